"""A monitor inside `generate`: between decode steps as a stopping criterion, or before every forward pass.

`stopping_criteria=[Watching(monitor)]` polls between steps and never stops. `with watched(model, monitor):` also polls
between the chunks of a prompt, and in loops of one's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from ..planner.monitor import Monitor

EVERY = 0.25


class Watching(StoppingCriteria):
    """Polls a monitor after steps.

    Args:
        monitor: the monitor.
        every: seconds between polls at least: asking a device for its memory takes a millisecond.
        clock: monotonic seconds.
    """

    def __init__(self, monitor: Monitor, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self.monitor, self.every, self._clock = monitor, every, clock
        self._next = clock()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`(batch,)` of false."""
        self.look()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def look(self) -> None:
        """Poll, if it is time."""
        now = self._clock()
        if now >= self._next:
            self._next = now + self.every
            self.monitor.poll()


@contextmanager
def watched(
    model: nn.Module, monitor: Monitor, every: float = EVERY, clock: Callable[[], float] = time.monotonic
) -> Iterator[Watching]:
    """The monitor is polled before forward passes of the model: nothing is under way then.

    Args:
        model: the model whose caches the monitor's actions change.
        monitor: the monitor.
        every: seconds between polls at least; 0 for one at each pass.
        clock: monotonic seconds.
    """
    watching = Watching(monitor, every, clock)

    def polls(module: nn.Module, args: Any) -> None:
        watching.look()

    polls.outside_graphs = True  # type: ignore[attr-defined]  # see `graph_rules.harmless`
    handle = model.register_forward_pre_hook(polls)
    try:
        yield watching
    finally:
        handle.remove()
