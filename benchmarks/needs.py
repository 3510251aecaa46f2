"""Whether the measured needs of a prompt tell what a window does to its answer.

Five prompts on one model: for each window, what of the answer's attention lies outside and what of it seeks single
tokens (`planner/needs.py`), beside the KL divergence of the answer's first tokens, read with `ctx_sink` of that
window, from those read with everything kept. The bounds of `planner/needs.py` are to part the prompts whose answers
change from those whose answers do not.
"""

from __future__ import annotations

import argparse as code
import inspect
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import DynamicCache

import hf_ctxopt
from common import CACHE, SMOLLM2, arguments, load_smollm2, progress, verdict, write_results
from hf_ctxopt.integration.probe import probe
from hf_ctxopt.planner.needs import OUTSIDE, SOUGHT

FACT = " The secret number of Amsterdam is 48213. "
QUESTION = "\n\nWhat is the secret number of Amsterdam? Answer with the number."
CHANGED = 0.5
"""KL divergence per token above which an answer is another one."""


def prompts(tokenizer: Any, tokens: int) -> dict[str, torch.Tensor]:
    """Token ids `(1, about tokens)` of each prompt."""
    text = "\n\n".join(value for _, value in sorted(topics.items()) if len(value) > 2000)
    ids = tokenizer(text)["input_ids"]
    body = tokenizer.decode(ids[: tokens - 60])
    cut = len(body) // 4

    def asked(content: str) -> Any:
        message = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=True, return_dict=False)

    found = {
        "text": ids[3 * tokens : 4 * tokens],
        "code": tokenizer(inspect.getsource(code)[20000 : 20000 + 8 * tokens])["input_ids"][:tokens],
        "question on the end": asked(body + FACT + QUESTION),
        "question on the beginning": asked(body[:cut] + FACT + body[cut:] + QUESTION),
        "summary of the whole": asked(body + "\n\nSummarize the text above in two sentences."),
    }
    return {name: torch.tensor([row]) for name, row in found.items()}


@torch.no_grad()
def answers(
    model: Any, ids: torch.Tensor, cache: Any, said: list[int] | None, count: int, chunk: int
) -> Iterator[Any]:
    """(log-probabilities, token) of each of the answer's tokens; the likeliest ones where none are given."""
    for start in range(0, ids.shape[1], chunk):
        logits = model(ids[:, start : start + chunk], logits_to_keep=1, **{CACHE: cache}).logits[0, -1]
    for step in range(count):
        token = int(logits.argmax()) if said is None else said[step]
        yield logits.log_softmax(-1), token
        logits = model(torch.tensor([[token]]), **{CACHE: cache}).logits[0, -1]


def measured(model: Any, ids: torch.Tensor, windows: list[int], count: int, chunk: int) -> dict[str, Any]:
    """The needs of one prompt, and what each window does to its answer."""
    needs = probe(model, ids)
    whole = list(answers(model, ids, DynamicCache(config=model.config), None, count, chunk))
    said = [token for _, token in whole]
    rows = []
    for window in windows:
        cache = hf_ctxopt.make_cache(model, "ctx_sink", sinks=needs.sinks, window=window)
        pairs = zip(whole, answers(model, ids, cache, said, count, chunk), strict=True)
        kl = sum(float((dense.exp() * (dense - got)).sum()) for (dense, _), (got, _) in pairs) / count
        mass, sought = needs.outside(window)
        rows.append({"window": window, "outside": mass, "sought": sought, "kl": kl, "kept": needs.holds(window)})
    errors = {bits: needs.error(bits, bits) for bits in (8, 4, 2)}
    return {"tokens": ids.shape[1], "window": needs.window, "rows": rows, "errors": errors, "needs": needs.to_dict()}


def main() -> None:
    """Measures and writes `needs.json`."""
    parser = arguments(__doc__)
    parser.set_defaults(chunk=512)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=8)
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 384])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_smollm2()
    found = {}
    for name, ids in progress(list(prompts(tokenizer, args.tokens).items()), "prompts"):
        found[name] = measured(model, ids, args.windows, args.answer, args.chunk)
        for row in found[name]["rows"]:
            print(f"{name:26} {row}", flush=True)
    rows = [row for prompt in found.values() for row in prompt["rows"]]
    good = all(row["kept"] == (row["kl"] < CHANGED) for row in rows)
    bounds = {"sought": SOUGHT, "outside": OUTSIDE, "changed": CHANGED}
    write_results(args, "needs", SMOLLM2, {"bounds": bounds, "prompts": found, "told_apart": good})
    print("needs tell which answers a window changes:", verdict(good))


if __name__ == "__main__":
    main()
