"""Qwen: a left-padded batch. Pads never take a sink's place: each row reads as if it were alone.

python examples/qwen.py --model ./Qwen3-0.6B --prompt "The sea" --prompt "Once upon a time there was"
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import hf_ctxopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="random weights, bytes as tokens, no download")
    parser.add_argument("--prompt", action="append", help="one row of the batch; repeat it for more")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--plan", choices=["auto"], help="let the planner choose the cache and its options")
    args = parser.parse_args()
    model, tokenizer = load(args)
    prompts = args.prompt or ["The sea", "Once upon a time there was a castle"]
    rows = [tokenizer(p).input_ids if tokenizer else list(p.encode()) for p in prompts]
    width = max(len(row) for row in rows)
    batch = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    # One line, and every later generate() of this model uses the cache and the fused attention.
    if args.plan:
        plan = hf_ctxopt.plan(model, context=width + args.max_new_tokens, batch=len(rows))
        print(plan)
        hf_ctxopt.patch_model(model, plan=plan)
    else:
        hf_ctxopt.patch_model(model, cache="ctx_sink", window=args.window, sinks=args.sinks)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)[:, width:].tolist()
    for row, answer in zip(rows, together, strict=True):
        ids = torch.tensor([row])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(row) :].tolist()
        shown = tokenizer.decode(answer, skip_special_tokens=True) if tokenizer else answer
        # A row that ended early is padded up to the longest one in the batch.
        print(f"{width - len(row)} pads; same as alone: {answer[: len(alone)] == alone}; {shown}")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if not args.tiny:
        return AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=256, eos_token_id=None, pad_token_id=0, **sizes, **heads)
    return Qwen3ForCausalLM(config), None


if __name__ == "__main__":
    main()
