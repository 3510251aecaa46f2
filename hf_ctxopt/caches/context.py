"""What all layers of one cache share: position eras, the model's route, and counters."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..pages.group import LayerGroup
from .positions import PositionLedger

if TYPE_CHECKING:
    from .decode import DecodeState

ATTENTION = "ctxopt"  # name of the fused route in transformers' attention registries

logger = logging.getLogger(__name__)
_logged: set[str] = set()


def debugging() -> bool:
    """Whether `CTXOPT_DEBUG=1`: accounts are verified at every step, and a violation raises."""
    return os.environ.get("CTXOPT_DEBUG", "") == "1"


class NotReplayable(Exception):
    """A one-token step cannot be run on device state alone; the message says why. Never reaches the user."""


@dataclass
class CacheContext:
    """Shared by the layers of a cache.

    Args:
        config: the decoder's config, whose `_attn_implementation` names the route.
        ledger: position eras.
        groups: the cache's layer groups.
        steps: steps begun by each route.
        fallbacks: detours from the fused route, by reason.
        graph: captures and replays of decode graphs, and steps that ran without one, by reason.
        relief: what was done about a lack of memory, by what it was.
        not_reused: prompts that were computed although a store could have had them, by reason.
        unchunked: prompts that were read at once whatever chunk was asked for, by reason.
        decoders: device state of one-token steps, by group and device.
        captured: the decode graph of this cache, if there is one (see `integration/decode_graph.py`).
        warmed: the key of the step whose kernels have run once and may be captured.
        barred: why this cache's steps are not captured.
        planned: the model runs a step that was planned before (see `planned.py`).
        trusted: its masks are not asked.
    """

    config: Any
    ledger: PositionLedger = field(default_factory=PositionLedger)
    groups: list[LayerGroup] = field(default_factory=list)
    steps: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    graph: Counter[str] = field(default_factory=Counter)
    relief: Counter[str] = field(default_factory=Counter)
    not_reused: Counter[str] = field(default_factory=Counter)
    unchunked: Counter[str] = field(default_factory=Counter)
    decoders: dict[tuple[LayerGroup, torch.device], DecodeState] = field(default_factory=dict)
    captured: Any = None
    warmed: Any = None
    barred: str | None = None
    planned: bool = False
    trusted: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheContext:
        """A copy for a copied cache of the same model: the config is the model's own, a graph is not copied."""
        memo.setdefault(id(self.config), self.config)
        twin = CacheContext(memo[id(self.config)])
        memo[id(self)] = twin
        for name in (
            "ledger",
            "groups",
            "steps",
            "fallbacks",
            "graph",
            "relief",
            "not_reused",
            "unchunked",
            "decoders",
        ):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        return twin

    @property
    def between_steps(self) -> bool:
        """Whether every layer has done its part of the last forward pass, and none has begun another."""
        even = len({group.seen for group in self.groups}) <= 1
        return even and not any(group.plan is not None or group.request is not None for group in self.groups)

    def forget_graph(self) -> None:
        """The next one-token steps capture anew: the model may have changed, or the pages are gone."""
        self.captured = self.warmed = self.barred = None

    @property
    def fused(self) -> bool:
        """Whether the model runs our attention function."""
        return getattr(self.config, "_attn_implementation", None) == ATTENTION

    def pass_over(self, reason: str) -> None:
        """Count a one-token step that plain torch reads although the device has kernels; log each reason once."""
        self._note(self.fallbacks, reason, "pages are read without kernels: %s")

    def stay_eager(self, reason: str) -> None:
        """Count a one-token step that no decode graph replays, and log each reason once per process."""
        self._note(self.graph, f"eager: {reason}", "no decode graph: %s")

    def relieve(self, what: str) -> None:
        """Count what was done about a lack of memory, and log each kind once per process."""
        self._note(self.relief, what, "memory ran short: %s")

    def compute_all(self, reason: str) -> None:
        """Count a prompt that no store was asked about, and log each reason once per process."""
        self._note(self.not_reused, reason, "prompt computed without a look into the prefix store: %s")

    def read_at_once(self, reason: str) -> None:
        """Count a prompt that is not read in chunks, and log each reason once per process."""
        self._note(self.unchunked, reason, "prompt read at once, and not in halves where memory runs out: %s")

    def fall_back(self, reason: str) -> None:
        """Count a detour from the fused route, and log each reason once per process."""
        self._note(self.fallbacks, reason, "dense K/V built on the fused route: %s")

    def _note(self, counter: Counter[str], reason: str, message: str) -> None:
        counter[reason] += 1
        if reason not in _logged:
            _logged.add(reason)
            logger.warning(message, reason.removeprefix("eager: "))
