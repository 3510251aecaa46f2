"""What packing costs SmolLM2 on real text: perplexity and KL divergence against its own float32 weights.

HQQ (4 bits, groups of 64) and bitsandbytes nf4 (blocks of 64) quantize, as transformers' integrations have them, the
linears of the decoder layers and leave the embedding that is the head in float32; GGUF mixes pack both. A package
that is not installed is left out and named.

Two things favour GGUF here. SmolLM2's 576 columns turn Q4_K into Q5_0, so its Q4_K_M is 6.2 bits a weight, while HQQ
and nf4 hold 4.5 bits in the layers. And the float32 reference was unpacked from a Q4_1 file, whose grid Q5_1 meets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_ctxopt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import arguments, load_smollm2, real_tokens, verdict, write_results

RATIOS = {"Q8_0": 1.01, "Q6_K": 1.02, "Q5_K_M": 1.04, "Q4_K_M": 1.10}  # of perplexity, at most


def hqq(weight: Tensor) -> Tensor:
    """`weight` after HQQ at 4 bits."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(weight.float(), nbits=4, group_size=64, axis=1, device="cpu",
                                      compute_dtype=torch.float32)  # fmt: skip
    return Quantizer.dequantize(packed, meta).view_as(weight).float()


def nf4(weight: Tensor) -> Tensor:
    """`weight` after bitsandbytes' nf4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")).float()


@torch.no_grad()
def rounded(model: Any, scheme: Callable[[Tensor], Tensor]) -> Any:
    """The model with the linears of its decoder layers rounded in place."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(scheme(module.weight))
    return model


@torch.inference_mode()
def compare(model: Any, reference: Any, windows: Tensor) -> tuple[float, float, float]:
    """Mean negative log-likelihood of model and reference, and KL(reference || model), per token in nats."""
    sums = torch.zeros(3, dtype=torch.float64)
    for window in windows:
        ours, theirs = (m(window[None]).logits[0, :-1].log_softmax(-1) for m in (model, reference))
        target = window[1:, None]
        sums[0] -= ours.gather(1, target).double().sum()
        sums[1] -= theirs.gather(1, target).double().sum()
        sums[2] += (theirs.exp() * (theirs - ours)).double().sum()
    own, base, divergence = (sums / (windows.shape[0] * (windows.shape[1] - 1))).tolist()
    return own, base, divergence


def main(args: argparse.Namespace) -> int:
    """Compare every scheme; returns the number of bars that were missed."""
    torch.set_num_threads(args.threads)
    reference, tokenizer = load_smollm2()
    count = -(-args.tokens // args.context)
    windows = real_tokens(tokenizer, count * args.context).view(count, args.context)
    others = {"hqq": ("hqq 4-bit", hqq), "bitsandbytes": ("bitsandbytes nf4", nf4)}
    missing = [package for package in others if find_spec(package) is None]
    rows: list[dict[str, Any]] = []
    for name in [*args.mixes, *(label for package, (label, _) in others.items() if package not in missing)]:
        model = load_smollm2()[0]
        if name in RATIOS:
            hf_ctxopt.quantize_(model, name)
        else:
            rounded(model, next(scheme for label, scheme in others.values() if label == name))
        own, base, divergence = compare(model, reference, windows)
        row = {"scheme": name, "perplexity": exp(own), "ratio": exp(own - base), "kl": divergence,
               "passed": exp(own - base) <= RATIOS[name] if name in RATIOS else None}  # fmt: skip
        if name not in RATIOS:
            ours = next(entry for entry in rows if entry["scheme"] == "Q4_K_M")
            row["passed"] = ours["kl"] < divergence  # Q4_K_M must be the closer one
        rows.append(row)
        print(f"{name:18} perplexity {row['perplexity']:7.3f} ({row['ratio']:.4f} x), KL {divergence:.5f} "
              f"{verdict(row['passed'])}", flush=True)  # fmt: skip
    for package in missing:
        print(f"{package} is not installed")
    write_results(args, "packed_quality", "SmolLM2-135M-Instruct",
                  {"rows": rows, "missing": missing, "reference_perplexity": exp(base)})  # fmt: skip
    return sum(not row["passed"] for row in rows)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--mixes", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    raise SystemExit(main(parser.parse_args()))
