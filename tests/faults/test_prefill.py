"""Memory runs out while a prompt is read: the chunk is halved, the prompt goes on, and the answer does not change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import hf_ctxopt
from hf_ctxopt.caches import context
from hf_ctxopt.caches.base import PageCache
from hf_ctxopt.caches.layer import PageLayer
from hf_ctxopt.errors import InterruptedStepError, out_of_memory
from hf_ctxopt.integration.compat import cache_in, generate_argument
from hf_ctxopt.integration.generate import slices_chunks
from tests.families import VOCAB, build, model_for
from tests.faults.test_allocation import failing
from tests.feeding import pad_left, routed

CHUNK = 64
AGAIN = CHUNK if slices_chunks(1) else None  # of a text that goes on: before transformers 5.23 it is read at once
HALVED = "a prefill chunk ran out of memory and was halved"
NOT_AHEAD = "memory ran out while a prefix was computed ahead of its batch, which goes on without it"
ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    "python": lambda: MemoryError(),
}
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "paged": ("ctx_paged", {"page_size": 8}),
    "paged_int8": ("ctx_paged", {"page_size": 8, "kv_bits": 8}),
    "paged_int4": ("ctx_paged", {"page_size": 8, "kv_bits": {"k": 4, "v": 2}}),
    "sink_wide_int4": ("ctx_sink", {"page_size": 8, "sinks": 4, "window": 300, "kv_bits": 4}),
    "sink": ("ctx_sink", {"page_size": 8, "sinks": 4, "window": 40}),
    "priority": ("ctx_priority", {"page_size": 8, "budget": 64}),
    "sink_int8": ("ctx_sink", {"page_size": 8, "sinks": 4, "window": 40, "kv_bits": 8}),
}
FAULTS: list[tuple[int | str, tuple[int, ...]]] = [
    (0, (1,)), (0, (2, 3)), (1, (3,)), (1, (1, 4)), (2, (2,)), ("head", (1, 4)), ("head", (4,)),
]  # fmt: skip
"""Where memory runs out, and at which calls of that module: the prompt has four chunks."""
EXACT = [name for name in CACHES if "int" not in name and name != "priority"]
"""Where the chunks' sizes do not matter."""


