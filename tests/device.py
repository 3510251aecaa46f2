"""A stand-in for a GPU on the CPU: kernels that read device state only, and graphs that replay a traced run.

A tape records the tensor operations of one forward pass with every host number fixed, as a CUDA graph does: whatever
the recorded run took from the host and not from a buffer is stale in the next replay, and shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ctxopt.caches import layer, planned
from hf_ctxopt.integration import decode_graph
from hf_ctxopt.integration.capture import Capture
from hf_ctxopt.kernels.append import QueryTurn
from hf_ctxopt.kernels.dispatch import DecodeKernels
from hf_ctxopt.kernels.paged import HEADER, PagedStates, unpack
from hf_ctxopt.kernels.rotate import RotaryFacts, turn


def append(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, raw_keys: Tensor, raw_values: Tensor,
    turned: QueryTurn | None = None, variants: int = 1, key_basis: Tensor | None = None,
    value_basis: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`append.append_reference` without a look at the slots: rows that write nothing rewrite what is there."""
    for states, pages, basis in ((keys, raw_keys, key_basis), (values, raw_values, value_basis)):
        new = states[:, :, 0] if basis is None else states[:, :, 0] @ basis
        flat = pages.flatten(1, 2)
        where = slots.clamp(min=0).long()
        kept = torch.where((slots >= 0)[None, :, None], new.transpose(0, 1), flat[:, where])
        for row in range(slots.shape[0]):  # later rows win, and a row that writes nothing must not win
            at = where[row : row + 1]
            flat.index_copy_(1, at, torch.where(slots[row] >= 0, kept[:, row : row + 1], flat[:, at]))
    out = query[:, None, :, 0].expand(-1, variants, -1, -1)
    if turned is not None:
        facts = RotaryFacts(lambda: turned.cos, turned.start, turned.interleaved)
        out = turn(out, turned.cos[:, :, None], turned.sin[:, :, None], facts)
    return out.contiguous() if key_basis is None else out @ key_basis


def decode(
    query: Tensor, pages: PagedStates, table: Tensor, rows: Tensor, scaling: float, softcap: float | None = None,
    sink_logits: Tensor | None = None, workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`paged.decode_reference` as tensor operations over the whole table, its unused columns masked."""
    batch, variants, heads, _ = query.shape
    kv_heads, _, size, value_dim = pages.raw_values.shape
    width = table.shape[1]
    keys, values = _read(pages, table)  # (batch, kv_heads, width, size, dim)
    keys = keys.flatten(2, 3).repeat_interleave(heads // kv_heads, dim=1)
    values = values.flatten(2, 3).repeat_interleave(heads // kv_heads, dim=1)
    entry = torch.arange(width)[None].expand(batch, -1)
    logical = torch.where(entry < rows[:, 3:4], entry, entry + rows[:, 4:5])
    token = (logical[:, :, None] * size + torch.arange(size)).flatten(1)
    live = (entry < rows[:, :1]).repeat_interleave(size, dim=1)
    scores = torch.full((batch, heads, width * size), -torch.inf)
    for variant in range(variants):
        start, stop = rows[:, HEADER + 2 * variant, None], rows[:, HEADER + 2 * variant + 1, None]
        part = torch.einsum("bhd,bhtd->bht", query[:, variant].float(), keys) * scaling
        part = part if softcap is None else softcap * torch.tanh(part / softcap)
        scores = torch.where((live & (token >= start) & (token < stop))[:, None], part, scores)
    extra = torch.full((batch, heads, 1), -1e30)
    if sink_logits is not None:
        extra = sink_logits.float()[None, :, None].expand(batch, -1, -1)
    weights = torch.cat([scores, extra], dim=2).softmax(-1)[..., :-1]
    return torch.einsum("bht,bhtd->bhd", weights, torch.nan_to_num(values)).to(query.dtype)


def _read(pages: PagedStates, table: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for raw in (pages.raw_keys, pages.raw_values):
        place = table.clamp(0, raw.shape[1] - 1).long()
        found.append(raw[:, place].float().transpose(0, 1))
    sealed = pages.sealed
    if sealed is None:
        return found[0], found[1]
    place = (-1 - table).clamp(0, sealed.k_codes.shape[1] - 1).long()
    k_scale, k_zero = sealed.k_scales[:, place].float().unbind(3)
    v_scale, v_zero = sealed.v_scales[:, place].float().unbind(3)
    keys = unpack(sealed.k_codes[:, place], pages.k_bits).float() * k_scale[:, :, :, None] + k_zero[:, :, :, None]
    values = unpack(sealed.v_codes[:, place], pages.v_bits).float() * v_scale[..., None] + v_zero[..., None]
    is_sealed = (table < 0)[:, None, :, None, None]
    return (
        torch.where(is_sealed, keys.transpose(0, 1), found[0]),
        torch.where(is_sealed, values.transpose(0, 1), found[1]),
    )


KERNELS = DecodeKernels(append, decode, lambda query, pages, entries: 0)


class _Tape(TorchDispatchMode):
    """Records every tensor operation; `replay()` repeats them on the tensors they were recorded with."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, held in self.operations:
            found = func(*args, **kwargs)
            pairs = zip(held, found, strict=True) if isinstance(held, (tuple, list)) else [(held, found)]
            for old, new in pairs:
                # Views and in-place results are the recorded memory already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def capture(
    body: Callable[[Tensor, Tensor], Any], ids: Tensor, positions: Tensor, key: tuple[Any, ...], warm: bool = False
) -> Capture:
    """`integration.capture.capture` by recording: what the run takes from the host stays what it was."""
    held = ids.clone(), positions.expand(ids.shape[0], 1).clone()
    tape = _Tape()
    with torch.no_grad(), tape:
        output = body(*held)
    return Capture(tape, *held, output, key)


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps on the CPU take the kernels' and the decode graph's way."""
    with monkeypatch.context() as patch:
        for module in (layer, planned):
            patch.setattr(module, "decode_kernels", lambda device: KERNELS)
        patch.setattr(planned, "refusal", lambda keys, bits: None)
        patch.setattr(decode_graph, "DEVICE_TYPE", "cpu")
        patch.setattr(decode_graph, "capture", capture)
        yield
