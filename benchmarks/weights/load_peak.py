"""Peak memory of loading a bf16 model into packed blocks on a CPU.

A random bf16 safetensors file of Llama-3.2-1B's shape is loaded by `from_pretrained(quantization_config=...)` in a
fresh process while a thread samples its resident set, as the kernel counts it (`VmRSS`, file pages that are mapped
included) and without file pages (`RssAnon`). Base: the same process once a tiny model has been loaded the same way,
so that every module is imported. Bar: over the base, at most 1.1 x (packed bytes + the two largest bf16 tensors).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_ctxopt
from common import arguments, verdict, write_results

ALLOWED = 1.1
KINDS = {"rss": "VmRSS", "anonymous": "RssAnon"}


def llama_1b(layers: int = 16, vocab: int = 128256, hidden: int = 2048) -> LlamaConfig:
    """Llama-3.2-1B's shape, or a smaller one with its proportions."""
    return LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )  # fmt: skip


def write_random(folder: Path, config: LlamaConfig, seed: int) -> list[int]:
    """Writes a checkpoint of `config` with normal weights; returns the bytes of its tensors."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied head is not among them
        drawn = torch.empty(parameter.shape, dtype=torch.bfloat16)
        tensors[name] = drawn.fill_(1.0) if drawn.dim() == 1 else drawn.normal_(0, 0.02, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return sorted((t.numel() * t.element_size() for t in tensors.values()), reverse=True)


class Sampler(threading.Thread):
    """Largest resident bytes of this process, all of them and anonymous ones, sampled every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = dict.fromkeys(KINDS, 0)
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            for kind, value in resident().items():
                self.peak[kind] = max(self.peak[kind], value)


def resident() -> dict[str, int]:
    """Resident bytes by kind."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(rows[key].split()[0]) * 1024 for kind, key in KINDS.items()}


def load(folder: Path, mix: str) -> Any:
    """The packed model of a checkpoint."""
    config = hf_ctxopt.GgufQuantConfig(mix)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


def child(folders: list[Path], mix: str, threads: int) -> None:
    """Loads the tiny model, takes the base, loads the large one; prints the figures as JSON."""
    torch.set_num_threads(threads)
    load(folders[0], mix)
    base, sampler = resident(), Sampler()
    sampler.start()
    start = time.perf_counter()
    model = load(folders[1], mix)
    seconds = time.perf_counter() - start
    sampler.done.set()
    sampler.join()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    packed = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters() if p.dtype == torch.uint8}
    print(json.dumps({
        "base": base, "peak": sampler.peak, "held": resident(), "seconds": seconds, "packed": sum(packed.values()),
        "storages": sum(storages.values()),
    }))  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Writes the checkpoints, measures in a process of its own, prints and stores the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--mix", default="Q4_K_M")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="load_peak", help="of the JSON")
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.mix, args.threads)
        return {}
    with tempfile.TemporaryDirectory() as place:
        tiny, large = Path(place) / "tiny", Path(place) / "large"
        write_random(tiny, llama_1b(1, 512, 256), args.seed)
        sizes = write_random(large, llama_1b(args.layers, args.vocab, args.hidden), args.seed)
        command = [sys.executable, __file__, "--child", str(tiny), str(large), "--mix", args.mix, "--threads",
                   str(args.threads)]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    limit = ALLOWED * (found["packed"] + sum(sizes[:2]))
    over = {kind: found["peak"][kind] - found["base"][kind] for kind in KINDS}
    passed = over["rss"] <= limit
    for kind, value in over.items():
        print(f"peak {kind:9} over the base: {value / 1e6:7.1f} MB")
    print(f"packed {found['packed'] / 1e6:.1f} MB, two largest {sum(sizes[:2]) / 1e6:.1f} MB; allowed "
          f"{limit / 1e6:.1f} MB, {found['seconds']:.0f} s: {verdict(passed)}")  # fmt: skip
    figures = {**found, "two_largest": sum(sizes[:2]), "file": sum(sizes), "over": over, "allowed": limit,
               "passed": passed}  # fmt: skip
    return write_results(args, args.name, "random Llama-3.2-1B shape", figures)


if __name__ == "__main__":
    main()
