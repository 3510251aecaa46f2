"""Decoding on a CPU with packed weights beside dense float32: tokens/s, and bytes of the weights held.

Greedy decoding of SmolLM2 from a real prompt with stock caches; dense and packed take turns, so that whatever else
the machine does falls on both. The bars are those of the project: packed at 0.8 x dense or faster, under 0.4 x its
bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from transformers import DynamicCache

import hf_ctxopt
from common import CACHE, arguments, load_smollm2, real_tokens, verdict, write_results
from hf_ctxopt.kernels.dispatch import gguf_kernel

SPEED, SIZE = 0.8, 0.4


def held(model: Any) -> int:
    """Bytes of the distinct storages of a model's parameters."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@torch.inference_mode()
def decode_rate(model: Any, prompt: torch.Tensor, steps: int) -> tuple[float, float]:
    """Tokens/s of `steps` greedy steps after the prompt, and of the prompt itself."""
    cache = DynamicCache(config=model.config)
    started = time.perf_counter()
    token = model(prompt, **{CACHE: cache}, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    between = time.perf_counter()
    for _ in range(steps):
        token = model(token, **{CACHE: cache}).logits[:, -1].argmax(-1, keepdim=True)
    return steps / (time.perf_counter() - between), prompt.shape[1] / (between - started)


def main(args: argparse.Namespace) -> int:
    """Time each mix; returns the number of bars that were missed."""
    torch.set_num_threads(args.threads)
    dense, tokenizer = load_smollm2()
    prompt = real_tokens(tokenizer, args.prompt)
    packed = {mix: hf_ctxopt.quantize_(load_smollm2()[0], mix) for mix in args.mixes}
    models = {"dense float32": dense, **packed}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for model in models.values():
        decode_rate(model, prompt, 2)
    for _ in range(args.rounds):
        for name, model in models.items():
            rates[name].append(decode_rate(model, prompt, args.steps))
    rows = []
    for name, model in models.items():
        decode, prefill = (median(column) for column in zip(*rates[name], strict=True))
        rows.append({
            "weights": name, "tokens_per_s": decode, "prefill_tokens_per_s": prefill, "bytes": held(model),
            "all_tokens_per_s": [rate for rate, _ in rates[name]],
        })  # fmt: skip
    missed = 0
    for row in rows:
        # The median of the rounds' ratios: rounds, not models, share what disturbs them.
        pairs = zip(row["all_tokens_per_s"], rows[0]["all_tokens_per_s"], strict=True)
        row["speed_ratio"] = median(ours / theirs for ours, theirs in pairs)
        row["size_ratio"] = row["bytes"] / rows[0]["bytes"]
        row["passed"] = row is rows[0] or (row["speed_ratio"] >= SPEED and row["size_ratio"] < SIZE)
        missed += not row["passed"]
        print(f"{row['weights']:14} {row['tokens_per_s']:6.1f} tokens/s ({row['speed_ratio']:.2f} x), prompt "
              f"{row['prefill_tokens_per_s']:6.1f}, {row['bytes'] / 1e6:6.1f} MB ({row['size_ratio']:.3f} x) "
              f"{verdict(row['passed'])}")  # fmt: skip
    kernel = "compiled" if gguf_kernel(torch.device("cpu")) is not None else "torch"
    write_results(args, "packed_cpu_decode", "SmolLM2-135M-Instruct", {"kernel": kernel, "rows": rows})
    return missed


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    raise SystemExit(main(parser.parse_args()))
