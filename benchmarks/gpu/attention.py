"""The paged kernels on a GPU: checked against their float32 references first, timed after, one table, one JSON.

1. Decode attention on fresh random inputs with poisoned outputs, workspaces and unused slots: head sizes 64-256,
   groups 1/4/8, pages of 16-128, 16/8/4/2 bits, windows, shift variants, softcap, s_aux, shares; then append, seal
   and gather. Quantized pages are compared with the reference on the dequantized pages.
2. Times under a CUDA graph, GQA 32/8, head size 128, page 32: a step alone, over data sets that together exceed the
   L2 cache ("cold"), and over one set ("warm"). Floors are bytes / 4.3 TB/s and bytes / the read bandwidth of the run.
   The peer is SDPA on dense K/V, flash and cuDNN.

Run from the repository root on a machine with CUDA: `PYTHONPATH=. python benchmarks/gpu/attention.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from paged_problem import Problem, decode_shape, make, seal_all
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_ctxopt.kernels.append import QueryTurn, append_reference
from hf_ctxopt.kernels.append_triton import append
from hf_ctxopt.kernels.gather import gather_reference
from hf_ctxopt.kernels.gather_triton import gather
from hf_ctxopt.kernels.paged import PagedStates, decode_reference
from hf_ctxopt.kernels.paged_triton import Launch, choose, decode, workspace_bytes
from hf_ctxopt.kernels.seal_triton import seal
from hf_ctxopt.pages.codec import Codec

BANDWIDTH = 4.3e6  # bytes per us: what reads reach on an H200 (reference/gpu.md)
SHAPES = [(2048, 1), (32768, 1), (131072, 1), (2048, 8), (32768, 8), (131072, 8)]
BITS = [16, 8, 4, 2]
HEADS, KV_HEADS, DIM, SIZE = 32, 8, 128, 32
BOUND = 1e-2


def problems() -> list[Problem]:
    """The cases of the check."""
    groups, sizes = itertools.cycle([(4, 4), (8, 2), (16, 2)]), itertools.cycle([16, 32, 64])
    cases = []
    for bits in (None, (8, 8), (4, 4), (2, 2)):
        for dim in (64, 80, 96, 128, 192, 256):
            heads, kv_heads = next(groups)
            cases.append(Problem(heads, kv_heads, (dim, dim), next(sizes), bits, seed=dim))
        next(groups)
    for bits in (None, (4, 4)):
        cases += [Problem(heads, kv, (128, 128), 32, bits, seed=heads) for heads, kv in ((4, 4), (8, 2), (16, 2))]
    for bits in (None, (8, 8), (4, 4)):
        cases += [Problem(dims=(64, 64), size=size, bits=bits, seed=size) for size in (16, 32, 64, 128)]
    for bits in (None, (8, 4), (4, 4)):
        cases += [
            Problem(bits=bits, sinks=4, jump=5, seed=1),
            Problem(bits=bits, window=True, seed=2),
            Problem(bits=bits, softcap=3.0, seed=3),
            Problem(bits=bits, s_aux=True, seed=4),
        ]
    cases += [Problem(bits=(2, 8), dims=(192, 128), seed=5), Problem(bits=(8, 4), dims=(96, 64), seed=6)]
    return [*cases, Problem(dtype=torch.float16, seed=7), Problem(bits=(4, 4), dtype=torch.float16, seed=8)]


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_decode(case: Problem) -> dict[str, Any]:
    """Relative errors of output and shares of one problem."""
    query, pages, table, rows, logits = make(case)
    call = (query, pages, table, rows, case.dims[0] ** -0.5, case.softcap, logits)
    want, want_shares = decode_reference(*call)
    out = torch.full_like(want, torch.nan, dtype=case.dtype)
    shares = torch.full_like(want_shares, torch.nan)
    scratch = torch.full((workspace_bytes(query, pages, table.shape[1], True) // 4,), torch.nan, device="cuda")
    decode(*call, out=out, shares=shares, workspace=scratch.view(torch.uint8))
    again = decode(*call)
    errors = {"error": relative(out, want), "shares_error": relative(shares, want_shares)}
    return {**case.describe(), **errors, "repeats": torch.equal(out, again)}


def check_others(which: tuple[tuple[int, int], int, tuple[int, int]]) -> dict[str, Any]:
    """Append, seal and gather for head sizes, page size and bits: largest differences from their references."""
    dims, size, bits = which
    draw = torch.Generator("cuda").manual_seed(size + sum(dims))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=draw)

    batch, heads, kv, kind = 3, 8, 2, torch.bfloat16
    states = [normal(batch, 2, n, d + 8).to(kind)[:, 1:, :, :d].transpose(1, 2) for n, d in ((heads, dims[0]),)]
    states += [normal(batch, 1, kv, d).to(kind).transpose(1, 2) for d in dims]
    slots = torch.tensor([size + 3, -1, 0], device="cuda")
    angle = normal(batch, 2, dims[0] // 2)
    turned = QueryTurn(angle.cos(), angle.sin(), 0, interleaved=size == 16)
    bases = [torch.linalg.qr(normal(d, d))[0].contiguous().to(kind) for d in dims]
    worst = 0.0
    for basis in (bases, (None, None)):
        written = [[torch.full((kv, 2, size, d), torch.nan, dtype=kind, device="cuda") for d in dims] for _ in "ab"]
        got = append(*states, slots, *written[0], turned, 2, *basis)
        want = append_reference(*states, slots, *written[1], turned, 2, *basis)
        for mine, reference in zip([got, *written[0]], [want, *written[1]], strict=True):
            torch.testing.assert_close(mine, reference, rtol=2e-2, atol=2e-2, equal_nan=True)
            worst = max(worst, relative(mine.nan_to_num(), reference.nan_to_num()))
    raw = [normal(kv, 6, size, d).to(kind) for d in dims]
    room = seal_all(*(part.roll(1, 1) for part in raw), bits)
    pages = PagedStates(*raw, room)
    margins = Codec(bits[0], True).margin, Codec(bits[1], False).margin
    seal(pages, torch.tensor([[2, 0], [0, 3], [-1, 1], [3, 4]], dtype=torch.int32, device="cuda"), margins)
    # The codec on the CPU divides; on a GPU torch multiplies by the reciprocal.
    encoded = seal_all(*(part.cpu() for part in raw), bits)
    unequal = 0
    for mine, reference in zip(vars(room).values(), vars(encoded).values(), strict=True):
        for source, target in ((2, 0), (0, 3), (3, 4)):
            unequal += int((mine[:, target].cpu() != reference[:, source]).sum())
    row = torch.tensor([9, 1, -1, -4, 2, -5], dtype=torch.int32, device="cuda")
    dense = [[torch.full((kv, 4 * size, d), torch.nan, dtype=kind, device="cuda") for d in dims] for _ in "ab"]
    gather(pages, row, 1, 4, *dense[0])
    gather_reference(pages, row, 1, 4, *dense[1])
    gathered = max(relative(mine, reference) for mine, reference in zip(*dense, strict=True))
    return {
        "dims": dims, "size": size, "bits": bits, "append_error": worst, "seal_unequal": unequal,
        "gather_error": gathered,
    }  # fmt: skip


def warm_up(job: tuple[int, int, int, Launch]) -> None:
    """Compile the kernels of one timing for the processes that follow."""
    bits, batch, _, launch = job
    query, pages, table, rows = decode_shape(512, batch, bits % 16, 0)
    decode(query, pages, table, rows, DIM**-0.5, launch=launch)
    torch.cuda.synchronize()


def work(job: tuple[str, Any]) -> tuple[str, Any]:
    """One check, or one compilation, in a process of its own."""
    kind, argument = job
    return kind, {"decode": check_decode, "others": check_others, "compile": warm_up}[kind](argument)


def chosen(context: int, batch: int, bits: int) -> Launch:
    """The launch that `decode` chooses for a timing."""
    pages = decode_shape(512, 1, bits % 16, 0)[1]
    return choose(pages, batch * KV_HEADS, context // SIZE)


def timed(call: Callable[[int], object], sets: int, replays: int = 9) -> float:
    """Median us of one `call(set)`, under a graph that walks through all sets."""
    rounds = max(1, 32 // sets) if sets > 1 else 16
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(rounds * sets):
            call(index % sets)
    times = []
    for _ in range(replays + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / (rounds * sets))
    return statistics.median(times[1:])


def read_bandwidth() -> float:
    """Bytes per us at which a large tensor is read: its maximum, 4 GiB."""
    source = torch.zeros(1 << 30, device="cuda")
    return source.nbytes / timed(lambda _: source.amax(), 1)


def time_decode(context: int, batch: int, bits: int, measured: float) -> dict[str, Any]:
    """Times of one step of the 8B shape."""
    first = decode_shape(context, batch, bits % 16, 0)
    pages, launch = first[1], chosen(context, batch, bits)
    parts = [pages.raw_keys, pages.raw_values, *(vars(pages.sealed).values() if pages.sealed else [])]
    moved = sum(part.nbytes for part in parts)
    count = min(32, math.ceil(3e8 / moved))
    sets = [first, *(decode_shape(context, batch, bits % 16, seed) for seed in range(1, count))]
    out = torch.full((batch, HEADS, DIM), torch.nan, dtype=torch.bfloat16, device="cuda")
    scratch = torch.empty(workspace_bytes(first[0], pages, context // SIZE, False), dtype=torch.uint8, device="cuda")

    def step(index: int) -> Tensor:
        return decode(*sets[index], DIM**-0.5, out=out, workspace=scratch)

    row = {"context": context, "batch": batch, "bits": bits, "launch": vars(launch), "megabytes": moved / 1e6}
    row |= {"cold_us": timed(step, count), "warm_us": timed(step, 1), "data_sets": count}
    shares = torch.empty(batch, HEADS, context // SIZE, device="cuda")
    row |= {"warm_with_shares_us": timed(lambda _: decode(*first, DIM**-0.5, out=out, shares=shares), 1)}
    row |= {"floor_us": moved / BANDWIDTH, "floor_measured_us": moved / measured}
    if bits == 16:
        row |= time_sdpa(context, batch, count)
    return row


def time_sdpa(context: int, batch: int, count: int) -> dict[str, float]:
    """SDPA on dense K/V of the same size."""
    states = [torch.randn(2, batch, KV_HEADS, context, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
    query = torch.randn(batch, HEADS, 1, DIM, dtype=torch.bfloat16, device="cuda")
    found = {}
    for name, backend in (
        ("sdpa_flash_us", SDPBackend.FLASH_ATTENTION),
        ("sdpa_cudnn_us", SDPBackend.CUDNN_ATTENTION),
    ):
        with sdpa_kernel(backend):
            found[name] = timed(
                lambda index: scaled_dot_product_attention(query, *states[index], enable_gqa=True), count
            )
    return found


def time_others() -> dict[str, float]:
    """Append, seal and gather of one layer of the 8B shape, us."""
    query = torch.randn(1, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(1, KV_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    _, pages, table, _ = decode_shape(32768, 1, 4, 0)
    slots, angle = torch.tensor([5], device="cuda"), torch.randn(1, 2, DIM // 2, device="cuda")
    turned, basis = QueryTurn(angle.cos(), angle.sin()), torch.linalg.qr(torch.randn(DIM, DIM, device="cuda"))[0]
    basis = basis.contiguous().bfloat16()
    out = torch.empty(1, 2, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    write = (query, new, new, slots, pages.raw_keys, pages.raw_values, turned, 2)
    pairs = torch.tensor([[0, 0]], dtype=torch.int32, device="cuda")
    dense = [torch.empty(KV_HEADS, 8192, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    found = {
        "append_us": timed(lambda _: append(*write, out=out), 1),
        "append_rotated_us": timed(lambda _: append(*write, basis, basis, out=out), 1),
        "seal_one_page_us": timed(lambda _: seal(pages, pairs), 1),
        "gather_8192_tokens_us": timed(lambda _: gather(pages, table[0], 1, 256, *dense), 1),
    }
    return found


def bars(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The bars of issue 3 on attention alone, each with what was measured."""
    at = {(row["context"], row["batch"], row["bits"]): row for row in rows}

    def over_floor(*key: int) -> float:
        return float(at[key]["cold_us"] / at[key]["floor_us"])

    found = {
        "bf16 128k b1, x floor": (over_floor(131072, 1, 16), 1.15),
        "bf16 128k b8, x floor": (over_floor(131072, 8, 16), 1.05),
        "bf16 32k b1, x floor": (over_floor(32768, 1, 16), 1.5),
        "bf16 2k b1, us, one data set": (at[2048, 1, 16]["warm_us"], 9.0),
    }
    for batch in (1, 8):
        for bits in (8, 4):
            share = at[131072, batch, bits]["cold_us"] / at[131072, batch, 16]["cold_us"]
            found[f"int{bits} 128k b{batch}, x own bf16"] = (share, 0.75)
    return {name: {"measured": round(got, 3), "bar": bar, "met": got <= bar} for name, (got, bar) in found.items()}


