"""From a plan to what `patch_model` and `generate` take, and the plan of a model as it stands."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..caches.options import PageOptions
from ..errors import ConfigError, DoesNotFitError, UnsupportedModelError
from ..planner.facts import facts_of
from ..planner.footprint import KvLayout
from ..planner.plan import Plan
from ..planner.schemes import LOADED, PLAIN
from ..planner.words import size
from .build import parse_options
from .chunking import compute_device

AUTO = "ctx_auto"
USUAL = "ctx_paged"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a plan comes down to.

    Args:
        cache: name of the cache.
        options: its validated options.
        chunk: tokens of a prefill chunk; `None` leaves it to `chunking.py`.
        on_host: parts of the model that belong in the host's memory.
        plan: where it comes from; `None` where nothing could be planned.
    """

    cache: str
    options: PageOptions
    chunk: int | None = None
    on_host: tuple[str, ...] = ()
    plan: Plan | None = None


def settings_of(plan: Plan | Mapping[str, Any]) -> Settings:
    """Settings of a plan, or of what `Plan.to_dict` made of one.

    Raises:
        ConfigError: it is neither.
    """
    found = plan if isinstance(plan, Plan) else Plan.from_dict(plan)
    return Settings(found.cache, parse_options(found.cache, found.cache_options), found.chunk, found.on_host, found)


_automatic: WeakKeyDictionary[nn.Module, tuple[str, Settings]] = WeakKeyDictionary()


def automatic(model: nn.Module, again: bool = True) -> Settings:
    """Settings for the model as it stands: for the memory that its device has left.

    On a GPU the pages get a budget and prompts the planned chunk. A CPU has no hard limit, so there only the bits are
    planned. Where nothing can be planned this is `ctx_paged`, and a warning says why.

    Args:
        model: a transformers model, loaded.
        again: plan anew; otherwise an earlier plan for the same device will do.
    """
    device = str(compute_device(model))
    known = _automatic.get(model)
    if known is None or again or known[0] != device:
        known = _automatic[model] = (device, _planned(model))
    return known[1]


def _planned(model: nn.Module) -> Settings:
    from ..planner.search import plan

    try:
        found = plan(facts_of(model), device=compute_device(model))
    except (DoesNotFitError, UnsupportedModelError, ConfigError) as error:
        logger.warning("no plan for %s, %s keeps its defaults: %s", type(model).__name__, USUAL, error)
        return Settings(USUAL, parse_options(USUAL, {}))
    options = found.cache_options
    if found.bytes["graph"]:  # a GPU
        return Settings(found.cache, parse_options(found.cache, options), found.chunk, (), found)
    options.pop("budget", None)
    return Settings(found.cache, parse_options(found.cache, options), None, (), found)


_APART, _SMALL = 1.05, 1 << 20
"""Weights may take so much more than planned: plans are held to 5 %, and buffers are not counted."""


def check_model(model: Any, plan: Plan) -> None:
    """Refuse the plan of another model, and of this one in fewer bytes than it has; warn where it is packed otherwise.

    Raises:
        ConfigError: the pages or the weights of the model take other bytes than those that were planned.
        UnsupportedModelError: its keys and values cannot be planned for.
    """
    facts, kind = facts_of(model), type(model).__name__
    rows = max(plan.batch, plan.agents)
    apart = plan.kv_budget - plan.page_budget
    sizes, fitting = [], []
    for item in sorted({facts.item, 2, 4}):  # planned from a config, two bytes are assumed
        layout = KvLayout(facts.groups, plan.kv_bits, item, rows, plan.page_size, plan.sinks or 0, plan.window)
        sizes.append(f"{layout.page_bytes:,} bytes and what does not grow {layout.fixed_bytes:,}")
        if plan.page_bytes == layout.page_bytes and (not plan.pages or apart >= layout.fixed_bytes):
            fitting.append(item)
    if not fitting:
        allowed = f"a plan of this {kind}: a page of it takes {' or '.join(dict.fromkeys(sizes))}, the plan's "
        raise ConfigError("plan", plan.model, f"{allowed}{plan.page_bytes:,} and {apart:,}")
    if max(fitting) < facts.item:
        raise ConfigError(
            "plan", plan.model, f"a plan of this {kind} in {model.dtype}: the plan's keys and values have "
            f"{max(fitting)} bytes each, the model's {facts.item}; load the model in a dtype of {max(fitting)} bytes, "
            "or plan for it as it stands: hf_ctxopt.plan(model)",
        )  # fmt: skip
    if plan.window is None and facts.trained is not None and plan.context > facts.trained:
        allowed = f"a plan of this {kind}: it was trained on {facts.trained:,} tokens, the plan has {plan.context:,}"
        raise ConfigError("plan", plan.model, allowed)
    held = sum(facts.loaded or (0,))
    counted = plan.bytes["weights"] + plan.bytes["embeddings"] + plan.host_bytes
    if held > max(_APART * counted, counted + _SMALL):
        raise ConfigError(
            "plan", plan.model, f"a plan of this {kind} with the weights that it has: they take {size(held)}, those "
            f"of the plan ({plan.weights}) {size(counted)}; hf_ctxopt.load(plan) loads them as planned",
        )  # fmt: skip
    if plan.weights != LOADED and facts.packed != (plan.weights != PLAIN):
        logger.warning(
            "the plan is for %s weights, and those of this %s are %s: it may not fit as planned",
            plan.weights, kind, "packed" if facts.packed else "not packed",
        )  # fmt: skip
