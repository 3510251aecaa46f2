"""Manual loops: feed a text to a model in chunks, through a cache, and gather the logits of every position."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import hf_ctxopt
from hf_ctxopt.integration.compat import generate_argument


def routed(route: str, model: nn.Module, cache: str, **options: Any) -> AbstractContextManager[Any]:
    """Context in which the model takes one route: as it is, or patched for `cache`."""
    if route == "dense":
        return nullcontext(model)
    return hf_ctxopt.patched(model, cache=cache, **options)


def pad_left(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `(batch, seq)` of texts of unequal length, pads (token 0) on the left."""
    seq = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(seq - len(row)), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(seq - len(row)), torch.ones_like(row)]) for row in rows])
    return ids, mask


def cuts(seq: int, chunk: int, prefill: int = 0) -> list[tuple[int, int]]:
    """Bounds of the chunks of a text: `prefill` tokens at once if any, then `chunk` at a time."""
    starts = [0, *range(prefill, seq, chunk)] if prefill else list(range(0, seq, chunk))
    return list(zip(starts, [*starts[1:], seq], strict=True))


@torch.no_grad()
def feed(
    model: nn.Module, ids: torch.Tensor, cache: Any, chunk: int, prefill: int = 0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits `(batch, seq, vocab)` of a text `(batch, seq)` fed in chunks; those of pads mean nothing.

    Positions are left to the model where there is no padding; else they count each row's real tokens, as generate
    does.
    """
    logits = []
    for start, end in cuts(ids.shape[1], chunk, prefill):
        more: dict[str, Any] = {}
        if mask is not None:
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            more = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        logits.append(model(ids[:, start:end], use_cache=True, **{generate_argument(): cache}, **more).logits)
    return torch.cat(logits, dim=1)
