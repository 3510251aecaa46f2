"""Codecs: what is encoded comes back within half a step, in the layout that kernels read."""

from __future__ import annotations

import pytest
import torch

from hf_ctxopt.errors import ConfigError
from hf_ctxopt.kernels.paged import unpack
from hf_ctxopt.pages.codec import Codec
from hf_ctxopt.pages.rotation import rotate_channels, rotation_matrix
from hf_ctxopt.pages.sealed import Codecs

BITS = [8, 4, 2]


def round_trip(codec: Codec, states: torch.Tensor) -> torch.Tensor:
    return codec.decode(*codec.encode(states), torch.float32)


@pytest.mark.parametrize("over_tokens", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_value_inside_the_range_is_within_half_a_step(bits: int, over_tokens: bool) -> None:
    codec = Codec(bits, over_tokens)
    states = torch.randn(2, 3, 32, 64) * 3 + 1
    axis = -2 if over_tokens else -1
    found = round_trip(codec, states)
    low, high = states.aminmax(dim=axis, keepdim=True)
    margin = (high - low) * codec.margin
    inside = (states >= low + margin) & (states <= high - margin)
    step = (high - low - 2 * margin) / (2**bits - 1)
    error = (found - states).abs()
    assert (error <= 0.51 * step + 2e-3 * states.abs().amax(axis, keepdim=True))[inside].all()
    assert inside.float().mean() > (0.99 - 2 * codec.margin if bits > 2 else 0.7)
    assert (error <= step / 2 + margin + 0.02).all()  # what lies outside is brought to the edge


@pytest.mark.parametrize("bits", BITS)
def test_more_bits_err_less(bits: int) -> None:
    states = torch.randn(4, 32, 64)
    error = (round_trip(Codec(bits, over_tokens=True), states) - states).square().mean()
    assert {8: 0, 4: 2e-3, 2: 2e-2}[bits] <= error <= {8: 1e-4, 4: 1e-2, 2: 0.2}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_in_planes(bits: int) -> None:
    """Byte `e` of a token holds channel `e + i * bytes` in its `i`-th bits; the kernels' own unpacking agrees."""
    codec = Codec(bits, over_tokens=True)
    states = torch.arange(32)[:, None] * torch.ones(64) % (2**bits)
    codes, scales = codec.encode(states + torch.arange(64))
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (32, 64 * bits // 8), (2, 64))
    assert torch.equal(codec.unpack(codes).to(torch.int16), unpack(codes, bits))
    width = codes.shape[1]
    for channel in (0, 1, width - 1, 63):
        plane, byte = divmod(channel, width)
        expected = (codes[:, byte] >> (bits * plane)) & (2**bits - 1)
        assert torch.equal(codec.unpack(codes)[:, channel], expected)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-3, 7e4, -1e9])
@pytest.mark.parametrize("bits", BITS)
def test_constant_and_huge_groups_stay_finite(bits: int, value: float) -> None:
    states = torch.full((1, 32, 64), value)
    for over_tokens in (True, False):
        found = round_trip(Codec(bits, over_tokens), states)
        assert found.isfinite().all()
        if abs(value) < 65504:
            torch.testing.assert_close(found, states, rtol=1e-3, atol=1e-3)


def test_one_outlier_channel_costs_the_other_channels_of_k_nothing() -> None:
    states = torch.randn(32, 64)
    outlier = states.clone()
    outlier[:, 7] *= 1000
    codec, others = Codec(4, over_tokens=True), torch.arange(64) != 7
    assert torch.equal(round_trip(codec, states)[:, others], round_trip(codec, outlier)[:, others])


def test_sixteen_bits_keep_the_states_themselves() -> None:
    states = torch.randn(2, 32, 64, dtype=torch.bfloat16)
    codes, scales = Codec(16, over_tokens=True).encode(states)
    assert codes is states
    assert scales.numel() == 0


@pytest.mark.parametrize(("bits", "size"), [(4, 63), (2, 62), (2, 6)])
def test_a_head_size_that_does_not_fill_bytes_is_refused(bits: int, size: int) -> None:
    codecs = Codecs(Codec(bits, over_tokens=True), Codec(8, over_tokens=False))
    states = torch.zeros(1, 1, 1, size)
    with pytest.raises(ConfigError) as caught:
        codecs.check(states, states)
    assert (caught.value.field, caught.value.value) == ("kv_bits['k']", bits)


@pytest.mark.parametrize("size", [64, 96, 80, 128])
def test_the_rotation_is_orthogonal_and_undone(size: int) -> None:
    matrix = rotation_matrix(size, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    states, others = torch.randn(3, size), torch.randn(5, size)
    torch.testing.assert_close(rotate_channels(rotate_channels(states), back=True), states)
    torch.testing.assert_close(
        rotate_channels(states) @ rotate_channels(others).T, states @ others.T, atol=1e-4, rtol=0
    )
