"""Tables of settings for known models (`models.json`) on the planner's cards, as the documentation shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_ctxopt.errors import DoesNotFitError
from hf_ctxopt.planner.facts import ModelFacts, facts_of
from hf_ctxopt.planner.plan import Plan
from hf_ctxopt.planner.profiles import PROFILES, Profile
from hf_ctxopt.planner.search import plan
from hf_ctxopt.planner.valid import GOALS
from hf_ctxopt.planner.words import size

MODELS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
HEAD = ("cards", "GiB", "weights", "KV bits", "cache", "context", "room for", "used", "ms per token", "quality")
LEFT = ("cards", "weights", "cache", "quality")


def settings(name: str) -> str:
    """A table for each goal; cards whose plans differ in nothing but time share a row.

    Args:
        name: of `models.json`.
    """
    facts = facts_of(MODELS[name])
    parts = [f"Trained on {facts.trained:,} tokens." if facts.trained else "Trained length unknown."]
    cards = sorted(PROFILES.values(), key=lambda card: (card.vram, card.bandwidth))
    for goal in GOALS:
        parts += ["", f"**{goal}**", "", "| " + " | ".join(HEAD) + " |"]
        parts.append("|" + "|".join("---" if column in LEFT else "---:" for column in HEAD) + "|")
        parts += _rows(facts, goal, cards)
    return "\n".join(parts)


def _rows(facts: ModelFacts, goal: str, cards: list[Profile]) -> list[str]:
    found: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for card in cards:
        cells, time = _cells(facts, goal, card)
        found.setdefault(cells, []).append((card.name, time))
    lines = []
    for cells, same in found.items():
        times = [round(time) for _, time in same]
        span = str(min(times)) if min(times) == max(times) else f"{min(times)} to {max(times)}"
        row = (", ".join(name for name, _ in same), *cells[:-1], span if max(times) else "", cells[-1])
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _cells(facts: ModelFacts, goal: str, card: Profile) -> tuple[tuple[str, ...], float]:
    """What a row shows between the cards and the time, and the time in ms (0 where nothing fits)."""
    gib = f"{card.vram / 2**30:.0f}"
    try:
        best = plan(facts, gpu=card.name, goal=goal)
    except DoesNotFitError as error:
        return (gib, "none", "", "", "", "", f"{size(error.shortfall)} are missing", ""), 0.0
    return (gib, *_words(best)), best.ms_per_token or 0.0


def _words(best: Plan) -> tuple[str, ...]:
    keys, values = best.kv_bits["k"], best.kv_bits["v"]
    host = f" ({' and '.join(best.on_host)} on the host)" if best.on_host else ""
    cache = f"`{best.cache}`" + ("" if best.window is None else f" {best.sinks} + {best.window:,}")
    return (
        best.weights + host, str(keys) if keys == values else f"{keys}/{values}", cache, f"{best.context:,}",
        "any length" if best.capacity is None else f"{best.capacity:,}", size(best.total_bytes), best.quality,
    )  # fmt: skip
