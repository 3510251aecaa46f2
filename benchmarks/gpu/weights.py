"""Packed weights on a GPU: checked against float32 first, then timed; one JSON.

- `check`: every block type, 1 to 16 rows and more, against the decoded weight in float32, and the decoded weight
  against the codecs.
- `matvec`: one row under a CUDA graph, weights rotated through 160 MB, against bytes / 4.3 TB/s; bitsandbytes nf4
  beside it. `chained` makes each product wait for the one before it, as the layers of a model do.
- `decode`: a Llama-2-7B shape in Q4_K_M by `generate` with `patch_model`'s graph, and the same in nf4.
- `cap-`: an 8 GiB card (`card_8gb.py`): Llama-2-7B with 4,096 tokens of fp16 K/V; Gemma-3-12B with a packed embedding
  and int4 pages, of 8,192 and 12,288 tokens. In two parts, `cap-llama` and `cap-gemma`, each in a process of its own.
- `load`: a bf16 Llama shape read from disk into Q4_K_M on the GPU: peak allocated over what stays.

`PYTHONPATH=.:.carry/site python benchmarks/gpu/weights.py --only check,matvec,decode`
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from card_8gb import llama_7b, shrink, with_growing_segments
from decode import PEAK, Clock
from packed_models import llama_7b_config, packed_gemma_12b, packed_llama_7b, random_blocks

import hf_ctxopt
from hf_ctxopt.kernels import gguf_decode_triton
from hf_ctxopt.kernels.gguf_triton import Launch, choose, matmul
from hf_ctxopt.weights.blocks import BLOCKS, packed_bytes
from hf_ctxopt.weights.codecs import decode
from hf_ctxopt.weights.matmul import gguf_matmul

Rows = Iterator[dict[str, Any]]
SEED = 0
ROTATED = 160e6
CHECKED = ((1000, 4096), (509, 11008), (4096, 4096))  # (outputs, columns)
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (outputs, columns)


def check() -> list[dict[str, Any]]:
    """Largest error of a product over its own size, and whether decoded weights are the codecs' bit for bit."""
    tasks = [(type, *shape) for shape in CHECKED for type in BLOCKS]
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(check_one, tasks) for row in found]  # the compilers side by side
    worst = max(row["error"] for row in rows)
    print("check: worst relative error", worst, flush=True)
    wrong = [row for row in rows if not row["error"] < 6e-3 or not row["decoded"]]
    if wrong:
        print(wrong)
        raise SystemExit("products differ: nothing was timed")
    return rows


def check_one(task: tuple[str, int, int]) -> list[dict[str, Any]]:
    """One weight with 1 to 40 rows."""
    type, outputs, columns = task
    rows = []
    packed = random_blocks(outputs, columns, type)
    weight = decode(packed, type)
    fast = [gguf_decode_triton.decode(packed, type, dtype) for dtype in (torch.float32, torch.bfloat16)]
    decoded = torch.equal(fast[0], weight) and torch.equal(fast[1], weight.bfloat16())
    for count in (1, 2, 5, 16, 40):
        x = torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)
        want = x.float() @ weight.T
        error = float((gguf_matmul(x, packed, type).float() - want).norm() / want.norm())
        rows.append({"type": type, "outputs": outputs, "columns": columns, "rows": count, "error": error,
                     "decoded": decoded})  # fmt: skip
    return rows


