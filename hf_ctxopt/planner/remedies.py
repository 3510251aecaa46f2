"""Why choices were rejected, and what would fit where none does: contexts, budgets and cards, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from .fit import Choice
from .footprint import reserve_of
from .profiles import GIB
from .words import size

_LEAST = 256  # tokens that are worth naming


def remedies(best: Choice, tried: Sequence[Choice], tokens: int) -> tuple[str, ...]:
    """What would make it fit.

    Args:
        best: the choice that misses the fewest bytes.
        tried: all choices that were tried.
        tokens: the context that they were tried for.
    """
    found = []
    budget = best.task.kv_budget
    longest = max(tried, key=lambda choice: (choice.window is None, choice.capacity or 0))
    if budget is not None and best.left >= budget:  # it is the budget that is too small, on any card
        found.append(f"a kv_budget of {size(best.kv_bytes(tokens))} would do ({best.rung})")
        if longest.window is None and (longest.capacity or 0) >= _LEAST:
            found.append(f"a context of {longest.capacity:,} tokens would fit ({longest.rung})")
        return tuple(found)
    if budget is not None:
        found.append(f"pages of {size(max(0, best.left))} would fit" if best.left > 0 else "no pages fit beside it")
    elif longest.window is None and (longest.capacity or 0) >= _LEAST:
        found.append(f"a context of {longest.capacity:,} tokens would fit ({longest.rung})")
    found.append(f"a card of {_card_for(best, tokens)} GiB would do ({best.rung})")
    return tuple(found)


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
    while usual and gib * GIB - reserve_of(gib * GIB) < needed - card.reserve:
        gib += 1
    return gib
