"""The options of each cache: plain JSON values, checked before anything is built.

transformers deep-copies and saves `cache_config`, so every option is a number, a string or a dictionary of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ..errors import ConfigError
from ..pages.budget import Budget
from ..pages.codec import Codec
from ..pages.policy import Policy
from ..pages.sealed import Codecs
from ..policies.priority import DEFAULT_PRIORITY, Retention, check_priority

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
        kv_bits: bits per stored value of a full page: 16, 8, 4 or 2, or `{"k": int, "v": int}`; 16 keeps the model's
            dtype.
        seal_sinks: whether the page(s) of the first tokens are quantized too. They hold the attention sinks (in
            `ctx_paged`, one page), which most queries attend to, and stay in the model's dtype by default.
        rotate: whether keys and values are quantized in a rotated basis that spreads outliers over the channels (see
            `pages/rotation.py`): `True`, `False` or `{"k": bool, "v": bool}`; `None` chooses what measures better.
        budget: `None`; tokens (page slots over the batch, per layer group); or bytes as `"2GiB"`.

    Raises:
        ConfigError: a value is out of range.
    """

    page_size: int = 32
    kv_bits: int | Mapping[str, int] = 16
    seal_sinks: bool = False
    rotate: bool | Mapping[str, bool] | None = None
    budget: int | str | None = None

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1, 1024)
        if self.page_size & (self.page_size - 1):
            raise ConfigError("page_size", self.page_size, "a power of two from 1 to 1024")
        _check_bits(self.kv_bits)
        if isinstance(self.kv_bits, Mapping):
            object.__setattr__(self, "kv_bits", dict(self.kv_bits))  # the caller's dictionary may change
        check_bool("seal_sinks", self.seal_sinks)
        _check_rotation(self.rotate)
        if isinstance(self.rotate, Mapping):
            object.__setattr__(self, "rotate", dict(self.rotate))
        limit = Budget(self.budget)
        if limit.tokens is not None and limit.tokens < self.page_size:
            raise ConfigError("budget", self.budget, f"at least one page of {self.page_size} tokens")

    @property
    def bits(self) -> dict[str, int]:
        """`kv_bits` of K and of V, however they were given."""
        return dict(self.kv_bits) if isinstance(self.kv_bits, Mapping) else dict.fromkeys("kv", self.kv_bits)

    def codecs(self, policy: Policy) -> Codecs | None:
        """How full pages are stored; `None` where they stay as they are.

        Args:
            policy: what the layers keep.
        """
        bits = self.bits
        if bits == {"k": 16, "v": 16}:
            return None
        rotate = self.rotate if isinstance(self.rotate, Mapping) else dict.fromkeys("kv", self.rotate)
        turn = {part: _ROTATED[part, bits[part]] if rotate[part] is None else bool(rotate[part]) for part in "kv"}
        first = 0 if self.seal_sinks else 1 if policy.most_held is None else -(-policy.sinks // self.page_size)
        return Codecs(
            Codec(bits["k"], over_tokens=True), Codec(bits["v"], over_tokens=False), turn["k"], turn["v"], first
        )

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


_BITS = (16, 8, 4, 2)
_ROTATED = {(part, bits): bits <= 4 for part in "kv" for bits in _BITS}  # measured: benchmarks/quality.py


def check_bool(field: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is a `bool`."""
    if not isinstance(value, bool):
        raise ConfigError(field, value, "True or False")


def _check_bytes(field: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is `None` or bytes as text."""
    try:
        bad = value is not None and (not isinstance(value, str) or Budget(value).nbytes is None)
    except ConfigError:
        bad = True
    if bad:
        raise ConfigError(field, value, 'None, or bytes as text such as "4GiB"')


def _parts(value: Any) -> list[Any]:
    """The values of `{"k": ..., "v": ...}`, else the value itself."""
    return list(value.values()) if isinstance(value, Mapping) and set(value) == {"k", "v"} else [value]


def _check_bits(bits: Any) -> None:
    if any(isinstance(part, bool) or not isinstance(part, int) or part not in _BITS for part in _parts(bits)):
        raise ConfigError("kv_bits", bits, '16, 8, 4 or 2, or {"k": ..., "v": ...} of these')


def _check_rotation(rotate: Any) -> None:
    if any(not isinstance(part, bool) for part in _parts(rotate)) and rotate is not None:
        raise ConfigError("rotate", rotate, 'None, True or False, or {"k": ..., "v": ...} of True and False')


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

    @property
    def most_tokens(self) -> int:
        """Tokens of a row after which some go."""
        return self.sinks + self.window


@dataclass(frozen=True, kw_only=True)
class RankedOptions(PageOptions):
    """Options of caches that keep what is worth most.

    Args:
        priorities: worth of the prompt's tokens, 0 to 100: a list of `[start, end, priority]` or of dictionaries with
            `start`, `end`, `priority` and `duration` in seconds (see `policies/priority.py`). A page has that of its
            first token.
        decode_priority: worth of generated tokens.
        decode_duration: seconds for which that holds; `None` for ever.
    """

    priorities: Any = None
    decode_priority: int = DEFAULT_PRIORITY
    decode_duration: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        retention = Retention.parse(self.priorities, self.decode_priority, self.decode_duration)
        object.__setattr__(self, "_retention", retention)

    @property
    def retention(self) -> Retention:
        """The priorities, parsed."""
        found: Retention = vars(self)["_retention"]
        return found


@dataclass(frozen=True, kw_only=True)
class PriorityOptions(RankedOptions):
    """Options of `ctx_priority`.

    Args:
        budget: most tokens of a row that are kept, in whole pages; or bytes of the whole cache as `"512MiB"`.
    """

    budget: int | str | None = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = Budget(self.budget)
        if self.budget is None or (limit.tokens is not None and limit.tokens < 2 * self.page_size):
            raise ConfigError("budget", self.budget, f"at least two pages: {2 * self.page_size} tokens; or bytes")

    @property
    def most_tokens(self) -> int | None:
        """Tokens of a row after which some go; `None` if that depends on the model."""
        return Budget(self.budget).tokens


@dataclass(frozen=True, kw_only=True)
class PrefixOptions(RankedOptions):
    """Options of `ctx_prefix`.

    Args:
        store: name of the store whose pages are shared, in this process; `None` shares nothing between calls.
        salt: texts of another salt are never found. Give every tenant its own.
        budget: of the whole store; what is needed least goes when it is full.
        steps_to_next: turns of other agents until this text is expected to go on; of equal priorities, the text that
            goes on latest goes first.
        cpu_budget: bytes of host memory for pages that are pushed out of a full budget; `None` drops them.
        offload_priority: least priority of a page that is worth a place there.
    """

    store: str | None = None
    salt: str = ""
    budget: int | str | None = "1GiB"
    steps_to_next: int | None = None
    cpu_budget: str | None = None
    offload_priority: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store is not None and (not isinstance(self.store, str) or not self.store):
            raise ConfigError("store", self.store, "None or the name of a store")
        if not isinstance(self.salt, str):
            raise ConfigError("salt", self.salt, "a string")
        if self.steps_to_next is not None:
            check_int("steps_to_next", self.steps_to_next, 0)
        _check_bytes("cpu_budget", self.cpu_budget)
        check_priority("offload_priority", self.offload_priority)
