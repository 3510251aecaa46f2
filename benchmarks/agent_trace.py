"""Seeded traces of agents that share a system prompt, over the radix tree alone or through `generate`.

Eight agents take twelve turns in an order that is shuffled anew for each: a system prompt of 1,024 tokens that all
share, a role of 128 of each agent's own, and with every turn 64 tokens of the user and 64 of the answer. After each
call some one-off requests of 1,024 tokens that nobody repeats may flood the store.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_ctxopt.integration.compat import cache_in
from hf_ctxopt.pages.radix import RadixTree

PAGE = 16
AGENT_PRIORITY, FLOOD_PRIORITY = 80, 10


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Numbers of a trace: tokens of each part."""

    agents: int = 8
    turns: int = 12
    system: int = 1024
    role: int = 128
    user: int = 64
    answer: int = 64
    flood: int = 1024


@dataclass(frozen=True)
class Served:
    """One call: its answer, and of how many prompt tokens so many were found."""

    answer: list[int]
    reused: int


Serve = Callable[[list[int], int, bool], Served]
"""Prompt, tokens of the answer, whether it is an agent's → what became of it."""


@dataclass
class Tally:
    """What the agents' calls of a trace found, floods not counted."""

    prompt: int = 0
    reused: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found."""
        return self.reused / self.prompt


def replay(serve: Serve, shape: Shape, *, floods: int, seed: int, vocab: int) -> Tally:
    """Plays a trace against whatever serves it."""
    rng, tally = random.Random(seed), Tally()

    def draw(count: int) -> list[int]:
        return [rng.randrange(1, vocab) for _ in range(count)]

    system = draw(shape.system)
    texts = [system + draw(shape.role) for _ in range(shape.agents)]
    for _ in range(shape.turns):
        for agent in rng.sample(range(shape.agents), shape.agents):
            prompt = texts[agent] + draw(shape.user)
            served = serve(prompt, shape.answer, True)
            texts[agent] = prompt + served.answer
            tally.prompt += len(prompt)
            tally.reused += served.reused
            for _ in range(floods):
                serve(draw(shape.flood), 1, False)
    return tally


class Simulated:
    """A store of whole pages without a model: the package's tree, and a budget that evicts from it.

    Args:
        budget: tokens of the store, those of the call that is running included.
        ranked: whether agents' texts outrank floods.
        answers: whether an answer's pages are kept; without, they come with the next prompt.
        seed: of the answers' tokens.
        vocab: likewise.
    """

    def __init__(self, budget: int, *, ranked: bool, answers: bool, seed: int, vocab: int) -> None:
        self.pages, self.ranked, self.answers, self.vocab = budget // PAGE, ranked, answers, vocab
        self.tree: RadixTree[int] = RadixTree(PAGE)
        self.rng = random.Random(seed + 1)

    def __call__(self, prompt: list[int], new_tokens: int, agent: bool) -> Served:
        """Serves one call with random tokens for its answer."""
        return self.serve(prompt, [self.rng.randrange(1, self.vocab) for _ in range(new_tokens)], agent)

    def serve(self, prompt: list[int], answer: list[int], agent: bool) -> Served:
        """Serves one call whose answer is known."""
        match = self.tree.match("", prompt, limit=len(prompt) - 1)
        self.tree.lock(match.node)
        fed = len(prompt) + len(answer) - 1  # the last token of an answer is never fed
        own = -(-fed // PAGE) - len(match.items)
        self.tree.evict(max(0, self.tree.pages + own - self.pages))
        kept = (prompt + answer)[:fed] if self.answers else prompt
        count = len(kept) // PAGE
        worth = [(AGENT_PRIORITY if agent else FLOOD_PRIORITY)] * count if self.ranked else None
        self.tree.insert("", kept[: count * PAGE], list(range(count)), priorities=worth)
        self.tree.unlock(match.node)
        return Served(answer, match.tokens + (match.partial[1] if match.partial is not None else 0))


class Generated:
    """The same through `generate(cache_implementation="ctx_prefix")`, beside a simulation of the very same calls.

    Args:
        model: a model without an end-of-text token, so that every answer has its length.
        budget: tokens of the store.
        ranked: whether agents' texts outrank floods.
        store: its name.
        beside: replays each call on the tree alone.
    """

    def __init__(self, model: Any, budget: int, *, ranked: bool, store: str, beside: Simulated) -> None:
        self.model, self.budget, self.ranked, self.store, self.beside = model, budget, ranked, store, beside
        self.simulated = Tally()
        self.calls = self.differing = 0

    def __call__(self, prompt: list[int], new_tokens: int, agent: bool) -> Served:
        """Serves one call with the model's own answer."""
        config: dict[str, Any] = {"store": self.store, "budget": self.budget, "page_size": PAGE}
        if self.ranked:
            worth = AGENT_PRIORITY if agent else FLOOD_PRIORITY
            config |= {"priorities": [[0, None, worth]], "decode_priority": worth}
        out = self.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=new_tokens, cache_implementation="ctx_prefix", cache_config=config,
            return_dict_in_generate=True,
        )  # fmt: skip
        cache = cache_in(out)
        reused = int(cache.stats()["prefix"]["reused_tokens"])
        cache.release()
        answer = out.sequences[0, len(prompt) :].tolist()
        beside = self.beside.serve(prompt, answer, agent).reused
        self.calls += 1
        self.differing += beside != reused
        if agent:
            self.simulated.prompt += len(prompt)
            self.simulated.reused += beside
        return Served(answer, reused)
