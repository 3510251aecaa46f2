"""What a prompt needs of a cache, as measured by `integration/probe.py`, and what a plan makes of it.

Of the attention of the answer's side (the last queries of the prompt and the first of the answer) some lies outside
any window, whatever the text: spread thinly over many tokens, or on delimiters that all queries attend to and that
carry no content (Sun et al. 2024, arXiv 2402.17762, section 4). What a task needs shows in attention that seeks one
far token: at least `SEEK` of a query's attention, and `TIMES` what the text's own far queries give that token. The
heads that do so are few (Wu et al. 2024, arXiv 2404.15574, section 2).

A window does where at most `SOUGHT` of the answer's attention, on average over heads and layers, seeks tokens outside
of it, and at most `OUTSIDE` lies there at all. Bits do where what attention returns changes by at most `ERROR`. The
bounds are those that tell apart, on SmolLM2, prompts whose answers change with a window from those whose answers do
not, and 4 bits from 2 (`benchmarks/needs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError

SEEK, TIMES = 0.05, 4.0
SOUGHT, OUTSIDE = 0.012, 0.35
ERROR = 0.10
"""Most change of what attention returns, relative to its norm, for the sake of fewer bits."""
BITS = (8, 4, 2)
SINKS, LEAST_WINDOW = 4, 256
"""First tokens that are kept with every window, measured or planned, and the shortest window that is worth having."""


@dataclass(frozen=True, kw_only=True)
class GroupNeeds:
    """The layers that keep the same tokens: full attention, or one sliding window of the model's own.

    Args:
        layers: how many they are.
        window: their own sliding window; `None` for full attention.
        text: by window of `Needs.windows`: share of attention outside sinks and window, over queries of the whole
            text that have anything there.
        answer: the same, over the queries of the answer's side.
        sought: of `answer`, what seeks single tokens.
        key_errors: by bits of `BITS`: change of what attention returns if K is stored with so many bits.
        value_errors: likewise V.
    """

    layers: int
    window: int | None
    text: tuple[float, ...]
    answer: tuple[float, ...]
    sought: tuple[float, ...]
    key_errors: tuple[float, ...]
    value_errors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one prompt needs.

    Args:
        tokens: of the prompt.
        queries: of the answer's side, prompt and answer.
        sinks: first tokens that every window is measured with.
        windows: candidates, all of them shorter than the prompt; none if it is too short to tell.
        groups: the layers.
    """

    tokens: int
    queries: int
    sinks: int
    windows: tuple[int, ...]
    groups: tuple[GroupNeeds, ...]

    @property
    def cut(self) -> tuple[GroupNeeds, ...]:
        """The layers that a sink window would cut: those with full attention, or all if every layer slides."""
        return tuple(group for group in self.groups if group.window is None) or self.groups

    def outside(self, window: int) -> tuple[float, float]:
        """Share of the answer's attention outside a window, and what of it seeks single tokens, in the layers it cuts.

        Args:
            window: one of `windows`.
        """
        at = self.windows.index(window)
        layers = sum(group.layers for group in self.cut)
        shares = [(group.layers / layers, group.answer[at], group.sought[at]) for group in self.cut]
        return sum(part * mass for part, mass, _ in shares), sum(part * sought for part, _, sought in shares)

    def holds(self, window: int) -> bool:
        """Whether a window, any number of tokens, keeps what the prompt needs."""
        if window + self.sinks >= self.tokens:
            return True
        measured = [candidate for candidate in self.windows if candidate <= window]
        return any(self._enough(candidate) for candidate in measured)

    @property
    def window(self) -> int | None:
        """The shortest window that keeps what the prompt needs; `None` if none that was measured does."""
        return next((window for window in self.windows if self._enough(window)), None)

    def _enough(self, window: int) -> bool:
        mass, sought = self.outside(window)
        return sought <= SOUGHT and mass <= OUTSIDE

    def error(self, keys: int, values: int) -> float:
        """Change of what attention returns with so many bits of K and V, of the group in which it is the largest."""
        pairs = ((_at(group.key_errors, keys), _at(group.value_errors, values)) for group in self.groups)
        return max(math.hypot(key, value) for key, value in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` makes the same needs of them."""
        groups = [{key: _listed(value) for key, value in asdict(group).items()} for group in self.groups]
        return {**{key: _listed(value) for key, value in asdict(self).items()}, "groups": groups}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Needs:
        """The needs that `to_dict` wrote.

        Raises:
            ConfigError: a field is missing, unknown, of another type or out of range, or a row has another length than
                there are windows or bits.
        """
        given = _checked(cls, values)
        groups = []
        for row in given["groups"]:
            group = GroupNeeds(**{key: _tupled(value) for key, value in _checked(GroupNeeds, row).items()})
            measured = (group.text, group.answer, group.sought)
            errors = (group.key_errors, group.value_errors)
            if any(len(part) != len(given["windows"]) for part in measured) or any(
                len(e) != len(BITS) for e in errors
            ):
                raise ConfigError("needs", row, f"a value for each of the windows, and for each of {BITS} bits")
            groups.append(group)
        if not groups:
            raise ConfigError("needs", values, "at least one group of layers")
        return cls(**{**{key: _tupled(value) for key, value in given.items()}, "groups": tuple(groups)})


def described(needs: Needs) -> list[str]:
    """Sentences with the figures, for `Plan.reasons`."""
    lines = []
    for group in needs.groups if needs.windows else ():
        kind = "full" if group.window is None else f"sliding ({group.window:,})"
        rows = zip(needs.windows, group.answer, group.sought, strict=True)
        shares = ", ".join(f"{window:,}: {mass:.0%}, {sought:.1%}" for window, mass, sought in rows)
        lines.append(
            f"the prompt's {group.layers} {kind} layers: attention outside {needs.sinks} sinks and a window, and what "
            f"of it seeks single tokens: {shares}"
        )
    name = f"the prompt of {needs.tokens:,} tokens"
    bound = f"at most {OUTSIDE:.0%} may lie outside, {SOUGHT:.1%} seek single tokens there"
    if not needs.windows:
        lines.append(f"{name} is too short to tell anything of windows")
    elif needs.window is None:
        lines.append(f"{name} needs its far tokens: no window that was measured keeps them ({bound})")
    else:
        lines.append(f"{name} does with a window of {needs.window:,} ({bound})")
    errors = ", ".join(f"{bits} bits {needs.error(bits, bits):.1%}" for bits in BITS)
    return [*lines, f"change of what attention returns on the prompt: {errors} (at most {ERROR:.0%})"]


def _at(errors: Sequence[float], bits: int) -> float:
    return 0.0 if bits == 16 else errors[BITS.index(bits)]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


_WHOLE = ("tokens", "queries", "sinks", "layers", "window")


def _checked(kind: type, values: Any) -> dict[str, Any]:
    names = {part.name for part in fields(kind)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ConfigError("needs", values, f"a dictionary that Needs.to_dict() wrote ({', '.join(sorted(names))})")
    for name, value in values.items():
        if name == "window" and value is None:
            continue
        parts = (value,) if name in _WHOLE else value
        fits = isinstance(parts, list | tuple) and all(_fits(name, part) for part in parts)
        if not fits or (name == "windows" and list(parts) != sorted(set(parts))):
            least = 0 if name == "sinks" else 1
            allowed = f"a whole number >= {least}" if name in _WHOLE else "a list, as it was measured"
            raise ConfigError(f"needs.{name}", value, allowed)
    return dict(values)


def _fits(name: str, part: Any) -> bool:
    if name == "groups":
        return isinstance(part, Mapping)
    if isinstance(part, bool) or not isinstance(part, int | float):
        return False
    if name in _WHOLE or name == "windows":
        return isinstance(part, int) and part >= (0 if name == "sinks" else 1)
    return math.isfinite(part) and part >= 0
