"""Full pages stored with fewer bits in the middle of a text: decoded, encoded, and nothing else changes."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_ctxopt
from hf_ctxopt import ConfigError
from hf_ctxopt.caches.base import PageCache
from hf_ctxopt.errors import InterruptedStepError
from hf_ctxopt.integration.compat import cache_in, generate_argument
from hf_ctxopt.pages.arena import unique_bytes
from hf_ctxopt.pages.pool import SEALED
from hf_ctxopt.pages.rotation import rotate_channels
from hf_ctxopt.pages.rows import Stretch
from hf_ctxopt.pages.sealed import SealedPart
from tests.device import pretend_gpu
from tests.families import VOCAB, build
from tests.faults.runs import stopped_in
from tests.faults.test_allocation import failing
from tests.feeding import feed, pad_left, routed
from tests.integration.test_memory import Live

SINK = {"sinks": 4, "window": 40}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "paged": ("llama", "ctx_paged", {}),
    "paged_seal_sinks": ("llama", "ctx_paged", {"seal_sinks": True}),
    "sink": ("llama", "ctx_sink", SINK),
    "sink_shift": ("llama", "ctx_sink", {**SINK, "n_discard": 0}),
    "priority": ("llama", "ctx_priority", {"budget": 96}),
    "hybrid": ("gemma3", "ctx_paged", {}),
}
STEPS: list[tuple[Any, Any]] = [(16, 8), (16, 4), (8, 4), (8, 2), (16, {"k": 16, "v": 8}), ({"k": 8, "v": 4}, 4)]
CASES = [
    *(("paged", *step) for step in STEPS),
    *((kind, before, 4) for kind in KINDS if kind != "paged" for before in (16, 8)),
]


def text(rows: int = 2, seq: int = 100) -> tuple[Tensor, Tensor]:
    """Ids and mask `(rows, seq)` of texts of unequal length."""
    draw = torch.Generator().manual_seed(7)
    return pad_left([torch.randint(2, VOCAB, (seq - 5 * row,), generator=draw) for row in range(rows)])


def read(model: Any, kind: str, options: dict[str, Any], ids: Tensor, mask: Tensor) -> PageCache:
    """A cache that has read all but the last 20 columns: chunks, and then steps of one token."""
    cache = hf_ctxopt.make_cache(model, kind, attention_mask=mask, page_size=8, **options)
    stop = ids.shape[1] - 32
    go_on(model, cache, ids, mask, tuple(min(20, stop - at) for at in range(0, stop, 20)) + (1,) * 12)
    return cache


@torch.no_grad()
def go_on(model: Any, cache: PageCache, ids: Tensor, mask: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """Logits of the columns that follow those the cache has seen."""
    logits, places = [], (mask.cumsum(-1) - 1).clamp(min=0)
    for length in chunks:
        at = cache.get_seq_length()
        out = model(ids[:, at : at + length], attention_mask=mask[:, : at + length], use_cache=True,
                    position_ids=places[:, at : at + length], **{generate_argument(): cache})  # fmt: skip
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def held(cache: PageCache) -> list[Tensor]:
    """Every token that the cache holds, K and V of each layer and row in the model's basis, in the text's order."""
    found: list[Tensor] = []
    for group in cache.groups:
        for row in group.rows:
            stretches = row.stretches(group.page_size, group.policy.sinks)
            for storage in group.storages.values():
                read = [storage.plain(*storage.read(stretch)) for stretch in stretches]
                found += [torch.cat(part, dim=1) for part in zip(*read, strict=True)]
    return found


@torch.no_grad()
def overwrite(target: PageCache, source: PageCache, bits: Any) -> int:
    """Put into a cache of open pages what `source` holds, full pages decoded and encoded with `bits`; counts them."""
    count, options = 0, replace(source.options, kv_bits=bits)
    for mine, theirs in zip(target.groups, source.groups, strict=True):
        codecs = options.codecs(theirs.policy)
        assert codecs is not None
        size = theirs.page_size
        for own, row in zip(mine.rows, theirs.rows, strict=True):
            assert [logical for logical, _ in own.pages()] == [logical for logical, _ in row.pages()]
            for (logical, page), (_, place) in zip(row.pages(), own.pages(), strict=True):
                full = codecs.open_first <= logical < row.length // size
                count += full
                for layer, storage in theirs.storages.items():
                    states = storage.plain(*storage.read(Stretch(page * size, 0, size)))
                    if full:
                        states = tuple(_coded(*one) for one in zip(
                            states, (codecs.keys, codecs.values), (codecs.rotate_keys, codecs.rotate_values),
                            strict=True,
                        ))  # fmt: skip
                    mine.storages[layer].write(*states, place * size)
    return count


def _coded(states: Tensor, codec: Any, rotated: bool) -> Tensor:
    states = rotate_channels(states) if rotated else states
    states = codec.decode(*codec.encode(states), states.dtype)
    return rotate_channels(states, back=True) if rotated else states


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize(("kind", "before", "after"), CASES, ids=str)
def test_logits_are_those_of_pages_that_were_decoded_and_encoded(
    kind: str, before: Any, after: Any, route: str
) -> None:
    family, name, options = KINDS[kind]
    model, (ids, mask) = build(family), text(1 if kind in ("priority", "sink_shift") else 2)
    with routed(route, model, name, **options):
        cache = read(model, name, {**options, "kv_bits": before}, ids, mask)
        twin = read(model, name, options, ids, mask)
        full = overwrite(twin, cache, after)
        assert full > 4
        was, pages = held(cache), [[list(row.pages()) for row in group.rows] for group in cache.groups]
        freed = cache.requantize(after)
        assert freed > 0
        cache.check_integrity()
        assert [states.shape for states in held(cache)] == [states.shape for states in was]
        for group, listed in zip(cache.groups, pages, strict=True):
            assert [[at for at, _ in row.pages()] for row in group.rows] == [[at for at, _ in row] for row in listed]
        stats = cache.stats()
        assert stats["kv_bits"] == (after if isinstance(after, dict) else {"k": after, "v": after})
        assert stats["relief"] == {f"full pages are stored with {after} bits": 1}
        for chunks in ((5,), (1, 1)):  # what they fill is sealed at their end, or later
            got, want = (go_on(model, copy.deepcopy(one), ids, mask, chunks) for one in (cache, twin))
            torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
        go_on(model, cache, ids, mask, (5, 1, 1, 1, 1, 1, 1, 8))
        cache.check_integrity()


def test_it_is_the_storages_that_shrink() -> None:
    model, (ids, mask) = build("llama"), text(seq=800)
    cache = read(model, "ctx_paged", {}, ids, mask)
    sizes = [cache.nbytes]
    old = [storage.keys.untyped_storage().data_ptr() for storage in cache.groups[0].storages.values()]
    for bits in (8, 4, 2):
        assert cache.requantize(bits) == sizes[-1] - cache.nbytes
        sizes.append(cache.nbytes)
    assert sizes[1] < 0.45 * sizes[0]  # float32 states
    assert sizes[2] < 0.75 * sizes[1]
    tensors = [tensor for storage in cache.groups[0].storages.values() for tensor in storage.tensors]
    assert unique_bytes(tensors) == cache.nbytes
    gc.collect()
    assert not {tensor.untyped_storage().data_ptr() for tensor in tensors} & set(old)
    assert cache.requantize(2) == 0


def test_the_peak_is_one_part_of_one_layer() -> None:
    """Keys or values of one layer, and the float32 copies of a few pages; the old ones are gone by then."""
    model, ids = build("llama", num_hidden_layers=6), text(seq=3000)[0]
    with Live(model) as live:
        cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8)
        feed(model, ids[:, :2990] % VOCAB, cache, chunk=300)
        for bits in (8, 4):
            gc.collect()
            before = live.peak = live.alive()
            one_part = cache.nbytes // 12
            cache.requantize(bits)
            pieces = 6 * 64 * 8 * 2 * 16 * 2 * 4  # of 64 pages
            assert live.peak - before < one_part + pieces, (live.peak, before)
            assert live.alive() - before < -one_part


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize(("before", "after"), [(16, 8), (16, 4), (8, 4)])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_memory_may_run_out_anywhere(
    route: str, before: int, after: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every page can be read then, the text goes on, and a second call ends what the first began."""
    model, (ids, mask) = build("llama"), text()
    recoded = SealedPart.recoded
    with routed(route, model, "ctx_paged"):
        for number in range(1, 20):
            cache = read(model, "ctx_paged", {"kv_bits": before}, ids, mask)
            whole, was, count = copy.deepcopy(cache), held(cache), [0]
            whole.requantize(after)

            def failing_part(part: SealedPart, *args: Any) -> SealedPart:
                count[0] += 1  # noqa: B023
                if count[0] == number:  # noqa: B023
                    raise error
                return recoded(part, *args)

            monkeypatch.setattr(SealedPart, "recoded", failing_part)
            try:
                cache.requantize(after)
            except error:
                monkeypatch.undo()
                cache.check_integrity()
                for old, new in zip(was, held(cache), strict=True):
                    assert old.shape == new.shape
                    assert (old - new).abs().max() < (0.05 if after == 8 else 1.5) * old.abs().max()
                other = copy.deepcopy(cache)
                go_on(model, other, ids, mask, (5, 1, 1, 1, 1, 8))
                other.check_integrity()
                other.requantize(after)
                go_on(model, other, ids, mask, (1,))
                cache.requantize(after)
                for one, two in zip(held(cache), held(whole), strict=True):
                    assert torch.equal(one, two)
                continue
            break
        assert number == 5  # K and V of two layers
    with failing(1, error) as failed, pytest.raises(error):  # the pages that stay open are moved first
        read(model, "ctx_paged", {}, ids, mask).requantize(8)
    assert failed


