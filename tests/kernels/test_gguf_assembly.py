"""The kernels' inline assembly against decoded weights: its instructions as the PTX manual defines them, in numpy.

Triton's CPU interpreter has none, so the other tests take the branch without; which bytes and halves the instructions
pick is settled here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.runtime.interpreter as interpreter

from hf_ctxopt.kernels import gguf_triton
from hf_ctxopt.kernels.gguf_triton import Launch, matmul
from hf_ctxopt.weights.blocks import BLOCKS
from hf_ctxopt.weights.codecs import decode, encode


def bytes_of(words: np.ndarray, signed: bool) -> np.ndarray:
    """(..., 4) bytes, the lowest first."""
    kind = np.int8 if signed else np.uint8
    return np.ascontiguousarray(words.astype(np.int32)).view(kind).reshape(*words.shape, 4)


def dp2a(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + two signed halves of a times two bytes of b (PTX ISA, `dp2a`)."""
    _, half, first, second = name.split(".")
    assert first == "s32"
    halves = np.ascontiguousarray(a.astype(np.int32)).view(np.int16).reshape(*a.shape, 2).astype(np.int64)
    start = 2 if half == "hi" else 0
    picked = bytes_of(b, second == "s32")[..., start : start + 2].astype(np.int64)
    total = c.astype(np.int64) + (halves * picked).sum(-1)
    assert (abs(total) < 2**31).all()
    return total.astype(np.int32)


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes out of the eight of b and a, one for each nibble of the selector (PTX ISA, `prmt`)."""
    eight = np.concatenate([bytes_of(a, False), bytes_of(b, False)], -1)
    place = np.stack([(selector >> (4 * i)) & 7 for i in range(4)], -1)
    return np.take_along_axis(eight, place, -1).view(np.int32)[..., 0]


def run(builder: Any, text: str, constraints: str, values: list[Any], types: list[Any], *_: Any) -> SimpleNamespace:
    """Stands in for `create_inline_asm`."""
    name, *operands = text.replace(",", "").rstrip(";").split()
    data = [value.data for value in values]
    given = [
        data[int(at[1:]) - 1] if at.startswith("$") else np.full_like(data[0], int(at, 16)) for at in operands[1:]
    ]
    if name.startswith("dp2a"):
        done = dp2a(name, *given)
    elif name == "prmt.b32":
        done = prmt(*(part.view(np.int32) for part in given))
    else:
        assert name == "rcp.approx.ftz.f32"
        with np.errstate(divide="ignore"):
            done = np.float32(1) / given[0]
    scalar = getattr(types[0], "scalar", types[0])
    return SimpleNamespace(get_result=lambda index: interpreter.TensorHandle(done, scalar))


@pytest.mark.parametrize("type", list(BLOCKS))
@pytest.mark.parametrize("columns", [256, 768 + 256])
def test_assembly_equals_decoded_weight(type: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_triton, "ASM", True)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", run)
    draw = torch.Generator().manual_seed(columns)
    packed = encode(torch.randn(3, columns, generator=draw) + 0.1, type)
    x = torch.randn(2, columns, generator=draw)
    got = matmul(x, packed, type, Launch(tile=2, chunks=16, warps=1))
    torch.testing.assert_close(got, x @ decode(packed, type).T, rtol=1e-3, atol=2e-3)
