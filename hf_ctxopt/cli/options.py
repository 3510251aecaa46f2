"""The options that commands share, and what a choice of cache means.

Does not know which values are right: each cache's own options type checks them and names field, value and range.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_ctxopt.errors import ConfigError

if TYPE_CHECKING:
    from hf_ctxopt.caches.options import PageOptions

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch's CUDA allocator is set up; the second name is the older one, which every torch understands."""
GROWING = "expandable_segments:True"
_NUMBER = re.compile("[0-9]{1,32}")  # int() would take the digits of other scripts, and raise at thousands of them
DYNAMIC = "dynamic"
"""Name of transformers' own growing cache, offered for comparison."""
AUTO = "ctx_auto"
"""The planner chooses, for the memory that the model's device has left; it takes no options."""

Model = Annotated[str, typer.Option("--model", "-m", help="Folder, .gguf file, Hub id, or 'smollm2' (packaged).")]
GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF file inside the model folder or repository.")]
CacheName = Annotated[
    str, typer.Option("--cache", "-c", help="ctx_paged, ctx_sink, ctx_priority, ctx_auto (planned), or dynamic.")
]
Window = Annotated[int | None, typer.Option(help="ctx_sink: how many of the last tokens are kept; 1024 unless given.")]
Sinks = Annotated[int | None, typer.Option(help="ctx_sink: how many of the first tokens are kept; 4 unless given.")]
Budget = Annotated[str | None, typer.Option(help="Most that the cache may hold: tokens ('4096') or bytes ('2GiB').")]
PageSize = Annotated[int | None, typer.Option(help="Tokens in a page; a power of two.")]
KvBits = Annotated[str | None, typer.Option(help="Bits of a stored key and value: 16, 8, 4, 2, or both as 'k8v4'.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Fused = Annotated[bool, typer.Option("--fused/--dense", help="Attention that reads pages, or transformers' own.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 picks the likeliest token (greedy).")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this total probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.")]


@dataclass(frozen=True, kw_only=True)
class CacheChoice:
    """One cache with its options, as the user chose them.

    Attributes:
        name: `"dynamic"`, or a name that hf_ctxopt registers.
        options: what the user set; all else keeps the cache's own default.
        fused: whether the model is patched, so that attention reads pages.
    """

    name: str
    options: dict[str, Any]
    fused: bool


def cache_choice(
    name: str,
    *,
    window: int | None = None,
    sinks: int | None = None,
    budget: str | None = None,
    page_size: int | None = None,
    kv_bits: str | None = None,
    fused: bool = True,
) -> CacheChoice:
    """Collects the options that were given, and has the cache check them before any model is loaded.

    Raises:
        ConfigError: if the name is unknown, or an option is not one of the cache's, or out of range.
    """
    known = cache_names()
    if name not in known:
        raise ConfigError("cache", name, "one of " + ", ".join(known))
    bits = None if kv_bits is None else parse_bits(kv_bits)
    given = {
        "window": window, "sinks": sinks, "budget": parse_budget(budget), "page_size": page_size, "kv_bits": bits,
    }  # fmt: skip
    options = {key: value for key, value in given.items() if value is not None}
    for key, value in options.items():
        if key not in option_names(name):
            raise ConfigError(key, value, f"unset: cache {name!r} has no such option")
    if name not in (DYNAMIC, AUTO):
        _options_type(name).parse(options)
    return CacheChoice(name=name, options=options, fused=fused and name != DYNAMIC)


def cache_names() -> tuple[str, ...]:
    """Returns every cache name the command line takes, the dynamic one first."""
    from hf_ctxopt.caches import CACHES

    return (DYNAMIC, *CACHES, AUTO)


def option_names(name: str) -> tuple[str, ...]:
    """Returns the options that a cache takes."""
    return () if name in (DYNAMIC, AUTO) else tuple(field.name for field in fields(_options_type(name)))


def _options_type(name: str) -> type[PageOptions]:
    from hf_ctxopt.caches import CACHES

    return CACHES[name].options_type


def parse_budget(text: str | None) -> int | str | None:
    """Returns a bare number as tokens, anything else as it is (bytes with a unit)."""
    return int(text) if text is not None and _NUMBER.fullmatch(text) else text


def parse_bits(text: str) -> int | dict[str, int]:
    """Returns the bits of keys and values that a text such as `"8"` or `"k8v4"` stands for.

    Raises:
        ConfigError: if it is neither a number nor of that form; which numbers there are, the cache checks.
    """
    both = re.fullmatch(r"k([0-9]{1,9})v([0-9]{1,9})", text.strip().lower())
    if both:
        return {"k": int(both[1]), "v": int(both[2])}
    if not _NUMBER.fullmatch(text.strip()):
        raise ConfigError("kv_bits", text, "16, 8, 4 or 2, or keys and values apart as in 'k8v4'")
    return int(text)


def prefer_growing_segments() -> None:
    """Asks torch's CUDA allocator for expandable segments, unless the user has set it up otherwise.

    With them a cache that grows leaves no gaps behind. Commands call this before they import torch, whose
    allocator reads the setting once. On Windows torch has no such segments.
    """
    if sys.platform == "linux" and not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[-1]] = GROWING


def sampling(temperature: float, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """Returns the arguments of `generate` for these options; all are set, so the model's own defaults never mix in.

    Raises:
        ConfigError: if top_p or top_k is out of range, or given with temperature 0.
    """
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError("top_p", top_p, "0 < top_p <= 1")
    if top_k is not None and top_k < 1:
        raise ConfigError("top_k", top_k, "top_k >= 1")
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "top_p": top_p or 1.0, "top_k": top_k or 0}
    for field, value in (("top_p", top_p), ("top_k", top_k)):
        if value is not None:
            raise ConfigError(field, value, "unset while temperature is 0, which picks the likeliest token")
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
