"""The options of each cache: plain JSON values, checked before anything is built.

transformers deep-copies and saves `cache_config`, so every option is a number, a string or a dictionary of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ..errors import ConfigError
from ..pages.budget import Budget

_Options = TypeVar("_Options", bound="PageOptions")


def check_int(field: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise `ConfigError` unless `value` is an integer in `[low, high]`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        raise ConfigError(field, value, f"an integer >= {low}" if high is None else f"an integer from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Options that every cache takes.

    Args:
        page_size: tokens of a page; a power of two from 1 to 1024.
        kv_bits: bits per stored value, an `int` or `{"k": int, "v": int}`; 16 keeps the model's dtype.
        budget: `None`; tokens (page slots over the batch, per layer group); or bytes as `"2GiB"`.

    Raises:
        ConfigError: a value is out of range.
    """

    page_size: int = 32
    kv_bits: int | Mapping[str, int] = 16
    budget: int | str | None = None

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1, 1024)
        if self.page_size & (self.page_size - 1):
            raise ConfigError("page_size", self.page_size, "a power of two from 1 to 1024")
        _check_bits(self.kv_bits)
        if isinstance(self.kv_bits, Mapping):
            object.__setattr__(self, "kv_bits", dict(self.kv_bits))  # the caller's dictionary may change
        limit = Budget(self.budget)
        if limit.tokens is not None and limit.tokens < self.page_size:
            raise ConfigError("budget", self.budget, f"at least one page of {self.page_size} tokens")

    @classmethod
    def parse(cls: type[_Options], given: Mapping[str, Any] | None) -> _Options:
        """Options from a `cache_config` dictionary.

        Raises:
            ConfigError: not a dictionary, an unknown name, or a value out of range.
        """
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ConfigError("cache_config", given, "a dictionary of options")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"cache_config[{name!r}]", given[name], f"one of the options {', '.join(known)}")
        return cls(**given)


def _check_bits(bits: Any) -> None:
    both = isinstance(bits, Mapping) and set(bits) == {"k", "v"}
    parts = list(bits.values()) if both else [bits]
    if any(isinstance(part, (bool, Mapping)) or part != 16 for part in parts):
        raise ConfigError("kv_bits", bits, '16, or {"k": 16, "v": 16} (quantized pages are not part of this version)')


@dataclass(frozen=True, kw_only=True)
class SinkOptions(PageOptions):
    """Options of `ctx_sink`.

    Args:
        sinks: first tokens that are always kept (StreamingLLM's `start_size`, llama.cpp's `n_keep`).
        window: a query sees the last `window` tokens, itself included, besides the sinks.
        n_discard: `None` evicts token by token. A number evicts so many tokens at once whenever `sinks + window`
            slots are full (llama.cpp's context shift); 0 means half of the window.
    """

    sinks: int = 4
    window: int = 1024
    n_discard: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("sinks", self.sinks, 0)
        check_int("window", self.window, 1)
        if self.n_discard is not None:
            check_int("n_discard", self.n_discard, 0)
            if self.window < 4:
                raise ConfigError("window", self.window, "at least 4 with n_discard, as in llama.cpp")
        limit = Budget(self.budget).tokens
        if limit is not None and limit < self.sinks + self.window:
            raise ConfigError("budget", limit, f"at least sinks + window = {self.sinks + self.window} tokens")
