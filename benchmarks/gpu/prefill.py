"""Prefill on a GPU: logits checked against DynamicCache first, then time and peak memory, one table, one JSON.

Llama-3.1-8B shape, random bf16 weights, batch 1. Time is that of `generate` for one token, the logits of the last
prompt token included; peak is what the allocator held above the weights, K and V included.

1. Check: the last token's logits of every way against one pass with DynamicCache. The distance of DynamicCache in
   chunks from itself in one pass is what bf16 does to equal arithmetic; ours may be twice as far. Quantized pages are
   further by their quantization error: that figure is reported, and held to a loose limit.
2. Time: all ways take turns; medians.

cuDNN attention is off, as on consumer cards, but for the rows that say so: there a chunked prefill of a growing cache
pays its planning for every new length (reference/gpu.md).
Run: `PYTHONPATH=. python benchmarks/gpu/prefill.py` (under 4 minutes on an H200; `--quick`: 8 k only).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from decode import llama_8b

import hf_ctxopt

SINK = {"sinks": 4, "window": 4092}
NOISE_FLOOR = 5e-3  # relative, should chunked and whole happen to agree exactly


@dataclass(frozen=True)
class Way:
    """One way to read a prompt.

    Args:
        name: of its row.
        cache: `"dynamic"` or one of ours, on the fused route.
        chunk: `prefill_chunk_size`; `None` leaves it to the cache (and to transformers: the whole prompt).
        cudnn: whether torch may use cuDNN attention.
        options: of the cache.
    """

    name: str
    cache: str
    chunk: int | None = None
    cudnn: bool = False
    options: dict[str, Any] = field(default_factory=dict)


WAYS = [
    Way("dynamic, whole", "dynamic"),
    Way("dynamic, chunks of 2048", "dynamic", 2048),
    Way("dynamic, whole, cuDNN", "dynamic", cudnn=True),
    Way("dynamic, chunks of 2048, cuDNN", "dynamic", 2048, cudnn=True),
    Way("ctx_paged", "ctx_paged"),
    Way("ctx_paged, int4", "ctx_paged", options={"kv_bits": 4}),
    Way("ctx_sink 4 + 4092", "ctx_sink", options=SINK),
]


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor, way: Way) -> dict[str, Any]:
    """Read a prompt once: logits of the last token, seconds, peak and held bytes, and the chunks it was read in."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.backends.cuda.enable_cudnn_sdp(way.cudnn)
    chunks: list[int] = []
    ours = way.cache != "dynamic"
    call = {} if way.chunk is None else {"prefill_chunk_size": way.chunk}
    hook = model.register_forward_pre_hook(lambda _, __, kw: chunks.append(kw["input_ids"].shape[1]), with_kwargs=True)
    with hf_ctxopt.patched(model, cache=way.cache, **way.options) if ours else nullcontext():
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True, disable_compile=True, **call,
        )  # fmt: skip
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    hook.remove()
    cache = next(out[key] for key in ("cache", "past_key_values") if out.get(key) is not None)
    held = cache.nbytes if ours else sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    fallbacks = cache.stats()["fallbacks"] if ours else {}
    peak = torch.cuda.max_memory_allocated() - base
    return {"logits": out.logits[0][0].float(), "seconds": seconds, "peak": peak, "held": held,
            "chunk": max(chunks), "fallbacks": fallbacks}  # fmt: skip


def distance(logits: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((logits - want).norm() / want.norm())


def check(model: Any, ids: torch.Tensor) -> tuple[list[dict[str, Any]], bool]:
    """Each way's logits against DynamicCache in one pass, on a prompt of several chunks."""
    want = read(model, ids, WAYS[0])["logits"]
    noise = max(NOISE_FLOOR, distance(read(model, ids, WAYS[1])["logits"], want))
    # A window that holds the whole prompt: then ctx_sink sees what everybody sees.
    wide = Way("ctx_sink, window of all", "ctx_sink", 2048, options={"window": ids.shape[1]})
    rows, passed = [], True
    for way in (*WAYS[1:6], Way("ctx_paged, int8", "ctx_paged", options={"kv_bits": 8}), wide):
        found = read(model, ids, way)
        # 4 bits are as far off as random weights amplify them; 8 bits take the same path and must stay near.
        limit = {4: math.inf, 8: 4 * noise}.get(way.options.get("kv_bits", 16), 2 * noise)
        error = distance(found["logits"], want)
        good = bool(found["logits"].isfinite().all()) and error <= limit and not found["fallbacks"]
        passed &= good
        rows.append({"way": way.name, "error": error, "limit": limit, "same_token": bool(
            found["logits"].argmax() == want.argmax()), "fallbacks": found["fallbacks"], "passed": good})  # fmt: skip
        print(rows[-1], flush=True)
    return rows, passed


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_prefill.json"))
    parser.add_argument("--commit", default="unknown", help="the lent machine has no git: pass `git rev-parse HEAD`")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    started = time.monotonic()
    model = llama_8b()
    weights = torch.cuda.memory_allocated()
    draw = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(2, 128000, (1, 32768), device="cuda", generator=draw)
    checks, passed = check(model, ids[:, :6500])
    if not passed:
        raise SystemExit("logits differ: nothing was timed")
    table = []
    for context in (8192,) if options.quick else (8192, 32768):
        runs: dict[str, list[dict[str, Any]]] = {way.name: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                runs[way.name].append(read(model, ids[:, :context], way))
        for name, found in runs.items():
            row = {"context": context, "way": name, "seconds": statistics.median(one["seconds"] for one in found),
                   "rounds": [round(one["seconds"], 3) for one in found], "peak_gib": found[-1]["peak"] / 2**30,
                   "held_gib": found[-1]["held"] / 2**30, "chunk": found[-1]["chunk"]}  # fmt: skip
            table.append(row)
            print(f"{context:>6} {name:<31} {row['seconds']:7.3f} s  peak {row['peak_gib']:6.2f} GiB  held "
                  f"{row['held_gib']:5.2f} GiB  chunk {row['chunk']:>6}  {row['rounds']}", flush=True)  # fmt: skip
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
        "dtype": "bfloat16", "seed": 0, "commit": options.commit, "weights_gib": weights / 2**30,
        "seconds": time.monotonic() - started, "checks": checks, "prefill": table,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
