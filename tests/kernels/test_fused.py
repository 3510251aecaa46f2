"""Norm and rotary embedding in one launch, through Triton's interpreter, against their references."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from hf_ctxopt.kernels import fused
from hf_ctxopt.kernels.fused import NormForm
from hf_ctxopt.kernels.fused_triton import rms_norm, rotary

CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("form", list(NormForm))
@pytest.mark.parametrize("shape", [(1, 1, 96), (2, 3, 5, 16), (1, 1280)])
def test_norm(form: NormForm, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(len(shape))
    x = (3 * torch.randn(shape, generator=draw)).to(dtype)
    weight = torch.randn(shape[-1], generator=draw).to(dtype)
    got, want = rms_norm(x, weight, 1e-5, form), fused.rms_norm(x, weight, 1e-5, form)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_norm_of_small_rows_and_of_a_view() -> None:
    x = 1e-4 * torch.randn(2, 64, 3).transpose(1, 2)
    want = fused.rms_norm(x, torch.ones(64), 1e-2, NormForm.ROUNDED)
    torch.testing.assert_close(rms_norm(x, torch.ones(64), 1e-2, NormForm.ROUNDED), want)
    assert float(want.abs().max()) < 0.1  # eps was felt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("seq", [1, 3])
def test_rotary(dtype: torch.dtype, tables: int, seq: int) -> None:
    draw = torch.Generator().manual_seed(seq)
    wide = torch.randn(2, seq, 6, 24, generator=draw).to(dtype)
    query, keys = wide[:, :, :4].transpose(1, 2), wide[:, :, 4:].transpose(1, 2)  # as models make them
    cos, sin = torch.randn(2, tables, seq, 24, generator=draw).to(dtype)
    got, want = rotary(query, keys, cos, sin), fused.rotary(query, keys, cos, sin)
    for mine, theirs in zip(got, want, strict=True):
        # The roundings are the reference's: equal to the bit on a GPU, but for a fused multiply-add in float32; the
        # interpreter cuts bfloat16 off at each of three roundings.
        torch.testing.assert_close(mine, theirs, rtol=0, atol={torch.float32: 1e-6, torch.float16: 0}.get(dtype, 0.1))
