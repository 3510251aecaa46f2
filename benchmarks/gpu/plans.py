"""Whether plans are true: predicted and measured peaks, whole contexts without running out, and times per token.

A larger GPU plays the card: torch's allocator is capped at the card less the plan's CUDA context. Random weights of
real shapes, stored as the plan says. Each plan is run twice: to the context it was made for, and to all that its pages
hold (`capacity`); then 11 % more is tried without a budget, which must take some of the reserve if the capacity is to
be within 90 % of the largest (where the trained length does not end it first). Times are compared with what a plan for
the real card expects of the same settings.

`PYTHONPATH=. python benchmarks/gpu/plans.py` from the repository root; `--dry` only prints the plans, on any machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from card_8gb import with_growing_segments
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import hf_ctxopt
from hf_ctxopt.planner.curve import curve
from hf_ctxopt.planner.plan import Plan
from hf_ctxopt.planner.profiles import recognized

GIB = 1 << 30
NEW = 32
OFF = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, **OFF,
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, **OFF,
    },
    "Gemma-3-12B": {
        "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "max_position_embeddings": 131072, "sliding_window": 1024, "query_pre_attn_scalar": 256, **OFF,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One plan to make and run."""

    shape: str
    gib: int
    goal: str = "quality"
    context: int | None = None

    def plan(self) -> Plan:
        return hf_ctxopt.plan(SHAPES[self.shape], vram=self.gib * GIB, goal=self.goal, context=self.context)


CASES = [
    Case("Llama-2-7B", 8), Case("Llama-2-7B", 8, context=16384), Case("Llama-2-7B", 12), Case("Llama-2-7B", 24),
    Case("Llama-3.1-8B", 8), Case("Llama-3.1-8B", 8, context=16384), Case("Llama-3.1-8B", 12),
    Case("Llama-3.1-8B", 24), Case("Llama-3.1-8B", 12, "speed"),
    Case("Gemma-3-12B", 8), Case("Gemma-3-12B", 12), Case("Gemma-3-12B", 24),
]  # fmt: skip


def build(shape: dict[str, Any], plan: Plan) -> Any:
    """Random weights on the GPU, in the plan's scheme; what the plan keeps on the host is not packed."""
    from packed_models import random_blocks

    from hf_ctxopt.integration.load import _PARTS, _pattern
    from hf_ctxopt.weights.selection import Choice, replacement, types_of

    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    if plan.weights != "bf16":
        kept = [_pattern(_PARTS[part]) for part in plan.on_host]
        for name, type in types_of(model, Choice(plan.weights, exclude=kept)).items():
            old = model.get_submodule(name)
            with torch.device("meta"):
                new = replacement(old, type, torch.bfloat16, packed=True)
            new.weight = nn.Parameter(random_blocks(*old.weight.shape, type), requires_grad=False)
            model.set_submodule(name, new)
    model.tie_weights()
    for module in model.modules():
        for key, part in list(module._parameters.items()):
            if part is None or not part.is_meta:
                continue
            new = torch.empty(part.shape, device="cuda", dtype=torch.bfloat16)
            new.fill_(1.0) if part.dim() == 1 else new.normal_(0, 0.02)
            module._parameters[key] = nn.Parameter(new, requires_grad=False)
    model.tie_weights()
    with torch.device("cuda"):
        model.model.rotary_emb = model.model.rotary_emb.__class__(config)
    return model.eval()


def cap(limit: int | None) -> None:
    """Let torch's allocator have `limit` bytes."""
    share = 1.0 if limit is None else limit / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)


