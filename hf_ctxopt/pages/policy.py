"""What pages ask of policies (`policies/`), which know nothing of pages: two protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Policy(Protocol):
    """What a layer group asks about the tokens that a query sees (see `policies/sink_window.py`)."""

    @property
    def sinks(self) -> int:
        """First tokens that are never evicted."""

    @property
    def most_held(self) -> int | None:
        """Most non-sink tokens a query sees; `None` if unbounded."""

    @property
    def slides(self) -> bool:
        """Whether every query sees exactly its last `most_held` tokens besides the sinks."""

    def horizon(self, token: int) -> int:
        """Oldest non-sink token the query at `token` may see; never decreases."""


class Evictor(Protocol):
    """What a layer group asks of a policy that names pages to drop (see `policies/priority_budget.py`)."""

    tokens: int | None
    nbytes: int | None
    clock: Any

    def excess(self, held: int, coming: int) -> int:
        """Pages that go before a step of `coming` tokens."""

    def victims(self, pages: Sequence[tuple[int, bool, float]], count: int) -> list[int]:
        """Which of these (first token, generated, born) go, by their place."""
