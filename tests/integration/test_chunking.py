"""Which prompts are read in chunks, and that the tokens do not depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import hf_ctxopt
from hf_ctxopt.caches.options import PageOptions, SinkOptions
from hf_ctxopt.integration import chunking
from hf_ctxopt.integration.compat import generate_argument
from hf_ctxopt.pages.storage import LayerStorage
from tests.families import build
from tests.integration.test_memory import TEXT, Live, _lengths, tiny

GPU = torch.device("cuda", 0)
PAGED, COUNTED = PageOptions(), PageOptions(budget="2GiB")
RULES = [
    # device, GiB of the device, options, tokens of the prompt, expected
    ("cpu", 0, PAGED, 100_000, None),
    ("cpu", 0, COUNTED, 1_024, None),
    ("cpu", 0, COUNTED, 1_025, 1_024),
    ("cpu", 0, PageOptions(budget=100_000), 50_000, None),
    ("cuda", 8, PAGED, 2_048, None),
    ("cuda", 8, PAGED, 2_049, 1_024),
    ("cuda", 80, PAGED, 2_048, None),
    ("cuda", 80, PAGED, 2_049, 2_048),
    ("cuda", 80, COUNTED, 2_049, 1_024),
    ("cuda", 80, COUNTED, 1_025, 1_024),
    ("cuda", 80, PAGED, None, None),
    ("cuda", 80, SinkOptions(window=300), 1_000, 300),
    ("cuda", 80, SinkOptions(window=3_000), 5_000, 1_024),
    ("cuda", 80, SinkOptions(window=9_000), 5_000, 2_048),
    ("cpu", 0, SinkOptions(window=9_000), 5_000, None),
]


@pytest.mark.parametrize(("kind", "size", "options", "prompt", "expected"), RULES)
def test_the_rule(
    kind: str, size: int, options: PageOptions, prompt: int | None, expected: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(chunking, "compute_device", lambda model: torch.device(kind))
    monkeypatch.setattr(chunking, "device_memory", lambda device: size << 30)
    monkeypatch.setattr(chunking, "memory_left", lambda device: size << 30)
    assert chunking.chunk_size(torch.nn.Linear(1, 1), options, None, prompt) == expected


@pytest.mark.parametrize(
    ("left_mib", "kv_bits", "prompt", "expected"),
    [(8000, 16, 6_500, 1_024), (3_586, 16, 6_500, 512), (3_380, 16, 6_500, 256), (3_586, 4, 6_500, 1_024),
     (3_586, {"k": 16, "v": 8}, 6_500, 1_024), (3_300, 16, 6_500, 128)],
)  # fmt: skip
def test_a_chunk_takes_a_share_of_what_is_left(left_mib: int, kv_bits: Any, prompt: int, expected: int) -> None:
    """Llama-2-7B: 512 KiB of pages and 115,200 bytes of activations a token."""
    with torch.device("meta"):
        model = torch.nn.Module()
        model.config = LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        )
    options = PageOptions(kv_bits=kv_bits)
    assert chunking.affordable(model, options, prompt, 1_024, left_mib << 20) == expected


def test_a_chunk_is_at_most_half_an_era() -> None:
    assert chunking.chunk_size(torch.nn.Linear(1, 1), SinkOptions(window=300), 100, 1_000) == 50


def test_the_device_is_where_the_model_computes() -> None:
    model = tiny()
    assert chunking.compute_device(model).type == "cpu"
    assert chunking.compute_device(model.to("meta")).type == "meta"
    model.model.embed_tokens.to_empty(device="cpu")
    assert chunking.compute_device(model).type == "meta"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_tokens_do_not_depend_on_chunks(family: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks stand for large ones; DynamicCache reads the prompt at once."""
    monkeypatch.setattr(chunking, "SMALL", 16)
    model = build(family)
    call: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    want = model.generate(TEXT[None, :90], **call)
    options = {"budget": "64MiB", "page_size": 8}
    if route == "fused":
        with hf_ctxopt.patched(model, **options):
            assert _lengths(model, {"input_ids": TEXT[None, :90]}) == [16] * 5 + [10, 1, 1]
            got = model.generate(TEXT[None, :90], **call)
    else:
        got = model.generate(TEXT[None, :90], cache_implementation="ctx_paged", cache_config=options, **call)
    assert torch.equal(got, want)


def test_a_chunk_size_of_the_users_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "SMALL", 16)
    with hf_ctxopt.patched(tiny(), budget="64MiB") as model:
        lengths = _lengths(model, {"input_ids": TEXT[None, :50]}, prefill_chunk_size=40)
    assert lengths == [40, 10, 1, 1]


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_nothing_of_a_chunk_outlives_its_forward_pass(route: str, family: str) -> None:
    """transformers' own sliding layers keep the prompt alive as a view; here only whole pages remain."""
    model = build(family)
    chunks = [chunk.clone() % 100 for chunk in TEXT[None, :4_096].split(256, dim=1)]
    with hf_ctxopt.patched(model) if route == "fused" else torch.no_grad():
        for tokens in (512, 4_096):
            with Live(model) as live, torch.no_grad():
                cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
                for chunk in chunks[: tokens // 256]:
                    model(chunk, use_cache=True, **{generate_argument(): cache}, logits_to_keep=1)
                    # Besides the pages: the last ids and a few index tensors, never the states of 256 tokens.
                    assert live.alive() - cache.nbytes < 256 * 2 * 16 * 4
            sliding = [g for g in cache.stats()["groups"] if g["window"] is not None]
            assert all(group["tokens_held"] <= 10 for group in sliding)


def test_the_peak_of_a_prefill_of_sliding_layers_is_bounded() -> None:
    """A Mistral-like prompt of 16 k tokens in chunks takes hardly more than one of 2 k."""
    model = build("mistral", max_position_embeddings=20_000)
    peaks = {}
    for tokens in (2_048, 16_384):
        with hf_ctxopt.patched(model), Live(model) as live:
            model.generate(TEXT[None, :tokens] % 100, max_new_tokens=1, prefill_chunk_size=512)
        peaks[tokens] = live.peak
    assert peaks[16_384] < 1.25 * peaks[2_048], peaks


@pytest.mark.parametrize("options", [{}, {"kv_bits": 4}, {"cache": "ctx_sink", "window": 40}])
def test_nothing_is_moved_between_the_chunks_of_a_prompt(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storages are made for the whole prompt: a card that can hold it need not hold parts of it twice."""
    made: list[tuple[int, int]] = []
    resize = LayerStorage.resize

    def counted(self: LayerStorage, capacity: int, sealed: int = 0) -> None:
        before = self.shape
        resize(self, capacity, sealed)
        made.extend([self.shape] if self.shape != before else [])

    monkeypatch.setattr(LayerStorage, "resize", counted)
    model, settings = tiny(), {"cache": "ctx_paged", "page_size": 8, **options}
    with hf_ctxopt.patched(model, **settings):
        model.generate(TEXT[None, :200], do_sample=False, max_new_tokens=4, prefill_chunk_size=16)
    assert not made
    cache = hf_ctxopt.make_cache(model, settings.pop("cache"), **settings)
    with torch.no_grad():
        for start in range(0, 200, 16):  # nobody announces the text of a manual loop
            model(TEXT[None, start : start + 16], use_cache=True, **{generate_argument(): cache})
    assert made or "window" in options  # a window's storage is made for all of it at once
