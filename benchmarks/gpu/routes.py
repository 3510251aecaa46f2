"""Both routes on a GPU: checked against DynamicCache first, timed after, one JSON.

1. Every family of the test matrix, float32 on the GPU: greedy tokens on a left-padded batch and the largest
   logit difference from DynamicCache, for both caches and both routes.
2. A bf16 model of 1B shape: ms per token of DynamicCache, ctx_paged and ctx_sink, alternating in one run.
3. Bytes: `ctx_sink` at 512 + 4 while 64 k tokens stream through in chunks, peak and held.

Run from the repository root on a machine with CUDA: `PYTHONPATH=. python benchmarks/gpu/routes.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_ctxopt
from hf_ctxopt.integration.compat import generate_argument
from tests.families import FAMILIES

CACHE = generate_argument()

ROOM = {"ctx_paged": {}, "ctx_sink": {"window": 256}}
PAIRS = [("dynamic", False), ("ctx_paged", False), ("ctx_paged", True), ("ctx_sink", False), ("ctx_sink", True)]


def check_families() -> list[dict[str, Any]]:
    """Tokens and logits of each family x cache x route against DynamicCache on the same GPU."""
    rows = []
    for family in FAMILIES.values():
        if family.encoder_decoder:
            continue
        torch.manual_seed(0)
        model: Any = family.make().eval().cuda()
        model.set_attn_implementation(family.attn)
        ids = torch.randint(2, 128, (2, 20), device="cuda")
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        call = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
        call |= {"return_dict_in_generate": True, "output_logits": True}
        want = model.generate(ids, **call)
        for name, options in ROOM.items():
            for fused in (False, True) if family.fused else (False,):
                route = hf_ctxopt.patched(model, cache=name, page_size=8, **options) if fused else nullcontext()
                extra = {} if fused else {"cache_implementation": name, "cache_config": {"page_size": 8, **options}}
                with route:
                    got = model.generate(ids, **call, **extra)
                error = (torch.stack(got.logits) - torch.stack(want.logits)).abs().max().item()
                equal = torch.equal(got.sequences, want.sequences)
                rows.append({"family": family.name, "cache": name, "fused": fused, "equal": equal, "error": error})
    return rows


def one_billion() -> Any:
    """A random bf16 Llama of 1B shape (16 layers, 2048 wide, 32 heads over 8)."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def new_cache(model: Any, name: str) -> Any:
    """An empty cache of that name; `ctx_sink` with 2048 + 4."""
    if name == "dynamic":
        return DynamicCache(config=model.config)
    return hf_ctxopt.make_cache(model, name, **({"window": 2048} if name == "ctx_sink" else {}))


@torch.no_grad()
def decode(model: Any, context: int, steps: int) -> dict[str, float]:
    """Median ms per token after `context` tokens, the caches taking turns token by token."""
    ids = torch.randint(2, 32000, (1, context + 2 * steps + 8), device="cuda")
    caches = {}
    for name, fused in PAIRS:
        with hf_ctxopt.patched(model) if fused else nullcontext():
            cache = new_cache(model, name)
            for start in range(0, context, 2048):
                stop = min(start + 2048, context)
                model(ids[:, start:stop], **{CACHE: cache}, logits_to_keep=1)
        caches[name, fused] = cache
    times: dict[tuple[str, bool], list[float]] = {pair: [] for pair in PAIRS}
    for step in range(steps):
        for pair in PAIRS:
            with hf_ctxopt.patched(model) if pair[1] else nullcontext():
                at = context + 2 * step
                model(ids[:, at : at + 1], **{CACHE: caches[pair]})  # settles into the route
                torch.cuda.synchronize()
                start_time = time.perf_counter()
                model(ids[:, at + 1 : at + 2], **{CACHE: caches[pair]})
                torch.cuda.synchronize()
                times[pair].append(time.perf_counter() - start_time)
    names = {pair: pair[0] + ("" if pair[0] == "dynamic" else "/fused" if pair[1] else "/dense") for pair in PAIRS}
    return {names[pair]: round(1e3 * statistics.median(values), 2) for pair, values in times.items()}


@torch.no_grad()
def stream(model: Any, tokens: int) -> list[dict[str, Any]]:
    """Bytes of `ctx_sink` 512 + 4 on both routes while `tokens` tokens pass in chunks of 512."""
    ids = torch.randint(2, 32000, (1, 512), device="cuda")
    rows = []
    for fused in (False, True):
        with hf_ctxopt.patched(model) if fused else nullcontext():
            gc.collect()
            torch.cuda.empty_cache()
            base = torch.cuda.memory_allocated()
            cache = hf_ctxopt.make_cache(model, "ctx_sink", window=512, sinks=4)
            torch.cuda.reset_peak_memory_stats()
            for seen in range(512, tokens + 1, 512):
                model(ids, **{CACHE: cache}, logits_to_keep=1)
                if seen in (1024, 16384, tokens):
                    peak = torch.cuda.max_memory_allocated() - base
                    rows.append({"fused": fused, "seen": seen, "held": cache.nbytes, "peak": peak})
        finite = model(ids[:, :1], **{CACHE: cache}).logits.isfinite().all().item() if not fused else True
        rows[-1]["finite"] = finite
    return rows


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_routes.json"))
    parser.add_argument("--commit", default="unknown", help="the lent machine has no git: pass `git rev-parse HEAD`")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    families = check_families()
    wrong = [row for row in families if not row["equal"] or row["error"] > 1e-4]
    print(f"families: {len(families)} cells, {len(wrong)} wrong", *wrong, sep="\n")
    torch.backends.cuda.enable_cudnn_sdp(False)  # what cards other than data-centre ones do (reference/gpu.md)
    model = one_billion()
    speeds = {context: decode(model, context, options.steps) for context in (2048, 8192, 32768)}
    for context, row in speeds.items():
        print(context, row)
    memory = stream(model, 65536)
    print(*memory, sep="\n")
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
        "dtype": {"families": "float32", "speed": "bfloat16"}, "seed": 0, "commit": options.commit,
        "families": families, "ms_per_token": speeds, "ctx_sink_memory": memory,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
