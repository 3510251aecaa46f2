"""Caches with quantized pages inside real forward passes and `generate`."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_ctxopt
from hf_ctxopt.caches.base import PageCache
from hf_ctxopt.errors import ConfigError
from hf_ctxopt.pages.pool import SEALED
from tests.families import VOCAB, build, model_for
from tests.feeding import feed, routed
from tests.modes import Outcome
from tests.test_equality import Cell, _run

TEXT = torch.randint(2, VOCAB, (1, 90), generator=torch.Generator().manual_seed(21))
BITS: list[Any] = [8, 4, 2, {"k": 8, "v": 4}, {"k": 16, "v": 2}, {"k": 4, "v": 16}]
TURNS: list[Any] = [False, True, {"k": True, "v": False}]


def dequantized(cache: PageCache, config: Any) -> DynamicCache:
    """What a cache of one row holds, in the model's basis, as transformers' own cache."""
    plain = DynamicCache(config=config)
    for group in cache.groups:
        for layer in group.layers:
            storage = group.storages[layer]
            parts = [storage.read(stretch) for stretch in group.rows[0].stretches(group.page_size, 0)]
            keys, values = (torch.cat(part, dim=1)[None] for part in zip(*parts, strict=True))
            plain.update(*storage.plain(keys, values), layer)
    return plain


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("rotate", TURNS, ids=str)
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_decoding_equals_the_reference_on_the_dequantized_pages(bits: Any, rotate: Any, route: str) -> None:
    model = model_for("llama", "quantized")
    options = {"page_size": 8, "kv_bits": bits, "rotate": rotate}
    with routed(route, model, "ctx_paged", **options), torch.no_grad():
        cache = hf_ctxopt.make_cache(model, "ctx_paged", **options)
        feed(model, TEXT[:, :83], cache, 20)
        plain = dequantized(cache, model.config)
        found = feed(model, TEXT[:, 83:84], cache, 1)
    assert cache.stats()["pages"]["sealed"] == 9
    expected = feed(model, TEXT[:, 83:84], plain, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gemma2"])
def test_more_bits_come_closer_to_the_model(family: str, route: str) -> None:
    """Quantized history is read at all, and 8 bits are all but exact, whatever the chunks."""
    model = model_for(family, "quantized")
    dense = feed(model, TEXT, DynamicCache(config=model.config), 90)
    errors = {}
    for bits in (8, 4, 2):
        options = {"page_size": 8, "kv_bits": bits}
        with routed(route, model, "ctx_paged", **options):
            for chunk in (1, 13, 16):
                cache = hf_ctxopt.make_cache(model, "ctx_paged", **options)
                found = feed(model, TEXT, cache, chunk, prefill=0 if chunk > 1 else 60)
                errors[bits, chunk] = (found - dense)[:, 60:].abs().mean().item()
                cache.check_integrity()
    for chunk in (1, 13, 16):
        assert 0 < errors[8, chunk] < 0.02
        assert errors[8, chunk] < errors[4, chunk] / 4
        assert errors[4, chunk] < errors[2, chunk]


def same_until_apart(expected: Outcome, got: Outcome, tolerance: float) -> None:
    """Logits agree within `tolerance`, row by row, until a row's tokens part at a near-tie."""
    steps = expected.logits.shape[0]
    for row in range(len(expected.sequences)):
        apart = (expected.sequences[row, -steps:] != got.sequences[row, -steps:]).nonzero()
        shared = steps if len(apart) == 0 else int(apart[0]) + 1
        difference = (got.logits[:shared, row] - expected.logits[:shared, row]).abs().max().item()
        assert difference < tolerance, row


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("mode", ["left_padding", "prefill_chunk", "assisted", "prompt_lookup", "multi_turn"])
@pytest.mark.parametrize(
    ("family", "cache"),
    [("llama", "ctx_paged"), ("llama", "ctx_sink"), ("gemma3", "ctx_paged"), ("gpt_oss", "ctx_paged")],
)
def test_generate_with_8_bits_says_what_16_bits_say(family: str, cache: str, mode: str, route: str) -> None:
    options: dict[str, Any] = {"page_size": 4}
    if cache == "ctx_sink":
        options |= {"window": 12, "sinks": 2, "n_discard": 3 if route == "fused" and mode != "assisted" else None}
    cell = Cell(family, mode, cache, route)
    expected, got = _run(cell, options), _run(cell, {**options, "kv_bits": 8})
    if mode in ("assisted", "prompt_lookup"):
        assert torch.equal(expected.sequences, got.sequences)
    else:
        same_until_apart(expected, got, 0.15)
    held: PageCache = got.cache
    held.check_integrity()
    assert held.stats()["pages"]["sealed"] > 0
    assert held.stats()["kv_bits"] == {"k": 8, "v": 8}
    if mode not in ("assisted", "prompt_lookup"):  # there the last candidates stay open
        assert held.nbytes < expected.cache.nbytes


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beams_share_sealed_pages(family: str, route: str) -> None:
    """Scores of beams are close; the beams themselves may part at a near-tie."""
    cell, options = Cell(family, "beams", "ctx_paged", route), {"page_size": 4}
    expected, got = _run(cell, options), _run(cell, {**options, "kv_bits": 8})
    assert (expected.logits[0] - got.logits[0]).abs().max() < 1e-4  # the prompt meets its own exact states
    assert got.cache.stats()["pages"]["shared"] > 0
    got.cache.check_integrity()


