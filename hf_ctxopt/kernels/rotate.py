"""Rotating keys or queries that already carry rotary position embeddings.

RoPE is relative: rotating a key by `delta` positions is the same as having embedded it `delta` positions
later (Su et al. 2021, arXiv 2104.09864, section 3.2). Rotations are always computed in one shot from the
original tensor: step by step, bf16 loses half its digits in a thousand steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryFacts:
    """How one layer's model rotates.

    Args:
        inv_freq: returns the model's current inverse frequencies, `(rotary_dim / 2,)`, radians per position.
        start: first rotated channel of the head (0, or after the un-rotated part).
        interleaved: pairs are channels (0, 1), (2, 3) … instead of (0, n/2), (1, n/2 + 1) ….
    """

    inv_freq: Callable[[], Tensor]
    start: int = 0
    interleaved: bool = False


def rotate(states: Tensor, delta: Tensor | int, facts: RotaryFacts) -> Tensor:
    """`states` as if embedded `delta` positions later.

    Args:
        states: `(..., seq, head_dim)`, rotated already.
        delta: positions; an `int`, or a tensor that broadcasts to `(..., seq)`.
        facts: the layer's rotary facts.

    Returns:
        A new tensor of the same shape and dtype.
    """
    return turn(states, *rotation(delta, facts, states.device), facts)


def rotation(delta: Tensor | int, facts: RotaryFacts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of a rotation by `delta` positions, float32 `(..., rotary_dim / 2)`.

    Angles are computed in float64, so that 4 M positions stay exact.
    """
    positions = torch.as_tensor(delta, device=device, dtype=torch.float64)
    angle = positions[..., None] * facts.inv_freq().to(device=device, dtype=torch.float64)
    return angle.cos().to(torch.float32), angle.sin().to(torch.float32)


def turn(states: Tensor, cos: Tensor, sin: Tensor, facts: RotaryFacts) -> Tensor:
    """Apply a `rotation` to `states`, `(..., seq, head_dim)`; channels that do not rotate pass through."""
    stop = facts.start + 2 * cos.shape[-1]
    turned = states[..., facts.start : stop].to(torch.float32)
    if facts.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = [first * cos - second * sin, second * cos + first * sin]
        turned = torch.stack(pairs, dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    parts = [states[..., : facts.start], turned.to(states.dtype), states[..., stop:]]
    kept = [part for part in parts if part.shape[-1]]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=-1)