def graphed(call: Callable[[int], Any], count: int, repeats: int = 20) -> float:
    """Microseconds of one of `count` calls under a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(min(count, 3)):
            call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call(index) for index in range(count)]
    warm = time.perf_counter() + 0.1  # a GPU that was idle raises its clocks first
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / count)
    del kept
    return statistics.median(times)


def matvec(sweep: bool) -> list[dict[str, Any]]:
    """One row times each shape."""
    found = []
    for type in ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "Q5_0"):
        for outputs, columns in SHAPES:
            rows = one_shape(type, outputs, columns, sweep and type in ("Q4_K", "Q6_K", "Q8_0"))
            for row in rows[:1] + sorted(rows[1:], key=lambda row: row["us"])[:4]:
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            found += rows
    return found + nf4_matvec()


def one_shape(type: str, outputs: int, columns: int, sweep: bool) -> list[dict[str, Any]]:
    """Microseconds of a product; the first row is that of the launch `choose` takes."""
    nbytes = packed_bytes((outputs, columns), type)
    count = max(4, int(ROTATED / nbytes) + 1)
    weights = [random_blocks(outputs, columns, type) for _ in range(count)]
    x = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
    launches = [choose(type, 1, columns, outputs)]
    if sweep:
        tried = (Launch(tile, 64, warps) for tile in (4, 8, 16, 32) for warps in (2, 4, 8))
        launches += [launch for launch in tried if launch != launches[0]]
    rows = []
    floor = 1e6 * nbytes / PEAK
    for launch in launches:
        us = graphed(partial(_product, x, weights, type, launch), 3 * count)
        rows.append({"type": type, "outputs": outputs, "columns": columns, "us": us, "floor_us": floor,
                     "ratio": us / floor, "launch": str(launch)})  # fmt: skip
    if outputs == columns:
        rows[0]["chained_us"] = graphed(_Chain(x, weights, type), 3 * count)
    return rows


def _product(x: torch.Tensor, weights: list[torch.Tensor], type: str, launch: Launch, index: int) -> torch.Tensor:
    return matmul(x, weights[index % len(weights)], type, launch)


class _Chain:
    """Each product takes the one before it."""

    def __init__(self, x: torch.Tensor, weights: list[torch.Tensor], type: str) -> None:
        self.x, self.weights, self.type = x, weights, type

    def __call__(self, index: int) -> torch.Tensor:
        self.x = matmul(self.x, self.weights[index % len(self.weights)], self.type)
        return self.x


def nf4_matvec() -> list[dict[str, Any]]:
    """The same of bitsandbytes."""
    import bitsandbytes as bnb

    found = []
    for outputs, columns in SHAPES:
        count = int(ROTATED / (outputs * columns / 2)) + 1
        layers = []
        for _ in range(count):
            layer = bnb.nn.Linear4bit(columns, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            layers.append(layer.to("cuda"))
        x = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode():
            us = graphed(lambda i: layers[i % count](x), 3 * count)  # noqa: B023
        found.append({"type": "nf4", "outputs": outputs, "columns": columns, "us": us})
        print(found[-1], flush=True)
    return found


@torch.inference_mode()
def generated(model: Any, context: int, **options: Any) -> dict[str, Any]:
    """Prefill, and the median gap between 24 tokens, with `ctx_paged`."""
    ids = torch.randint(2, 32000, (1, context), device="cuda", generator=torch.Generator("cuda").manual_seed(context))
    clock = Clock()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with hf_ctxopt.patched(model, cache="ctx_paged", **options):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, disable_compile=True,
            stopping_criteria=[clock], return_dict_in_generate=True, output_logits=context < 1000,
        )  # fmt: skip
    cache = next(out[key] for key in ("cache", "past_key_values") if out.get(key) is not None)
    stats, gaps = cache.stats(), clock.gaps()
    finite = None if context >= 1000 else all(bool(part.isfinite().all()) for part in out.logits)
    return {"context": context, "ms": statistics.median(gaps), "seconds": time.perf_counter() - start,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "graph": stats.get("graph"),
            "fallbacks": stats["fallbacks"], "finite": finite}  # fmt: skip


def clear() -> None:
    """Give everything back to the allocator."""
    gc.collect()
    torch.cuda.empty_cache()


@torch.inference_mode()
def graphs_are_right() -> list[dict[str, Any]]:
    """Three packed layers: a graph's logits, as captured and compiled, against DynamicCache's on the same weights."""
    model, rows = packed_llama_7b(layers=3), []
    ids = torch.randint(2, 32000, (2, 70), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False, "disable_compile": True,
            "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    want = model.generate(ids, **call)
    for compiled in (False, True):
        with hf_ctxopt.patched(model, cache="ctx_paged", compile=compiled):
            got = model.generate(ids, **call)
        cache = next(got[key] for key in ("cache", "past_key_values") if got.get(key) is not None)
        same = 0
        while same < 40 and torch.equal(got.sequences[:, : 70 + same], want.sequences[:, : 70 + same]):
            same += 1
        errors = [float((a.float() - b.float()).norm() / b.float().norm())
                  for a, b in zip(got.logits[:same], want.logits[:same], strict=True)]  # fmt: skip
        rows.append({"compile": compiled, "graph": cache.stats()["graph"], "steps": same, "error": max(errors)})
        print(rows[-1], flush=True)
    return rows


def whole_decode(quick: bool) -> Rows:
    """Q4_K_M and nf4 in the same run, two rounds; `quick`: one of them, one context, not compiled."""
    yield from graphs_are_right()
    clear()
    makers = {"Q4_K_M": packed_llama_7b, "nf4": llama_7b}
    for round in range(1 if quick else 2):
        for name, make in makers.items():
            model = make()
            held = torch.cuda.memory_allocated() / 2**30
            for compiled in (False, True) if round == 0 and not quick else (False,):
                for context in (2048,) if quick else (512, 2048):
                    try:
                        row = generated(model, context, compile=compiled)
                    except (RuntimeError, ValueError) as error:
                        row = {"context": context, "error": f"{type(error).__name__}: {str(error)[:300]}"}
                    row = {"weights": name, "round": round, "compile": compiled, "held_gib": held, **row}
                    print(row, flush=True)
                    yield row
            del model
            clear()


def cap_llama() -> Rows:
    """Llama-2-7B with 4,096 tokens of fp16 K/V on an 8 GiB card."""
    return capped("Llama-2-7B", lambda: packed_llama_7b(dtype=torch.float16), (4096,))


def cap_gemma(mix: str) -> Rows:
    """Gemma-3-12B's text model, its embedding packed too, with int4 pages on an 8 GiB card."""
    return capped(f"Gemma-3-12B {mix}", lambda: packed_gemma_12b(mix), (8192, 12288), kv_bits=4)