def page_hashes(cache: PageCache) -> dict[tuple[int, int], str]:
    """Layer and logical page → hash of the sealed page's codes and scales, of row 0."""
    found = {}
    for group in cache.groups:
        for layer, storage in group.storages.items():
            for logical, page in group.rows[0].pages():
                if page >= SEALED:
                    tensors = [tensor[:, page - SEALED] for part in storage.parts for tensor in part.tensors]
                    data = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
                    found[layer, logical] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("bits", [8, {"k": 4, "v": 2}], ids=str)
def test_sealed_pages_never_change(bits: Any) -> None:
    """Over 2,000 further tokens, in chunks and in single steps, through growth of the storage."""
    model = build("llama", max_position_embeddings=4096)
    cache = hf_ctxopt.make_cache(model, "ctx_paged", kv_bits=bits, page_size=16)
    ids = torch.randint(2, VOCAB, (1, 2100), generator=torch.Generator().manual_seed(3))
    known: dict[tuple[int, int], str] = {}
    start = 0
    for chunk in [100, 1, 7, 250, *[1] * 40, 333, 500, *[1] * 20, 600, 249]:
        feed(model, ids[:, start : start + chunk], cache, chunk)
        start += chunk
        now = page_hashes(cache)
        assert all(now[key] == value for key, value in known.items())
        known |= now
    assert (start, len(known)) == (2100, 2 * (2100 // 16 - 1))


@pytest.mark.parametrize("route", ["dense", "fused"])
@pytest.mark.parametrize("back", [1, 3, 8, 9, 40])
def test_text_taken_back_into_sealed_pages_can_be_read_again(back: int, route: str) -> None:
    model = model_for("llama", "quantized")
    options = {"page_size": 8, "kv_bits": 8}
    with routed(route, model, "ctx_paged", **options):
        cache, whole = (hf_ctxopt.make_cache(model, "ctx_paged", **options) for _ in range(2))
        expected = feed(model, TEXT, whole, 30)
        feed(model, TEXT[:, :60], cache, 30)
        cache.crop(-back)
        cache.check_integrity()
        found = feed(model, TEXT[:, 60 - back :], cache, 11)
        cache.check_integrity()
    assert (found - expected[:, 60 - back :]).abs().max() < 0.1
    assert cache.stats()["tokens_held"] == 90


def test_a_head_size_that_cannot_be_packed_is_refused_before_memory_is_taken() -> None:
    model = build("llama", head_dim=6)
    cache = hf_ctxopt.make_cache(model, "ctx_paged", kv_bits=2)
    with pytest.raises(ConfigError, match="head size 6 does not fill whole bytes"):
        feed(model, TEXT, cache, 90)
    assert cache.nbytes == 0
    feed(model, TEXT, hf_ctxopt.make_cache(model, "ctx_paged", kv_bits=4), 90)


def test_sinks_stay_open_unless_asked() -> None:
    model = model_for("llama", "quantized")
    first = {}
    for seal in (False, True):
        cache = hf_ctxopt.make_cache(model, "ctx_sink", kv_bits=8, page_size=4, sinks=6, window=30, seal_sinks=seal)
        feed(model, TEXT, cache, 7)
        cache.check_integrity()
        first[seal] = [page >= SEALED for logical, page in cache.groups[0].rows[0].pages() if logical < 2]
    assert first == {False: [False, False], True: [True, True]}
