"""FlashAttention as torch ships it, piece by piece, against one softmax in float64. Needs a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from hf_ctxopt.kernels import prefill_backends
from hf_ctxopt.kernels.prefill import Piece, attend_pieces

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention runs on CUDA only")
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (17, 0), (40, 4), (300, 33), (5000, 4)])
@pytest.mark.parametrize(("history", "queries"), [(0, 2), (0, 700), (13, 7), (500, 1), (500, 257), (1000, 64)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(8, 2, 64, 64), (4, 4, 128, 128), (2, 1, 256, 256), (2, 2, 96, 64)]
)
def test_pieces_on_a_gpu(
    heads: int, kv_heads: int, dim: int, value_dim: int, history: int, queries: int, window: int | None, sinks: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    draw = torch.Generator("cuda").manual_seed(history + queries + dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.float32).to(dtype)

    total, sinks = history + queries, min(sinks, history + queries)
    query, turned = normal(heads, queries, dim), normal(heads, queries, dim)
    # As pages lie: one view per stretch in a larger pool, which holds what no query may see.
    pool = torch.full((2, kv_heads, 3 * total, dim), math.nan, device="cuda", dtype=dtype)
    keys, values = pool[0, :, total : 2 * total], pool[1, :, total : 2 * total, :value_dim]
    keys.copy_(normal(kv_heads, total, dim))
    values.copy_(normal(kv_heads, total, value_dim))
    edges = sorted({0, sinks, history, total, *range(0, total, 333)})
    pieces = []
    for start, stop in zip(edges, edges[1:], strict=False):
        mine, limit = (turned, None) if start < sinks else (query, window)
        pieces.append(Piece(mine, keys[:, start:stop], values[:, start:stop], start - history, limit))
    assert prefill_backends.choose(query, keys, values, None).name == "aten_flash"
    got = attend_pieces(pieces, dim**-0.5)
    wide, mass = (part.double().repeat_interleave(heads // kv_heads, 0) for part in (keys, values))
    scores = query.double() @ wide.transpose(1, 2) * dim**-0.5
    scores[..., :sinks] = (turned.double() @ wide.transpose(1, 2) * dim**-0.5)[..., :sinks]
    token = torch.arange(history, total, device="cuda")[:, None]
    key = torch.arange(total, device="cuda")[None]
    seen = (key <= token) & ((key > token - (window or total)) | (key < sinks))
    want = scores.masked_fill(~seen, -math.inf).softmax(-1) @ mass
    error = float((got.double() - want).norm() / want.norm())
    assert error < TOLERANCE[dtype]
    assert got.isfinite().all()
