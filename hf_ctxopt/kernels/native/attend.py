"""One-token attention by the compiled kernel: which steps it serves, and how they are handed over."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sealed import SealedSegment, SealedTokens
from .build import NotBuilt, library

if TYPE_CHECKING:
    from ..attention import Segment

FEWEST = 256
"""Sealed tokens from which the kernel is used: nobody should wait for a compiler over a short text."""

_FORMATS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 17}
_STRETCH = 16  # numbers of a `Stretch` of `attention.cpp`
_OPEN_PAGE = 128  # tokens of open pages lie side by side: any number serves as their page


@dataclass(frozen=True)
class AllPages:
    """All pages of a layer, where a step names the tokens that it reads by their places in them.

    Args:
        keys: K of open pages, `(kv_heads, pages, page_size, key_dim)`.
        values: their V.
        sealed: K and V of sealed pages.
    """

    keys: Tensor
    values: Tensor
    sealed: tuple[SealedTokens, SealedTokens]


Place = tuple[bool, int, int]
"""Neighbouring tokens: whether in sealed pages, the first one's slot among those or the open ones, how many."""


def why_not(query: Tensor, segments: Sequence[Segment | SealedSegment]) -> str | None:
    """Why a step that the kernel is meant for runs without it; `None` where it runs, or is not meant to.

    Args:
        query: `(heads, queries, key_dim)`.
        segments: what it is compared with.
    """
    if not _meant(query, segments):
        return None
    if not all(_fits(part) for part in segments):
        return "the CPU kernel takes heads of whole groups of four codes"
    try:
        library()
    except NotBuilt as reason:
        return str(reason)
    return None


def serves(query: Tensor, segments: Sequence[Segment | SealedSegment]) -> bool:
    """Whether the kernel runs this step; compiles it if need be."""
    return _meant(query, segments) and why_not(query, segments) is None


def serves_pages(query: Tensor, pages: AllPages, places: Sequence[Place]) -> bool:
    """`serves`, for tokens named by their places."""
    if not _one_row(query) or sum(tokens for sealed, _, tokens in places if sealed) < FEWEST:
        return False
    both = ((pages.keys, 16), (pages.values, 16), *((part.codes, part.bits) for part in pages.sealed))
    if not all(_served(*part) for part in both):
        return False
    try:
        library()
    except NotBuilt:
        return False  # the general way says so
    return True


def _meant(query: Tensor, segments: Sequence[Segment | SealedSegment]) -> bool:
    return _one_row(query) and (sum(part.tokens for part in segments if isinstance(part, SealedSegment)) >= FEWEST)


def _one_row(query: Tensor) -> bool:
    if query.shape[1] != 1 or query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return query.dtype in _FORMATS and not (torch.is_grad_enabled() and query.requires_grad)


def _fits(part: Segment | SealedSegment) -> bool:
    if isinstance(part, SealedSegment):
        both = ((part.keys.codes, part.keys.bits), (part.values.codes, part.values.bits))
    else:
        both = ((part.keys, 16), (part.values, 16))
    return all(_served(*part) for part in both)


def _served(states: Tensor, bits: int) -> bool:
    return states.shape[-1] % 4 == 0 and (bits < 16 or states.dtype in _FORMATS)


def attend(
    query: Tensor,
    segments: Sequence[Segment | SealedSegment],
    seen: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """See `kernels.attention.attend`, for one query; `seen` is bool `(1, tokens)` or `None`."""
    kv_heads, value_dim = segments[0].kv_heads, segments[0].value_dim
    # Tensors the pointers lead to; the list keeps them alive through the call.
    held = [query.to(torch.float32).contiguous()]
    numbers: list[int] = []
    for part in segments:
        asked = held[0]
        if part.query is not None:
            asked = part.query.to(torch.float32).contiguous()
            held.append(asked)
        if isinstance(part, SealedSegment):
            numbers += [*_sealed(part.keys), *_sealed(part.values)]
            numbers += [asked.data_ptr(), part.skip, part.tokens, part.keys.codes.shape[2]]
        else:
            for states in (part.keys, part.values):
                rows = states if states.stride(2) == 1 else states.contiguous()
                held.append(rows)
                numbers += _open(rows)
            numbers += [asked.data_ptr(), 0, part.tokens, _OPEN_PAGE]
    return _run(query, numbers, kv_heads, value_dim, seen, scaling, softcap, sink_logits)


def attend_pages(
    query: Tensor,
    pages: AllPages,
    places: Sequence[Place],
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """See `kernels.attention.attend`, for one query that sees all tokens of the places: no view of any is made."""
    asked = query.to(torch.float32).contiguous()
    opened = tuple(_open(states.flatten(1, 2)) for states in (pages.keys, pages.values))
    closed = tuple(_sealed(part) for part in pages.sealed)
    size = pages.sealed[0].codes.shape[2]
    steps = [(part.codes.stride(1) * part.codes.element_size(), 2 * part.scales.stride(1)) for part in pages.sealed]
    numbers: list[int] = []
    for sealed, slot, tokens in places:
        if sealed:
            page, skip = divmod(slot, size)
            for (codes, scales, *rest), (step, scale_step) in zip(closed, steps, strict=True):
                numbers += (codes + page * step, scales + page * scale_step, *rest)
            numbers += (asked.data_ptr(), skip, tokens, size)
        else:
            for states, _, head, row, *rest in opened:
                numbers += (states + slot * row, 0, head, row, *rest)
            numbers += (asked.data_ptr(), 0, tokens, _OPEN_PAGE)
    heads, value_dim = pages.keys.shape[0], pages.values.shape[-1]
    return _run(query, numbers, heads, value_dim, None, scaling, softcap, sink_logits)


def _run(
    query: Tensor,
    numbers: list[int],
    kv_heads: int,
    value_dim: int,
    seen: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """The kernel over stretches of `_STRETCH` numbers each; what they point to is held by the caller."""
    heads, _, key_dim = query.shape
    packed = array.array("q", numbers)
    visible = None if seen is None else seen.reshape(-1).contiguous()
    sinks = None if sink_logits is None else sink_logits.detach().to(torch.float32).contiguous()
    out = torch.empty(heads, 1, value_dim, dtype=torch.float32)
    library().ctxopt_attend(
        packed.buffer_info()[0], len(numbers) // _STRETCH, kv_heads, heads // kv_heads, key_dim, value_dim, scaling,
        softcap or 0.0, _pointer(visible), _pointer(sinks), torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out.to(query.dtype)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _sealed(part: SealedTokens) -> tuple[int, ...]:
    """A `Part` of `attention.cpp`: codes, scales, bytes from head to head and from token to token, and so on."""
    codes, item = part.codes, part.codes.element_size()
    form = part.bits if part.bits < 16 else _FORMATS[codes.dtype]
    steps = codes.stride()
    return codes.data_ptr(), part.scales.data_ptr(), steps[0] * item, steps[2] * item, part.scales.stride(0), form


def _open(states: Tensor) -> tuple[int, ...]:
    item, steps = states.element_size(), states.stride()
    return states.data_ptr(), 0, steps[0] * item, steps[1] * item, 0, _FORMATS[states.dtype]
