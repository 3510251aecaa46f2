"""Random problems for the paged kernels: pages in random order, ragged rows, poison wherever nothing may be read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ctxopt.kernels.paged import PagedStates, SealedPages
from hf_ctxopt.pages.codec import Codec


@dataclass(frozen=True)
class Problem:
    """One decode step.

    Args:
        heads: query heads.
        kv_heads: heads of K and V.
        dims: head sizes of K and V.
        size: tokens of a page.
        bits: of K and V in sealed pages; `None` seals nothing.
        lengths: tokens of each row.
        sinks: tokens of a first page that a second query variant meets; 0 for one variant.
        jump: logical pages left out after the sink page.
        window: whether each row sees its last two thirds only.
        softcap: of the scores.
        s_aux: whether each head has a logit that carries no value.
        dtype: of open pages.
        seed: of everything random.
    """

    heads: int = 8
    kv_heads: int = 2
    dims: tuple[int, int] = (128, 128)
    size: int = 32
    bits: tuple[int, int] | None = None
    lengths: tuple[int, ...] = (1500, 5, 777)
    sinks: int = 0
    jump: int = 0
    window: bool = False
    softcap: float | None = None
    s_aux: bool = False
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def describe(self) -> dict[str, object]:
        """What differs from the defaults, for the record."""
        found = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                found[entry.name] = str(value) if isinstance(value, torch.dtype) else value
        return found


def make(case: Problem) -> tuple[Tensor, PagedStates, Tensor, Tensor, Tensor | None]:
    """Query, pages, table, row state and extra logits of a problem, on the GPU.

    Slots of open pages that hold no token, and pages of no row, are NaN; codes of unused sealed pages are random.
    """
    draw = torch.Generator("cuda").manual_seed(case.seed)
    batch, variants, size = len(case.lengths), 2 if case.sinks else 1, case.size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=draw)

    entries = [-(-length // size) for length in case.lengths]
    pages, width = sum(entries) + 3, max(entries) + 2
    query = normal(batch, variants, case.heads, case.dims[0]).to(case.dtype)
    keys = normal(case.kv_heads, pages, size, case.dims[0]).to(case.dtype)
    values = (normal(case.kv_heads, pages, size, case.dims[1]) + 0.5).to(case.dtype)
    sealed = None if case.bits is None else seal_all(keys, values, case.bits)
    order = torch.randperm(pages, generator=draw, device="cuda").tolist()
    rows = torch.zeros(batch, 8 + 2 * variants, dtype=torch.int32)
    table = torch.full((batch, width), 2**30, dtype=torch.int32)  # columns past the row's are never used
    used = torch.zeros(pages, size, dtype=torch.bool)
    for row, length in enumerate(case.lengths):
        count = entries[row]
        codes = (min(1, count - 1), count - 1) if case.bits else (0, 0)
        end = length + case.jump * size
        ranges = [length // 3 if case.window else 0, end]
        if case.sinks:
            ranges = [0, case.sinks, (1 + case.jump) * size + 3, end]
        state = [count, *codes, int(bool(case.sinks)), case.jump if case.sinks else 0, 0, 0, 0, *ranges]
        rows[row] = torch.tensor(state)
        for entry in range(count):
            page = order.pop()
            table[row, entry] = -1 - page if codes[0] <= entry < codes[1] else page
            used[page, : max(0, length - entry * size)] = True
    keys[:, ~used.cuda()], values[:, ~used.cuda()] = torch.nan, torch.nan
    logits = normal(case.heads) if case.s_aux else None
    return query, PagedStates(keys, values, sealed), table.cuda(), rows.cuda(), logits


def seal_all(keys: Tensor, values: Tensor, bits: tuple[int, int]) -> SealedPages:
    """Sealed pages of all open ones, under the same numbers."""
    return SealedPages(*Codec(bits[0], True).encode(keys), *Codec(bits[1], False).encode(values))


def decode_shape(
    context: int, batch: int, bits: int, seed: int, heads: int = 32, kv_heads: int = 8, dim: int = 128, size: int = 32
) -> tuple[Tensor, PagedStates, Tensor, Tensor]:
    """A step of the 8B shape with a full context; sealed but for the first and the last page, codes random."""
    draw = torch.Generator("cuda").manual_seed(seed)
    count, device = context // size, {"device": "cuda", "generator": draw}
    encoded = batch * (count - 2) if bits else 0
    raw = batch * count - encoded
    keys, values = (torch.randn(kv_heads, raw, size, dim, dtype=torch.bfloat16, **device) for _ in range(2))
    table = torch.empty(batch, count, dtype=torch.int32, device="cuda")
    rows = torch.zeros(batch, 10, dtype=torch.int32)
    rows[:, 0], rows[:, 9] = count, context
    order = torch.randperm(raw, **device).int()
    sealed = None
    if bits:
        rows[:, 1], rows[:, 2] = 1, count - 1
        table[:, 1:-1] = -1 - torch.randperm(encoded, **device).int().view(batch, count - 2)
        table[:, 0], table[:, -1] = order[:batch], order[batch:]

        def scales(channels: int) -> Tensor:
            zero = torch.rand(kv_heads, encoded, channels, **device) * 0.5 - 3
            return torch.stack([-2 * zero / (2**bits - 1), zero], dim=2).half()

        shape = (kv_heads, encoded, size, dim * bits // 8)
        codes = [torch.randint(0, 256, shape, dtype=torch.uint8, **device) for _ in range(2)]
        sealed = SealedPages(codes[0], scales(dim), codes[1], scales(size))
    else:
        table[:] = order.view(batch, count)
    query = torch.randn(batch, 1, heads, dim, dtype=torch.bfloat16, **device)
    return query, PagedStates(keys, values, sealed), table, rows.cuda()