def test_rows_that_share_pages_share_them_afterwards() -> None:
    model, (ids, mask) = build("llama"), text(1)
    cache = read(model, "ctx_paged", {}, ids, mask)
    cache.batch_repeat_interleave(3)
    shared = cache.stats()["pages"]["shared"]
    cache.requantize(8)
    cache.check_integrity()
    assert cache.stats()["pages"]["shared"] == shared > 8
    wide = cache.stats()["pages"]["used"]
    logits = go_on(model, cache, ids.repeat(3, 1), mask.repeat(3, 1), (1, 1, 1))
    torch.testing.assert_close(logits[0], logits[2], atol=1e-5, rtol=0)
    assert wide <= cache.stats()["pages"]["used"] <= wide + 2 * 2 * 3
    cache.batch_select_indices(torch.tensor([1]))
    cache.check_integrity()


def test_a_text_is_taken_back_into_re_encoded_pages() -> None:
    model, (ids, mask) = build("llama"), text(1)
    cache = read(model, "ctx_paged", {}, ids, mask)
    other = read(model, "ctx_paged", {}, ids, mask)
    cache.requantize(8)
    for one in (cache, other):
        one.crop(-21)
    cache.check_integrity()
    got, want = (go_on(model, one, ids, mask, (21, 1, 1)) for one in (cache, other))
    assert 1e-6 < (got - want).abs().max() < 0.1


