"""`plan`: what was asked for, checked, and the best settings that fit it (`descent.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..caches.options import PageOptions, check_int
from ..errors import ConfigError
from ..weights.mixes import MIXES
from ..weights.others import OTHERS
from .cards import card_for
from .descent import Descent
from .facts import ModelFacts, facts_of
from .fit import Task
from .hardware import bytes_of
from .ladder import ladder, worse
from .needs import Needs
from .plan import Plan
from .profiles import MOST
from .schemes import LOADED, PLAIN
from .valid import GOALS


def plan(
    model: Any,
    *,
    vram: int | str | None = None,
    gpu: str | None = None,
    device: Any = None,
    context: int | None = None,
    batch: int = 1,
    agents: int = 1,
    goal: str = "quality",
    weights: str | Sequence[str] | None = None,
    kv_bits: int | Mapping[str, int] | None = None,
    kv_budget: int | str | None = None,
    reserve: int | str | None = None,
    page_size: int = 32,
    probe: Any = None,
) -> Plan:
    """Settings with which the model runs on a card, the best of those that fit.

    Quality is spent in a fixed order (`ladder.py`): 16 bits first, 8-bit pages before packed weights, 4-bit weights
    before pages of fewer than 8 bits, embedding and head on the host before two bits, and windows, which forget, last.

    Args:
        model: a transformers model or config, a dictionary with `model_type`, or a path; a model that is loaded is
            planned for as it stands, unless `vram` or `gpu` names another card.
        vram: memory of the card, `"8GiB"` or bytes, instead of a device's own.
        gpu: a card's profile (`profiles.py`), e.g. `"rtx4070-laptop"`.
        device: a device of this machine; by default the accelerator with the most free memory, or the CPU.
        context: tokens of each sequence, prompt and answer together. By default 8,192 or the trained length, for
            goal `"context"` the trained length; less if no more fits, of which a larger card never has fewer.
        batch: sequences at once.
        agents: sequences whose pages stay between calls (`ctx_prefix`).
        goal: `"quality"`: the best quality that holds the context. `"context"`: the same, with the trained length as
            context. `"speed"`: the fewest milliseconds per token that 4-bit weights and pages allow, and two bits
            rather than the host where those do not hold the context.
        weights: scheme or schemes to choose from (`schemes.SCHEMES`). By default the ladder's; of a checkpoint that is
            packed only its own, of a `.gguf` file its own and the smaller ones that it can be packed as again.
        kv_bits: bits of K and V; by default the ladder's.
        kv_budget: bytes of pages that must fit.
        reserve: bytes to leave alone; by default 1 GiB up to 8 GiB of memory, then 12 %.
        page_size: tokens of a page.
        probe: a prompt like those to come, or what was measured of one (`Needs`, or its `to_dict()`). The plan then
            takes the shortest window that holds what this prompt needs, or none, and leaves out bits that change too
            much of what attention returns (`needs.py`); no window if the whole text fits beside the best weights and
            pages, unless the goal is speed. As text or token ids, for a model that is loaded or a path to
            load it from: `integration/probed.py`, which is what `hf_ctxopt.plan` is, measures it.

    Raises:
        ConfigError: a bad value; or a context beyond the trained one of a model that cannot give up tokens.
        DoesNotFitError: nothing fits; says by how many bytes, and what would.
        UnsupportedModelError: the model's keys and values are not those of attention heads.
    """
    _check(context, batch, agents, goal)
    facts = facts_of(model)
    card = card_for(facts, model, vram, gpu, device, reserve)
    live = facts.loaded is not None and weights is None
    rungs = ladder(LOADED if live else _schemes(facts, weights), _bits(kv_bits, page_size))
    budget = None if kv_budget is None else bytes_of("kv_budget", kv_budget)
    task = Task(facts=facts, card=card, batch=batch, agents=agents, page_size=page_size, kv_budget=budget)
    return Descent(task, rungs, goal, context, _needs(probe, context)).run()


def _schemes(facts: ModelFacts, weights: str | Sequence[str] | None) -> str | Sequence[str] | None:
    """What there is to choose from: a checkpoint's own scheme; of a `.gguf` file, also those that give up more."""
    named = (weights,) if isinstance(weights, str) else weights if isinstance(weights, Sequence) else ()
    gguf = facts.stored is not None and facts.repackable
    if (gguf or facts.unpacked is not None) and any(OTHERS[name].pack is None for name in named if name in OTHERS):
        able = (PLAIN, *MIXES, *(name for name, row in OTHERS.items() if row.pack is not None))
        raise ConfigError("weights", weights, f"of {', '.join(able)}: {facts.name} is unpacked, and packed in memory")
    if facts.stored is None or (gguf and weights is not None):
        return weights
    if gguf:
        return (facts.stored, *worse(facts.stored))
    if weights is not None and facts.stored not in named:
        raise ConfigError("weights", weights, f"{facts.stored}: {facts.name} is packed so already")
    return facts.stored


def _bits(kv_bits: int | Mapping[str, int] | None, page_size: int) -> tuple[int, int] | None:
    bits = PageOptions(kv_bits=16 if kv_bits is None else kv_bits, page_size=page_size).bits  # says what is allowed
    return None if kv_bits is None else (bits["k"], bits["v"])


def _needs(probe: Any, context: int | None) -> Needs | None:
    if probe is None or isinstance(probe, Needs):
        needs = probe
    elif isinstance(probe, Mapping):
        needs = Needs.from_dict(probe)
    else:
        raise ConfigError("probe", type(probe).__name__, "needs that were measured, or a model that is loaded with it")
    if needs is not None and context is not None and context < needs.tokens:
        raise ConfigError("context", context, f"at least {needs.tokens}, the tokens of the prompt")
    return needs


def _check(context: int | None, batch: int, agents: int, goal: str) -> None:
    for name, value in (("context", context), ("batch", batch), ("agents", agents)):
        if value is not None:
            check_int(name, value, 1, MOST)
    if goal not in GOALS:
        raise ConfigError("goal", goal, f"one of {', '.join(GOALS)}")
