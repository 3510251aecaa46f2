"""What all layers of one cache share: position eras, the model's route, and counters."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..pages.group import LayerGroup
from .positions import PositionLedger

ATTENTION = "ctxopt"  # name of the fused route in transformers' attention registries

logger = logging.getLogger(__name__)
_logged: set[str] = set()


def debugging() -> bool:
    """Whether `CTXOPT_DEBUG=1`: accounts are verified at every step, and a violation raises."""
    return os.environ.get("CTXOPT_DEBUG", "") == "1"


@dataclass
class CacheContext:
    """Shared by the layers of a cache.

    Args:
        config: the decoder's config, whose `_attn_implementation` names the route.
        ledger: position eras.
        groups: the cache's layer groups.
    """

    config: Any
    ledger: PositionLedger = field(default_factory=PositionLedger)
    groups: list[LayerGroup] = field(default_factory=list)
    steps: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def fused(self) -> bool:
        """Whether the model runs our attention function."""
        return getattr(self.config, "_attn_implementation", None) == ATTENTION

    def fall_back(self, reason: str) -> None:
        """Count a detour from the fused route, and log each reason once per process."""
        self.fallbacks[reason] += 1
        if reason not in _logged:
            _logged.add(reason)
            logger.warning("dense K/V built on the fused route: %s", reason)
