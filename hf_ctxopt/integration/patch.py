"""`patch_model` and its undo."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..caches import CACHES
from ..caches.context import ATTENTION
from ..errors import ConfigError, UnsupportedModelError
from ..models.readers import check_reads
from ..planner.plan import Plan
from .build import parse_options, unwrap
from .decode_graph import DecodeGraph
from .offload import check_parts, from_host, parse_parts, to_host
from .packing import check_in_memory, pack_in_memory
from .planned import AUTO, USUAL, Settings, automatic, check_model, settings_of
from .record import ATTRIBUTE, PatchRecord, record_of
from .register import register

logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)


def patch_model(
    model: _Model, cache: str | None = None, *, plan: Plan | Mapping[str, Any] | None = None, graph: bool = True,
    compile: bool = False, on_host: Sequence[str] = (), weights: str | None = None, **options: Any
) -> _Model:  # fmt: skip
    """Make `generate` use one of our caches by default, and attention read its pages.

    Without a cache, options or a plan, the model is planned for as it stands: `ctx_paged` with the bits, the budget
    and the prefill chunk that the memory left on its device allows (see `planned.py`).

    A second patch replaces the first. Nothing is changed if an argument is bad.

    Args:
        model: a transformers model that can generate, or a PEFT model around one.
        cache: name of the default cache; `"ctx_auto"` plans, and so does `None` without options. With options `None`
            is `"ctx_paged"`.
        plan: of `hf_ctxopt.plan`, or its `to_dict()`: cache, options and placement are the plan's.
        graph: on a GPU, replay decode steps as CUDA graphs (see `decode_graph.py`).
        compile: put the graph's body through `torch.compile`: a minute at the first step, faster ones afterwards.
        on_host: of `"embedding"` and `"head"`, the matrices to keep in the host's memory (see `offload.py`). Moving
            the model afterwards moves them too.
        weights: pack the model's weights first, e.g. as `"Q4_K_M"` (see `packing.py`); `unpatch_model` leaves them so.
        **options: the cache's options.

    Returns:
        The same model.

    Raises:
        ConfigError: an unknown cache or option, a value out of range, the plan of another model, or weights that are
            packed only while loading.
        CtxoptError: a package that `weights` needs is missing.
        UnsupportedModelError: not a transformers model that generates, one that reads its cache's layers itself, or it
            has no such matrix.
    """
    for name, flag in (("graph", graph), ("compile", compile)):
        if not isinstance(flag, bool):
            raise ConfigError(name, flag, "True or False")
    if compile and not graph:
        raise ConfigError("compile", compile, "False without graph=True: only the body of a decode graph is compiled")
    parts = parse_parts(on_host)
    inner = unwrap(model)
    chosen = None if plan is not None else _given(cache, options)
    if plan is not None:
        if cache is not None or options or parts or weights is not None:
            raise ConfigError("plan", "given", "a plan alone: cache, options, on_host and weights are the plan's")
        chosen = settings_of(plan)
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate():
        raise UnsupportedModelError(f"{type(inner).__name__} is not a transformers model with generate()")
    check_reads(inner.config)
    if weights is not None and check_in_memory(inner, weights):
        check_parts(inner, parts)
        pack_in_memory(inner, weights)
    if chosen is None:
        chosen = automatic(inner)
    elif chosen.plan is not None:
        check_model(inner, chosen.plan)
    parts = parts or chosen.on_host
    check_parts(inner, parts)
    before = record_of(inner)
    unpatch_model(model)
    register()
    record = PatchRecord(
        chosen.cache, chosen.options, fused=_can_fuse(inner), graph=graph, compiled=compile, on_host=parts,
        chunk=chosen.chunk, plan=chosen.plan,
    )  # fmt: skip
    if record.fused:
        record.attention = [(config, config._attn_implementation_internal) for config in configs_of(inner)]
    try:
        _apply(inner, record)
    except BaseException:  # memory that is short, an interrupt: the model is left as it was
        unpatch_model(model)
        if before is not None:
            _apply(inner, before)
        raise
    return model


def unpatch_model(model: _Model) -> _Model:
    """Undo `patch_model`. A model that is not patched stays as it is.

    Returns:
        The same model.
    """
    inner = unwrap(model)
    record = record_of(inner)
    if record is not None:
        for config, implementation in record.attention:
            config._attn_implementation_internal = implementation
        hooked = vars(inner).get("_old_forward")
        if isinstance(hooked, DecodeGraph):  # accelerate's hooks were added later
            vars(inner)["_old_forward"] = hooked.before or MethodType(type(inner).forward, inner)
        graph = vars(inner).get("forward")
        if isinstance(graph, DecodeGraph):
            del inner.forward
            if graph.before is not None:
                inner.forward = graph.before
        from_host(inner, record.moved)
        delattr(inner, ATTRIBUTE)
    return model


@contextmanager
def patched(model: _Model, cache: str | None = None, **options: Any) -> Iterator[_Model]:
    """`patch_model` for the length of a `with` block; an earlier patch comes back afterwards."""
    if options.get("weights") is not None:
        raise ConfigError("weights", options["weights"], "None: packing is not undone at the end of the block")
    before = record_of(unwrap(model))
    patch_model(model, cache, **options)
    try:
        yield model
    finally:
        unpatch_model(model)
        if before is not None:
            _apply(unwrap(model), before)


def _given(cache: str | None, options: dict[str, Any]) -> Settings | None:
    """The settings that were asked for; `None` to plan."""
    if cache is None and not options:
        return None
    if cache == AUTO:
        if options:
            raise ConfigError("cache", cache, f"without options: {AUTO} chooses them")
        return None
    if cache is not None and cache not in (*CACHES, AUTO):
        raise ConfigError("cache", cache, f"one of {', '.join((*CACHES, AUTO))}")
    name = USUAL if cache is None else cache
    return Settings(name, parse_options(name, options))


def _apply(model: Any, record: PatchRecord) -> None:
    setattr(model, ATTRIBUTE, record)  # first: whatever follows can then be undone
    if record.fused:
        model.set_attn_implementation(ATTENTION)
    if record.fused and record.graph:
        if record.forward is None:
            record.forward = DecodeGraph(model, record.compiled, vars(model).get("forward"))
        model.forward = record.forward
    record.moved = []
    to_host(model, record.on_host, record.moved)


def _can_fuse(model: PreTrainedModel) -> bool:
    """Whether attention goes through transformers' interface; otherwise the caches serve dense K/V."""
    if model.config.is_encoder_decoder or not type(model)._can_set_attn_implementation():
        logger.warning(
            "%s: attention keeps its own implementation (%s); the cache serves dense keys and values",
            type(model).__name__,
            "encoder-decoder" if model.config.is_encoder_decoder else "it does not use AttentionInterface",
        )
        return False
    return True


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config that `set_attn_implementation` may write to, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found:
            continue
        found[id(config)] = config
        waiting.extend(getattr(config, key, None) for key in config.sub_configs)
    return list(found.values())
