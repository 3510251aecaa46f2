"""Sinks, then text placed J tokens later: SmolLM2 must read it as well at J = 4 M as at J = 0.

`hf_ctxopt.testing.skip(cache, J)` makes a cache believe that J more tokens were seen and evicted, so a stream of four
million tokens need not be run. Bar: mean NLL within 0.5 % of J = 0, on the fused and on the dense route.
Control without the shift: DynamicCache with explicit positions (sinks at 0..3, text from J + 4 on), which is what
keeping the sinks where they were would mean; it must leave the bar.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import DynamicCache

import hf_ctxopt
from common import CACHE, SMOLLM2, arguments, load_smollm2, progress, real_tokens, twin, verdict, write_results
from hf_ctxopt.testing import skip
from measure import nll

BAR = 0.005
JUMPS = (0, 4_000, 60_000, 1_000_000, 4_000_000)
ROUTES = ("fused", "dense", "no shift")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints one line per route and returns what it wrote as JSON."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    dense, tokenizer = load_smollm2()
    fused = hf_ctxopt.patch_model(twin(dense), cache="ctx_sink", window=args.window, sinks=args.sinks)
    ids = real_tokens(tokenizer, args.tokens, start=args.start)
    readers = {
        "fused": lambda jump: _sink(fused, ids, jump, args),
        "dense": lambda jump: _sink(dense, ids, jump, args),
        "no shift": lambda jump: _control(dense, ids, jump, args),
    }
    losses: dict[str, dict[int, float]] = {route: {} for route in ROUTES}
    for route, jump in progress([(route, jump) for route in ROUTES for jump in args.jumps], "jumping"):
        losses[route][jump] = readers[route](jump)
    figures = {route: _figures(by_jump) for route, by_jump in losses.items()}
    for route in ROUTES:
        values = "  ".join(f"J={jump}: {value:.4f}" for jump, value in losses[route].items())
        print(f"{route:9} mean NLL  {values}   worst change {figures[route]['worst']:.3%}")
    kept = all(figures[route]["worst"] <= BAR for route in ROUTES[:2])
    lost = figures["no shift"]["worst"] > BAR
    print(f"within {BAR:.1%} on both routes: {verdict(kept)};  without the shift it is not: {verdict(lost)}")
    payload = {"bar": BAR, "figures": figures, "passed": kept and lost}
    return write_results(args, "position_jump", SMOLLM2, payload)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    # The text is longer than the window, so that the window also moves behind the jump.
    parser.set_defaults(window=256)
    parser.add_argument("--jumps", type=int, nargs="+", default=list(JUMPS), help="the first is the reference")
    parser.add_argument("--tokens", type=int, default=644, help="sinks and text")
    parser.add_argument("--start", type=int, default=3000, help="first token of the text that is read")
    return parser


@torch.no_grad()
def _sink(model: Any, ids: torch.Tensor, jump: int, args: argparse.Namespace) -> float:
    """Returns the mean NLL of the text behind the jump, read through `ctx_sink`."""
    cache = hf_ctxopt.make_cache(model, "ctx_sink", window=args.window, sinks=args.sinks)
    model(ids[:, : args.sinks], **{CACHE: cache})
    skip(cache, jump)
    total = torch.zeros(())
    for start in range(args.sinks, ids.shape[1] - 1, args.chunk):
        piece = ids[:, start : min(start + args.chunk, ids.shape[1] - 1)]
        logits = model(piece, **{CACHE: cache}).logits[0]
        total += nll(logits, ids[0, start + 1 : start + 1 + piece.shape[1]]).sum()
    return float(total) / (ids.shape[1] - 1 - args.sinks)


@torch.no_grad()
def _control(model: Any, ids: torch.Tensor, jump: int, args: argparse.Namespace) -> float:
    """Returns the same mean when the sinks stay at positions 0..3 and the text stands at its text positions.

    The text is cut to one window: DynamicCache forgets nothing, and so both see the same tokens.
    """
    cache = DynamicCache(config=model.config)
    model(ids[:, : args.sinks], **{CACHE: cache})
    end = min(args.sinks + args.window, ids.shape[1] - 1)
    text = ids[:, args.sinks : end]
    positions = torch.arange(args.sinks, end)[None] + jump
    logits = model(text, **{CACHE: cache}, position_ids=positions).logits[0]
    return float(nll(logits, ids[0, args.sinks + 1 : end + 1]).mean())


def _figures(by_jump: dict[int, float]) -> dict[str, Any]:
    reference = next(iter(by_jump.values()))
    changes = {str(jump): value / reference - 1 for jump, value in by_jump.items()}
    return {
        "mean_nll": {str(jump): value for jump, value in by_jump.items()},
        "relative_change": changes,
        "worst": max(abs(change) for change in changes.values()),
    }


if __name__ == "__main__":
    main()
