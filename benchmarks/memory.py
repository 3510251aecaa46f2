"""Memory of `ctx_sink`: the same bytes held however long the stream, and a bounded peak in a long prefill.

Held: a random small Llama streams 64 k tokens by chunks; the bytes at 1 k, 4 k and 64 k must be identical and equal
to the formula. Peak: everything that the CPU allocator hands out during `generate` on a chunked prompt (cache,
attention, activations; the weights were there before), read from torch's memory profiler. Bar: the peak of a 16 k
prompt stays under 1.25 x that of a 1 k prompt. The model is narrow, so that activations do not hide the cache:
DynamicCache beside it shows how much the same measure grows when the cache does.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import hf_ctxopt
from common import arguments, feed, held_bytes, tiny_llama, twin, verdict, write_results

BAR = 1.25
HELD_MARKS = (1024, 4096, 65536)
PROMPTS = (1024, 16384)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the figures and returns what it wrote as JSON."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    dense = tiny_llama(layers=2, heads=2, kv_heads=2, vocab=256, seed=args.seed)
    fused = hf_ctxopt.patch_model(twin(dense), cache="ctx_sink", window=args.window, sinks=args.sinks)
    formula = formula_bytes(dense.config, args)
    held = {"fused": _held(fused, args), "dense": _held(dense, args)}
    for route, by_mark in held.items():
        print(f"{route} route, bytes held at  " + "  ".join(f"{k}: {v}" for k, v in by_mark.items()), end="   ")
        print(f"formula: {formula}")
    constant = all(value == formula for by_mark in held.values() for value in by_mark.values())
    print(f"identical at every length and equal to the formula: {verdict(constant)}")
    peaks = _peaks(dense, fused, args)
    ratios = {name: list(by_prompt.values())[-1] / next(iter(by_prompt.values())) for name, by_prompt in peaks.items()}
    for name, by_prompt in peaks.items():
        values = "  ".join(f"{prompt}: {peak / 2**20:.2f} MiB" for prompt, peak in by_prompt.items())
        print(f"{name:16} peak of a prompt of  {values}   ratio {ratios[name]:.2f}")
    bounded = all(ratio < BAR for name, ratio in ratios.items() if name.startswith("ctx_sink"))
    print(f"ctx_sink peak ratio < {BAR}: {verdict(bounded)}")
    figures = {
        "bar": BAR,
        "bytes_held": held,
        "bytes_formula": formula,
        "peak_bytes": peaks,
        "peak_ratio": ratios,
        "passed": bounded and constant,
    }
    return write_results(args, "memory", "tiny random Llama", figures)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.set_defaults(chunk=256)
    parser.add_argument("--marks", type=int, nargs="+", default=list(HELD_MARKS), help="tokens seen, rising")
    parser.add_argument("--prompts", type=int, nargs=2, default=list(PROMPTS), help="lengths to compare")
    parser.add_argument("--page-size", type=int, default=32)
    return parser


def _prompt(length: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def _held(model: Any, args: argparse.Namespace) -> dict[int, int]:
    """Returns the bytes held when the stream has reached each mark, by chunks and then one token at a time."""
    cache = hf_ctxopt.make_cache(model, "ctx_sink", window=args.window, sinks=args.sinks, page_size=args.page_size)
    ids = _prompt(max(args.marks), args.seed)
    held: dict[int, int] = {}
    for mark in args.marks:
        seen = cache.get_seq_length()
        feed(model, ids[:, seen : mark - 4], cache, chunk=args.chunk, label=f"streaming to {mark}")
        feed(model, ids[:, mark - 4 : mark], cache, chunk=1)
        held[mark] = held_bytes(cache)
    return held


def _peaks(dense: Any, fused: Any, args: argparse.Namespace) -> dict[str, dict[int, int]]:
    """Returns the peak of each cache and prompt length, in bytes above what was there before the prompt."""
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        "ctx_sink (fused)": (fused, {"cache_implementation": "ctx_sink"}),
        "ctx_sink (dense)": (dense, {"cache_implementation": "ctx_sink"}),
        "DynamicCache": (dense, {}),
    }
    config = {"window": args.window, "sinks": args.sinks, "page_size": args.page_size}
    peaks: dict[str, dict[int, int]] = {}
    for name, (model, keywords) in options.items():
        if keywords:
            keywords = keywords | {"cache_config": config}
        _peak(model, _prompt(args.prompts[0], args.seed), keywords, args.chunk)  # first call: lazy set-up, not counted
        peaks[name] = {
            length: _peak(model, _prompt(length, args.seed), keywords, args.chunk) for length in args.prompts
        }
    return peaks


def _peak(model: Any, ids: torch.Tensor, keywords: dict[str, Any], chunk: int) -> int:
    """Returns the highest sum of live allocations during the prefill of ids `(1, seq)`, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model.generate(ids, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk, **keywords)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def formula_bytes(config: Any, args: argparse.Namespace) -> int:
    """Returns what the settings say a fp32 `ctx_sink` holds for one row, in bytes.

    The sinks begin a page of their own; `window` tokens at any alignment touch at most one page more than
    `window - 1` of them fill. Every page has K and V of all layers.
    """
    pages = math.ceil(args.sinks / args.page_size) + math.ceil((args.window - 1) / args.page_size) + 1
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return int(pages * args.page_size * per_token)


if __name__ == "__main__":
    main()
