"""Timing, fitting and scoring helpers: a robust slope, NLL, KL and a plot frame."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch


def now() -> float:
    """Returns the clock in seconds, once the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def theil_sen(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns the median slope through all pairs of points: one disturbed point cannot move it far."""
    pairs = combinations(zip(xs, ys, strict=True), 2)
    return statistics.median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x1 != x2)


def relative_drift(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns |slope| x range of `xs`, as a share of the mean of `ys` (0.05 is five per cent)."""
    return abs(theil_sen(xs, ys)) * (max(xs) - min(xs)) / statistics.fmean(ys)


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the nats of each target, shape `(seq,)`, from logits `(seq, vocab)`."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns KL(reference || other) in nats for each row of logits `(seq, vocab)`."""
    log_p = reference.float().log_softmax(-1)
    log_q = other.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def new_figure(panels: int) -> tuple[Any, Any]:
    """Returns a matplotlib figure with panels side by side, drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(4.6 * panels, 3.6), squeeze=False)
    return figure, axes[0]


def save_figure(figure: Any, path: Path) -> Path:
    """Writes the figure as PNG and frees it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
