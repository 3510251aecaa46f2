"""How much quantized pages change what a real model says, beside transformers' own quantized caches.

All caches read one real text in chunks, in lockstep with a dense one, so that every later token reads quantized
history. Reported for each: KL(dense || this) and top-1 agreement per position, the ratio of perplexities, and the bits
per value really held at the end (every storage of the cache, scales and open pages included; SmolLM2 in float32, whose
open pages cost 32 bits per value, so the figure for a 16-bit model is given too).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache

import hf_ctxopt
from common import CACHE, SMOLLM2, arguments, load_smollm2, progress, real_tokens, verdict, write_results

NONE, BOTH = {"k": False, "v": False}, {"k": True, "v": True}
OURS: dict[str, dict[str, Any]] = {
    "int8": {"kv_bits": 8},
    "int4": {"kv_bits": 4},
    "int2": {"kv_bits": 2},
    "k8v4": {"kv_bits": {"k": 8, "v": 4}},
    "k4v8": {"kv_bits": {"k": 4, "v": 8}},
    "k4v2": {"kv_bits": {"k": 4, "v": 2}},
    "int8, both rotated": {"kv_bits": 8, "rotate": BOTH},
    **{f"int{bits}, no rotation": {"kv_bits": bits, "rotate": NONE} for bits in (4, 2)},
    **{f"int{bits}, k rotated": {"kv_bits": bits, "rotate": {"k": True, "v": False}} for bits in (4, 2)},
    **{f"int{bits}, v rotated": {"kv_bits": bits, "rotate": {"k": False, "v": True}} for bits in (4, 2)},
    "int4, sinks sealed": {"kv_bits": 4, "seal_sinks": True},
}
PEERS: dict[str, dict[str, Any]] = {
    "hqq8": {"backend": "hqq", "nbits": 8},
    "hqq4": {"backend": "hqq", "nbits": 4},
    "hqq2": {"backend": "hqq", "nbits": 2},
    "quanto4": {"backend": "quanto", "nbits": 4},
    "quanto2": {"backend": "quanto", "nbits": 2},
    "fp8": {"backend": "fp8"},
}


class Reader:
    """A cache and what was measured while it read.

    Args:
        name: its row in the table.
        cache: the cache.
    """

    def __init__(self, name: str, cache: Any) -> None:
        self.name, self.cache = name, cache
        self.nll, self.kl, self.same = 0.0, 0.0, 0.0

    def score(self, logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a chunk: log-probabilities `(seq, vocab)` of both caches and the next tokens, `(seq,)` or one fewer."""
        self.nll -= logits[: targets.numel()].gather(-1, targets[:, None]).double().sum().item()
        self.kl += torch.nn.functional.kl_div(logits, dense, reduction="sum", log_target=True).item()
        self.same += (logits.argmax(-1) == dense.argmax(-1)).double().sum().item()


def tensors_of(value: Any, depth: int = 0) -> list[torch.Tensor]:
    """Every tensor inside a cache layer: quanto's wrap others, hqq's lie in tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        inner = [getattr(value, name) for name in ("_data", "_scale", "_shift") if hasattr(value, name)]
        return [part for item in inner for part in tensors_of(item, depth + 1)] if inner else [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in tensors_of(item, depth + 1)]
    return []


def bits_per_value(cache: Any, values: int) -> float:
    """Bits of everything the cache holds, for each of the `values` numbers of the text's keys and values."""
    if hasattr(cache, "nbytes"):
        return 8 * int(cache.nbytes) / values
    storages = {}
    for layer in cache.layers:
        for tensor in tensors_of(list(vars(layer).values())):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return 8 * sum(storages.values()) / values


def bits_in_bf16(cache: Any, held: float, values: int) -> float | None:
    """What `bits_per_value` would be in a 16-bit model, by arithmetic: open pages and peers' residuals cost half."""
    groups = getattr(cache, "groups", None)
    if groups is None:
        return None
    wide = sum(group.arena.capacity.open * group.arena.page_bytes for group in groups)
    return held - 8 * wide / 2 / values


