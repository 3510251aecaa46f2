"""Bytes by part as the context grows, with a plan's settings kept: what `ctxopt plan --plot` draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .facts import facts_of
from .fit import Card, Choice, Task
from .ladder import Rung
from .plan import Plan


def curve(model: Any, found: Plan, contexts: Iterable[int]) -> list[dict[str, int]]:
    """Bytes by part (`valid.PARTS`) at each context, whether they fit the card or not.

    Args:
        model: the model that `found` is a plan of, as `plan` takes it.
        found: the plan.
        contexts: tokens of each sequence.
    """
    parts = found.bytes
    card = Card(
        name=found.device, vram=found.vram, others=parts["others"], context=parts["cuda_context"],
        reserve=parts["reserve"], bandwidth=None, accelerator=bool(parts["graph"] or found.on_host),
    )  # fmt: skip
    task = Task(
        facts=facts_of(model), card=card, batch=found.batch, agents=found.agents, page_size=found.page_size,
        kv_budget=found.kv_budget if parts["kv"] == found.kv_budget else None,  # one that was asked for counts whole
    )  # fmt: skip
    rung = Rung(found.weights, found.kv_bits["k"], found.kv_bits["v"])
    choice = Choice(task, rung, found.chunk, found.on_host, found.sinks or 0, found.window)
    return [choice.parts(tokens) for tokens in contexts]
