"""How full memory is: of a device, of a prefix store, of caches; 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError
from .hardware import device_of
from .monitor import Meter


def device_meter(place: Any = "cpu", total: int | None = None) -> Meter:
    """Share of a device's memory that nobody could allocate: what the allocator keeps without using it is free.

    Args:
        place: a `torch.device` or its name.
        total: bytes that count as all of it; by default what a process may use.
    """
    device_of(place)

    def measure() -> float:
        device = device_of(place)
        whole = device.total if total is None else total
        return min(1.0, max(0.0, (device.total - device.free) / max(1, whole)))

    return measure


def store_meter(store: Any) -> Meter:
    """Share of a prefix store's byte budget that its pages in use take; 0 without one.

    Args:
        store: a `PrefixStore`.
    """
    return lambda: store.stats()["bytes_used"] / store.budget.nbytes if getattr(store.budget, "nbytes", None) else 0.0


def bytes_meter(measure: Callable[[], int], budget: int) -> Meter:
    """Share of a budget that `measure()` bytes are, e.g. `bytes_meter(lambda: cache.nbytes, 2 << 30)`.

    Raises:
        ConfigError: the budget is not positive.
    """
    if budget < 1:
        raise ConfigError("budget", budget, "bytes >= 1")
    return lambda: measure() / budget


def fullest(meters: Sequence[Meter]) -> Meter:
    """The fullest of several."""
    return lambda: max((meter() for meter in meters), default=0.0)
