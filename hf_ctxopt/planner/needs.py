"""What a prompt needs of a cache, as measured by `integration/probe.py`, and what a plan makes of it.

A window does where little of the attention lies outside it: of the queries that lead to the answer at most `ANSWER`
on average over heads and layers, and at most `HEAD` in any one head. The second bound is there for retrieval: the
heads that find a needle are few (Wu et al. 2024, arXiv 2404.15574, section 2), and an average over all hides them.
Bits do where what attention returns for these queries changes by at most `ERROR`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError

ANSWER, HEAD = 0.10, 0.50
"""Most attention outside a window: on average, and of any head."""
ERROR = 0.05
"""Most change of what attention returns, relative to its norm, for the sake of fewer bits."""
BITS = (8, 4, 2)


@dataclass(frozen=True, kw_only=True)
class GroupNeeds:
    """The layers that keep the same tokens: full attention, or one sliding window of the model's own.

    Args:
        layers: how many they are.
        window: their own sliding window; `None` for full attention.
        text: by window of `Needs.windows`: share of attention outside sinks and window, over queries of the whole
            text that have anything there.
        answer: the same, over the queries of the answer's side.
        head: the same as `answer`, of the head in which it is the largest.
        key_errors: by bits of `BITS`: change of what attention returns if K is stored with so many bits.
        value_errors: likewise V.
    """

    layers: int
    window: int | None
    text: tuple[float, ...]
    answer: tuple[float, ...]
    head: tuple[float, ...]
    key_errors: tuple[float, ...]
    value_errors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one prompt needs.

    Args:
        tokens: of the prompt.
        last: queries at its end that count as the answer's side.
        sinks: first tokens that every window is measured with.
        windows: candidates, all of them shorter than the prompt; none if it is too short to tell.
        groups: the layers.
    """

    tokens: int
    last: int
    sinks: int
    windows: tuple[int, ...]
    groups: tuple[GroupNeeds, ...]

    @property
    def cut(self) -> tuple[GroupNeeds, ...]:
        """The layers that a sink window would cut: those with full attention, or all if every layer slides."""
        return tuple(group for group in self.groups if group.window is None) or self.groups

    def outside(self, window: int) -> tuple[float, float]:
        """Share of the answer's attention outside a window: on average over the layers it would cut, and of a head.

        Args:
            window: one of `windows`.
        """
        at = self.windows.index(window)
        layers = sum(group.layers for group in self.cut)
        mean = sum(group.layers * group.answer[at] for group in self.cut) / layers
        return mean, max(group.head[at] for group in self.cut)

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
        mean, head = self.outside(window)
        return mean <= ANSWER and head <= HEAD

    def error(self, keys: int, values: int) -> float:
        """Change of what attention returns with so many bits of K and V, of the group in which it is the largest."""
        return max(
            (_at(group.key_errors, keys) ** 2 + _at(group.value_errors, values) ** 2) ** 0.5 for group in self.groups
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` makes the same needs of them."""
        groups = [{key: _listed(value) for key, value in asdict(group).items()} for group in self.groups]
        return {**{key: _listed(value) for key, value in asdict(self).items()}, "groups": groups}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Needs:
        """The needs that `to_dict` wrote.

        Raises:
            ConfigError: a field is missing or unknown, or a row has another length than there are windows or bits.
        """
        given = _checked(cls, values)
        groups = []
        for row in given["groups"]:
            group = GroupNeeds(**{key: _tupled(value) for key, value in _checked(GroupNeeds, row).items()})
            measured = (group.text, group.answer, group.head)
            errors = (group.key_errors, group.value_errors)
            if any(len(part) != len(given["windows"]) for part in measured) or any(len(e) != len(BITS) for e in errors):
                raise ConfigError("needs", row, f"a value for each of the windows, and for each of {BITS} bits")
            groups.append(group)
        if not groups:
            raise ConfigError("needs", values, "at least one group of layers")
        return cls(**{**{key: _tupled(value) for key, value in given.items()}, "groups": tuple(groups)})


def described(needs: Needs) -> list[str]:
    """Sentences with the figures, for `Plan.reasons`."""
    name = f"the prompt ({needs.tokens:,} tokens)"
    lines = []
    for group in needs.groups:
        kind = "full" if group.window is None else f"sliding ({group.window:,})"
        rows = zip(needs.windows, group.answer, group.head, strict=True)
        shares = ", ".join(f"{window:,}: {mean:.0%} (a head: {head:.0%})" for window, mean, head in rows)
        if shares:
            lines.append(f"{name}, {group.layers} {kind} layers: attention of its end outside {needs.sinks} + {shares}")
    if needs.windows:
        chosen = needs.window
        bound = f"at most {ANSWER:.0%} on average and {HEAD:.0%} of a head may lie outside"
        if chosen is None:
            lines.append(f"{name} needs its far tokens: no window measured keeps enough ({bound})")
        else:
            lines.append(f"{name} does with a window of {chosen:,} ({bound})")
    else:
        lines.append(f"{name} is too short to tell anything of windows")
    errors = ", ".join(f"{bits}: {needs.error(bits, bits):.1%}" for bits in BITS)
    lines.append(f"{name}: change of what attention returns, by bits of the pages: {errors} (at most {ERROR:.0%})")
    return lines


def _at(errors: Sequence[float], bits: int) -> float:
    return 0.0 if bits == 16 else errors[BITS.index(bits)]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _checked(kind: type, values: Any) -> dict[str, Any]:
    names = {part.name for part in fields(kind)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ConfigError("needs", values, f"a dictionary that Needs.to_dict() wrote ({', '.join(sorted(names))})")
    return dict(values)
