"""The scale search against an exhaustive one on small groups, and what it gains over plain rounding."""

from __future__ import annotations

import pytest
import torch

from hf_ctxopt.weights.codecs import decode, encode
from hf_ctxopt.weights.search import affine_scales, symmetric_scale

GROUPS = 40


def groups(kind: str, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(GROUPS, size, generator=generator)
    if kind == "skewed":
        weight = weight.exp() - 0.5
    if kind == "heavy":
        weight = weight**3
    return weight


def affine_error(weight, counts, scale, minimum, top):
    codes = ((weight - minimum) / scale).round().clamp(0, top)
    return (counts * (scale * codes + minimum - weight).square()).sum(-1)


@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy"])
@pytest.mark.parametrize("top", [15, 31])
def test_affine_search_is_near_the_best(kind, top):
    weight = groups(kind, 32)
    counts = weight.square().mean(1, keepdim=True).sqrt() + weight.abs()
    scale, minimum = affine_scales(weight, counts, top)
    assert (scale >= 0).all()
    assert (minimum <= 0).all()
    found = affine_error(weight, counts, scale, minimum, top)
    low = weight.amin(1, keepdim=True).clamp(max=0)
    width = weight.amax(1, keepdim=True) - low
    best = torch.full_like(found, torch.inf)
    for part in torch.linspace(0.6, 1.1, 121):
        for shift in torch.linspace(0.0, 0.25, 61):
            best = torch.minimum(best, affine_error(weight, counts, width * part / top, low + shift * width, top))
    # `low + shift * width` may be positive, which a K-block cannot hold: the bound is then the harder one to meet.
    assert found.sum().sqrt() <= 1.05 * best.sum().sqrt()
    plain = affine_error(weight, counts, width / top, low, top)
    assert found.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy"])
@pytest.mark.parametrize("half", [8, 16, 32])
def test_symmetric_search_is_near_the_best(kind, half):
    weight = groups(kind, 16)
    counts = weight.square()

    def error(scale):
        codes = (weight / scale).round().clamp(-half, half - 1)
        return (counts * (scale * codes - weight).square()).sum(1)

    found = error(symmetric_scale(weight, counts, half))
    peak = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    best = torch.stack([error(-peak / half * part) for part in torch.linspace(0.7, 1.3, 1001)]).amin(0)
    assert found.sum().sqrt() <= 1.1 * best.sum().sqrt()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_importance_moves_the_error(name):
    """Columns that count more are stored better, and the weighted error falls."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(64, 512, generator=generator)
    importance = torch.where(torch.arange(512) % 4 == 0, 50.0, 0.1)
    without, within = (
        decode(encode(weight, name, share), name).sub(weight).square().mul(importance).sum()
        for share in (None, importance)
    )
    assert within < 0.95 * without
    rows = importance.expand(64, 512)
    assert torch.equal(encode(weight, name, rows), encode(weight, name, importance))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_nothing_and_of_constants(name):
    weight = torch.zeros(4, 256)
    weight[1], weight[2], weight[3, 17] = 0.5, -0.5, 3.0
    restored = decode(encode(weight, name), name)
    assert restored.isfinite().all()
    assert torch.equal(restored[0], weight[0])
    torch.testing.assert_close(restored, weight, rtol=0.02, atol=0.02)
