"""The devices of this machine: memory in all and free, who else uses it, and how fast it is read.

Only what torch and the kernel tell is reported. Asking a CUDA device for its free memory creates this process's
context on it, which then counts as in use; `others` leaves it out.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..pages.budget import parse_bytes
from .memory import host_memory
from .profiles import CONSUMER_CONTEXT, MOST, Profile, of_size, recognized

HOST_BANDWIDTH = 30e9
"""Bytes per second assumed of a CPU's memory where it is not measured: two channels of DDR4 reach about this."""
_COPY = 256 << 20  # bytes of a bandwidth probe on an accelerator
_HOST_COPY = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, as it is now or as its profile says.

    Args:
        device: torch's name, e.g. `"cuda:0"`; the profile's name for a card that is not here.
        name: what the driver calls it.
        total: bytes of memory that a process may use at most: a cgroup's limit for a CPU.
        free: bytes nothing uses now.
        own: bytes that this process's allocator holds already.
        capability: compute capability; `""` where there is none.
        bandwidth: bytes per second: measured, or of the card's profile; `None` if unknown.
        context: bytes that a process takes outside of its allocator.
        here: whether it is a device of this machine.
    """

    device: str
    name: str
    total: int
    free: int
    own: int = 0
    capability: str = ""
    bandwidth: float | None = None
    context: int = 0
    here: bool = True

    @property
    def others(self) -> int:
        """Bytes that others use: what is neither free nor this process's."""
        return max(0, self.total - self.free - self.own - (self.context if self.here else 0))

    @property
    def accelerator(self) -> bool:
        """Whether it is anything but the CPU."""
        return not self.device.startswith("cpu")


def devices(measure: bool = False) -> list[Device]:
    """Every device that torch can use here, accelerators first, the CPU last.

    Args:
        measure: time a copy on each of them, for `bandwidth`.
    """
    import torch

    found = [_cuda(index) for index in range(torch.cuda.device_count())]
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        found += [_xpu(xpu, index) for index in range(xpu.device_count())]
    if torch.backends.mps.is_available():
        found.append(_mps())
    found.append(_cpu())
    return [_measured(device) for device in found] if measure else found


def device_of(place: Any) -> Device:
    """The device called `place`.

    Args:
        place: a `torch.device` or its name; `"cuda"` is the current CUDA device.

    Raises:
        ConfigError: there is no such device here.
    """
    name = str(place)
    for device in devices():
        if device.device == name or device.device.partition(":")[0] == name:
            return device
    raise ConfigError("device", name, "one of " + ", ".join(device.device for device in devices()))


def best_device() -> Device:
    """The accelerator with the most free memory, or the CPU."""
    found = devices()
    accelerators = [device for device in found if device.accelerator]
    return max(accelerators, key=lambda device: device.free, default=found[-1])


def from_profile(card: Profile) -> Device:
    """A card one does not own, with nothing else running on it."""
    return Device(
        device=card.name, name=card.name, total=card.vram, free=card.vram, capability=card.capability,
        bandwidth=card.bandwidth, context=card.context, here=False,
    )  # fmt: skip


def of_memory(vram: int) -> Device:
    """A card of which only the memory is known: the bandwidth is that of the slowest card of about this size."""
    like = of_size(vram)
    return Device(
        device=f"a card of {vram / 2**30:.3g} GiB", name=like.name, total=vram, free=vram,
        bandwidth=like.bandwidth, context=CONSUMER_CONTEXT, here=False,
    )  # fmt: skip


def bytes_of(field: str, value: int | str, least: int = 1) -> int:
    """Bytes of `8 << 30`, `"8GiB"`, `"8 GB"` or `"8589934592"`.

    Args:
        field: what they are for, which the message names.
        value: a number or text.
        least: the fewest that are allowed.

    Raises:
        ConfigError: it is neither such a number nor such a text.
    """
    given = value
    if isinstance(value, str):
        text = value.strip()
        if text.isascii() and text.isdecimal() and len(text) < 32:
            value = int(text)
        elif re.fullmatch(r"0+(\.0+)?\s*([KMG]i?)?B", text, re.IGNORECASE):
            value = 0
        else:
            try:
                value = parse_bytes(text)
            except ConfigError:
                value = -1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        kind = "a positive number" if least == 1 else f"a number >= {least:,}"
        raise ConfigError(field, given, f'bytes as {kind} up to 2**60, or as text such as "8GiB"')
    return value


def copy_bandwidth(place: Any, seconds: float = 0.2) -> float:
    """Bytes per second that a copy on the device reads and writes together, the best of several.

    Args:
        place: a `torch.device` or its name.
        seconds: how long to try.
    """
    import torch

    device = torch.device(place)
    source = torch.zeros(_HOST_COPY if device.type == "cpu" else _COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best, stop = 0.0, time.perf_counter() + seconds
    target.copy_(source)  # the first copy also maps the memory
    while True:
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * source.numel() / (time.perf_counter() - start))
        if time.perf_counter() > stop:
            return best


def _wait(device: Any) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _measured(device: Device) -> Device:
    return replace(device, bandwidth=copy_bandwidth(device.device))


def _cuda(index: int) -> Device:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    card = recognized(name)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # since torch 2.9
    own = int(torch.cuda.memory_reserved(index))
    context = CONSUMER_CONTEXT if card is None else card.context
    if share is not None and (fraction := float(share(index))) < 1:  # a limit that the process set itself
        limit = min(total, int(total * fraction) + context)
        free, total = max(0, min(free, limit - own - context)), limit
    # Allocated, not reserved: what the allocator keeps without using it is there for the taking.
    used = int(torch.cuda.memory_allocated(index))
    return Device(
        device=f"cuda:{index}", name=name, total=total, free=free + own - used, own=used,
        capability=f"{major}.{minor}", bandwidth=None if card is None else card.bandwidth, context=context,
    )  # fmt: skip


def _xpu(xpu: Any, index: int) -> Device:
    facts = xpu.get_device_properties(index)
    total = int(facts.total_memory)
    own = int(xpu.memory_allocated(index))
    asked = getattr(xpu, "mem_get_info", None)
    free = int(asked(index)[0]) if asked is not None else total - own
    return Device(device=f"xpu:{index}", name=str(facts.name), total=total, free=free, own=own)


def _mps() -> Device:
    import torch

    own = int(torch.mps.driver_allocated_memory())
    total = int(torch.mps.recommended_max_memory())
    return Device(device="mps", name="Apple GPU", total=total, free=max(0, total - own), own=own)


def _cpu() -> Device:
    import torch

    total, free = host_memory()
    name = torch.backends.cpu.get_cpu_capability()
    return Device(device="cpu", name=f"CPU ({name})", total=total, free=free, bandwidth=HOST_BANDWIDTH)
