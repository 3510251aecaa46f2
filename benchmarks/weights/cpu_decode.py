"""Decoding on a CPU with packed weights beside dense float32: tokens/s, and bytes of the weights held.

Greedy decoding of SmolLM2 from a real prompt with stock caches; dense and packed take turns, so that whatever else
the machine does falls on both. The bars are those of the project: packed at 0.8 x dense or faster, under 0.4 x its
bytes.

Where llama-cpp-python can be imported, llama.cpp takes its turns too, on the same packed weights, written by
`save_gguf`: how far we are from it, and whether it reads what we write. It must be built from its sources
(`pip install --no-binary llama-cpp-python llama-cpp-python`), which takes some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
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
Speaker = Callable[[torch.Tensor], Iterator[int]]


def held(model: Any) -> int:
    """Bytes of the distinct storages of a model's parameters."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@torch.inference_mode()
def greedy(model: Any, prompt: torch.Tensor) -> Iterator[int]:
    """Tokens that a transformers model says after the prompt, without end."""
    cache = DynamicCache(config=model.config)
    token = prompt
    while True:
        token = model(token, **{CACHE: cache}, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        yield int(token)


def rates(tokens: Iterator[int], prompt: int, steps: int) -> tuple[float, float, list[int]]:
    """Tokens/s of `steps` steps after the first token, and of the `prompt` tokens before it; what was said."""
    started = time.perf_counter()
    said = [next(tokens)]
    between = time.perf_counter()
    said += [next(tokens) for _ in range(steps)]
    return steps / (time.perf_counter() - between), prompt / (between - started), said


def llama_cpp(model: Any, tokenizer: Any, threads: int) -> tuple[Speaker, int]:
    """The same for llama.cpp, of a packed model written to a file; and the bytes of that file."""
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        path = hf_ctxopt.save_gguf(model, Path(folder) / "model.gguf", tokenizer)
        nbytes = path.stat().st_size
        llama = Llama(str(path), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def speak(prompt: torch.Tensor) -> Iterator[int]:
        llama.reset()  # else it goes on from what it has in common with the last prompt
        return iter(llama.generate(prompt[0].tolist(), top_k=1, temp=0.0))

    return speak, nbytes


def main(args: argparse.Namespace) -> int:
    """Time each mix; returns the number of bars that were missed."""
    torch.set_num_threads(args.threads)
    dense, tokenizer = load_smollm2()
    prompt = real_tokens(tokenizer, args.prompt)
    models = {"dense float32": dense}
    models |= {mix: hf_ctxopt.quantize_(load_smollm2()[0], mix) for mix in args.mixes}
    speakers: dict[str, tuple[Speaker, int]] = {
        name: (partial(greedy, model), held(model)) for name, model in models.items()
    }
    there = find_spec("llama_cpp") is not None
    for mix in args.mixes if there else ():
        speakers[f"llama.cpp {mix}"] = llama_cpp(models[mix], tokenizer, args.threads)
    seen: dict[str, list[tuple[float, float, list[int]]]] = {name: [] for name in speakers}
    for speak, _ in speakers.values():
        rates(speak(prompt), args.prompt, 2)
    for _ in range(args.rounds):
        for name, (speak, _) in speakers.items():
            seen[name].append(rates(speak(prompt), args.prompt, args.steps))
    rows = []
    for name, (_, nbytes) in speakers.items():
        decode, prefill, said = zip(*seen[name], strict=True)
        rows.append({
            "weights": name, "tokens_per_s": median(decode), "prefill_tokens_per_s": median(prefill), "bytes": nbytes,
            "all_tokens_per_s": decode, "said": said[0],
        })  # fmt: skip
    missed = 0
    for row in rows:
        # The median of the rounds' ratios: rounds, not models, share what disturbs them.
        pairs = zip(row["all_tokens_per_s"], rows[0]["all_tokens_per_s"], strict=True)
        row["speed_ratio"] = median(ours / theirs for ours, theirs in pairs)
        row["size_ratio"] = row["bytes"] / rows[0]["bytes"]
        row["passed"] = row["weights"] not in args.mixes or (row["speed_ratio"] >= SPEED and row["size_ratio"] < SIZE)
        missed += not row["passed"]
        print(f"{row['weights']:16} {row['tokens_per_s']:6.1f} tokens/s ({row['speed_ratio']:.2f} x), prompt "
              f"{row['prefill_tokens_per_s']:6.1f}, {row['bytes'] / 1e6:6.1f} MB ({row['size_ratio']:.3f} x) "
              f"{verdict(row['passed'])}")  # fmt: skip
    said = {row["weights"]: row["said"] for row in rows}
    for mix in args.mixes if there else ():
        pairs = zip(said[mix], said[f"llama.cpp {mix}"], strict=True)
        alike = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), len(said[mix]))
        print(f"{mix}: the first {alike} of {len(said[mix])} tokens are those of llama.cpp")
    figures = {
        "kernel": "compiled" if gguf_kernel(torch.device("cpu")) is not None else "torch", "rows": rows,
        "llama_cpp_python": version("llama-cpp-python") if there else None,
    }  # fmt: skip
    write_results(args, "packed_cpu_decode", "SmolLM2-135M-Instruct", figures)
    return missed


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    raise SystemExit(main(parser.parse_args()))
