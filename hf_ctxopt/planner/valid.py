"""Whether values make a plan: the type and range of each field, before any of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..caches.options import PageOptions, check_int
from ..errors import ConfigError
from .profiles import MOST
from .schemes import LOADED, SCHEMES

GOALS = ("quality", "context", "speed")
CACHES = ("ctx_paged", "ctx_prefix", "ctx_sink")
"""The caches of plans: all tokens, the shared ones of several agents, and a window."""
PARTS = ("weights", "embeddings", "kv", "activations", "logits", "graph", "cuda_context", "others", "reserve")
"""Keys of `Plan.bytes`, in the order in which they are shown."""
HOST_PARTS = ("embedding", "head")

_WORDS = ("model", "device", "goal", "weights", "cache", "quality")
_POSITIVE = ("context", "batch", "agents", "page_size", "chunk", "vram")
_COUNTS = ("pages", "page_bytes", "page_budget", "kv_budget", "host_bytes")
_OPTIONAL = ("window", "sinks", "capacity")


def check_fields(given: Mapping[str, Any]) -> None:
    """Refuse what no plan has in its fields.

    Args:
        given: every field of `Plan` but `needs`, as read from JSON or as they are.

    Raises:
        ConfigError: a value of another type or out of range; the message names `plan.<field>`.
    """
    for name in _WORDS:
        _check(name, given[name], isinstance(given[name], str), "text")
    _check("goal", given["goal"], given["goal"] in GOALS, f"one of {', '.join(GOALS)}")
    schemes = (LOADED, *SCHEMES)
    _check("weights", given["weights"], given["weights"] in schemes, f"one of {', '.join(schemes)}")
    _check("cache", given["cache"], given["cache"] in CACHES, f"one of {', '.join(CACHES)}")
    for name in _POSITIVE:
        check_int(f"plan.{name}", given[name], 1, MOST)
    for name in _COUNTS:
        check_int(f"plan.{name}", given[name], 0, MOST)
    for name in _OPTIONAL:
        if given[name] is not None:
            check_int(f"plan.{name}", given[name], 0, MOST)
    _check_pages(given)
    _check_parts(given["bytes"])
    _check_sums(given)
    for name in ("on_host", "reasons"):
        listed = isinstance(given[name], list | tuple) and all(isinstance(item, str) for item in given[name])
        _check(name, given[name], listed, "a list of texts")
    host = given["on_host"]
    known = set(host) <= set(HOST_PARTS) and len(set(host)) == len(host)
    _check("on_host", host, known, f"of {' and '.join(HOST_PARTS)}, each once")
    time = given["ms_per_token"]
    number = isinstance(time, int | float) and not isinstance(time, bool)
    _check("ms_per_token", time, time is None or (number and 0 <= time <= MOST), "None or a time >= 0")


def _check_pages(given: Mapping[str, Any]) -> None:
    bits, window = given["kv_bits"], given["window"]
    pair = isinstance(bits, Mapping) and set(bits) == {"k", "v"}
    _check("kv_bits", bits, pair, '{"k": ..., "v": ...} of 16, 8, 4 or 2')
    try:
        PageOptions(page_size=given["page_size"], kv_bits=bits)
    except ConfigError as error:
        raise ConfigError(f"plan.{error.field}", error.value, error.allowed) from None
    _check("window", window, (window is None) is (given["cache"] != "ctx_sink"), "tokens with ctx_sink, else None")
    shared = given["agents"] == 1 or given["cache"] == "ctx_prefix"
    _check("cache", given["cache"], shared, "ctx_prefix for several agents")
    _check("sinks", given["sinks"], (given["sinks"] is None) is (window is None), "tokens with a window, else None")


def _check_parts(parts: Any) -> None:
    whole = isinstance(parts, Mapping) and set(parts) == set(PARTS)
    _check("bytes", parts, whole, f"bytes of exactly the parts {', '.join(PARTS)}")
    for name, count in parts.items():
        check_int(f"plan.bytes[{name!r}]", count, 0, MOST)


def _check_sums(given: Mapping[str, Any]) -> None:
    """What holds for the numbers of every plan: one that was changed by hand promises what is not there."""
    pages, each, budget = given["pages"], given["page_bytes"], given["page_budget"]
    _check("pages", pages, pages * each <= budget < (pages + 1) * each, "as many as page_budget holds of page_bytes")
    _check("page_budget", budget, budget <= given["kv_budget"], "at most kv_budget")
    held = given["capacity"]
    _check("capacity", held, held is None or held >= given["context"], "None, or at least the context")
    _check("bytes", given["bytes"], sum(given["bytes"].values()) <= given["vram"], "parts that fit the vram together")


def _check(field: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"plan.{field}", value, allowed)
