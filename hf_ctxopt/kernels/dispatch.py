"""Which kernels serve a device, decided in one place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .fused import NormForm
from .native import gguf as native_gguf
from .paged import PagedStates


@dataclass(frozen=True)
class DecodeKernels:
    """The kernels of a one-token step.

    Args:
        append: stores the new states and turns the queries; see `append.append_reference`.
        decode: attention over a page table; see `paged.decode_reference`.
        workspace_bytes: scratch memory that `decode` needs for these tensors and a table of so many columns.
    """

    append: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    workspace_bytes: Callable[[Tensor, PagedStates, int], int]


def decode_kernels(device: torch.device) -> DecodeKernels | None:
    """The kernels for one-token steps on `device`; `None` where plain torch reads the pages (see `why_not`)."""
    return None if why_not(device) is not None else _triton_kernels()


@dataclass(frozen=True)
class FusedKernels:
    """The small operations of a step in one launch each.

    Args:
        norm: see `fused.rms_norm`.
        rotary: see `fused.rotary`.
    """

    norm: Callable[[Tensor, Tensor, float, NormForm], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def fused_kernels(device: torch.device) -> FusedKernels | None:
    """The kernels for a captured step's norms and rotary embeddings on `device`; `None` where there are none."""
    return None if why_not(device) is not None else _triton_fused()


@cache
def _triton_fused() -> FusedKernels:
    from .fused_triton import rms_norm, rotary

    return FusedKernels(_on_its_device(rms_norm), _on_its_device(rotary))


Sealer = Callable[[PagedStates, Tensor, tuple[float, float]], None]


def seal_kernel(device: torch.device) -> Sealer | None:
    """What encodes full pages on `device`, see `seal_triton.seal`; `None` where the codec's torch functions do."""
    return None if why_not(device) is not None else _triton_seal


def _triton_seal(pages: PagedStates, pairs: Tensor, margins: tuple[float, float]) -> None:
    from .seal_triton import seal

    device = pages.raw_keys.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        seal(pages, pairs.to(device, non_blocking=True), margins)


def gather_kernel(device: torch.device) -> Callable[..., None] | None:
    """What decodes sealed pages into dense K and V on `device` (see `gather.py`); `None` where torch functions do."""
    return None if why_not(device) is not None else _triton_gather


def _triton_gather(pages: PagedStates, row: Tensor, first: int, count: int, keys: Tensor, values: Tensor) -> None:
    from .gather_triton import gather

    gather(pages, row, first, count, keys, values)


def why_not(device: torch.device) -> str | None:
    """Why there are no kernels for `device`; `None` if there are."""
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    if not _has_triton():
        return "triton is not installed"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _triton_kernels() -> DecodeKernels:
    from .append_triton import append
    from .paged_triton import decode, workspace_bytes

    def scratch(query: Tensor, pages: PagedStates, entries: int) -> int:
        return workspace_bytes(query, pages, entries, False)

    return DecodeKernels(_on_its_device(append), _on_its_device(decode), scratch)


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, launched on its first argument's device: Triton takes the current one, whatever the tensors say."""

    @wraps(kernel)
    def launch(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return kernel(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return kernel(first, *args, **kwargs)

    return launch


GGUF_ROWS = 16  # rows of activations that the kernels over GGUF blocks serve; more share a decoded weight


def gguf_kernel(device: torch.device) -> Callable[[Tensor, Tensor, str], Tensor] | None:
    """What multiplies up to `GGUF_ROWS` rows by a packed weight on `device`, see `gguf_triton.matmul`; or `None`."""
    if device.type == "cpu":
        return native_gguf.matmul if native_gguf.available() else None
    return None if why_not(device) is not None else _gguf_triton()


@cache
def _gguf_triton() -> Callable[[Tensor, Tensor, str], Tensor]:
    from .gguf_triton import matmul

    return _on_its_device(matmul)


def gguf_decoder(device: torch.device) -> Callable[[Tensor, str, torch.dtype], Tensor] | None:
    """What decodes a packed weight on `device` faster than torch, see `gguf_decode_triton.decode`; or `None`."""
    if device.type == "cpu":
        return _native_decode if native_gguf.available() else None
    return None if why_not(device) is not None else _triton_decode


def _native_decode(packed: Tensor, type: str, dtype: torch.dtype) -> Tensor:
    return native_gguf.decode(packed, type).to(dtype)


def _triton_decode(packed: Tensor, type: str, dtype: torch.dtype) -> Tensor:
    from .gguf_decode_triton import decode

    return decode(packed, type, dtype)
