"""Gemma 3: a hybrid. Five layers of six slide and drop their own pages; only the full layers follow sinks and window.

python examples/gemma.py --model ./gemma-3-1b-it --prompt "Write about the sea." --window 512
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

import hf_ctxopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="google/gemma-3-1b-it", help="folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="random weights, bytes as tokens, no download")
    parser.add_argument("--prompt", default="Write about the sea, its light and the people who live by it.")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--plan", choices=["auto"], help="let the planner choose the cache and its options")
    args = parser.parse_args()
    model, tokenizer = load(args)
    ids = torch.tensor([tokenizer(args.prompt).input_ids if tokenizer else list(args.prompt.encode())])
    config = model.config.get_text_config()
    sliding = config.layer_types.count("sliding_attention")
    full = len(config.layer_types) - sliding
    print(f"{sliding} sliding layers of {config.sliding_window} tokens, {full} full layers")
    chosen: dict[str, Any] = {"cache": "ctx_sink", "window": args.window, "sinks": args.sinks}
    if args.plan:
        plan = hf_ctxopt.plan(model, context=ids.shape[1] + args.max_new_tokens)
        print(plan)
        chosen = {"plan": plan}
    # Patched inside the block only; afterwards the model is as it was.
    with hf_ctxopt.patched(model, **chosen):
        options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
        turn = model.generate(ids, return_dict_in_generate=True, **options)
    answer = turn.sequences[0, ids.shape[1] :].tolist()
    print(tokenizer.decode(answer, skip_special_tokens=True) if tokenizer else answer)
    for group in turn.past_key_values.stats()["groups"]:
        print("group", group)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if not args.tiny:
        return AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "head_dim": 16}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma3TextConfig(vocab_size=256, sliding_window=24, eos_token_id=None, **sizes, **heads)
    return Gemma3ForCausalLM(config), None


if __name__ == "__main__":
    main()