def test_refusals_change_nothing() -> None:
    model, (ids, mask) = build("llama"), text()
    cache = read(model, "ctx_paged", {"kv_bits": {"k": 8, "v": 4}}, ids, mask)
    go_on(model, cache, ids, mask, (1,))  # it seals the page that the last one has filled
    was, stats = held(cache), cache.stats()
    for bits in (16, 8, {"k": 4, "v": 8}, 3, "8", {"k": 8}):
        with pytest.raises(ConfigError, match="kv_bits"):
            cache.requantize(bits)  # type: ignore[arg-type]
    layer = model.get_decoder().layers[0]
    assert cache.stats() == stats
    with stopped_in(layer, 1, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        go_on(model, cache, ids, mask, (1,))
    with pytest.raises(InterruptedStepError, match="settle"):
        cache.requantize(4)
    cache.settle()
    assert all(torch.equal(one, two) for one, two in zip(held(cache), was, strict=True))
    cache.requantize(4)
    odd = build("llama", head_dim=6, num_attention_heads=2, num_key_value_heads=1)
    narrow = read(odd, "ctx_paged", {"kv_bits": 8}, ids, mask)
    with pytest.raises(ConfigError, match="head size 6"):
        narrow.requantize(2)
    assert narrow.options.kv_bits == 8


@pytest.mark.parametrize("seen", [0, 60])
def test_a_pass_between_two_groups_of_layers_is_a_pass(seen: int) -> None:
    """The full layer has finished it and the sliding ones have not begun."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    model, (ids, mask) = build("gemma3", layer_types=kinds), text()
    with routed("fused", model, "ctx_paged"):
        cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, attention_mask=mask)
        layers, asked = model.get_decoder().layers, [0]
        if seen:
            go_on(model, cache, ids, mask, (seen,))

        def asks(*_: Any) -> None:
            asked[0] += 1
            for change in (
                lambda: cache.requantize(8),
                lambda: cache.batch_repeat_interleave(2),
                lambda: cache.batch_select_indices(torch.tensor([0])),
            ):
                with pytest.raises(InterruptedStepError, match="settle"):
                    change()

        hooks = [layer.register_forward_hook(asks) for layer in layers[:-1]]
        go_on(model, cache, ids, mask, (9,))
        for hook in hooks:
            hook.remove()
        assert asked == [len(layers) - 1]
        assert [group.layers for group in cache.groups] == [(0,), (1, 2)]
        cache.requantize(8)  # between two passes
        cache.batch_repeat_interleave(2)
        go_on(model, cache, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), (1, 5))
        cache.check_integrity()


def test_a_prefix_stores_pages_are_left_alone() -> None:
    model, (ids, mask) = build("llama"), text(1)
    try:
        with hf_ctxopt.patched(model, cache="ctx_prefix", store="whole", page_size=8):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True)
            with pytest.raises(ConfigError, match="prefix store"):
                cache_in(out).requantize(8)
    finally:
        hf_ctxopt.drop_store("whole")


def test_an_empty_cache_begins_with_fewer_bits() -> None:
    model, (ids, mask) = build("llama"), text()
    cache = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, attention_mask=mask)
    assert cache.requantize(8) == 0
    other = hf_ctxopt.make_cache(model, "ctx_paged", page_size=8, attention_mask=mask, kv_bits=8)
    got, want = (go_on(model, one, ids, mask, (40, 20, 1, 1)) for one in (cache, other))
    assert torch.equal(got, want)
    assert cache.nbytes == other.nbytes
    cache.reset()
    assert cache.stats()["kv_bits"] == {"k": 8, "v": 8}


@pytest.mark.parametrize("name", ["ctx_paged", "ctx_sink"])
def test_replayed_steps_are_captured_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the kernels' stand-in: the graph of the old pages is forgotten, that of the new ones reads them."""
    model, ids = build("llama"), text(1, seq=60)[0]
    options: dict[str, Any] = {"page_size": 16, **({"sinks": 4, "window": 64} if name == "ctx_sink" else {})}
    call: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    with pretend_gpu(monkeypatch), hf_ctxopt.patched(model, cache=name, **options):
        cache = hf_ctxopt.make_cache(model, name, **options)
        for bits in (None, 8, 4):
            if bits is not None:
                cache.requantize(bits)
                assert cache.context.captured is None
            before = cache.stats()["graph"].get("replays", 0)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, output_logits=True,
                **call, **{generate_argument(): cache},
            )  # fmt: skip
            ids = out.sequences
            assert cache.stats()["graph"]["replays"] > before + 4
        cache.check_integrity()
        assert any(page >= SEALED for row in cache.groups[0].rows for _, page in row.pages())
        assert not cache.stats()["fallbacks"]