def capped(name: str, make: Callable[[], Any], points: tuple[int, ...], **options: Any) -> Rows:
    """`generate` at growing lengths until the card is full, 32 tokens of each generated."""
    yield shrink()
    model = make()
    clear()
    held, built = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
    for context in points:
        try:
            row = generated(model, context - 32, **options)
        except torch.OutOfMemoryError as error:
            row = {"refused": str(error).split(". ")[0]}
        row = {"model": name, "held_gib": held, "build_peak_gib": built, **row, "context": context}
        print(row, flush=True)
        yield row
        clear()
        if "refused" in row:
            break


def load(layers: int) -> list[dict[str, Any]]:
    """`from_pretrained` with `GgufQuantConfig` of `layers` layers of Llama-2-7B's shape."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(llama_7b_config(layers))
    torch.set_default_dtype(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        clear()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=hf_ctxopt.GgufQuantConfig("Q4_K_M"), dtype=torch.bfloat16, device_map="cuda"
        )
        seconds = time.perf_counter() - start
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    row = {
        "layers": layers,
        "dtype": str(model.dtype),
        "held_gib": held / 2**30,
        "peak_gib": peak / 2**30,
        "ratio": peak / held,
        "seconds": seconds,
    }
    print(row, flush=True)
    return [row]


def main() -> None:
    """Run the parts asked for; write after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_weights.json"))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", default="check,matvec,decode,load")
    parser.add_argument("--sweep", action="store_true", help="try other launches of the matvec kernels")
    parser.add_argument("--quick", action="store_true", help="the shortest `decode`")
    parser.add_argument("--load-layers", type=int, default=32)
    parser.add_argument("--gemma-mix", default="Q4_K_M", help="the mix of `cap-gemma`")
    options = parser.parse_args()
    parts = options.only.split(",")
    if any(part.startswith("cap") for part in parts):
        with_growing_segments()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(SEED)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                              "transformers": transformers.__version__, "dtype": "bfloat16", "seed": SEED,
                              "commit": options.commit}  # fmt: skip
    steps: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "check": check, "matvec": lambda: matvec(options.sweep), "decode": lambda: whole_decode(options.quick),
        "cap-llama": cap_llama, "cap-gemma": lambda: cap_gemma(options.gemma_mix),
        "load": lambda: load(options.load_layers),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        start, result[part] = time.monotonic(), []
        for row in steps[part]():
            result[part].append(row)
            options.out.write_text(json.dumps(result, indent=1) + "\n")  # a run that is cut short has told something
        print(part, f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
