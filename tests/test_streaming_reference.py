"""The StreamingLLM reference itself, checked without any cache of ours.

Three independent views of the same thing: no eviction is the plain model; no sinks is the plain model under a band
mask (RoPE is relative); one layer is the model run on the kept tokens as a text of their own.
"""

from __future__ import annotations

import pytest
import torch

from tests.families import VOCAB, build
from tests.streaming_reference import contiguous_logits, streaming_logits

LLAMAS = ["llama", "llama3_rope", "yarn_rope", "linear_rope", "dynamic_rope"]
TEXT = torch.randint(2, VOCAB, (60,), generator=torch.Generator().manual_seed(3))


def _close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", LLAMAS)
def test_with_room_for_all_it_is_the_plain_model(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        plain = model(TEXT[None], use_cache=False).logits[0]
    _close(streaming_logits(model, TEXT, sinks=4, window=56), plain)
    _close(streaming_logits(model, TEXT, sinks=4, window=100), plain)


@pytest.mark.parametrize("window", [1, 5, 16])
def test_without_sinks_it_is_a_band_mask(window: int) -> None:
    model = build("llama", attn="eager")
    place = torch.arange(len(TEXT))
    gap = place[:, None] - place[None]
    mask = torch.where((gap >= 0) & (gap < window), 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        banded = model(TEXT[None], attention_mask=mask[None, None], use_cache=False).logits[0]
    _close(streaming_logits(model, TEXT, sinks=0, window=window), banded)


@pytest.mark.parametrize("family", LLAMAS)
def test_with_one_layer_it_is_the_kept_text_read_anew(family: str) -> None:
    model = build(family, num_hidden_layers=1)
    streamed = streaming_logits(model, TEXT, sinks=4, window=12)
    _close(streamed, contiguous_logits(model, TEXT, sinks=4, window=12))


def test_eviction_and_sinks_both_matter() -> None:
    """The comparison has teeth: another window or other sinks give other logits."""
    model = build("llama")
    streamed = streaming_logits(model, TEXT, sinks=4, window=12)
    for sinks, window in [(3, 13), (4, 13), (0, 16)]:
        other = streaming_logits(model, TEXT, sinks=sinks, window=window)
        assert (streamed - other)[-20:].abs().amax() > 1e-2


def test_a_context_shift_is_the_kept_text_read_anew() -> None:
    """One layer, worked by hand: 2 sinks, 6 more slots, 3 discarded at once whenever 7 are held."""
    model = build("llama", num_hidden_layers=1)
    shifted = streaming_logits(model, TEXT[:20], sinks=2, window=6, n_discard=3)
    held: list[int] = []
    for place in range(20):
        if len(held) == 7:
            held = held[:2] + held[5:]
        held.append(place)
        with torch.no_grad():
            anew = model(TEXT[held][None], use_cache=False).logits[0, -1]
        _close(shifted[place], anew)