def main() -> int:
    """Check, time, print, write; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_attention.json"))
    parser.add_argument("--commit", default="unknown", help="the lent machine has no git: pass `git rev-parse HEAD`")
    options = parser.parse_args()
    started = time.monotonic()
    others = [((64, 64), 16, (8, 8)), ((80, 96), 16, (4, 4)), ((128, 128), 32, (4, 2)), ((256, 192), 64, (2, 8))]
    timings = [(bits, batch, context, chosen(context, batch, bits)) for context, batch in SHAPES for bits in BITS]
    jobs = [("decode", case) for case in problems()] + [("others", which) for which in others]
    distinct = {(job[0], job[3]): job for job in timings}
    jobs += [("compile", job) for job in distinct.values()]
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(work, jobs))
    checks = [row for kind, row in done if kind == "decode"]
    pieces = [row for kind, row in done if kind == "others"]
    wrong = [row for row in checks if not (max(row["error"], row["shares_error"]) <= BOUND and row["repeats"])]
    wrong += [
        row for row in pieces if row["seal_unequal"] or not max(row["append_error"], row["gather_error"]) <= BOUND
    ]
    largest = max(row["error"] for row in checks)
    print(f"{len(checks)} decode cases, largest error {largest:.1e}; {len(pieces)} of the others; {len(wrong)} wrong")
    print(*wrong, sep="\n")
    measured = read_bandwidth()
    print(f"checked in {time.monotonic() - started:.0f} s; reads {measured / 1e6:.2f} TB/s")
    print("us, cold (x floor, x bytes / reads) | warm, warm with shares")
    rows = []
    for context, batch in SHAPES:
        for bits in BITS:
            row = time_decode(context, batch, bits, measured)
            rows.append(row)
            ratios = [row["cold_us"] / row[name] for name in ("floor_us", "floor_measured_us")]
            line = f"{context:7} b{batch} {bits:2} bits {row['cold_us']:7.1f} ({ratios[0]:.2f}, {ratios[1]:.2f})"
            line += f" | {row['warm_us']:7.1f}, {row['warm_with_shares_us']:.1f}"
            if bits == 16:
                line += f"   SDPA flash {row['sdpa_flash_us']:.1f}, cuDNN {row['sdpa_cudnn_us']:.1f}"
            print(line, flush=True)
            torch.cuda.empty_cache()
    pieces_us, reached = time_others(), bars(rows)
    print(pieces_us, *reached.items(), f"{time.monotonic() - started:.0f} s", sep="\n")
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "dtype": "bfloat16", "seed": 0, "commit": options.commit, "shape": "GQA 32/8, head size 128, page 32",
        "bandwidth_bytes_per_us": {"floor": BANDWIDTH, "read_in_this_run": measured}, "checks": checks,
        "append_seal_gather_checks": pieces, "decode_us": rows, "others_us": pieces_us, "bars": reached,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
