"""Why choices were rejected, and what would fit where none does: contexts, budgets and cards, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from .fit import Choice
from .footprint import reserve_of
from .profiles import GIB
from .words import size

KIB, MIB = 1 << 10, 1 << 20
_LEAST = 256  # tokens that are worth naming


def remedies(best: Choice, tried: Sequence[Choice], tokens: int) -> tuple[str, ...]:
    """What would make it fit.

    Args:
        best: the choice that misses the fewest bytes.
        tried: all choices that were tried.
        tokens: the context that they were tried for.
    """
    budget, needed = best.task.kv_budget, best.kv_bytes(tokens)
    able = [choice for choice in tried if budget is None or choice.left >= budget] or tried
    longest = max(able, key=lambda choice: (choice.window is None, choice.capacity or 0))
    shorter = []
    if longest.window is None and (longest.capacity or 0) >= _LEAST:
        shorter = [f"a context of {longest.capacity:,} tokens would fit ({longest.rung})"]
    if budget is not None and needed > budget:  # on any card
        needed, text = _rounded_up(needed)
        larger = replace(best, task=replace(best.task, kv_budget=needed))
        where = "" if larger.left >= needed else f" on a card of {_card_for(larger, tokens)} GiB"
        found = [f"a kv_budget of {text}{where} would do ({best.rung})"]
        return (*found, *shorter) if best.left >= budget else tuple(found)
    if budget is not None:
        pages = f"pages of {size(_rounded_down(best.left))} would fit"
        shorter = [pages if best.left > 0 else "no pages fit beside it"]
    return (*shorter, f"a card of {_card_for(best, tokens)} GiB would do ({best.rung})")


def _rounded_up(count: int) -> tuple[int, str]:
    """Bytes that `size` writes exactly, no fewer than `count`, and what it writes."""
    step = _step(count)
    found = math.ceil(math.ceil(count / step) * step)
    return found, size(found)


def _rounded_down(count: int) -> int:
    step = _step(count)
    return int(int(count / step) * step)


def _step(count: int) -> float:
    """Bytes between two numbers that `size` tells apart."""
    return GIB / 100 if count >= GIB else MIB if count >= MIB else KIB


def rejections(tried: Sequence[Choice], tokens: int) -> list[str]:
    """One sentence for each scheme of weights that was tried on the card alone, one for each other placement."""
    nearest: dict[tuple[object, ...], Choice] = {}
    for choice in tried:
        plain = not choice.host and choice.window is None
        key = (choice.rung.weights,) if plain else (choice.host, choice.window)
        if key not in nearest or choice.missing(tokens) < nearest[key].missing(tokens):
            nearest[key] = choice
    found = []
    for choice in nearest.values():
        missing = choice.missing(tokens)
        if missing <= 0:
            continue  # it was tried for more tokens than were planned for in the end
        where = f" with {' and '.join(choice.host)} on the host" if choice.host else ""
        kept = f"{tokens:,} tokens" if choice.window is None else f"a window of {choice.window:,}"
        found.append(f"rejected: {choice.rung}{where}: {size(missing)} too much for {kept}")
    return found


def _card_for(choice: Choice, tokens: int) -> int:
    """Whole GiB of a card on which the choice fits, with that card's own reserve unless another was asked for."""
    card = choice.task.card
    needed = card.vram + choice.missing(tokens)
    usual = card.reserve == reserve_of(card.vram)
    gib = -(-needed // GIB)
    if usual:  # 12 % of the card is its reserve: counting up to it takes for ever where a batch is absurd
        gib = max(gib, (needed - card.reserve) * 100 // 88 // GIB)
    while usual and gib * GIB - reserve_of(gib * GIB) < needed - card.reserve:
        gib += 1
    return gib
