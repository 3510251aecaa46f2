"""Which tokens are worth keeping: priorities of token ranges.

Source: TensorRT-LLM, `KvCacheRetentionConfig` (`executor.h`, `evictionPolicy.cpp`). A priority is a rank, never a pin:
what is in use stays, and of the rest the lowest goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

DEFAULT_PRIORITY = 35
_FORM = '[start, end, priority] or {"start": ..., "end": ..., "priority": ..., "duration": ...}'


@dataclass(frozen=True)
class TokenRange:
    """Tokens `[start, end)` of a prompt.

    Args:
        start: first token.
        end: one past the last; `None` for all that follow.
        priority: 0 (goes first) to 100.
        duration: seconds after the last use for which the priority holds; then it is the default. `None` for ever.

    Raises:
        ConfigError: a value is out of range.
    """

    start: int
    end: int | None = None
    priority: int = DEFAULT_PRIORITY
    duration: float | None = None

    def __post_init__(self) -> None:
        if not _whole(self.start) or self.start < 0:
            raise ConfigError("priorities: start", self.start, "a token number >= 0")
        if self.end is not None and (not _whole(self.end) or self.end <= self.start):
            raise ConfigError("priorities: end", self.end, f"None, or a token number > start = {self.start}")
        check_priority("priorities: priority", self.priority)
        check_duration("priorities: duration", self.duration)


@dataclass(frozen=True)
class Retention:
    """Priorities of a prompt's tokens and of those generated after it.

    Args:
        ranges: of the prompt; tokens outside of them have no priority of their own.
        decode_priority: of generated tokens.
        decode_duration: seconds for which that holds; `None` for ever.

    Raises:
        ConfigError: ranges overlap, are not in order, or one follows an open-ended one.
    """

    ranges: tuple[TokenRange, ...] = ()
    decode_priority: int = DEFAULT_PRIORITY
    decode_duration: float | None = None

    def __post_init__(self) -> None:
        check_priority("decode_priority", self.decode_priority)
        check_duration("decode_duration", self.decode_duration)
        for one, following in zip(self.ranges, self.ranges[1:], strict=False):
            if one.end is None:
                raise ConfigError("priorities", _show(self.ranges), "an open-ended range only as the last one")
            if following.start < one.end:
                raise ConfigError("priorities", _show(self.ranges), "ranges in order that do not overlap")

    @classmethod
    def parse(cls, ranges: Any, decode_priority: int = DEFAULT_PRIORITY, decode_duration: Any = None) -> Retention:
        """From JSON values.

        Args:
            ranges: `None`, or a list of `[start, end, priority]` or dictionaries of `TokenRange`'s arguments.
            decode_priority: see above.
            decode_duration: see above.

        Raises:
            ConfigError: anything else, or a value out of range.
        """
        if ranges is not None and (isinstance(ranges, str) or not isinstance(ranges, Sequence)):
            raise ConfigError("priorities", ranges, f"a list of {_FORM}")
        return cls(tuple(_range(one) for one in ranges or ()), decode_priority, decode_duration)

    def of_token(self, token: int, prompt: int) -> tuple[int | None, float | None]:
        """Priority and duration of a token of a text whose first `prompt` tokens were given; `None`: no own one."""
        if token >= prompt:
            return self.decode_priority, self.decode_duration
        for one in self.ranges:
            if one.start <= token and (one.end is None or token < one.end):
                return one.priority, one.duration
        return None, None

    def of_pages(self, page_size: int, length: int, prompt: int) -> tuple[list[int | None], list[float | None]]:
        """Priority and duration of each page: those of its first token.

        Args:
            page_size: tokens of a page.
            length: tokens of the text; a begun last page counts.
            prompt: how many of them were given.
        """
        found = [self.of_token(start, prompt) for start in range(0, length, page_size)]
        return [priority for priority, _ in found], [duration for _, duration in found]


def _range(given: Any) -> TokenRange:
    if isinstance(given, Mapping):
        known = ("start", "end", "priority", "duration")
        for name in given:
            if name not in known:
                raise ConfigError(f"priorities: {name}", given[name], f"one of {', '.join(known)}")
        if "start" not in given:
            raise ConfigError("priorities", dict(given), _FORM)
        return TokenRange(**given)
    if isinstance(given, str) or not isinstance(given, Sequence) or not 2 <= len(given) <= 4:
        raise ConfigError("priorities", given, _FORM)
    return TokenRange(*given)


def _show(ranges: Sequence[TokenRange]) -> list[list[Any]]:
    return [[one.start, one.end, one.priority] for one in ranges]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_priority(field: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is a priority."""
    if not _whole(value) or not 0 <= value <= 100:
        raise ConfigError(field, value, "a whole number from 0 to 100")


def check_duration(field: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is a duration or `None`."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise ConfigError(field, value, "None, or seconds > 0")
