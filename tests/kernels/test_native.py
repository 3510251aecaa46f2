"""The compiled CPU kernel equals torch attention over what the pages decode to, and is never missed silently."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import hf_ctxopt
from hf_ctxopt.caches import context
from hf_ctxopt.kernels.attention import Segment, attend
from hf_ctxopt.kernels.native import attend as native
from hf_ctxopt.kernels.native import build
from hf_ctxopt.kernels.sealed import SealedSegment, SealedTokens
from hf_ctxopt.pages.codec import Codec
from tests.families import VOCAB, model_for
from tests.feeding import feed

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with")
SPECIAL: list[dict[str, Any]] = [{}, {"softcap": 3.0}, {"sink_logits": torch.linspace(-1, 4, 12)}]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(autouse=True)
def _own_build(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CTXOPT_CACHE_DIR", str(cache_dir))
    monkeypatch.delenv("CTXOPT_NATIVE", raising=False)
    monkeypatch.setattr(native, "FEWEST", 1)
    build.forget()
    yield
    build.forget()


def pages(bits: int, over_tokens: bool, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Any:
    """Sealed pages in the middle of poisoned ones, and the float32 states they stand for, `(heads, tokens, dim)`."""
    codec = Codec(bits, over_tokens)
    codes, scales = codec.encode((torch.randn(shape) + 0.5).to(dtype))
    decoded = codec.decode(codes, scales, torch.float32).flatten(1, 2)
    inside = slice(1, 1 + shape[1])
    grown = [torch.full((t.shape[0], t.shape[1] + 2, *t.shape[2:]), 255 if t.dtype == torch.uint8 else torch.nan,
                        dtype=t.dtype) for t in (codes, scales)]  # fmt: skip
    for large, part in zip(grown, (codes, scales), strict=True):
        large[:, inside] = part
    return SealedTokens(grown[0][:, inside], grown[1][:, inside], bits, over_tokens), decoded


def problem(
    bits: tuple[int, int], dims: tuple[int, int], page: int, groups: int, dtype: torch.dtype, turned: bool = False
) -> tuple[Tensor, list[Any], list[Any]]:
    """A query over an open page, sealed ones cut at both ends, and open ones; and the same decoded."""
    heads, count, skip, rest = 2, 5, 3, 2
    keys, plain_keys = pages(bits[0], True, (heads, count, page, dims[0]), dtype)
    values, plain_values = pages(bits[1], False, (heads, count, page, dims[1]), dtype)
    tokens = count * page - skip - rest
    if bits[1] < 16:  # tokens of the cut pages outside of the stretch must not be read
        values.scales[:, 0, :, :skip] = torch.nan
        values.scales[:, -1, :, -rest:] = torch.nan
    query = torch.randn(heads * groups, 1, dims[0], dtype=dtype)
    other = torch.randn_like(query) if turned else None
    inside = slice(skip, skip + tokens)
    first = Segment(*(torch.randn(heads, page, dim, dtype=dtype) for dim in dims), other)
    # Views as a step's new states are: the heads of a token lie side by side.
    tail = Segment(*(torch.randn(7, heads, dim, dtype=dtype).transpose(0, 1) for dim in dims))
    sealed = SealedSegment(keys, values, skip, tokens, other)
    plain = [Segment(part.keys.float(), part.values.float(), part.query) for part in (first, tail)]
    middle = Segment(plain_keys[:, inside], plain_values[:, inside], other)
    return query, [first, sealed, tail], [plain[0], middle, plain[1]]


def check(query: Tensor, segments: list[Any], plain: list[Any], seen: Tensor | None = None, **special: Any) -> Tensor:
    """The kernel's result, checked against float32 attention over the decoded states."""
    poisoned = mock.patch.object(torch, "empty", lambda *size, **kw: torch.full(size, torch.nan, **kw))
    assert native.serves(query, segments)
    with poisoned:
        found = native.attend(query, segments, seen, 0.3, special.get("softcap"), special.get("sink_logits"))
    with mock.patch.object(native, "serves", return_value=False):
        expected = attend(query.float(), plain, lambda *_: seen, 0.3, **special)
    assert found.dtype == query.dtype
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if query.dtype == torch.float32 else 2e-2, rtol=0)
    return found


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (8, 4), (2, 8), (16, 4), (4, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_bits_and_dtypes(bits: tuple[int, int], dtype: torch.dtype) -> None:
    check(*problem(bits, (64, 64), 16, 3, dtype))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dims", [(32, 32), (64, 128), (80, 80), (96, 16), (256, 256)], ids=str)
def test_head_dims(dims: tuple[int, int], bits: int) -> None:
    check(*problem((bits, bits), dims, 16, 2, torch.float32))


@pytest.mark.parametrize("groups", [1, 4, 5, 8])
@pytest.mark.parametrize("page", [16, 32, 128, 256])
def test_groups_and_page_sizes(page: int, groups: int) -> None:
    check(*problem((8, 4), (32, 32), page, groups, torch.float32))


@pytest.mark.parametrize("special", SPECIAL, ids=["plain", "softcap", "sinks"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_masks_caps_sinks_and_turned_queries(special: dict[str, Any], turned: bool, masked: bool) -> None:
    query, segments, plain = problem((8, 4), (32, 32), 64, 6, torch.float32, turned)
    seen = torch.rand(1, sum(part.tokens for part in segments)) > 0.7 if masked else None
    if seen is not None:
        seen[:, :200] = False  # whole blocks, the first ones too
    check(query, segments, plain, seen, **special)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    query, segments, _ = problem((8, 8), (32, 32), 16, 2, torch.float32)
    seen = torch.zeros(1, sum(part.tokens for part in segments), dtype=torch.bool)
    assert native.attend(query, segments, seen, 0.3, None, None).abs().max() == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_tokens(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*problem((8, 8), (64, 64), 256, 3, torch.float32))
    finally:
        torch.set_num_threads(before)


def test_large_and_tiny_scores() -> None:
    query, segments, plain = problem((8, 8), (32, 32), 16, 2, torch.float32)
    for factor in (1e-6, 100.0):
        check(query * factor, segments, plain)


def test_attend_takes_the_kernel_and_leaves_the_rest() -> None:
    query, segments, _ = problem((8, 8), (32, 32), 16, 2, torch.float32)
    with mock.patch.object(native, "attend", wraps=native.attend) as called:
        attend(query, segments, lambda *_: None, 0.3)
        assert called.call_count == 1
        with mock.patch.object(native, "FEWEST", 1 << 20), mock.patch.object(build, "_build") as built:
            attend(query, segments, lambda *_: None, 0.3)  # a short text
            attend(query.expand(-1, 2, -1), segments, lambda *_: None, 0.3)  # two queries
            attend(query, [segments[0], segments[2]], lambda *_: None, 0.3)  # nothing sealed
        assert not built.called
        attend(query.clone().requires_grad_(), segments, lambda *_: None, 0.3)
        assert called.call_count == 1


def decode(bits: int, family: str = "llama", rows: int = 1) -> tuple[Tensor, dict[str, Any]]:
    """Logits of twelve steps after 60 tokens, over a page's end, and the cache's stats."""
    model = model_for(family, "native")
    text = torch.randint(2, VOCAB, (rows, 72), generator=torch.Generator().manual_seed(5))
    options = {"page_size": 8, "kv_bits": bits}
    with hf_ctxopt.patched(model, "ctx_paged", **options), torch.no_grad():
        cache = hf_ctxopt.make_cache(model, "ctx_paged", **options)
        feed(model, text[:, :60], cache, 20)
        return feed(model, text[:, 60:], cache, 1), cache.stats()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_decodes_as_without_it(family: str, bits: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row names its tokens by their places; several hand over a view of each stretch."""
    name = "attend_pages" if rows == 1 else "attend"
    with mock.patch.object(native, name, wraps=getattr(native, name)) as called:
        found, stats = decode(bits, family, rows)
    assert called.call_count
    assert stats["fallbacks"] == {}
    monkeypatch.setattr(native, "FEWEST", 1 << 20)
    torch.testing.assert_close(found, decode(bits, family, rows)[0], atol=1e-5, rtol=0)


def test_without_a_compiler_torch_serves_and_it_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = decode(8)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(context, "_logged", set())
    build.forget()
    with caplog.at_level(logging.WARNING):
        found, stats = decode(8)
    reason = "there is no g++ to compile the CPU kernel with"
    assert stats["fallbacks"] == {reason: 12}  # each step
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()] == [
        f"pages are read without kernels: {reason}"
    ]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXOPT_NATIVE", "0")
    with pytest.raises(build.NotBuilt, match="CTXOPT_NATIVE=0"):
        build.library()


def test_a_failed_build_says_why_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(build, "SOURCE", broken)
    monkeypatch.setenv("CTXOPT_CACHE_DIR", str(tmp_path))
    with mock.patch.object(build.subprocess, "run", wraps=build.subprocess.run) as run:
        for _ in range(2):
            with pytest.raises(build.NotBuilt, match=r"(?s)could not compile.*error"):
                build.library()
    assert run.call_count == 1
    assert list((tmp_path / "native").iterdir()) == []


def test_libraries_lie_where_only_their_owner_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXOPT_CACHE_DIR", str(tmp_path))
    assert build._folder().stat().st_mode & 0o777 == 0o700
    (tmp_path / "native").chmod(0o770)
    with pytest.raises(build.NotBuilt, match="writable by nobody else"):
        build.library()


def test_another_processor_gets_a_library_of_its_own(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library()
    before = set((cache_dir / "native").iterdir())
    build.forget()
    build.library()
    assert set((cache_dir / "native").iterdir()) == before
    monkeypatch.setattr(build, "_processor", lambda: "another")
    build.forget()
    build.library()
    assert len(list((cache_dir / "native").iterdir())) == len(before) + 1
