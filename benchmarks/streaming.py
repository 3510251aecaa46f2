"""Several caches read one text in lockstep; the first reader is the dense model that the others are held against.

Most of the text goes in by chunks, which is quick. At marks along the way a short burst of true one-token steps is
timed, the readers taking turns at every token, so that all of them meet the same state of the machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from common import CACHE, held_bytes, progress
from measure import kl_divergence, nll, now


@dataclass(kw_only=True)
class Reader:
    """One cache with the model that fills it, and what was seen while it read.

    Attributes:
        nll: per segment, nats of each next token, shape `(seq,)`.
        kl: per segment, KL(dense || this) in nats at each position, shape `(seq,)`.
        same_top: per segment, whether the most likely next token is the dense model's, shape `(seq,)`.
        held: `(tokens seen, bytes held)` after each segment.
        burst_ms: `(tokens seen, median ms per token)` of each timed burst.
    """

    name: str
    model: Any
    cache: Any
    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    same_top: list[torch.Tensor] = field(default_factory=list)
    held: list[tuple[int, int]] = field(default_factory=list)
    burst_ms: list[tuple[int, float]] = field(default_factory=list)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Feeds ids `(1, seq)` and returns the logits `(seq, vocab)`."""
        logits: torch.Tensor = self.model(ids, **{CACHE: self.cache}, use_cache=True).logits[0]
        return logits

    def score(self, logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor) -> None:
        """Keeps NLL, KL and top-1 agreement of one segment; the text's last token has no target."""
        self.nll.append(nll(logits[: targets.numel()], targets))
        self.kl.append(kl_divergence(dense, logits))
        self.same_top.append(logits.argmax(-1) == dense.argmax(-1))

    def summary(self, first: int) -> dict[str, Any]:
        """Returns the figures of the table; quality counts positions from `first` on."""
        return {
            "cache": self.name,
            "bytes_held": self.held[-1][1],
            "bytes_held_series": self.held,
            "ms_per_token_start": self.burst_ms[0][1],
            "ms_per_token_end": self.burst_ms[-1][1],
            "ms_per_token_series": self.burst_ms,
            "kl_vs_dense": torch.cat(self.kl)[first:].mean().item(),
            "top1_agreement": torch.cat(self.same_top)[first:].float().mean().item(),
            "perplexity": math.exp(torch.cat(self.nll)[first:].mean().item()),
            "perplexity_whole_text": math.exp(torch.cat(self.nll).mean().item()),
        }


def segments(total: int, *, chunk: int, burst: int, every: int) -> list[tuple[int, int, bool]]:
    """Returns `(start, end, timed)` pieces that cover `total` tokens: chunks, with a burst at each mark.

    The first burst follows the first chunk, the last one ends the text, the others stand `every` tokens apart.
    """
    marks = sorted({chunk, *range(every, total - burst - chunk, every), total - burst})
    pieces: list[tuple[int, int, bool]] = []
    position = 0
    while position < total:
        if position in marks:
            pieces.append((position, position + burst, True))
        else:
            following = [mark for mark in marks if mark > position]
            pieces.append((position, min(position + chunk, *following, total), False))
        position = pieces[-1][1]
    return pieces


@torch.no_grad()
def read_together(readers: list[Reader], ids: torch.Tensor, *, chunk: int, burst: int, every: int) -> None:
    """Lets all readers read ids `(1, seq)` in lockstep and fills their records. `readers[0]` is the dense model."""
    pieces = segments(ids.shape[1], chunk=chunk, burst=burst, every=every)
    for start, end, timed in progress(pieces, "reading"):
        logits = _timed_burst(readers, ids, start, end) if timed else _chunk(readers, ids, start, end)
        targets = ids[0, start + 1 : end + 1]
        for reader, own in zip(readers, logits, strict=True):
            reader.score(own, logits[0], targets)
            reader.held.append((end, held_bytes(reader.cache)))


def _chunk(readers: list[Reader], ids: torch.Tensor, start: int, end: int) -> list[torch.Tensor]:
    return [reader.step(ids[:, start:end]) for reader in readers]


def _timed_burst(readers: list[Reader], ids: torch.Tensor, start: int, end: int) -> list[torch.Tensor]:
    """Reads tokens one by one, the order of the readers turning at each; the first token only warms up."""
    logits: list[list[torch.Tensor]] = [[] for _ in readers]
    times: list[list[float]] = [[] for _ in readers]
    for position in range(start, end):
        for index in _turned(len(readers), position):
            token = ids[:, position : position + 1]
            begin = now()
            logits[index].append(readers[index].step(token))
            times[index].append(now() - begin)
    for reader, taken in zip(readers, times, strict=True):
        reader.burst_ms.append((start, 1000 * statistics.median(taken[1:] or taken)))
    return [torch.cat(rows) for rows in logits]


def _turned(count: int, by: int) -> Iterator[int]:
    return ((by + i) % count for i in range(count))


def rolling(values: torch.Tensor, width: int) -> tuple[list[int], list[float]]:
    """Returns positions and means of consecutive stretches of `width` values, for plots."""
    whole = values[: values.numel() // width * width].float().view(-1, width)
    return [width * (i + 1) for i in range(whole.shape[0])], whole.mean(-1).tolist()
