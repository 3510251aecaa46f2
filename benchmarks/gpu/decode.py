"""Decoding through `generate` on a GPU: checked first, timed after, one table, one JSON.

1. Graph against eager: `CTXOPT_DEBUG=1` compares every replayed step with an eager one over 200 steps, through page
   seals, pool growth and eviction, for 16- and 4-bit pages and `ctx_sink`; logits against DynamicCache.
2. Llama-3.1-8B shape, random bf16 weights: caches are filled with random states, then `generate` runs. ms per token is
   the median gap between CUDA events recorded by a stopping criterion; rounds of all caches alternate.

cuDNN attention is off for everybody, as on consumer cards: it plans anew for every length.
Run from the repository root: `PYTHONPATH=. python benchmarks/gpu/decode.py` (`--quick`: 2 k and 32 k only).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, StoppingCriteria

import hf_ctxopt
from hf_ctxopt.integration.compat import generate_argument

CACHE = generate_argument()
PEAK = 4.3e12  # bytes per second of an H200, as in reference/gpu.md
STEPS, WARM = 24, 6


class Clock(StoppingCriteria):
    """Records a CUDA event for every token."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def gaps(self) -> list[float]:
        """Milliseconds between tokens, the first `WARM` left out."""
        torch.cuda.synchronize()
        pairs = zip(self.events, self.events[1:], strict=False)
        return [first.elapsed_time(second) for first, second in pairs][WARM:]


def llama_8b(layers: int = 32, vocab: int = 128256) -> Any:
    """A random bf16 Llama of 8B shape on the GPU."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def fill(cache: Any, model: Any, context: int, batch: int, chunk: int = 8192) -> Any:
    """Write `context` random tokens of states into every layer."""
    text = model.config
    draw = torch.Generator(device="cuda").manual_seed(1)
    for layer in range(text.num_hidden_layers):
        for start in range(0, context, chunk):
            shape = (batch, text.num_key_value_heads, min(chunk, context - start), text.head_dim)
            keys, values = (torch.randn(shape, device="cuda", dtype=model.dtype, generator=draw) for _ in "kv")
            cache.update(keys, values, layer)
    return cache


def fill_pages(cache: Any, model: Any, context: int, batch: int, chunk: int = 8192) -> Any:
    """The same for our caches, whose layers take each step one after the other."""
    text = model.config
    draw = torch.Generator(device="cuda").manual_seed(1)
    for start in range(0, context, chunk):
        shape = (batch, text.num_key_value_heads, min(chunk, context - start), text.head_dim)
        keys, values = (torch.randn(shape, device="cuda", dtype=model.dtype, generator=draw) for _ in "kv")
        for layer in range(text.num_hidden_layers):
            cache.update(keys, values, layer)
    return cache


@torch.inference_mode()
def generate(model: Any, cache: Any, context: int, batch: int) -> list[float]:
    """Gaps of `STEPS` tokens on top of a filled cache."""
    clock = Clock()
    ids = torch.randint(2, 1000, (batch, context + 1), device="cuda")
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS + WARM + 2, do_sample=False,
        stopping_criteria=[clock], disable_compile=True, **{CACHE: cache},
    )  # fmt: skip
    return clock.gaps()


Maker = Callable[[Any, int, int], Any]


def ours(name: str, compiled: bool = False, **options: Any) -> tuple[Maker, dict[str, Any]]:
    """A cache of ours and the patch that goes with it."""

    def make(model: Any, context: int, batch: int) -> Any:
        return fill_pages(hf_ctxopt.make_cache(model, name, **options), model, context, batch)

    return make, {"compile": compiled}


def dynamic(model: Any, context: int, batch: int) -> Any:
    """Transformers' default."""
    return fill(DynamicCache(config=model.config), model, context, batch, chunk=context)


def static(model: Any, context: int, batch: int) -> Any:
    """Transformers' StaticCache, without compilation."""
    cache = StaticCache(config=model.config, max_cache_len=context + STEPS + WARM + 8)
    return fill(cache, model, context, batch, chunk=context)


def hqq4(model: Any, context: int, batch: int) -> Any:
    """Transformers' QuantizedCache, hqq, 4 bits."""
    from transformers import QuantizedCache

    cache = QuantizedCache("hqq", config=model.config, nbits=4, axis_key=1, axis_value=1)
    return fill(cache, model, context, batch, chunk=context)


