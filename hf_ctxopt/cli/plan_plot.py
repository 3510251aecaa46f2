"""Draws what `ctxopt plan` found: memory by part against context, and the card's limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_ctxopt.errors import CtxoptError

if TYPE_CHECKING:
    from hf_ctxopt.planner.facts import ModelFacts
    from hf_ctxopt.planner.plan import Plan

GIBIBYTE = 2**30
POINTS = 48


def draw(facts: ModelFacts, found: Plan, path: Path) -> None:
    """Writes the plot as PNG.

    Raises:
        CtxoptError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CtxoptError("--plot needs matplotlib: pip install matplotlib") from error
    from hf_ctxopt.planner.curve import curve
    from hf_ctxopt.planner.words import PART_NAMES

    contexts = grid(found)
    parts = curve(facts, found, contexts)
    # What stands still below what grows, so that the growing part meets the limit.
    names = [name for name in found.bytes if name != "kv" and found.bytes[name]] + ["kv"]
    heights = [[part[name] / GIBIBYTE for part in parts] for name in names]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(contexts, heights, labels=[PART_NAMES[name] for name in names], alpha=0.85)
    limit = found.vram / GIBIBYTE
    axes.axhline(limit, color="black", linewidth=1.2, label=f"{found.device}: {limit:.3g} GiB")
    axes.axvline(found.context, color="black", linewidth=0.8, linestyle=":", label=f"planned: {found.context:,}")
    axes.set(xlabel="tokens of context", ylabel="GiB", xlim=(contexts[0], contexts[-1]))
    axes.set_ylim(0, max(limit * 1.08, max(map(sum, zip(*heights, strict=True))) * 1.02))
    bits = found.kv_bits
    axes.set_title(f"{Path(found.model).name}: {found.weights} weights, {bits['k']}/{bits['v']}-bit keys and values")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=110)


def grid(found: Plan) -> list[int]:
    """Returns the contexts to draw: from one page to a quarter beyond what fits."""
    most = max(found.context, found.capacity or found.context) * 5 // 4
    return [max(found.page_size, most * step // POINTS) for step in range(1, POINTS + 1)]
