"""Phi: part of each head is rotated, and longrope changes its frequencies past the trained length. With sinks and
a window, positions stay trained ones; a prompt longer than the trained context is read in chunks.

python examples/phi.py --model ./Phi-4-mini-instruct --prompt "$(cat book.txt)" --window 2048
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

import hf_ctxopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="microsoft/Phi-4-mini-instruct", help="folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="random weights, bytes as tokens, no download")
    parser.add_argument("--prompt", default="A long text about many things. " * 12)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--plan", choices=["auto"], help="let the planner choose the cache and its options")
    args = parser.parse_args()
    model, tokenizer = load(args)
    ids = torch.tensor([tokenizer(args.prompt).input_ids if tokenizer else list(args.prompt.encode())])
    if args.plan:
        # A text beyond the trained length is planned with sinks and a window, too.
        plan = hf_ctxopt.plan(model, context=ids.shape[1] + args.max_new_tokens)
        print(plan)
        hf_ctxopt.patch_model(model, plan=plan)
    else:
        hf_ctxopt.patch_model(model, cache="ctx_sink", window=args.window, sinks=args.sinks)
    rope = model.config.rope_parameters
    print(f"rope {rope['rope_type']}, {rope.get('partial_rotary_factor', 1.0):.0%} of each head rotated")
    print(f"trained context {model.config.max_position_embeddings}, prompt {ids.shape[1]} tokens")
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    turn = model.generate(ids, return_dict_in_generate=True, **options)
    answer = turn.sequences[0, ids.shape[1] :].tolist()
    print(tokenizer.decode(answer, skip_special_tokens=True) if tokenizer else answer)
    stats = turn.past_key_values.stats()
    print(f"{stats['tokens_seen']} tokens seen, {stats['tokens_held']} held in {stats['bytes_held']} bytes")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if not args.tiny:
        return AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    # Heads of 16, of which 12 are rotated: six frequencies, one factor for each.
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    rope |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 128}
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = Phi3Config(rope_parameters=rope, eos_token_id=None, pad_token_id=0, **sizes)
    return Phi3ForCausalLM(config), None


if __name__ == "__main__":
    main()
