"""`hf_ctxopt.plan`: the planner's `plan`, for which a prompt is measured first where one is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

from torch import nn

from ..errors import ConfigError, CtxoptError, first_line
from ..planner import search
from ..planner.needs import Needs
from ..planner.plan import Plan
from .load import LOAD_ERRORS, source_of
from .probe import probe

_Arguments = ParamSpec("_Arguments")


def _probing(function: Callable[_Arguments, Plan]) -> Callable[_Arguments, Plan]:
    @functools.wraps(function)
    def probing(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Plan:
        prompt = kwargs.get("probe")
        if prompt is not None and not isinstance(prompt, Needs | Mapping):
            model: Any = args[0] if args else kwargs.get("model")
            kwargs["probe"] = measured(model, prompt, kwargs.get("page_size", 32))
        return function(*args, **kwargs)

    return probing


plan = _probing(search.plan)


def measured(model: Any, prompt: Any, page_size: Any = 32) -> Needs:
    """What a prompt needs.

    Args:
        model: a transformers model, or a folder, `.gguf` file or Hub id, of which the weights are loaded for it.
        prompt: text or token ids.
        page_size: tokens of a page.

    Raises:
        ConfigError: a config or facts, which no prompt can be read with, or text for a model whose tokenizer is not
            known.
        CtxoptError: transformers cannot load it; the message is its first line.
    """
    if isinstance(model, nn.Module):
        name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        tokenizer = None
        if isinstance(prompt, str):
            if not name:
                raise ConfigError("probe", "text", "token ids: the model does not say where its tokenizer is")
            tokenizer = _loaded("AutoTokenizer", name)
        return probe(model, prompt, tokenizer=tokenizer, page_size=page_size)
    if not isinstance(model, str | Path):
        raise ConfigError("probe", type(prompt).__name__, "needs that were measured: a config has no weights to ask")
    return probe(
        _loaded("AutoModelForCausalLM", str(model), dtype="auto").eval(), prompt,
        tokenizer=_loaded("AutoTokenizer", str(model)) if isinstance(prompt, str) else None, page_size=page_size,
    )  # fmt: skip


def _loaded(kind: str, name: str, **options: Any) -> Any:
    import transformers

    source, extra = source_of(name)
    try:
        return getattr(transformers, kind).from_pretrained(source, **extra, **options)
    except LOAD_ERRORS as error:
        if isinstance(error, CtxoptError):
            raise
        raise CtxoptError(f"cannot load {name!r} to measure the prompt: {first_line(error)}") from error
