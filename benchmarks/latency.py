"""Per-token time of `ctx_sink` from 1 k to 16 k tokens is flat; DynamicCache in the same run is not.

A stream is placed at every mark (1 k, 2 k, ... tokens) for both caches, fed there by chunks. Then short blocks of
true one-token steps are timed, all marks and caches taking turns, and each round starts one further: drift of the
machine cannot look like a slope. A block of `ctx_sink` is a whole page of tokens, so opening a page is counted.
Bar: |Theil-Sen slope over the block medians| x range < 5 % of their mean.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import hf_ctxopt
from common import CACHE, arguments, feed, load_smollm2, progress, tiny_llama, twin, verdict, write_results
from measure import new_figure, now, relative_drift, save_figure, theil_sen

BAR = 0.05
MARKS = (1024, 2048, 4096, 8192, 12288, 16384)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the verdict and returns what it wrote as JSON."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    dense = load_smollm2()[0] if args.model == "smollm2" else tiny_llama(vocab=512, seed=args.seed)
    fused = hf_ctxopt.patch_model(twin(dense), cache="ctx_sink", window=args.window, sinks=args.sinks)
    times = _measure(dense, fused, args)
    curves = {name: _curve(args.marks, times, name) for name in ("ctx_sink", "DynamicCache")}
    for name, curve in curves.items():
        pairs = zip(args.marks, curve["ms_per_token"], strict=True)
        print(f"{name:13} ms per token at  " + "  ".join(f"{mark}: {ms:.2f}" for mark, ms in pairs), end="   ")
        print(f"|slope| x range / mean = {curve['drift']:.2%}")
    flat, grows = curves["ctx_sink"]["drift"] < BAR, curves["DynamicCache"]["drift"] >= BAR
    print(f"ctx_sink is flat (< {BAR:.0%}): {verdict(flat)};  DynamicCache is not: {verdict(grows)}")
    _plot(args.marks, curves, args.out / "latency.png")
    figures = {"bar": BAR, "figures": curves, "passed": flat and grows}
    return write_results(args, "latency", args.model, figures)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    # One thread: the model is tiny, and threads that wait for each other make the noise of a busy machine.
    parser.set_defaults(chunk=256, threads=1)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny", help="tiny: a random Llama")
    parser.add_argument("--marks", type=int, nargs="+", default=list(MARKS), help="tokens seen, rising")
    parser.add_argument("--block", type=int, default=32, help="ctx_sink steps in one timed block")
    parser.add_argument("--dense-block", type=int, default=8, help="DynamicCache steps in one timed block")
    parser.add_argument("--rounds", type=int, default=24)
    return parser


def _measure(dense: Any, fused: Any, args: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """Returns ms per token of every block, by (cache, mark)."""
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(0, dense.config.vocab_size, (1, max(args.marks)), generator=generator)
    blocks: dict[tuple[str, int], tuple[Callable[[int], None], int]] = {}
    for mark in progress(args.marks, "filling"):
        sink = hf_ctxopt.make_cache(fused, "ctx_sink", window=args.window, sinks=args.sinks)
        full = DynamicCache(config=dense.config)
        feed(fused, ids[:, :mark], sink, chunk=args.chunk)
        feed(dense, ids[:, :mark], full, chunk=args.chunk)
        blocks["ctx_sink", mark] = (partial(_steps, fused, ids, sink), args.block)
        blocks["DynamicCache", mark] = (partial(_steps, dense, ids, full), args.dense_block)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in blocks}
    # The marks of one cache lie side by side: what the copies of a long DynamicCache do to the processor's caches then
    # meets one mark of ctx_sink a turn, each in its turn, and not the longest marks every time.
    keys = sorted(blocks)
    for turn in progress(range(args.rounds), "timing"):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            steps, count = blocks[key]
            steps(1)  # brings this cache's data near the cores again, untimed
            begin = now()
            steps(count)
            times[key].append(1000 * (now() - begin) / count)
    return times


@torch.no_grad()
def _steps(model: Any, ids: torch.Tensor, cache: Any, count: int) -> None:
    """Feeds `count` tokens one by one."""
    for position in range(count):
        token = ids[:, position : position + 1]
        model(token, **{CACHE: cache}, use_cache=True)


def _curve(marks: list[int], times: dict[tuple[str, int], list[float]], name: str) -> dict[str, Any]:
    medians = [statistics.median(times[name, mark]) for mark in marks]
    return {
        "ms_per_token": medians,
        "slope_ms_per_1k": 1000 * theil_sen(marks, medians),
        "drift": relative_drift(marks, medians),
        "blocks_ms": {str(mark): times[name, mark] for mark in marks},
    }


def _plot(marks: list[int], curves: dict[str, Any], path: Path) -> None:
    figure, (axis,) = new_figure(1)
    for name, curve in curves.items():
        axis.plot(marks, curve["ms_per_token"], marker="o", label=name)
    axis.set(xlabel="tokens seen", ylabel="ms per token (median of blocks)", ylim=(0, None))
    axis.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
