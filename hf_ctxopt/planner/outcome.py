"""What a search ends with: the plan of a choice, with what there is to say about it, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DoesNotFitError
from ..weights.others import install_line
from .fit import Choice, Task
from .needs import Needs
from .plan import Plan
from .remedies import remedies
from .schemes import LINEAR
from .speed import token_ms
from .words import size


def plan_of(
    choice: Choice, context: int, goal: str, notes: Sequence[str], host: str, needs: Needs | None
) -> Plan:  # fmt: skip
    """The plan of a choice.

    Args:
        choice: the settings, which fit.
        context: tokens of each sequence.
        goal: what they were chosen for.
        notes: what was tried and why it was rejected, and what else to know.
        host: why parts of the model are on the host, if they are.
        needs: what the prompt needs that the plan was made for.
    """
    task, rung, window = choice.task, choice.rung, choice.window
    reasons = [*notes, f"chosen: {rung}, chunks of {choice.chunk:,} tokens"]
    if window is not None:
        reasons.append(f"kept: {choice.sinks} first and {window:,} last tokens")
    if choice.host:
        reasons.append(f"{' and '.join(choice.host)} on the host: {host}; decoding has no CUDA graph")
    if task.card.like is not None:
        reasons.append(f"the time is that of a card as slow as {task.card.like}")
    if rung.weights in LINEAR:
        reasons.append(f"{rung.weights} weights need packages of their own: {install_line(rung.weights)}")
    return Plan(
        model=task.facts.name, device=task.card.name, goal=goal, weights=rung.weights,
        kv_bits={"k": rung.keys, "v": rung.values},
        cache="ctx_sink" if window is not None else "ctx_prefix" if task.agents > 1 else "ctx_paged",
        window=window, sinks=None if window is None else choice.sinks, context=context, capacity=choice.capacity,
        batch=task.batch, agents=task.agents, page_size=task.page_size, pages=choice.pages,
        page_bytes=choice.layout.page_bytes, page_budget=choice.page_budget, kv_budget=choice.room,
        chunk=choice.chunk, on_host=choice.host, host_bytes=_host_bytes(choice), vram=task.card.vram,
        bytes=choice.parts(context), ms_per_token=milliseconds(choice, context),
        quality=rung.quality + ("" if window is None else ", windowed"), reasons=tuple(reasons), needs=needs,
    )  # fmt: skip


def refusal(task: Task, tried: Sequence[Choice], wanted: int, lost: bool) -> DoesNotFitError:
    """What does not fit, by how much, and what would.

    Args:
        task: what was planned for.
        tried: all choices that were tried.
        wanted: the tokens that they were to hold.
        lost: whether a window would fit, and lose what the prompt needs.
    """
    budget, name, card = task.kv_budget, task.facts.name, size(task.card.vram)
    choices = tried if budget is None else [choice for choice in tried if not choice.host]
    best = min(choices, key=lambda choice: choice.missing(wanted))
    if budget is not None and best.left >= budget:
        what = f"{wanted:,} tokens of {name} need {size(best.kv_bytes(wanted))} of pages and do not fit the "
        what += f"{size(budget)} of kv_budget"
    elif budget is not None:
        what = f"{size(budget)} of pages beside {best.rung.weights} weights of "
        what += f"{size(best.weights.layers + best.embeddings)} do not fit {card}"
    else:
        what = f"{wanted:,} tokens of {name} do not fit {card}" if best.left > 0 else f"{name} does not fit {card}"
    would = remedies(best, tried, wanted)
    return DoesNotFitError(
        best.missing(wanted), what, (*would, "a window that fits loses what the prompt needs") if lost else would
    )  # fmt: skip


def milliseconds(choice: Choice, tokens: int) -> float | None:
    """Expected milliseconds per token with `tokens` tokens in each sequence; `None` if the bandwidth is unknown."""
    facts, weights = choice.task.facts, choice.weights
    head = 2 * facts.vocab * facts.hidden if "head" in choice.host else 0
    read = weights.read - ((weights.embedding if facts.tied else weights.head) if head else 0)
    held = choice.kv_bytes(tokens) * choice.task.batch // choice.task.rows
    foreign = facts.foreign or weights.scheme in LINEAR
    return token_ms(
        read, held, facts.layers, choice.task.card.bandwidth, replayed=choice.replayed, foreign=foreign, on_host=head,
    )  # fmt: skip


def _host_bytes(choice: Choice) -> int:
    """Bytes of the parts on the host, in 16 bits."""
    one = 2 * choice.task.facts.vocab * choice.task.facts.hidden
    return one * (1 if choice.task.facts.tied and choice.host else len(choice.host))
