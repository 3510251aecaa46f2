"""What the sinks are worth: SmolLM2 over 6 k tokens of real text with 0 sinks, 4 sinks and a recomputed window.

Recomputing feeds, for one position, the last `window + sinks` tokens into the model afresh and takes the last
logits: the same number of tokens in view, at trained positions, nothing stale. It costs a whole forward per token, so
it is done at evenly spaced positions, and the caches are compared with it at just those.
Bars: no sinks >= 1.25 x of 4 sinks, over all positions behind the first window; 4 sinks <= 1.10 x of recomputing, at
the samples.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

import hf_ctxopt
from common import CACHE, SMOLLM2, arguments, load_smollm2, progress, real_tokens, verdict, write_results
from measure import nll

BAR_WITHOUT_SINKS = 1.25
BAR_TO_RECOMPUTED = 1.10


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the perplexities and returns what it wrote as JSON."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    model, tokenizer = load_smollm2()
    ids = real_tokens(tokenizer, args.tokens + 1, start=args.start)
    held = args.window + args.sinks
    positions = torch.linspace(held, args.tokens - 1, args.samples).round().long()
    fresh = _recomputed(model, ids, positions, held, args.batch)
    hf_ctxopt.patch_model(model, cache="ctx_sink", window=args.window, sinks=args.sinks)
    without = _streamed(model, ids, sinks=0, args=args)
    kept = _streamed(model, ids, sinks=args.sinks, args=args)
    perplexity = {
        "no sinks": {"at the samples": _ppl(without[positions]), "everywhere": _ppl(without[held:])},
        f"{args.sinks} sinks": {"at the samples": _ppl(kept[positions]), "everywhere": _ppl(kept[held:])},
        "recomputed": {"at the samples": _ppl(fresh)},
    }
    ratios = {
        "no_sinks_to_sinks": math.exp((without - kept)[held:].mean().item()),
        "sinks_to_recomputed": math.exp((kept[positions] - fresh).mean().item()),
        "sinks_to_recomputed_standard_error_nats": _standard_error(kept[positions] - fresh),
    }
    passed = _report(perplexity, ratios)
    figures = {
        "bars": {"no_sinks_to_sinks": BAR_WITHOUT_SINKS, "sinks_to_recomputed": BAR_TO_RECOMPUTED},
        "positions": positions.tolist(),
        "perplexity": perplexity,
        "ratios": ratios,
        "passed": passed,
    }
    return write_results(args, "negative_control", SMOLLM2, figures)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--samples", type=int, default=128, help="positions where the window is recomputed")
    parser.add_argument("--batch", type=int, default=4, help="recomputed windows per forward")
    parser.add_argument("--start", type=int, default=0, help="first token of the text that is read")
    return parser


@torch.no_grad()
def _streamed(model: Any, ids: torch.Tensor, *, sinks: int, args: argparse.Namespace) -> torch.Tensor:
    """Returns the NLL of every next token, shape `(tokens,)`, read through `ctx_sink` by chunks."""
    cache = hf_ctxopt.make_cache(model, "ctx_sink", window=args.window, sinks=sinks)
    parts = []
    for start in progress(range(0, args.tokens, args.chunk), f"{sinks} sinks"):
        end = min(start + args.chunk, args.tokens)
        logits = model(ids[:, start:end], **{CACHE: cache}).logits[0]
        parts.append(nll(logits, ids[0, start + 1 : end + 1]))
    return torch.cat(parts)


@torch.no_grad()
def _recomputed(model: Any, ids: torch.Tensor, positions: torch.Tensor, held: int, batch: int) -> torch.Tensor:
    """Returns the NLL at each position from a fresh forward over its last `held` tokens, itself included."""
    losses = []
    for group in progress(positions.split(batch), "recomputing"):
        windows = torch.stack([ids[0, p - held + 1 : p + 1] for p in group.tolist()])
        logits = model(windows, use_cache=False, logits_to_keep=1).logits[:, -1]
        losses.append(nll(logits, ids[0, group + 1]))
    return torch.cat(losses)


def _ppl(losses: torch.Tensor) -> float:
    return math.exp(losses.mean().item())


def _standard_error(differences: torch.Tensor) -> float:
    """Returns the standard error of the mean of paired differences, in nats."""
    return float(differences.std() / math.sqrt(differences.numel()))


def _report(perplexity: dict[str, dict[str, float]], ratios: dict[str, float]) -> bool:
    """Prints perplexities and both bars; returns whether both are met."""
    for name, values in perplexity.items():
        print(f"{name:11} perplexity  " + "  ".join(f"{key}: {value:.2f}" for key, value in values.items()))
    without, fresh = ratios["no_sinks_to_sinks"], ratios["sinks_to_recomputed"]
    error = ratios["sinks_to_recomputed_standard_error_nats"]
    needed, near = without >= BAR_WITHOUT_SINKS, fresh <= BAR_TO_RECOMPUTED
    print(f"no sinks / sinks = {without:.3f} (bar >= {BAR_WITHOUT_SINKS}): {verdict(needed)}")
    print(f"sinks / recomputed = {fresh:.3f} +- {error:.3f} (bar <= {BAR_TO_RECOMPUTED}): {verdict(near)}")
    return needed and near


if __name__ == "__main__":
    main()
