"""SmolLM2: eight agents share 600 tokens; a fact outlives 8 k tokens in a budget of 1,024."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_ctxopt
from hf_ctxopt.integration.compat import generate_argument
from hf_ctxopt.integration.messages import render
from tests.prefix.rig import reused, same, say
from tests.streaming_reference import kept_logits
from tests.test_priority import Keeper, plan

FACT = " The code word of this house is marmalade."
QUESTION = " Remember: the code word of this house is"


def text(tokenizer: Any, count: int, start: int = 0) -> list[int]:
    """Tokens of Python's own manual."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[key] for key in sorted(topics))
    ids: list[int] = tokenizer(whole[: 6 * (start + count) + 1000]).input_ids
    return ids[start : start + count]


def test_eight_agents_with_one_system_prompt(smollm2: Any) -> None:
    model, tokenizer = smollm2
    system = {"role": "system", "content": tokenizer.decode(text(tokenizer, 590))}
    roles = ["cook", "pilot", "judge", "nurse", "clerk", "miner", "baker", "guard"]
    prompts = [
        render(tokenizer, [system, {"role": "user", "content": f"You are a {role}. What do you do?"}], generate=True)
        for role in roles
    ]
    shared = next(at for at, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert shared >= 600
    call = {"max_new_tokens": 4, "pad_token_id": 0}
    read = DynamicCache(config=model.config)
    feed(model, read, prompts[0][:shared], shared)
    for number, ids in enumerate(prompts):
        got = say(model, ids, {"page_size": 16}, **call)
        same(got, say(model, ids, **{generate_argument(): copy.deepcopy(read)}, **call))
        assert reused(got) >= (shared // 16 * 16 if number else 0)


def feed(model: Any, cache: Any, ids: list[int], chunk: int, keep: int = 1) -> torch.Tensor:
    """Logits of the last `keep` tokens of the last chunk, `(keep, vocab)`; 0 for all."""
    for start in range(0, len(ids), chunk):
        with torch.no_grad():
            part = torch.tensor([ids[start : start + chunk]])
            logits = model(part, use_cache=True, logits_to_keep=keep, **{generate_argument(): cache}).logits
    return logits[0]


def side_by_side(model: Any, cache: Any) -> DynamicCache:
    """A DynamicCache of exactly the tokens that are kept, but for the newest, at positions 0, 1, 2 ..."""
    kept, group = DynamicCache(config=model.config), cache.groups[0]
    stretches = group.rows[0].stretches(group.page_size, 0)
    tokens = torch.tensor([t for part in stretches for t in range(part.token, part.token + part.length)][:-1])

    def turned(keys: torch.Tensor, places: torch.Tensor, sign: int) -> torch.Tensor:
        cos, sin = (table[0] for table in model.model.rotary_emb(torch.zeros(1, 1, 1), places[None]))
        first, second = keys.chunk(2, dim=-1)
        return keys * cos + sign * sin * torch.cat([-second, first], dim=-1)

    for layer in group.layers:
        parts = [group.storages[layer].read(part) for part in stretches]
        keys, values = (torch.cat(states, dim=1)[:, :-1] for states in zip(*parts, strict=True))
        keys = turned(turned(keys, tokens, -1), torch.arange(len(tokens)), 1)
        kept.update(keys[None], values[None], layer)
    return kept


@pytest.mark.slow
def test_a_fact_outlives_what_came_after_it(smollm2: Any) -> None:
    """Its pages are held and it is still known; by recency alone it is gone after a fifth of the text."""
    model, tokenizer = smollm2
    head = [*text(tokenizer, 40), *tokenizer(FACT).input_ids]
    question, word = tokenizer(QUESTION).input_ids, tokenizer(" marmalade").input_ids[0]
    options: dict[str, Any] = {"budget": 1024, "page_size": 16}
    nats = {}
    for name, length, ranges in (("ranked", 8192, [[0, len(head), 90]]), ("recent", 1536, None)):
        ids = [*head, *text(tokenizer, length - len(head), start=3000)]
        cache = hf_ctxopt.make_cache(model, "ctx_priority", priorities=ranges, **options)
        feed(model, cache, ids, 256)
        held = {page for page, _ in cache.groups[0].rows[0].pages()}
        got = feed(model, cache, [ids[5]], 1)
        torch.testing.assert_close(got, feed(model, side_by_side(model, cache), [ids[5]], 1), atol=1e-3, rtol=0)
        logits = feed(model, cache, question, 256)
        nats[name] = -float(logits[-1].log_softmax(-1)[word])
        pages = set(range(-(-len(head) // 16)))
        assert pages <= held if ranges else not pages & held
        assert cache.stats()["tokens_seen"] == length + 1 + len(question)
        assert cache.stats()["tokens_held"] <= 1024 + 256
    assert nats["ranked"] < 4 < nats["recent"] - 4


def test_logits_are_those_of_exactly_the_kept_tokens(smollm2: Any) -> None:
    """A short stretch: token by token, from scratch, on what the rule keeps."""
    model, tokenizer = smollm2
    ids = torch.tensor(text(tokenizer, 96))
    ranges = [[0, 16, 90], [32, 40, 60]]
    counts = [24, 16, 16, 1, 1, 1, 1, 1, 1, 1, 1, 16, 16]
    steps = plan(counts, Keeper(ranges))
    assert any(len(kept) < start for start, _, kept in steps)
    want = kept_logits(model, ids, steps)
    cache = hf_ctxopt.make_cache(model, "ctx_priority", budget=48, page_size=8, priorities=ranges)
    got, start = [], 0
    for count in counts:
        got.append(feed(model, cache, ids[start : start + count].tolist(), count, keep=0))
        start += count
    one, other = want.log_softmax(-1), torch.cat(got).log_softmax(-1)
    assert float((one.exp() * (one - other)).sum(-1).abs().max()) < 1e-6
