"""Draws the result of `ctxopt bench`: bytes held, and time per token along the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_ctxopt.errors import CtxoptError

MEBIBYTE = 1024**2


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the plot as PNG.

    Raises:
        CtxoptError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CtxoptError("--plot needs matplotlib: pip install matplotlib") from error
    rows, context = result["caches"], result["context"]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    memory.bar([row["cache"] for row in rows], [row["bytes_held"] / MEBIBYTE for row in rows], color="tab:blue")
    memory.set(ylabel="cache, MiB held", title=f"After {context + result['new_tokens'] - 1:,} tokens")
    for row in rows:
        times = row["ms_by_token"]
        speed.plot(range(context + 1, context + 1 + len(times)), times, label=row["cache"], linewidth=1)
    speed.set(xlabel="tokens seen", ylabel="ms per token", title="Decoding")
    speed.set_ylim(bottom=0)
    speed.legend()
    figure.savefig(path, dpi=110)