def readers(model: Any, names: list[str] | None) -> tuple[list[Reader], dict[str, str]]:
    """The caches to compare, the dense one first; and why a peer is missing."""
    found, missing = [Reader("dense", DynamicCache(config=model.config))], {}
    makers: dict[str, Callable[[], Any]] = {
        name: (lambda options=options: hf_ctxopt.make_cache(model, "ctx_paged", **options))
        for name, options in OURS.items()
    }
    makers |= {
        name: (lambda options=options: QuantizedCache(config=model.config, **options))
        for name, options in PEERS.items()
    }
    for name, make in makers.items():
        if names is not None and name not in names:
            continue
        try:
            found.append(Reader(name, make()))
        except (ImportError, ValueError, TypeError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


@torch.no_grad()
def read(model: Any, caches: list[Reader], ids: torch.Tensor, chunk: int) -> dict[str, str]:
    """Let all caches read ids `(1, seq)`; returns why one stopped on the way."""
    failed: dict[str, str] = {}
    total = ids.shape[1]
    for start in progress(range(0, total, chunk), "reading"):
        stop, dense = min(start + chunk, total), None
        targets = ids[0, start + 1 : stop + 1]
        for reader in caches:
            if reader.name in failed:
                continue
            try:
                logits = model(ids[:, start:stop], **{CACHE: reader.cache}, use_cache=True).logits[0]
            except (RuntimeError, NotImplementedError) as error:
                failed[reader.name] = f"{type(error).__name__}: {error}"
                continue
            logits = logits.float().log_softmax(-1)
            dense = logits if dense is None else dense
            reader.score(logits, dense, targets)
    return failed


def row(reader: Reader, dense: Reader, tokens: int, values: int) -> dict[str, Any]:
    """One cache's figures."""
    held = bits_per_value(reader.cache, values)
    return {
        "cache": reader.name,
        "kl": reader.kl / tokens,
        "top1_agreement": reader.same / tokens,
        "perplexity": math.exp(reader.nll / (tokens - 1)),
        "perplexity_ratio": math.exp((reader.nll - dense.nll) / (tokens - 1)),
        "bits_per_value": held,
        "bits_per_value_bf16": bits_in_bf16(reader.cache, held, values),
    }


def bars(rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """The project's bars, where the caches they are about have run."""
    found: dict[str, bool] = {}
    if "int8" in rows:
        found["int8: KL <= 0.001"] = rows["int8"]["kl"] <= 0.001
        found["int8: perplexity ratio <= 1.002"] = rows["int8"]["perplexity_ratio"] <= 1.002
    if "int4" in rows:
        found["int4: top-1 >= 93 %"] = rows["int4"]["top1_agreement"] >= 0.93
        found["int4: perplexity ratio <= 1.02"] = rows["int4"]["perplexity_ratio"] <= 1.02
    if {"k8v4", "k4v8"} <= rows.keys():
        found["K8/V4 has a lower KL than K4/V8"] = rows["k8v4"]["kl"] < rows["k4v8"]["kl"]
    for peer, ours in (("hqq8", "int8"), ("fp8", "int8"), ("hqq4", "int4"), ("quanto4", "int4"), ("hqq2", "int2"),
                       ("quanto2", "int2")):  # fmt: skip
        if {peer, ours} <= rows.keys():
            found[f"{ours}: KL no worse than {peer}"] = rows[ours]["kl"] <= rows[peer]["kl"]
    return found


def main(args: argparse.Namespace) -> int:
    """Run, print the table and write the JSON; returns the number of bars that were missed."""
    torch.set_num_threads(args.threads)
    model, tokenizer = load_smollm2()
    ids = real_tokens(tokenizer, args.tokens, start=args.start)
    caches, missing = readers(model, args.only)
    missing |= read(model, caches, ids, args.chunk)
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    values = args.tokens * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    rows = {r.name: row(r, caches[0], args.tokens, values) for r in caches if r.name not in missing}
    print(f"{'cache':24} {'KL':>9} {'top-1':>7} {'ppl':>8} {'ratio':>8} {'bits':>6} {'(bf16)':>7}")
    for name, figures in rows.items():
        narrow = figures["bits_per_value_bf16"]
        print(
            f"{name:24} {figures['kl']:9.5f} {figures['top1_agreement']:7.2%} {figures['perplexity']:8.3f} "
            f"{figures['perplexity_ratio']:8.4f} {figures['bits_per_value']:6.2f} "
            f"{'' if narrow is None else format(narrow, '7.2f')}"
        )
    for name, reason in missing.items():
        print(f"{name:24} did not run: {reason}")
    passed = bars(rows)
    for bar, fine in passed.items():
        print(f"{verdict(fine)}  {bar}")
    write_results(args, args.name, SMOLLM2, {"rows": list(rows.values()), "not_run": missing, "bars": passed})
    return sum(not fine for fine in passed.values())


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.set_defaults(chunk=256)
    parser.add_argument("--start", type=int, default=0, help="first token of the text")
    parser.add_argument("--only", nargs="*", help="names of the caches to run")
    parser.add_argument("--name", default="quality", help="name of the JSON file")
    sys.exit(main(parser.parse_args()))
