"""The memory that a plan is for, from whichever of `vram`, `gpu` and `device` is given."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .facts import ModelFacts
from .fit import Card
from .footprint import reserve_of
from .hardware import Device, best_device, bytes_of, device_of, from_profile, of_memory
from .profiles import profile

LEAST = 1 << 20
"""Fewest bytes of memory that are planned for: `vram=8` is a slip for `"8GiB"`."""


def card_for(
    facts: ModelFacts, model: Any, vram: int | str | None, gpu: str | None, device: Any, reserve: int | str | None
) -> Card:
    """The memory to plan for; arguments as of `plan`. Raises `ConfigError`: two of them exclude each other."""
    given = [name for name, value in (("vram", vram), ("gpu", gpu), ("device", device)) if value is not None]
    if len(given) > 1 and given != ["vram", "gpu"]:
        raise ConfigError(given[-1], {"vram": vram, "gpu": gpu, "device": device}[given[-1]], f"unset with {given[0]}")
    found = _device(facts, model, vram, gpu, device)
    total = found.total if vram is None else bytes_of("vram", vram, LEAST)
    own = facts.loaded is not None and found.here
    # What this process holds besides the model is there for others, as far as the plan goes.
    others = found.others if not own else max(0, found.others + found.own - sum(facts.loaded or (0,)))
    return Card(
        name=found.device, vram=total, others=others,
        context=found.context, reserve=reserve_of(total) if reserve is None else bytes_of("reserve", reserve, 0),
        bandwidth=found.bandwidth, accelerator=found.accelerator,
        like=None if found.here or found.device == found.name else found.name,
    )  # fmt: skip


def _device(facts: ModelFacts, model: Any, vram: int | str | None, gpu: str | None, device: Any) -> Device:
    if gpu is not None:
        return from_profile(profile(gpu))
    if vram is not None:
        return of_memory(bytes_of("vram", vram, LEAST))
    if device is not None:
        return device_of(device)
    if facts.loaded is not None:
        place = next((p.device for p in model.parameters() if p.device.type != "cpu"), "cpu")
        return device_of(place)
    return best_device()
