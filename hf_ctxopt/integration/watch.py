"""A monitor inside `generate`: `stopping_criteria=[Watching(monitor)]` polls it between steps and never stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ..planner.monitor import Monitor


class Watching(StoppingCriteria):
    """Polls a monitor after steps.

    Args:
        monitor: the monitor.
        every: seconds between polls at least: asking a device for its memory takes a millisecond.
        clock: monotonic seconds.
    """

    def __init__(self, monitor: Monitor, every: float = 0.25, clock: Callable[[], float] = time.monotonic) -> None:
        self.monitor, self.every, self._clock = monitor, every, clock
        self._next = clock()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`(batch,)` of false."""
        now = self._clock()
        if now >= self._next:
            self._next = now + self.every
            self.monitor.poll()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
