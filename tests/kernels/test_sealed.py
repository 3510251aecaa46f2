"""Attention over sealed pages equals attention over what they decode to."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from hf_ctxopt.kernels import attention, sealed
from hf_ctxopt.kernels.attention import Segment, attend
from hf_ctxopt.kernels.sealed import SealedSegment, SealedTokens
from hf_ctxopt.pages.codec import Codec

HEADS, GROUPS, PAGES, PAGE, KEY_DIM, VALUE_DIM = 2, 3, 5, 8, 16, 8


def part(bits: int, over_tokens: bool, dim: int) -> tuple[SealedTokens, torch.Tensor]:
    """Sealed pages and the states they decode to, `(heads, tokens, dim)`."""
    codec = Codec(bits, over_tokens)
    codes, scales = codec.encode(torch.randn(HEADS, PAGES, PAGE, dim) + 0.5)
    decoded = codec.decode(codes, scales, torch.float32)
    return SealedTokens(codes, scales, bits, over_tokens), decoded.flatten(1, 2)


@pytest.mark.parametrize("piece", [1, 300, 1 << 20])
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_folded_products_equal_those_of_the_decoded_states(bits: int, piece: int) -> None:
    keys, plain_keys = part(bits, True, KEY_DIM)
    values, plain_values = part(bits, False, VALUE_DIM)
    query, weights = torch.randn(HEADS, GROUPS, KEY_DIM), torch.rand(HEADS, GROUPS, PAGES * PAGE)
    with mock.patch.object(sealed, "PIECE", piece):
        torch.testing.assert_close(keys.scores(query), query @ plain_keys.transpose(1, 2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values.mix(weights), weights @ plain_values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("few", [0, 1 << 30])
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_unpacking_gives_the_decoded_states(bits: int, few: int) -> None:
    for over_tokens, dim in ((True, KEY_DIM), (False, VALUE_DIM)):
        tokens, plain = part(bits, over_tokens, dim)
        out = torch.full_like(plain, torch.nan)
        with mock.patch.object(sealed, "_FEW", few):
            tokens.decode(out)
        torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("scratch", [0, 1 << 22])
@pytest.mark.parametrize(("skip", "count"), [(0, PAGES * PAGE), (3, 30), (0, 33)])
@pytest.mark.parametrize("special", [{}, {"softcap": 5.0}, {"sink_logits": torch.ones(HEADS * GROUPS)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_mixed_segments(
    scratch: int, skip: int, count: int, special: dict[str, object], dtype: torch.dtype
) -> None:
    keys, plain_keys = part(8, True, KEY_DIM)
    values, plain_values = part(4, False, VALUE_DIM)
    inside = slice(skip, skip + count)
    tail = torch.randn(HEADS, 3, KEY_DIM, dtype=dtype), torch.randn(HEADS, 3, VALUE_DIM, dtype=dtype)
    query = torch.randn(HEADS * GROUPS, 1, KEY_DIM, dtype=dtype)
    both = [SealedSegment(keys, values, skip, count), Segment(*tail)]
    plain = [
        Segment(plain_keys[:, inside], plain_values[:, inside]),
        Segment(tail[0].float(), tail[1].float()),
    ]
    with mock.patch.object(attention, "SCRATCH", scratch):
        found = attend(query, both, lambda *_: None, 0.3, **special)
    expected = attend(query.float(), plain, lambda *_: None, 0.3, **special)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=0)


def test_a_mask_hides_tokens_of_unpacked_pages() -> None:
    keys, plain_keys = part(8, True, KEY_DIM)
    values, plain_values = part(8, False, VALUE_DIM)
    query, mask = torch.randn(HEADS * GROUPS, 1, KEY_DIM), torch.rand(1, PAGES * PAGE) > 0.5
    found = attend(query, [SealedSegment(keys, values, 0, PAGES * PAGE)], lambda *_: mask, 0.3)
    expected = attend(query, [Segment(plain_keys, plain_values)], lambda *_: mask, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