def check(model: Any) -> list[dict[str, Any]]:
    """Graph against eager over 200 steps, and against DynamicCache's logits."""
    rows = []
    os.environ["CTXOPT_DEBUG"] = "1"
    ids = torch.randint(2, 1000, (2, 70), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    call = {"attention_mask": mask, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(ids, **call, max_new_tokens=200)
    cases = [("ctx_paged", {}), ("ctx_paged", {"kv_bits": 8}), ("ctx_paged", {"kv_bits": 4}),
             ("ctx_sink", {"window": 100}), ("ctx_sink", {"window": 100, "kv_bits": 4})]  # fmt: skip
    for name, options in cases:
        with hf_ctxopt.patched(model, cache=name, **options):
            got = model.generate(ids, **call, max_new_tokens=200)
        stats = next(got[key] for key in ("cache", "past_key_values") if got.get(key) is not None).stats()
        same = 0  # steps whose texts agree: only there can logits be compared
        while same < 200 and torch.equal(got.sequences[:, : 70 + same], want.sequences[:, : 70 + same]):
            same += 1
        errors = [
            float((a.float() - b.float()).abs().max() / b.float().abs().max())
            for a, b in zip(got.logits[:same], want.logits[:same], strict=True)
        ]
        row = {"cache": name, **options, "graph": stats["graph"], "fallbacks": stats["fallbacks"],
               "steps_compared_with_dynamic": same, "error": max(errors)}  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    os.environ["CTXOPT_DEBUG"] = "0"
    return rows


def floor_ms(model: Any, context: int, batch: int, bits: float) -> float:
    """Weights (without the embedding table) and K/V, once over the memory bus."""
    weights = sum(part.numel() * part.element_size() for part in model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * 2
    text = model.config
    values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * context * batch
    return 1e3 * (weights + values * bits / 8) / PEAK


def plan(quick: bool) -> list[tuple[int, int, dict[str, Any]]]:
    """(context, batch, caches) in the order of the table."""
    short = {"ctx_paged": ours("ctx_paged"), "ctx_paged int4": ours("ctx_paged", kv_bits=4), "dynamic": dynamic}
    compiled = {"ctx_paged compiled": ours("ctx_paged", compiled=True)}
    long = {**short, "ctx_paged int8": ours("ctx_paged", kv_bits=8), "hqq4": hqq4, "static": static}
    points = [(2048, 1, {**short, "ctx_sink": ours("ctx_sink", window=1020), **compiled}), (32768, 1, short)]
    if not quick:
        points += [(131072, 1, long), (32768, 8, short)]
    return points


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_decode.json"))
    parser.add_argument("--commit", default="unknown", help="the lent machine has no git: pass `git rev-parse HEAD`")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="comma-separated caches")
    options = parser.parse_args()
    started = time.monotonic()
    torch.backends.cuda.enable_cudnn_sdp(False)
    small = llama_8b(layers=3, vocab=4096)
    checks = check(small)
    del small
    model = llama_8b()
    print(f"model after {time.monotonic() - started:.0f} s", flush=True)
    table = []
    for context, batch, caches in plan(options.quick):
        chosen = {name: cache for name, cache in caches.items() if not options.only or name in options.only.split(",")}
        gaps: dict[str, list[float]] = {name: [] for name in chosen}
        notes: dict[str, Any] = {}
        for _ in range(options.rounds):
            for name, maker in chosen.items():
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                gaps[name] += one(model, maker, context, batch, notes, name)
        for name, found in gaps.items():
            bits = 5.0 if "int4" in name else 9.0 if "int8" in name else 16
            floor = floor_ms(model, context, batch, bits)
            row = {"context": context, "batch": batch, "cache": name, "ms": statistics.median(found),
                   "floor_ms": floor, "steps": len(found), **notes.get(name, {})}  # fmt: skip
            table.append(row)
            print(f"{context:>7} x{batch} {name:<20} {row['ms']:7.2f} ms  {row['ms'] / floor:5.2f} x floor  "
                  f"{notes.get(name)} {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
        "dtype": "bfloat16", "seed": 0, "commit": options.commit, "seconds": time.monotonic() - started,
        "checks": checks, "decode": table,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def one(model: Any, maker: Any, context: int, batch: int, notes: dict[str, Any], name: str) -> list[float]:
    """One round of one cache; what could not run is noted and has no gaps."""
    make, patch = maker if isinstance(maker, tuple) else (maker, None)
    try:
        if patch is None:
            cache = make(model, context, batch)
            gaps = generate(model, cache, context, batch)
        else:
            with hf_ctxopt.patched(model, **patch):
                cache = make(model, context, batch)
                gaps = generate(model, cache, context, batch)
                notes[name] = {"graph": cache.stats()["graph"], "fallbacks": cache.stats()["fallbacks"]}
        held = getattr(cache, "nbytes", None)
        notes.setdefault(name, {})["held_gib"] = None if held is None else round(held / 2**30, 3)
        notes[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return gaps
    except (RuntimeError, ImportError, ValueError) as error:  # a peer that cannot run here must not end the others
        notes[name] = {"error": f"{type(error).__name__}: {str(error)[:160]}"}
        return [float("nan")]


if __name__ == "__main__":
    main()
