"""Rotations of tensors that are rotated already: laws, layouts, and how exact they are far out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_ctxopt.kernels.rotate import RotaryFacts, rotate

HEADS, SEQ, HEAD_DIM = 2, 5, 16


def facts(width: int = HEAD_DIM, start: int = 0, interleaved: bool = False) -> RotaryFacts:
    """Facts of a rotary embedding over `width` channels from `start` on, base 10,000."""
    inv_freq = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return RotaryFacts(lambda: inv_freq.to(torch.float32), start, interleaved)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(states: Tensor, delta: Tensor, rotary: RotaryFacts) -> Tensor:
    """The rotation pair by pair, as complex numbers, in float64. `delta` is `(seq,)`."""
    inv_freq = rotary.inv_freq().to(torch.float64)
    out, count = states.to(torch.float64).clone(), inv_freq.numel()
    for pair in range(count):
        one = rotary.start + (2 * pair if rotary.interleaved else pair)
        two = one + (1 if rotary.interleaved else count)
        turned = torch.complex(out[..., one], out[..., two]) * torch.polar(
            torch.ones_like(delta, dtype=torch.float64), delta.to(torch.float64) * inv_freq[pair]
        )
        out[..., one], out[..., two] = turned.real, turned.imag
    return out


LAYOUTS = [
    pytest.param(facts(), id="half"),
    pytest.param(facts(interleaved=True), id="interleaved"),
    pytest.param(facts(width=6), id="partial"),
    pytest.param(facts(width=6, start=10), id="partial-at-the-end"),
    pytest.param(facts(width=6, start=4, interleaved=True), id="partial-interleaved-in-the-middle"),
]


@pytest.mark.parametrize("rotary", LAYOUTS)
def test_channels_are_paired_and_turned_as_the_layout_says(rotary: RotaryFacts) -> None:
    states = draw(HEADS, SEQ, HEAD_DIM)
    for delta in (0, 1, -3, 1000):
        expected = exact(states, torch.full((SEQ,), delta), rotary)
        torch.testing.assert_close(rotate(states, delta, rotary).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rotary", LAYOUTS)
def test_other_channels_pass_through_bit_for_bit(rotary: RotaryFacts) -> None:
    states = draw(HEADS, SEQ, HEAD_DIM, dtype=torch.bfloat16)
    turned = rotate(states, 17, rotary)
    stop = rotary.start + 2 * rotary.inv_freq().numel()
    assert torch.equal(turned[..., : rotary.start], states[..., : rotary.start])
    assert torch.equal(turned[..., stop:], states[..., stop:])
    assert (turned.shape, turned.dtype) == (states.shape, states.dtype)
    assert not torch.equal(turned[..., rotary.start : stop], states[..., rotary.start : stop])


def test_the_two_pairings_differ() -> None:
    states = draw(HEADS, SEQ, HEAD_DIM)
    assert (rotate(states, 5, facts()) - rotate(states, 5, facts(interleaved=True))).abs().max() > 0.1


@pytest.mark.parametrize("rotary", LAYOUTS)
@pytest.mark.parametrize(("first", "second"), [(3, 4), (100, -37), (-9, 9), (123_456, -123_000)])
def test_turning_twice_is_turning_by_the_sum(first: int, second: int, rotary: RotaryFacts) -> None:
    states = draw(HEADS, SEQ, HEAD_DIM)
    twice = rotate(rotate(states, first, rotary), second, rotary)
    torch.testing.assert_close(twice, rotate(states, first + second, rotary), atol=2e-6, rtol=0)


def test_turning_by_nothing_changes_nothing_and_lengths_stay() -> None:
    states = draw(HEADS, SEQ, HEAD_DIM)
    assert torch.equal(rotate(states, 0, facts()), states)
    turned = rotate(states, 777, facts())
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))


def test_scores_depend_on_the_distance_only() -> None:
    query, key = draw(1, 1, HEAD_DIM, seed=1), draw(1, 1, HEAD_DIM, seed=2)
    near = (rotate(query, 9, facts()) * rotate(key, 2, facts())).sum()
    far = (rotate(query, 1_000_009, facts()) * rotate(key, 1_000_002, facts())).sum()
    turned = (rotate(query, 7, facts()) * key).sum()
    torch.testing.assert_close(torch.stack([near, far]), turned.expand(2), atol=1e-5, rtol=0)


def test_each_token_can_turn_by_its_own_number_of_positions() -> None:
    states = draw(3, HEADS, SEQ, HEAD_DIM)
    per_token = torch.tensor([0, 5, -2, 4_000_000, 1])
    expected = exact(states, per_token, facts())
    torch.testing.assert_close(rotate(states, per_token, facts()).double(), expected, atol=2e-6, rtol=0)
    per_row = torch.arange(3)[:, None, None].expand(3, 1, SEQ)  # broadcasts over the heads
    turned = rotate(states, per_row, facts())
    for row in range(3):
        torch.testing.assert_close(turned[row], rotate(states[row], row, facts()))


@pytest.mark.parametrize("rotary", LAYOUTS)
def test_four_million_positions_are_exact(rotary: RotaryFacts) -> None:
    states = draw(HEADS, SEQ, HEAD_DIM)
    for delta in (4_000_000, -4_000_000, 3_999_999):
        expected = exact(states, torch.full((SEQ,), delta), rotary)
        torch.testing.assert_close(rotate(states, delta, rotary).double(), expected, atol=2e-6, rtol=0)


def test_angles_in_float32_would_not_be() -> None:
    """The bar above is one that plain float32 misses: the test of the test."""
    delta, inv_freq = 3_999_999, facts().inv_freq()
    careless = (torch.tensor(float(delta)) * inv_freq).cos().double()
    careful = (torch.tensor(float(delta), dtype=torch.float64) * inv_freq.double()).cos()
    assert (careless - careful).abs().max() > 1e-3


def test_one_shot_is_exact_in_bf16_where_steps_are_not() -> None:
    states, steps = draw(HEADS, 64, HEAD_DIM, dtype=torch.bfloat16), 1000
    expected = exact(states, torch.full((64,), steps), facts())
    once = (rotate(states, steps, facts()).double() - expected).abs().max()
    stepped = states
    for _ in range(steps):
        stepped = rotate(stepped, 1, facts())
    drift = (stepped.double() - expected).abs().max()
    assert once < 2**-7 * states.abs().max()  # one rounding to bf16
    assert drift > 10 * once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_only_error_is_the_rounding_of_the_result(dtype: torch.dtype) -> None:
    states = draw(HEADS, SEQ, HEAD_DIM, dtype=dtype)
    expected = exact(states, torch.full((SEQ,), 4321), facts())
    turned = rotate(states, 4321, facts())
    assert turned.dtype == dtype
    error = (turned.double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def test_the_original_is_not_touched() -> None:
    states = draw(HEADS, SEQ, HEAD_DIM)
    before = states.clone()
    rotate(states, 99, facts())
    assert torch.equal(states, before)
