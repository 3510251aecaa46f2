"""The GPU's way through a chunk (pieces, no mask) run on a CPU: the same logits as the way that asks the mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function
from transformers.masking_utils import sliding_window_causal_mask_function as sliding

import hf_ctxopt
from hf_ctxopt.caches import chunk as pieces
from hf_ctxopt.integration.mask import LazyMask
from hf_ctxopt.kernels.gather import gather_reference
from hf_ctxopt.pages import storage
from hf_ctxopt.pages.plan import RowStep
from hf_ctxopt.pages.pool import SEALED
from hf_ctxopt.pages.rows import Stretch
from tests.families import VOCAB, build
from tests.feeding import feed, pad_left, routed

TEXT = torch.randint(2, VOCAB, (90,), generator=torch.Generator().manual_seed(8))
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "paged": ("ctx_paged", {"page_size": 4}),
    "sink": ("ctx_sink", {"sinks": 3, "window": 20, "page_size": 8}),
    "no_sinks": ("ctx_sink", {"sinks": 0, "window": 11, "page_size": 4}),
}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Switches the CPU on for pieces; holds the number of queries of each call."""
    calls: list[int] = []
    attend = pieces.attend_chunk

    def counted(view: Any, index: int, row: Any, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(query.shape[1])
        return attend(view, index, row, query, *rest)

    monkeypatch.setattr(pieces, "attend_chunk", counted)
    monkeypatch.setattr(pieces, "DEVICES", {"cuda", "cpu"})
    return calls


def _logits(family: str, kind: str, chunk: int, padded: bool = False) -> torch.Tensor:
    name, options = CACHES[kind]
    model = build(family)
    ids, mask = pad_left([TEXT, TEXT[:71]]) if padded else (TEXT[None], None)
    with routed("fused", model, name, **options):
        cache = hf_ctxopt.make_cache(model, name, attention_mask=mask, **options)
        logits = feed(model, ids, cache, chunk, mask=mask)
        logits = torch.cat([logits, feed(model, ids[:, :1], cache, 1)], 1) if mask is None else logits
    assert not cache.stats()["fallbacks"]
    return logits if mask is None else torch.cat([logits[0], logits[1, len(TEXT) - 71 :]])


@pytest.mark.parametrize("chunk", [7, 32, 90])
@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "phi", "glm"])
def test_same_logits(family: str, kind: str, chunk: int, served: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    got = _logits(family, kind, chunk)
    assert len(served) >= 2 * (90 // chunk)  # at both layers of each chunk
    monkeypatch.setattr(pieces, "DEVICES", set())
    served.clear()
    asked = _logits(family, kind, chunk)
    assert not served
    assert float((got - asked).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_same_logits_in_padded_rows(
    family: str, kind: str, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    got = _logits(family, kind, 25, padded=True)
    assert served
    monkeypatch.setattr(pieces, "DEVICES", set())
    assert float((got - _logits(family, kind, 25, padded=True)).abs().max()) < 1e-4


def test_a_piece_is_whole_pages_of_bounded_bytes() -> None:
    def tokens(heads: int, dim: int, page_size: int) -> int:
        states = torch.zeros(1, heads, 1, dim, dtype=torch.bfloat16)
        return pieces.piece_tokens(
            SimpleNamespace(keys=states, values=states, storage=SimpleNamespace(page_size=page_size))
        )

    assert tokens(8, 128, 32) == 4096
    assert tokens(32, 128, 32) == 1024
    assert tokens(128, 512, 1024) == 1024
    assert tokens(3, 64, 64) % 64 == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_quantized_history(family: str, bits: int, served: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces meet the stored states exactly as the way does that asks the mask."""
    monkeypatch.setitem(CACHES, "quantized", ("ctx_paged", {"page_size": 8, "kv_bits": bits, "rotate": True}))
    monkeypatch.setattr(pieces, "piece_tokens", lambda view: 24)
    got = _logits(family, "quantized", 20)
    assert served
    monkeypatch.setattr(pieces, "DEVICES", set())
    assert float((got - _logits(family, "quantized", 20)).abs().max()) < 1e-3


def test_the_devices_kernel_decodes_what_torch_would(served: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CACHES, "quantized", ("ctx_paged", {"page_size": 8, "kv_bits": {"k": 8, "v": 4}}))
    want, calls = _logits("llama", "quantized", 20), []

    def gather(pages: Any, row: torch.Tensor, first: int, count: int, *buffers: torch.Tensor) -> None:
        calls.append(count)
        gather_reference(pages, row, first, count, *buffers)

    monkeypatch.setattr(storage, "gather_kernel", lambda device: gather)
    assert float((want - _logits("llama", "quantized", 20)).abs().max()) < 1e-4
    assert calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_on_a_gpu(family: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's kernels seal and decode the pages; both ways read the same ones."""
    options = {"page_size": 16, "kv_bits": bits}
    monkeypatch.setattr(pieces, "piece_tokens", lambda view: 32)
    model, found = build(family).cuda(), []
    for devices in ({"cuda"}, set()):
        monkeypatch.setattr(pieces, "DEVICES", devices)
        with hf_ctxopt.patched(model, **options):
            found.append(feed(model, TEXT[None].cuda(), hf_ctxopt.make_cache(model, "ctx_paged", **options), 20))
    assert float((found[0] - found[1]).abs().max()) < 1e-3


def test_quantized_history_is_decoded_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Stretch] = []

    def decode(stretch: Stretch) -> tuple[torch.Tensor, torch.Tensor]:
        read.append(stretch)
        return torch.zeros(2, stretch.length, 8), torch.zeros(2, stretch.length, 8)

    monkeypatch.setattr(pieces, "piece_tokens", lambda view: 16)
    after = [Stretch(0, 0, 4), Stretch(SEALED * 4 + 8, 4, 40), Stretch(8, 44, 12)]
    row = RowStep(pad=0, start=50, stop=56, lower=0, before=[], after=after)
    view = SimpleNamespace(
        old=None, stored=None, storage=SimpleNamespace(page_size=4, read=decode), plan=SimpleNamespace(queries=6),
        keys=torch.zeros(1, 2, 6, 8), values=torch.zeros(1, 2, 6, 8),
        not_encoded=lambda index, row, stretch: [(stretch, None)],
    )  # fmt: skip
    found = [stretch for stretch, _, _ in pieces._stretches(view, 0, row)]
    assert [(part.token, part.length) for part in found] == [(0, 4), (4, 16), (20, 16), (36, 8), (44, 6), (50, 6)]
    assert found[:-1] == read
    assert read[2].slot == SEALED * 4 + 24


@pytest.mark.parametrize("cache", ["ctx_paged", "ctx_sink"])
def test_a_page_that_a_chunk_fills_tells_nothing_of_its_later_tokens(cache: str, served: list[int]) -> None:
    """Its scales are found over all its tokens, the chunk's last ones included."""
    model = build("llama")
    settings = {"page_size": 16, "kv_bits": 2, **({"window": 60} if cache == "ctx_sink" else {})}
    logits = []
    for last in (5, 90):
        text = TEXT[None, :40].clone()
        text[0, 31] = last
        with routed("fused", model, cache, **settings):
            held = hf_ctxopt.make_cache(model, cache, **settings)
            feed(model, text[:, :21], held, 21)
            logits.append(feed(model, text[:, 21:32], held, 11))
    assert served
    assert torch.equal(logits[0][:, :-1], logits[1][:, :-1])


@pytest.mark.parametrize("options", [{"n_discard": 5}, {}], ids=["jumps", "hole"])
def test_what_is_no_plain_window_is_not_served(options: dict[str, Any], served: list[int]) -> None:
    """A window that moves in jumps, and a mask with a hole in the middle of a row."""
    model, settings = build("llama"), {"sinks": 2, "window": 60, "page_size": 4} | options
    mask = torch.ones(1, 40, dtype=torch.long)
    if not options:
        mask[0, 17] = 0
    with routed("fused", model, "ctx_sink", **settings):
        feed(model, TEXT[None, :40], hf_ctxopt.make_cache(model, "ctx_sink", **settings), 20, mask=mask)
    assert not served


def test_only_a_window_that_hides_nothing_more_is_plain() -> None:
    """Otherwise what the model's own mask hides would be seen."""

    def mask(function: Any, size: int | None = None) -> LazyMask:
        return LazyMask(mask_function=function, attention_mask=None, local_size=size)

    assert mask(causal_mask_function).plain([0])
    assert mask(causal_mask_function).plain([0], 10)
    assert mask(sliding(10), 10).plain([0], 10)
    assert mask(sliding(10), 10).plain([0], 7)
    assert not mask(sliding(10), 10).plain([0], 11)
    assert not mask(sliding(10), 10).plain([0])
    assert not mask(sliding(9), 10).plain([0], 10)
    assert not mask(chunked_causal_mask_function(10, torch.zeros(1)), 10).plain([0], 10)
