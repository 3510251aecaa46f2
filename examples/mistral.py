"""Mistral: layers that slide by themselves. `ctx_paged` keeps everything, yet a sliding layer needs only its window:
its older pages are dropped. A Mistral without `sliding_window` (v0.3 on) has full layers and keeps all.

python examples/mistral.py --model ./Mistral-7B-v0.1 --prompt "The harbour" --max-new-tokens 200
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import hf_ctxopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1", help="folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="random weights, bytes as tokens, no download")
    parser.add_argument("--prompt", default="The harbour lay still in the first light of the morning.")
    parser.add_argument("--window", type=int, default=1024, help="of ctx_sink, for layers that do not slide")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--plan", choices=["auto"], help="let the planner choose the cache and its options")
    args = parser.parse_args()
    model, tokenizer = load(args)
    ids = torch.tensor([tokenizer(args.prompt).input_ids if tokenizer else list(args.prompt.encode())])
    print("sliding_window of the model:", model.config.sliding_window)
    sizes = {"window": args.window, "sinks": args.sinks, "page_size": 8}
    caches: list[tuple[str, dict[str, Any]]] = [("ctx_paged", {"page_size": 8}), ("ctx_sink", sizes)]
    if args.plan:
        plan = hf_ctxopt.plan(model, context=ids.shape[1] + args.max_new_tokens)
        print(plan)
        caches = [(plan.cache, plan.cache_options)]
    for name, settings in caches:
        # A cache made by hand, as for a loop of one's own; generate() takes it as past_key_values.
        cache = hf_ctxopt.make_cache(model, name, **settings)
        options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
        output = model.generate(ids, past_key_values=cache, **options)
        answer = output[0, ids.shape[1] :].tolist()
        print(f"{name}: {tokenizer.decode(answer) if tokenizer else answer}")
        stats = cache.stats()
        print(f"  {stats['tokens_seen']} tokens seen, {stats['bytes_held']} bytes held")
        for group in stats["groups"]:
            print("  group", group)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if not args.tiny:
        return AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=256, sliding_window=24, eos_token_id=None, **sizes, **heads)
    return MistralForCausalLM(config), None


if __name__ == "__main__":
    main()
