"""Scratch memory of decode attention on a CPU: one buffer for K and one for V per thread, kept from call to call.

Memory of this size comes fresh from the operating system at every allocation, and touching it for the first time
costs more than what is done with it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

SCRATCH = 1 << 22
"""Most floats of one buffer (16 MiB)."""

_kept = threading.local()


def scratch(name: str, device: torch.device, *shape: int) -> Tensor:
    """An uninitialised float32 tensor of that shape, at most `SCRATCH` large; good until the next call so named."""
    size = math.prod(shape)
    key = f"{name} {device}"
    buffer: Tensor | None = getattr(_kept, key, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            # Some room, so that a text that grows by a token at a time does not need a new one each time.
            buffer = torch.empty(min(SCRATCH, size + size // 4 + 4096), dtype=torch.float32, device=device)
        setattr(_kept, key, buffer)
    return buffer[:size].view(shape)
