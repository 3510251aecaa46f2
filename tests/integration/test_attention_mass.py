"""Sums over attention, against probabilities that are known because the scores are their logarithms."""

from __future__ import annotations

import math

import pytest
import torch

from hf_ctxopt.caches.options import PageOptions
from hf_ctxopt.integration import attention_mass
from hf_ctxopt.integration.attention_mass import Scored, outside, stored
from hf_ctxopt.policies.sink_window import SinkWindow


def known(probabilities: list[float]) -> Scored:
    """One head, one query, keys with these probabilities."""
    key = torch.tensor(probabilities).log().view(1, -1, 1)
    value = torch.arange(len(probabilities), dtype=torch.float32).view(1, -1, 1)
    return Scored(torch.ones(1, 1, 1), key, value, 1.0)


def test_mass_outside_of_sinks_and_window_is_what_was_put_there() -> None:
    call = known([1 / 2, 1 / 8, 1 / 16, 1 / 16, 1 / 8, 1 / 16, 1 / 32, 1 / 32])
    (_, found), *rest = call.blocks()
    assert not rest
    last = torch.tensor([7])
    mass = outside(found, last, 0, 1, (1, 2, 4, 6, 7, 100))[:, 0, 0]
    assert mass[:4].tolist() == pytest.approx([15 / 32, 7 / 16, 1 / 4, 1 / 8], abs=1e-6)
    assert mass[4:].isnan().all()  # sinks and window hold the whole text
    assert call.outputs()[0, 0, 0] == pytest.approx(1 / 8 + 2 / 16 + 3 / 16 + 4 / 8 + 5 / 16 + 6 / 32 + 7 / 32)


def test_keys_that_the_model_has_dropped_lie_outside_no_longer() -> None:
    """A sliding layer's call: the first key is the text's sixth, so no sinks are left."""
    found = torch.tensor([1 / 2, 1 / 4, 1 / 4]).view(1, 1, 3)
    mass = outside(found, torch.tensor([7]), 5, 4, (1, 2, 3))[:, 0, 0]
    assert mass.tolist() == pytest.approx([3 / 4, 1 / 2, 0])


def test_blocks_are_what_attention_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, additive and bool masks, a cap and learned sinks, cut into blocks of one query."""
    heads, kv_heads, queries, keys = 4, 2, 5, 9
    query, key, value = torch.randn(heads, queries, 8), torch.randn(kv_heads, keys, 8), torch.randn(kv_heads, keys, 6)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None]
    drains = torch.randn(heads)
    wide = key.repeat_interleave(2, 0)
    scores = 3 * torch.tanh(query @ wide.transpose(1, 2) * 0.4 / 3)
    scores = scores.masked_fill(~seen, -torch.inf)
    expected = torch.cat([scores, drains.view(-1, 1, 1).expand(-1, queries, 1)], -1).softmax(-1)[..., :-1]
    monkeypatch.setattr(attention_mass, "BLOCK", heads * keys)
    for mask in (seen, torch.zeros(1, queries, keys).masked_fill(~seen, -torch.inf)):
        call = Scored(query, key, value, 0.4, mask, 3.0, drains)
        blocks = list(call.blocks())
        assert len(blocks) == queries
        assert torch.allclose(torch.cat([found for _, found in blocks], 1), expected, atol=1e-6)
        assert torch.allclose(call.outputs(), expected @ value.repeat_interleave(2, 0), atol=1e-5)
        some = torch.tensor([1, 4])
        assert torch.allclose(call.of(some).outputs(), call.outputs()[:, some], atol=1e-6)


def test_pages_in_between_are_what_a_cache_gives_back() -> None:
    states, page = torch.randn(2, 100, 16), 16
    for part in "kv":
        for bits in (8, 4, 2):
            codecs = PageOptions(page_size=page, kv_bits=bits).codecs(SinkWindow())
            assert codecs is not None
            found = stored(states, codecs, part, page)
            assert torch.equal(found[:, :page], states[:, :page])
            assert torch.equal(found[:, 96:], states[:, 96:])
            change = (found - states)[:, page:96].norm() / states[:, page:96].norm()
            assert 0 < change < {8: 0.01, 4: 0.15, 2: 0.7}[bits]
    assert torch.equal(stored(states[:, :20], codecs, "k", page), states[:, :20])


def test_error_of_fewer_bits_is_the_change_of_the_output() -> None:
    call = Scored(torch.randn(2, 3, 16), torch.randn(1, 64, 16), torch.randn(1, 64, 16), 0.25)
    errors = []
    for bits in (16, 8, 4, 2):
        codecs = PageOptions(page_size=16, kv_bits={"k": bits, "v": 8}).codecs(SinkWindow())
        assert codecs is not None
        errors.append(math.sqrt(call.error(codecs, 16)))
    assert errors == sorted(errors)
    assert errors[0] > 0  # V at 8 bits