def text(rows: int = 1, seq: int = 250, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Ids and mask `(rows, seq)`, the second row 19 tokens shorter than the first and so on."""
    draw = torch.Generator().manual_seed(seed)
    return pad_left([torch.randint(2, VOCAB, (seq - 19 * row,), generator=draw) for row in range(rows)])


def llama() -> Any:
    """Three layers: when the MLP of the last one fails, every layer has stored the chunk."""
    return build("llama", num_hidden_layers=3)


def module_at(model: Any, place: int | str) -> nn.Module:
    """The MLP of a layer, whose attention has run by then, or the head, before which all layers have."""
    return model.get_output_embeddings() if place == "head" else model.get_decoder().layers[place].mlp


@dataclass
class Passes:
    """Forward passes: the columns the cache held before, and the tokens of each."""

    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def chunks(self, prompt: int) -> list[int]:
        """The lengths that the prompt was read in at last; a pass that failed counts where its tokens were kept."""
        first = len(self.starts) - 1 - self.starts[::-1].index(min(self.starts))
        starts, lengths = self.starts[first:], self.lengths[first:]
        kept = zip(starts, lengths, [*starts[1:], prompt], strict=True)
        return [length for start, length, end in kept if start < prompt and end >= start + length]


@contextmanager
def short_of_memory(
    model: Any, place: int | str, calls: tuple[int, ...] = (), most: int | None = None, error: str = "cuda"
) -> Iterator[Passes]:
    """A module raises at its `calls`-th calls, or at all with more than `most` tokens."""
    module, count, passes = module_at(model, place), [0], Passes()

    def begins(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        passes.starts.append(cache_in(kwargs).get_seq_length())
        passes.lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])

    def fails(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        count[0] += 1
        if count[0] in calls or (most is not None and args[0].shape[1] > most):
            raise ERRORS[error]()

    handles = [module.register_forward_pre_hook(fails), model.register_forward_pre_hook(begins, with_kwargs=True)]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def run(model: Any, cache: PageCache, ids: Tensor, mask: Tensor, chunk: int | None = CHUNK, new: int = 3) -> Any:
    """A greedy run from the prompt on, with the logits of each step."""
    return model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, prefill_chunk_size=chunk,
        return_dict_in_generate=True, output_logits=True, **{generate_argument(): cache},
    )  # fmt: skip


def assert_same(got: Any, want: Any, tolerance: float) -> None:
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=tolerance, rtol=0)


@torch.no_grad()
def by_lengths(model: Any, cache: PageCache, ids: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """Last logits of a prompt fed in chunks of the given lengths by hand."""
    at, places = 0, (mask.cumsum(-1) - 1).clamp(min=0)
    for length in lengths:
        stop = at + length
        out = model(ids[:, at:stop], attention_mask=mask[:, :stop], position_ids=places[:, at:stop],
                    use_cache=True, logits_to_keep=1, **{generate_argument(): cache})  # fmt: skip
        at = stop
    assert at == ids.shape[1]
    return out.logits[:, -1]


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("name", CACHES)
def test_every_layer_and_several_chunks(route: str, name: str) -> None:
    """Two rows of unequal padding, so that every chunk begins in the middle of a page of one of them.

    What is read in smaller chunks is what an unbroken run in those chunks reads, begun pages that are quantized too.
    """
    model, (kind, options) = llama(), CACHES[name]
    # Stock masks cannot describe rows that lose pages at different times.
    ids, mask = text(1 if (route, name) == ("dense", "priority") else 2)
    with routed(route, model, kind, **options):
        plain = run(model, hf_ctxopt.make_cache(model, kind, attention_mask=mask, **options), ids, mask)
        for place, calls in FAULTS if route == "fused" else FAULTS[1::3]:  # the routes differ in reading only
            cache = hf_ctxopt.make_cache(model, kind, attention_mask=mask, **options)
            with short_of_memory(model, place, calls) as passes:
                got = run(model, cache, ids, mask)
            assert cache.stats()["relief"][HALVED] == len(calls), (place, calls)
            cache.check_integrity()
            assert not any(group.begun or group.guarded or group.keeping for group in cache.groups)
            if name in EXACT and (route, name) != ("dense", "sink"):  # stock attention has one gap for a whole chunk
                assert_same(got, plain, 1e-4)
            chunks = passes.chunks(ids.shape[1])
            assert sum(chunks) == ids.shape[1], (place, calls, passes)
            assert max(chunks) <= CHUNK
            twin = hf_ctxopt.make_cache(model, kind, attention_mask=mask, **options)
            want = by_lengths(model, twin, ids, mask, chunks)
            torch.testing.assert_close(got.logits[0], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("chunk", [CHUNK, None])
def test_the_chunk_is_halved_until_it_fits(chunk: int | None, error: str) -> None:
    model = llama()
    ids, mask = text()
    with routed("fused", model, "ctx_paged"):
        want = run(model, hf_ctxopt.make_cache(model, "ctx_paged", page_size=8), ids, mask, chunk)
        cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
        with short_of_memory(model, 1, most=40 if chunk is None else 20, error=error) as passes:
            got = run(model, cache, ids, mask, chunk)
    assert_same(got, want, 1e-4)
    size = 16 if chunk else 31  # 250 -> 125 -> 62 -> 31
    assert passes.chunks(250) == [size] * (250 // size) + [250 % size]
    assert cache.stats()["relief"] == {HALVED: 2 if chunk else 3}


@pytest.mark.parametrize("tail", [1, 30])
@pytest.mark.parametrize("call", [1, 2])
def test_a_short_tail_does_not_hide_that_a_longer_chunk_failed(call: int, tail: int) -> None:
    """Every layer has stored the chunk, which is kept: only the tail is left, shorter than the least chunk."""
    model = llama()
    ids, mask = text(seq=256 + tail)
    with routed("fused", model, "ctx_paged"):
        want = run(model, hf_ctxopt.make_cache(model, "ctx_paged", page_size=32), ids, mask, 128)
        cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=32)
        with short_of_memory(model, 2, (call,)) as passes:
            got = run(model, cache, ids, mask, 128)
    assert_same(got, want, 1e-4)
    assert cache.stats()["relief"] == {HALVED: 1}
    assert passes.lengths[call - 1 : call + 1] == [128, 64 if call == 1 else tail]


@pytest.mark.parametrize("only_new", [False, True])
def test_pages_that_a_budget_dropped_for_the_failed_chunk_come_back(only_new: bool) -> None:
    """Smaller chunks push out fewer pages: the text must be what it is when nothing had failed."""
    model, (kind, options) = llama(), CACHES["priority"]
    ids, mask = text(seq=110)
    with routed("fused", model, kind, **options):
        cache = hf_ctxopt.make_cache(model, kind, **options)
        run(model, cache, ids[:, :60], mask[:, :60], chunk=None, new=1)
        with short_of_memory(model, 1, (1,)) as passes:
            if only_new:
                with pytest.raises(InterruptedStepError, match=r"cache\.reset\(\)"):
                    run(model, cache, ids[:, 60:], mask, None)
                cache.reset()
                return
            got = run(model, cache, ids, mask, None)
        cache.check_integrity()
        chunks = passes.chunks(ids.shape[1])
        assert passes.starts[:2] == [60, 0]
        twin = hf_ctxopt.make_cache(model, kind, **options)
        torch.testing.assert_close(got.logits[0], by_lengths(model, twin, ids, mask, chunks), atol=1e-4, rtol=0)


@pytest.mark.parametrize("page_size", [8, 32])
def test_under_the_least_chunk_the_error_goes_through_and_the_cache_stays(page_size: int) -> None:
    model, least = llama(), max(16, page_size)
    ids, mask = text()
    with routed("fused", model, "ctx_paged"):
        want = run(model, hf_ctxopt.make_cache(model, "ctx_paged", page_size=page_size), ids, mask)
        cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=page_size)
        run(model, cache, ids[:, :40], mask[:, :40], new=1)
        with short_of_memory(model, 1, most=10), pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
            run(model, cache, ids, mask, AGAIN)
        cache.check_integrity()
        assert cache.get_seq_length() == 40
        sizes = [AGAIN or 210]
        while sizes[-1] > least:
            sizes.append(max(least, sizes[-1] // 2))
        assert cache.stats()["relief"] == {HALVED: len(sizes) - 1}
        assert_same(run(model, cache, ids, mask, AGAIN), want, 1e-4)


@pytest.mark.parametrize("name", ["paged", "sink"])
@pytest.mark.parametrize("only_new", [False, True])
def test_a_text_that_goes_on(name: str, only_new: bool) -> None:
    """The second turn's chunk fails, whether `generate` is given the whole text or only what is new."""
    model, (kind, options) = llama(), CACHES[name]
    ids, mask = text()
    with routed("fused", model, kind, **options):
        outs = []
        for calls in ((), (2,), (1, 3)) if AGAIN else ((), (1,), (1, 2)):
            cache = hf_ctxopt.make_cache(model, kind, **options)
            run(model, cache, ids[:, :60], mask[:, :60], new=1)
            with short_of_memory(model, 1, calls):
                given = ids[:, 60:] if only_new else ids
                outs.append(run(model, cache, given, mask, AGAIN))
            assert cache.stats()["relief"].get(HALVED, 0) == len(calls)
            cache.check_integrity()
    for got in outs[1:]:
        assert_same(got, outs[0], 1e-4)


def test_new_tokens_alone_under_a_budget() -> None:
    """The window's tokens are gone, nobody has the text, and the budget left no room to keep them: it is said so."""
    model, options = llama(), {**CACHES["sink"][1], "budget": 56}
    ids, mask = text()
    with routed("fused", model, "ctx_sink", **options):
        cache = hf_ctxopt.make_cache(model, "ctx_sink", **options)
        run(model, cache, ids[:, :60], mask[:, :60], new=1)
        want = run(model, hf_ctxopt.make_cache(model, "ctx_sink", **options), ids, mask)
        with short_of_memory(model, 0, (1,)), pytest.raises(InterruptedStepError, match=r"cache\.reset\(\)"):
            run(model, cache, ids[:, 60:], mask, AGAIN)
        cache.reset()
        assert_same(run(model, cache, ids, mask), want, 1e-4)


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "mistral"])
def test_other_families(route: str, family: str) -> None:
    """Sliding layers have let go of tokens when a later layer fails: the text is read again."""
    model = model_for(family, "faults")
    ids, mask = text(2)
    decoder = model.get_decoder()
    last = len(decoder.layers if hasattr(decoder, "layers") else decoder.h) - 1
    with routed(route, model, "ctx_paged"):
        want = run(model, hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, attention_mask=mask), ids, mask)
        for calls in ((1,), (2,), (3,)):
            cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, attention_mask=mask)
            place = last if hasattr(decoder, "layers") else "head"
            with short_of_memory(model, place, calls):
                got = run(model, cache, ids, mask)
            assert_same(got, want, 1e-4)
            cache.check_integrity()


