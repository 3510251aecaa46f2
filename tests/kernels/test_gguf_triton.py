"""Kernels over GGUF blocks against decoded weights, in Triton's CPU interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from hf_ctxopt.kernels import gguf_decode_triton
from hf_ctxopt.kernels.gguf_triton import Launch, matmul
from hf_ctxopt.weights.blocks import BLOCKS
from hf_ctxopt.weights.codecs import decode, encode


def problem(type: str, rows: int, outputs: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(rows + columns)
    packed = encode(torch.randn(outputs, columns, generator=draw) + 0.1, type)
    x = torch.randn(rows, columns, generator=draw).to(dtype)
    return x, packed, x.float() @ decode(packed, type).T


@pytest.mark.parametrize("type", list(BLOCKS))
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (1, torch.float16), (5, torch.float16)])
def test_few_rows_equal_decoded_weight(type: str, rows: int, dtype: torch.dtype) -> None:
    x, packed, want = problem(type, rows, 6, 768, dtype)
    got = matmul(x, packed, type)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "Q8_0", "Q5_0"])
def test_one_row_in_bfloat16(type: str) -> None:
    x, packed, want = problem(type, 1, 4, 512, torch.bfloat16)
    torch.testing.assert_close(matmul(x, packed, type).float(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("type", ["Q4_K", "Q5_K", "Q6_K", "Q5_1"])
def test_row_longer_than_a_step(type: str) -> None:
    x, packed, want = problem(type, 2, 3, 1280, torch.float32)
    got = matmul(x, packed, type, Launch(tile=2, chunks=16, warps=1))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("type", list(BLOCKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoded_weight_is_the_codecs(type: str, dtype: torch.dtype) -> None:
    """Rows of more blocks than a program decodes, the last program not full."""
    _, packed, _ = problem(type, 1, 3, 4096 + 256, dtype)
    assert torch.equal(gguf_decode_triton.decode(packed, type, dtype), decode(packed, type, dtype))


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K"])
def test_zeros_large_and_missing_numbers(type: str) -> None:
    """A fixed-point chunk of zeros gives zero, one outlier does not drown in rounding, NaN and infinity stay seen."""
    _, packed, _ = problem(type, 1, 3, 512, torch.float32)
    weight = decode(packed, type)
    x = torch.zeros(4, 512)
    x[1, 3], x[1, 4] = 1e4, 1.0
    x[2, 300], x[3, 7] = float("nan"), float("inf")
    got = torch.cat([matmul(row, packed, type) for row in x.split(1)])
    assert torch.equal(got[0], torch.zeros(3))
    torch.testing.assert_close(got[1], weight @ x[1], rtol=1e-4, atol=0.5)
    assert not got[2:].isfinite().any()
