"""Decode speed on a CPU: `ctx_paged` by name and patched, with 16- and 8-bit pages, beside transformers' own caches.

Every cache is filled to a length, and then the twins of one model take single steps in turn, so that all of them meet
the same state of the machine; medians over the steps. A ratio is the median of DynamicCache's step over ours, taken
pairwise within each turn: above 1 is faster than DynamicCache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported: where other programs share the cores, threads that wait by spinning hold up each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import DynamicCache, QuantizedCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hf_ctxopt
from common import CACHE, SMOLLM2, arguments, feed, load_smollm2, progress, real_tokens, twin, verdict, write_results
from measure import now

BARS = {"ctx_paged": 1.0, "ctx_paged, patched": 1.0, "ctx_paged, patched, int8": 0.9}
"""Least speed of each, as a share of DynamicCache's (transformers' own quantized caches keep 0.5 to 0.84 of it); with
int8 pages also as a share of the speed with 16-bit pages."""


@dataclass
class Runner:
    """One cache with its own model object (on shared weights) and the seconds of its steps."""

    name: str
    model: Any
    cache: Any
    taken: list[float] = field(default_factory=list)

    def step(self, token: torch.Tensor) -> None:
        """One decode step with the token `(1, 1)`, timed."""
        begin = now()
        self.model(token, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        self.taken.append(now() - begin)


def runners(model: Any, peers: bool) -> list[Runner]:
    """DynamicCache, ours, and the quantized caches of transformers that can be built here."""
    patched = {name: twin(model) for name in ("ctx_paged, patched", "ctx_paged, patched, int8")}
    for name, other in patched.items():
        hf_ctxopt.patch_model(other, "ctx_paged", kv_bits=8 if name.endswith("int8") else 16)
    found = [
        Runner("dynamic", model, DynamicCache(config=model.config)),
        Runner("ctx_paged", model, hf_ctxopt.make_cache(model, "ctx_paged")),
        Runner("ctx_paged, patched", patched["ctx_paged, patched"],
               hf_ctxopt.make_cache(patched["ctx_paged, patched"], "ctx_paged")),
        Runner("ctx_paged, patched, int8", patched["ctx_paged, patched, int8"],
               hf_ctxopt.make_cache(patched["ctx_paged, patched, int8"], "ctx_paged", kv_bits=8)),
        Runner("ctx_paged, int8", model, hf_ctxopt.make_cache(model, "ctx_paged", kv_bits=8)),
    ]  # fmt: skip
    for backend, bits in (("hqq", {"nbits": 8}), ("hqq", {"nbits": 4}), ("quanto", {"nbits": 4}), ("fp8", {})):
        if peers:
            try:
                cache = QuantizedCache(backend=backend, config=model.config, **bits)
            except (ImportError, ValueError, TypeError) as error:
                print(f"{backend} {bits} did not run: {error}")
            else:
                found.append(Runner(f"{backend}{bits.get('nbits', '')}", model, cache))
    return found


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Median step of every cache that holds `length` tokens."""
    caches = runners(model, args.peers)
    for runner in caches:
        feed(runner.model, ids[:, :length], runner.cache, chunk=512)
    for turn in progress(range(args.warmup + args.steps), f"{length} tokens"):
        token = ids[:, length + turn : length + turn + 1]
        for place in range(len(caches)):
            caches[(place + turn) % len(caches)].step(token)
    dynamic = caches[0].taken[args.warmup :]
    rows = []
    for runner in caches:
        taken = runner.taken[args.warmup :]
        ratio = statistics.median(a / b for a, b in zip(dynamic, taken, strict=True))
        rows.append({"cache": runner.name, "tokens": length, "dtype": str(model.dtype).removeprefix("torch."),
                     "ms": 1000 * statistics.median(taken), "speed_to_dynamic": ratio})  # fmt: skip
        if runner.name == "ctx_paged, patched, int8":
            wide = caches[2].taken[args.warmup :]
            rows[-1]["speed_to_16_bit"] = statistics.median(a / b for a, b in zip(wide, taken, strict=True))
    return rows


def main(args: argparse.Namespace) -> int:
    """Measure all lengths and dtypes; returns the number of bars that were missed."""
    torch.set_num_threads(args.threads)
    model, tokenizer = load_smollm2()
    ids = real_tokens(tokenizer, max(args.lengths) + args.warmup + args.steps + 1)
    rows: list[dict[str, Any]] = []
    missed = 0
    for dtype in args.dtypes:
        model = model.to(getattr(torch, dtype))
        for length in args.lengths:
            for row in measure(model, ids, length, args):
                bar = BARS.get(row["cache"])
                speeds = [row[key] for key in ("speed_to_dynamic", "speed_to_16_bit") if key in row]
                fine = bar is None or min(speeds) >= bar
                missed += not fine
                rows.append({**row, "bar": bar, "passed": fine})
                print(f"{dtype:9} {length:6} {row['cache']:26} {row['ms']:8.2f} ms  {row['speed_to_dynamic']:5.2f} x "
                      f"{'' if bar is None else verdict(fine)}"
                      f"{'' if len(speeds) == 1 else f'  {speeds[1]:.2f} x of 16-bit pages'}", flush=True)  # fmt: skip
    write_results(args, args.name, SMOLLM2, {"rows": rows, "missed": missed})
    return missed


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each cache")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--name", default="cpu_decode", help="name of the JSON file")
    sys.exit(main(parser.parse_args()))