@pytest.mark.parametrize("name", ["paged", "paged_int8", "sink"])
def test_every_allocation_of_pages(name: str) -> None:
    """Nobody has announced the text, so pages grow with the chunks, and any growth may fail."""
    model, (kind, options) = llama(), CACHES[name]
    ids, mask = text()
    with routed("fused", model, kind, **options):
        want = run(model, hf_ctxopt.make_cache(model, kind, **options), ids, mask)
        for number in range(1, 40):
            cache = hf_ctxopt.make_cache(model, kind, **options)
            with failing(number, ERRORS["cuda"]) as failed:
                got = run(model, cache, ids, mask, new=1)
            if not failed:
                break
            assert cache.stats()["relief"][HALVED] == 1
            cache.check_integrity()
            if name in EXACT:
                assert torch.equal(got.sequences, want.sequences[:, : got.sequences.shape[1]])
        assert number > 2


@pytest.mark.parametrize("calls", [(1,), (2,)])
def test_reused_prefixes_stay(calls: tuple[int, ...]) -> None:
    """No hook here: a model with another hook is another model to a store."""
    model, (ids, mask) = llama(), text(seq=150)
    other = torch.cat([ids[:, :80], (ids[:, 80:] + 1).clamp(max=VOCAB - 1)], dim=1)
    settings: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
    update, count = PageLayer.update, [0]

    def failing_update(layer: PageLayer, *args: Any, **kwargs: Any) -> Any:
        count[0] += layer.index == 1
        if layer.index == 1 and count[0] in calls:
            raise ERRORS["cuda"]()
        return update(layer, *args, **kwargs)

    try:
        plain = [model.generate(one, **settings).tolist() for one in (ids, other)]
        with routed("fused", model, "ctx_prefix", store="short", page_size=8):
            assert model.generate(ids, **settings).tolist() == plain[0]
            with mock.patch.object(PageLayer, "update", failing_update):
                out = model.generate(other, **settings, prefill_chunk_size=32, return_dict_in_generate=True)
            stats = cache_in(out).stats()
            assert out.sequences.tolist() == plain[1]
            assert stats["relief"] == {HALVED if slices_chunks(1) else NOT_AHEAD: 1}
            assert stats["prefix"]["reused_tokens"] >= 72 or not slices_chunks(1)
            out = model.generate(other, **settings, return_dict_in_generate=True)
            assert cache_in(out).stats()["prefix"]["reused_tokens"] == 149
            assert [model.generate(one, **settings).tolist() for one in (ids, other)] == plain
            hf_ctxopt.stores()["short"].check_integrity()
    finally:
        hf_ctxopt.drop_store("short")


