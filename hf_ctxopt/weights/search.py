"""Search for the scale of a group of weights: the codes follow from it by rounding.

Round-to-nearest with the scale that just covers the largest weight is not the best: shrinking it a little clips one
weight and serves all the others. As ggml does (`ggml-quants.c`, `make_qkx2_quants` and `make_qx_quants`), a row of
trial scales is rounded with, the least-squares scale of each trial's codes is taken, and the trial of least weighted
squared error wins. All groups are searched at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import inverse

TINY = 1e-15  # groups whose largest weight is below this are stored as zeros


def affine_scales(
    weight: Tensor,
    counts: Tensor,
    top: int,
    first: float = -1.0,
    last: float = 1.0,
    trials: int = 21,
    free: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each group for `weight ~ scale * code + minimum`, codes 0–`top`.

    Args:
        weight: float32 (groups, n).
        counts: float32 (groups, n), non-negative: what each squared error counts.
        top: largest code.
        first, last: trial k has the inverse scale (top + t) / range, t going from `first` to `last`.
        trials: how many.
        free: the minimum may be positive; otherwise it is at most zero (K-blocks store its negative unsigned).

    Returns:
        scale (groups, 1) >= 0 and minimum (groups, 1).
    """
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if not free:
        low = low.clamp(max=0)
    width = high - low
    per = inverse(width)
    s_w = counts.sum(1, keepdim=True)
    weighted = counts * weight
    s_x, s_xx = weighted.sum(1, keepdim=True), (weighted * weight).sum(1, keepdim=True)
    scale, minimum, best = width / top, low, torch.full_like(low, torch.inf)
    steps = torch.linspace(first, last, trials).tolist() if trials > 1 else [first]
    for step in (0.0, *steps):
        # From the best minimum so far: least squares has often moved it off the smallest weight.
        codes = ((weight - minimum) * (per * (top + step))).round_().clamp_(0, top)
        counted = counts * codes
        s_l, s_ll = counted.sum(1, keepdim=True), (counted * codes).sum(1, keepdim=True)
        s_lx = (counted * weight).sum(1, keepdim=True)
        determinant = s_w * s_ll - s_l * s_l
        solvable = determinant > 0
        determinant = torch.where(solvable, determinant, 1)
        trial = (s_w * s_lx - s_x * s_l) / determinant
        base = (s_ll * s_x - s_l * s_lx) / determinant
        if not free:
            above = base > 0
            trial = torch.where(above, s_lx / torch.where(s_ll > 0, s_ll, 1), trial)
            base = base.clamp(max=0)
        error = trial * trial * s_ll + base * base * s_w + s_xx + 2 * (trial * base * s_l - trial * s_lx - base * s_x)
        better = solvable & (error < best) & (trial >= 0)
        scale, minimum = torch.where(better, trial, scale), torch.where(better, base, minimum)
        best = torch.where(better, error, best)
    return scale, minimum


def symmetric_scale(weight: Tensor, counts: Tensor, half: int, trials: int = 19) -> Tensor:
    """Signed scale of each group for `weight ~ scale * code`, codes -`half` to `half` - 1.

    Args:
        weight: float32 (groups, n).
        counts: float32 (groups, n), non-negative.
        half: half the number of codes.
        trials: how many scales; with them the largest weight lies between 3/4 of the codes and one code beyond.
            ggml stays within 0.9 codes of the last, which at 64 codes misses a tenth of the error.

    Returns:
        (groups, 1); the largest weight gets the code -`half`, so the scale's sign is opposite to that weight's.
    """
    peak = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    dead = peak.abs() < TINY
    per = inverse(torch.where(dead, 0, peak))
    scale, best = torch.zeros_like(peak), torch.full_like(peak, -1.0)
    for step in (0.0, *torch.linspace(-half / 4, 1, trials).tolist()):
        codes = (weight * (per * -(half + step))).round_().clamp_(-half, half - 1)
        counted = counts * codes
        s_ll = (counted * codes).sum(1, keepdim=True)
        s_lx = (counted * weight).sum(1, keepdim=True)
        # The squared error falls by s_lx^2 / s_ll.
        trial = s_lx / torch.where(s_ll > 0, s_ll, 1)
        gain = trial * s_lx
        better = (gain > best) & (s_ll > 0)
        scale, best = torch.where(better, trial, scale), torch.where(better, gain, best)
    return torch.where(dead, 0, scale)
