"""The compiled products with packed weights equal decoded ones, and their absence is said once."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from hf_ctxopt.kernels.dispatch import gguf_decoder, gguf_kernel
from hf_ctxopt.kernels.native import build, gguf
from hf_ctxopt.weights import matmul
from hf_ctxopt.weights.blocks import BLOCKS
from hf_ctxopt.weights.codecs import decode, encode

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(autouse=True)
def _own_build(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CTXOPT_CACHE_DIR", str(cache_dir))
    monkeypatch.delenv("CTXOPT_NATIVE", raising=False)
    build.forget()
    yield
    build.forget()


def test_formats_are_those_of_the_codecs() -> None:
    assert gguf._FORMATS == {row.name: (row.ggml, row.block, row.nbytes) for row in BLOCKS.values()}


@needs_compiler
@pytest.mark.parametrize("type", BLOCKS)
def test_real_and_random_blocks(type: str) -> None:
    """Weights as an encoder leaves them, and every byte at random with scales of all sizes."""
    encoded = encode(torch.randn(37, 512) + 0.1, type)
    random = torch.randint(0, 256, encoded.shape, dtype=torch.uint8)
    row = BLOCKS[type]
    halves = random.view(-1, row.nbytes)
    places = [208] if type == "Q6_K" else [0] if type in ("Q4_0", "Q5_0", "Q8_0") else [0, 2]
    for place in places:  # finite, some of them subnormal
        scales = torch.randn(len(halves)) * 10.0 ** torch.randint(-6, 2, (len(halves),))
        halves[:, place : place + 2] = scales.half().view(-1, 1).view(torch.uint8)
    for packed in (encoded, random):
        want = decode(packed, type)
        torch.testing.assert_close(gguf.decode(packed, type), want, rtol=1e-5, atol=1e-5)
        for rows in (1, 2, 3, 4, 7):
            x = torch.randn(rows, 512)
            size = x.abs() @ want.abs().T  # what rounding is measured by: terms may cancel
            error = (gguf.matmul(x, packed, type) - x.double() @ want.double().T).abs()
            assert bool((error <= 1e-5 * size + 1e-6).all()), (rows, float((error / size).max()))


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("processor", ["haswell", "x86-64-v2"])
def test_other_processors(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512, and without AVX2: other instructions, the same products."""
    if processor == "haswell" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("needs AVX2")
    monkeypatch.setattr(build, "FLAGS", tuple(flag.replace("native", processor) for flag in build.FLAGS))
    for type in BLOCKS:
        packed, x = encode(torch.randn(9, 512), type), torch.randn(3, 512)
        want = decode(packed, type)
        torch.testing.assert_close(gguf.decode(packed, type), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gguf.matmul(x, packed, type), x @ want.T, rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e4, 1e36, torch.inf, torch.nan])
def test_small_large_and_missing_activations(size: float) -> None:
    packed = encode(torch.randn(5, 256), "Q4_K")
    x = torch.randn(3, 256)
    x[1, 7:200] *= size
    got, want = gguf.matmul(x, packed, "Q4_K"), x @ decode(packed, "Q4_K").T
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        got[1], want[1], rtol=1e-4, atol=1e-4 * min(1.0, float(x[1].abs().max())), equal_nan=True
    )
    x *= size
    alone = gguf.matmul(x[:1], packed, "Q4_K")
    want = x[:1] @ decode(packed, "Q4_K").T
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-4 * size if size < torch.inf else 0.0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("type", ["Q8_0", "Q4_1", "Q4_K", "Q6_K"])
def test_no_factor_or_sum_overflows_where_no_product_does(type: str) -> None:
    """Codes of zero, with the largest factors that there are, and activations near float32's end."""
    row = BLOCKS[type]
    packed = torch.zeros(2, row.nbytes, dtype=torch.uint8)
    if type == "Q4_K":
        packed[:, 4:16] = 255
    if type == "Q6_K":  # codes are stored with 32 added
        packed[:, 128:208] = torch.tensor([0xAA] * 64 + [127] * 16, dtype=torch.uint8)
    at = 208 if type == "Q6_K" else 0
    packed[:, at : at + 2] = torch.tensor([65504.0]).half().view(torch.uint8)
    assert not decode(packed, type).any()
    x = torch.full((1, row.block), 1e-3)
    x[0, 3] = 3e38
    assert torch.equal(gguf.matmul(x, packed, type), torch.zeros(1, 2))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_threads_and_other_dtypes(dtype: torch.dtype) -> None:
    packed = encode(torch.randn(301, 576), "Q5_0")
    x = torch.randn(576, 2).to(dtype).T  # neither contiguous nor float32
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = gguf.matmul(x, packed, "Q5_0")
    finally:
        torch.set_num_threads(threads)
    assert got.dtype == dtype
    want = (x.double() @ decode(packed, "Q5_0").double().T).to(dtype)
    torch.testing.assert_close(got, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-3)


@needs_compiler
def test_few_rows_never_decode_a_weight() -> None:
    packed = encode(torch.randn(8, 64), "Q8_0")
    with mock.patch.object(matmul, "decode", side_effect=AssertionError), torch.no_grad():
        few, many = matmul.gguf_matmul(torch.ones(16, 64), packed, "Q8_0"), torch.ones(17, 64)
        torch.testing.assert_close(matmul.gguf_matmul(many, packed, "Q8_0")[:16], few)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="64 columns of Q8_0"):
        gguf.matmul(torch.ones(1, 64), torch.zeros(4, 34, dtype=torch.uint8), "Q8_0")


def test_without_a_compiler_torch_serves_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    gguf._say.cache_clear()
    packed, x = encode(torch.randn(8, 64), "Q8_0"), torch.randn(2, 64)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert gguf_kernel(CPU) is None
        assert gguf_decoder(CPU) is None
        for _ in range(2):
            got = matmul.gguf_matmul(x, packed, "Q8_0")
    torch.testing.assert_close(got, x @ decode(packed, "Q8_0").T)
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "no g++" in caplog.records[0].getMessage()