def test_other_errors_are_nobodys_lack_of_memory() -> None:
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(hf_ctxopt.CacheFullError(4, 2, "raise `budget`: out of memory"))
    model = llama()
    ids, mask = text()
    cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, budget=80)
    with pytest.raises(hf_ctxopt.CacheFullError):
        run(model, cache, ids, mask)
    assert cache.stats()["relief"] == {}


def test_it_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_logged", set())
    model = llama()
    ids, mask = text()
    with caplog.at_level(logging.WARNING), short_of_memory(model, 0, most=20):
        run(model, hf_ctxopt.make_cache(model, "ctx_paged", page_size=8), ids, mask)
    assert caplog.text.count(HALVED) == 1


@pytest.mark.parametrize("name", ["ctx_paged", "ctx_prefix"])
def test_assisted_decoding_says_that_it_reads_the_prompt_at_once(name: str) -> None:
    model = llama()
    ids, mask = text(seq=90)
    with routed("fused", model, name, page_size=8):
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=3, prefill_chunk_size=32,
            prompt_lookup_num_tokens=2, return_dict_in_generate=True,
        )  # fmt: skip
        assert cache_in(out).stats()["unchunked"] == {"assisted decoding reads the prompt by itself": 1}
        out = model.generate(ids, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True)
        assert cache_in(out).stats()["unchunked"] == {}
