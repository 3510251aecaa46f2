"""How much context fits on an 8 GB card, and how fast it decodes there: checked first, one table, one JSON.

A larger GPU plays the card: torch's allocator is capped at 8 GiB less the CUDA context of this process. Llama-2-7B
shape (MHA, 0.5 MiB of bf16 K/V a token), random weights, nf4. Every point is a true prefill and 24 decoded tokens by
`generate`; the largest context of each cache is looked for in a few steps upwards, from its bar on, until the
allocator refuses. ms per token is the median gap of CUDA events between tokens, at that context.

1. Check, without the cap: tokens and logits of `ctx_paged` (16 bits) against DynamicCache, finite logits of all.
2. Points: our caches patched, with whatever graph replay there is; DynamicCache and QuantizedCache (hqq, int4) as
   transformers has them, each read whole and in chunks of 1,024 where that is better for it.
3. `ctx_sink`: 64 k tokens pass through, and the bytes allocated after each chunk are compared.

cuDNN attention is off, as on consumer cards. Needs bitsandbytes, and hqq for its row. Run from the repository root:
`PYTHONPATH=.:.carry/site python benchmarks/gpu/fit_8gb.py` (under 8 minutes on an H200; `--quick`: one point each).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from card_8gb import llama_7b, outside, shrink, with_growing_segments
from decode import Clock

import hf_ctxopt
from hf_ctxopt.integration.compat import generate_argument

CACHE = generate_argument()
MOST_MS = 10  # per token: the bar of every cache of ours
NEW = 32  # 24 timed tokens, behind those that the clock and a graph need to warm up
STREAM = 65536
SINK = {"sinks": 4, "window": 4092}


@dataclass(frozen=True)
class Case:
    """One cache on the card.

    Args:
        name: of its row.
        points: contexts to try, rising; the first is the bar, if there is one.
        bar: tokens it must hold; 0 for peers.
        cache: one of ours; `None` for a peer.
        options: of the cache.
        peer: makes a peer's cache.
        chunk: `prefill_chunk_size` of a peer; our caches choose their own.
    """

    name: str
    points: tuple[int, ...]
    bar: int = 0
    cache: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    peer: Callable[[Any], Any] | None = None
    chunk: int | None = None


def hqq4(model: Any) -> Any:
    """QuantizedCache as its own authors set it: hqq, 4 bits."""
    from transformers import QuantizedCache

    return QuantizedCache("hqq", config=model.config, nbits=4, axis_key=1, axis_value=1)


CASES = [
    Case("ctx_paged int4", (18_000, 21_000, 22_500, 23_500, 24_500), 18_000, "ctx_paged", {"kv_bits": 4}),
    Case("ctx_paged int2", (28_000, 34_000, 37_000, 40_000, 43_000), 28_000, "ctx_paged", {"kv_bits": 2}),
    Case("ctx_paged bf16", (6_500, 6_900, 7_100, 7_300), 6_500, "ctx_paged"),
    Case("ctx_sink bf16", (16_384,), 16_384, "ctx_sink", SINK),
    Case("dynamic, chunks", (6_144, 6_656, 6_912), chunk=1_024),
    Case("hqq int4, whole", (11_264, 12_288, 13_312), peer=hqq4),
    Case("dynamic, whole", (6_144, 6_656)),
    Case("hqq int4, chunks", (8_192, 10_240), peer=hqq4, chunk=1_024),
]


@torch.inference_mode()
def run(model: Any, case: Case, context: int) -> dict[str, Any]:
    """One point: prefill, decode, figures. Raises what torch raises if it does not fit."""
    draw = torch.Generator("cuda").manual_seed(context)
    ids = torch.randint(2, 32000, (1, context), device="cuda", generator=draw)
    clock = Clock()
    call: dict[str, Any] = {} if case.chunk is None else {"prefill_chunk_size": case.chunk}
    if case.peer is not None:
        call[CACHE] = case.peer(model)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with nullcontext() if case.cache is None else hf_ctxopt.patched(model, cache=case.cache, **case.options):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, disable_compile=True,
            stopping_criteria=[clock], return_dict_in_generate=True, **call,
        )  # fmt: skip
    gaps = clock.gaps()
    found = {"context": context, "ms": statistics.median(gaps), "seconds": time.perf_counter() - start,
             "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "timed_tokens": len(gaps)}  # fmt: skip
    if case.cache is not None:
        cache = next(out[key] for key in ("cache", "past_key_values") if out.get(key) is not None)
        stats = cache.stats()
        found |= {"held_gib": cache.nbytes / 2**30, "fallbacks": stats["fallbacks"], "graph": stats.get("graph")}
    return found


def attempt(model: Any, case: Case, context: int) -> dict[str, Any]:
    """`run`, with a refusal of the allocator as a result; everything of the point is gone afterwards."""
    try:
        found = run(model, case, context)
    except torch.OutOfMemoryError as error:
        found = {"context": context, "refused": str(error)[:400]}
    except (RuntimeError, ImportError, ValueError) as error:  # a peer that cannot run here must not end the others
        found = {"context": context, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    gc.collect()
    torch.cuda.empty_cache()
    return found


def largest(model: Any, case: Case, points: tuple[int, ...], until: float) -> dict[str, Any]:
    """The last point of a case that fits, the first that does not, and what they gave."""
    row: dict[str, Any] = {"cache": case.name, "bar": case.bar, "fits": 0, "refused_at": None}
    for context in points:
        if time.monotonic() > until:
            row["stopped"] = "out of time: more may fit"
            break
        found = attempt(model, case, context)
        print(
            "   ", case.name, {key: round(v, 3) if isinstance(v, float) else v for key, v in found.items()}, flush=True
        )
        if "ms" not in found or (case.bar and found["ms"] > MOST_MS):
            slow = f"{found.get('ms', 0):.1f} ms per token"  # too full for a graph
            row |= {"refused_at": context, "why": found.get("refused") or found.get("error") or slow}
            break
        row |= {"fits": context, **found}
    return row


@torch.inference_mode()
def stream(model: Any, tokens: int) -> dict[str, Any]:
    """Bytes allocated after each chunk while `tokens` tokens pass through `ctx_sink` in one call of generate."""
    after: list[tuple[int, int]] = []
    hook = model.register_forward_hook(
        lambda _, __, kw, ___: after.append((kw["input_ids"].shape[1], torch.cuda.memory_allocated())),
        with_kwargs=True,
    )
    ids = torch.randint(2, 32000, (1, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    torch.cuda.reset_peak_memory_stats()
    try:
        with hf_ctxopt.patched(model, cache="ctx_sink", **SINK):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    except torch.OutOfMemoryError as error:
        return {"tokens": tokens, "refused": str(error).split(". ")[0], "flat": False}
    finally:
        hook.remove()
    filled = SINK["sinks"] + SINK["window"]
    chunks = [held for size, held in after if size > 1]
    steady = chunks[2 * filled // max(size for size, _ in after) :]
    if not steady:
        raise ValueError(f"{tokens} tokens do not fill {filled} twice")
    spread = (max(steady) - min(steady)) / 2**20
    return {"tokens": tokens, "chunks": len(chunks), "spread_mib": spread, "flat": spread < 16,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip


@torch.inference_mode()
def check(model: Any) -> dict[str, Any]:
    """`ctx_paged` with 16 bits against DynamicCache; finite logits of every cache of ours."""
    ids = torch.randint(2, 32000, (1, 512), device="cuda", generator=torch.Generator("cuda").manual_seed(7))
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "output_logits": True,
            "return_dict_in_generate": True, "disable_compile": True}  # fmt: skip
    want = model.generate(ids, **call)
    found: dict[str, Any] = {"passed": True}
    for case in (case for case in CASES if case.cache is not None):
        with hf_ctxopt.patched(model, cache=case.cache, **case.options):
            got = model.generate(ids, prefill_chunk_size=200, **call)
        finite = all(bool(logits.isfinite().all()) for logits in got.logits)
        error = float((got.logits[0].float() - want.logits[0].float()).norm() / want.logits[0].float().norm())
        same = int((got.sequences == want.sequences)[0, 512:].long().cumprod(0).sum())
        exact = not case.options.get("kv_bits")
        found[case.name] = {"finite": finite, "error": error, "same_tokens": same}
        found["passed"] &= finite and (not exact or (error < 5e-2 and same >= 1))
    return found


def main() -> None:
    """Check, probe, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_fit_8gb.json"))
    parser.add_argument("--commit", default="unknown", help="the lent machine has no git: pass `git rev-parse HEAD`")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=420, help="no new point is begun after so many")
    options = parser.parse_args()
    with_growing_segments()
    started = time.monotonic()
    until = started + options.seconds
    torch.backends.cuda.enable_cudnn_sdp(False)
    checks = check(llama_7b(layers=2))  # also loads the kernels, whose code counts as context
    print(checks, flush=True)
    if not checks["passed"]:
        raise SystemExit("logits differ: nothing was measured")
    gc.collect()
    torch.cuda.empty_cache()
    card = shrink()
    torch.cuda.reset_peak_memory_stats()
    model = llama_7b()
    card |= {"weights_gib": torch.cuda.memory_allocated() / 2**30}
    card |= {"build_peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    print(card, f"{time.monotonic() - started:.0f} s", flush=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
        "dtype": "nf4 weights, bfloat16", "seed": 0, "commit": options.commit, "card": card, "checks": checks,
        "fit": [],
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(row: dict[str, Any]) -> None:
        result["fit"].append(row)
        result["seconds"] = time.monotonic() - started
        card["context_at_end_gib"] = outside() / 2**30
        options.out.write_text(
            json.dumps(result, indent=1) + "\n"
        )  # after each row: the machine is lent by the minute

    for index, case in enumerate(CASES[:6] if options.quick else CASES):
        if index == 4:  # before the peers
            keep({"cache": "ctx_sink stream", **stream(model, STREAM)})
        keep(largest(model, case, case.points[:1] if options.quick else case.points, until))
    for row in result["fit"]:
        if "tokens" in row:
            print(row, flush=True)
            continue
        good = "" if not row["bar"] else "ok" if row["fits"] >= row["bar"] and row["ms"] <= MOST_MS else "MISSED"
        print(f"{row['cache']:<18} {row['fits']:>7,} tokens (bar {row['bar']:>6,}), refused at {row['refused_at']}, "
              f"{row.get('ms', float('nan')):6.2f} ms, peak {row.get('peak_gib', 0):5.2f} GiB, held "
              f"{row.get('held_gib', 0):5.2f} GiB {good}", flush=True)  # fmt: skip
    print(card, f"{result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