@torch.inference_mode()
def run(model: Any, plan: Plan, context: int, limit: int, free: bool = False) -> dict[str, Any]:
    """One true prefill and `NEW` tokens, to `context` tokens in all; `free` takes the budget away."""
    from decode import Clock

    ids = torch.randint(2, 32000, (1, context - NEW), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    settings = plan.to_dict()
    if free:
        settings["kv_budget"] = 1 << 50
    clock = Clock()
    hf_ctxopt.patch_model(model, plan=settings)
    torch.cuda.empty_cache()
    cap(limit)  # now that what the plan keeps on the host is there
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, stopping_criteria=[clock]
        )
        gaps = clock.gaps()
        return {"context": context, "peak": torch.cuda.max_memory_allocated(), "ms": statistics.median(gaps),
                "seconds": time.perf_counter() - start}  # fmt: skip
    except (torch.OutOfMemoryError, hf_ctxopt.CacheFullError) as error:
        return {"context": context, "refused": f"{type(error).__name__}: {str(error)[:160]}"}
    finally:
        cap(None)
        hf_ctxopt.unpatch_model(model)
        gc.collect()
        torch.cuda.empty_cache()


def expected(case: Case, plan: Plan, context: int) -> float | None:
    """Milliseconds per token that a plan for this GPU has for the same settings at `context` tokens; none for parts on
    the host."""
    card = recognized(torch.cuda.get_device_name())
    if card is None or plan.on_host:
        return None
    settings = {"weights": plan.weights, "kv_bits": dict(plan.kv_bits), "context": context}
    return hf_ctxopt.plan(SHAPES[case.shape], gpu=card.name, **settings).ms_per_token


def measure(case: Case, row: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill `row` with a case's plan and what running it gives, saved after each run."""
    plan, shape = case.plan(), SHAPES[case.shape]
    outside = plan.bytes["cuda_context"] + plan.bytes["reserve"]
    model = build(shape, plan)
    torch.cuda.empty_cache()
    limit = plan.vram - plan.bytes["cuda_context"]
    full = plan.capacity or plan.context
    row |= {"plan": plan.to_dict(), "limit_gib": limit / GIB}
    for context in sorted({plan.context, full}):
        predicted = sum(curve(shape, plan, [context])[0].values()) - outside
        found = run(model, plan, context, limit)
        if "peak" in found:
            found |= {
                "predicted": predicted,
                "error": predicted / found["peak"] - 1,
                "expected_ms": expected(case, plan, context),
            }
        row["runs"].append(found)
        print(case, plan.weights, plan.kv_bits, found["context"], told(found), flush=True)
        save()
    trained = shape["max_position_embeddings"]
    if plan.capacity is not None and full * 1.11 < trained:
        beyond = run(model, plan, int(full * 1.11), limit, free=True)
        row["beyond"] = beyond | {"too_much": beyond.get("peak", plan.vram) > plan.vram - outside}
        save()


def told(found: dict[str, Any]) -> str:
    """One run in words."""
    if "peak" not in found:
        return f"REFUSED {found['refused']}"
    wait = "" if found["expected_ms"] is None else f", expected {found['expected_ms']:.2f}"
    return (f"peak {found['peak'] / GIB:.3f} GiB, predicted {found['predicted'] / GIB:.3f} ({found['error']:+.1%}), "
            f"{found['ms']:.2f} ms{wait}")  # fmt: skip


def main() -> None:
    """Plan, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_plans.json"))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", default="", help="numbers of cases, with commas")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    cases = [CASES[int(number)] for number in options.only.split(",")] if options.only else CASES
    if options.dry:
        for case in cases:
            print(case, "\n", case.plan(), "\n", sep="")
        return
    with_growing_segments()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
        "dtype": "bfloat16", "commit": options.commit, "seed": 0, "cases": [],
    }  # fmt: skip

    def save() -> None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    for case in cases:
        start, row = time.monotonic(), {"case": vars(case), "runs": []}
        result["cases"].append(row)
        try:
            measure(case, row, save)
        except (RuntimeError, ValueError) as error:  # one case must not end the others
            row["error"] = f"{type(error).__name__}: {error}"
            print(case, row["error"][:600], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        save()
        if "beyond" in row:
            beyond = row["beyond"]
            told_more = beyond.get("refused") or f"peak {beyond['peak'] / GIB:.3f} GiB"
            fair = "takes of the reserve" if beyond["too_much"] else "FITS: a tenth was left unused"
            print(f"   11 % more: {told_more}: {fair}", flush=True)
        print(f"   {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
