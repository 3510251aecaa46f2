"""Llama: a conversation over one cache. Each turn feeds only its new tokens, and the memory held stays bounded.

python examples/llama.py --model ./Llama-3.2-1B-Instruct --prompt "Who was Ada?" --prompt "And then?"
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_ctxopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B-Instruct", help="folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="random weights, bytes as tokens, no download")
    parser.add_argument("--prompt", action="append", help="one turn; repeat it for more")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--plan", choices=["auto"], help="let the planner choose the cache and its options")
    args = parser.parse_args()
    model, tokenizer = load(args)
    config = {"window": args.window, "sinks": args.sinks}
    state: dict[str, Any] = {"cache_implementation": "ctx_sink", "cache_config": config}
    if args.plan:
        plan = hf_ctxopt.plan(model)
        print(plan)
        hf_ctxopt.patch_model(model, plan=plan)
        state = {}  # the plan's cache is the model's default now
    text, chat = torch.zeros((1, 0), dtype=torch.long), []
    for prompt in args.prompt or ["Who was Ada Lovelace?", "What came after?"]:
        chat.append({"role": "user", "content": prompt})
        text = torch.cat([text, encode(tokenizer, chat)], dim=1)
        turn = model.generate(text, return_dict_in_generate=True, max_new_tokens=args.max_new_tokens, **state)
        answer = turn.sequences[0, text.shape[1] :]
        shown = tokenizer.decode(answer, skip_special_tokens=True) if tokenizer else str(answer.tolist())
        print(f"> {prompt}", shown, sep="\n")
        chat.append({"role": "assistant", "content": shown})
        # The returned cache carries the whole conversation into the next turn.
        text, state = turn.sequences, {"past_key_values": turn.past_key_values}
    print(turn.past_key_values.stats())


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if not args.tiny:
        return AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, eos_token_id=None, **sizes)), None


def encode(tokenizer: Any, chat: list[dict[str, str]]) -> torch.Tensor:
    """The tokens of the last turn only: what the template adds behind the turns before it."""
    if tokenizer is None:
        return torch.tensor([list(chat[-1]["content"].encode())])
    before = tokenizer.apply_chat_template(chat[:-1], tokenize=False) if chat[:-1] else ""
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer(whole[len(before) :], add_special_tokens=False).input_ids])


if __name__ == "__main__":
    main()
