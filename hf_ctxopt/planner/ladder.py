"""In which order quality is spent: rungs of weight scheme and cache bits, best first.

16 bits first; then 8-bit pages before packed weights, weights down to 4 bits with 8-bit pages, and only then fewer
bits in the pages: values before keys. Two bits, and windows, which forget, come last. The order follows what each
costs: 8-bit pages change the model's distribution by a KL divergence of 1e-5, 4-bit ones by 1.5e-3, 2-bit ones by 5e-2
(`benchmarks/results/quality.json`); 4-bit weights add about 1 % of perplexity, 8-bit ones next to nothing (llama.cpp's
table of K-quants).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .schemes import LOADED, PLAIN, SCHEMES

WEIGHTS = (PLAIN, "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
"""The schemes tried by default, best first; all of them run without another package."""
FINE = ((16, 16), (8, 8))
COARSE = ((8, 4), (4, 4), (2, 2))
_EIGHT = (LOADED, PLAIN, "Q8_0", "hqq8", "int8", "quanto-int8", "torchao-int8")
_BEST_FIRST = (*_EIGHT, "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "awq", "gptq", "hqq4", "Q4_K_S",
               "nf4", "quanto-int4", "torchao-int4", "Q4_1", "Q4_0")  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: how weights are stored, and the bits of pages of keys and values."""

    weights: str
    keys: int
    values: int

    @property
    def quality(self) -> str:
        """Its class, in one word: exact, near-exact, high, good, fair or low."""
        fewest = min(self.keys, self.values)
        if fewest == 2:
            return "low"
        if fewest == 4:
            return "fair"
        if self.weights in (PLAIN, LOADED) and fewest == 16:
            return "exact"
        if self.weights in _EIGHT:
            return "near-exact"
        return "high" if self.weights.startswith(("Q6", "Q5")) else "good"

    @property
    def coarse(self) -> bool:
        """Whether its pages lose more than most texts forgive: only for a context that was asked for."""
        return min(self.keys, self.values) < 4

    @property
    def pages(self) -> str:
        """Its pages in words."""
        return f"{self.keys if self.keys == self.values else f'{self.keys}/{self.values}'}-bit pages"

    def __str__(self) -> str:
        return f"{self.weights} weights, {self.pages}"


def ladder(weights: str | Sequence[str] | None, kv_bits: tuple[int, int] | None) -> list[Rung]:
    """The rungs to try, best first.

    Args:
        weights: scheme or schemes to choose from; `None` for `WEIGHTS`.
        kv_bits: bits of K and V, if they are given.

    Raises:
        ConfigError: an unknown scheme, or none.
    """
    if weights is not None and not isinstance(weights, Sequence):
        raise ConfigError("weights", weights, f"one or several of {', '.join(SCHEMES)}")
    given = WEIGHTS if weights is None else (weights,) if isinstance(weights, str) else tuple(weights)
    for scheme in given:
        if scheme not in (LOADED, *SCHEMES):
            raise ConfigError("weights", scheme, f"one or several of {', '.join(SCHEMES)}")
    if not given:
        raise ConfigError("weights", given, "at least one scheme")
    schemes = sorted(given, key=_BEST_FIRST.index)
    return list(_rungs(schemes, kv_bits))


def worse(scheme: str) -> tuple[str, ...]:
    """The schemes tried by default that give up more quality than `scheme`, best first."""
    return tuple(name for name in WEIGHTS if _BEST_FIRST.index(name) > _BEST_FIRST.index(scheme))


def _rungs(schemes: Sequence[str], kv_bits: tuple[int, int] | None) -> Iterator[Rung]:
    for scheme in schemes:
        for bits in FINE if kv_bits is None else (kv_bits,):
            yield Rung(scheme, *bits)
    for bits in COARSE if kv_bits is None else ():
        yield Rung(schemes[-1], *bits)
