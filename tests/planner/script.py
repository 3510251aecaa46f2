"""Scripted pressure for monitors."""

from __future__ import annotations

from collections.abc import Sequence

from hf_ctxopt.planner.monitor import Action, Monitor


class Script:
    """A meter that follows a script; actions make room for what comes after them."""

    def __init__(self, uses: Sequence[float], relief: dict[str, float] | None = None) -> None:
        self.uses, self.place, self.freed = list(uses), -1, 0.0
        self.relief = relief or {}
        self.done: list[str] = []

    def __call__(self) -> float:
        return self.uses[max(0, self.place)] - self.freed

    def action(self, name: str, reversible: bool = True, again: bool = False, amount: int = 1) -> Action:
        def act() -> int:
            self.done.append(f"+{name}")
            self.freed += self.relief.get(name, 0.0)
            return amount

        def undo() -> None:
            self.done.append(f"-{name}")

        return Action(name, act, undo if reversible else None, again)

    def play(self, monitor: Monitor) -> list[list[str]]:
        """What was done at each point of the script."""
        found = []
        for place in range(len(self.uses)):
            self.place = place
            before = len(self.done)
            monitor.poll()
            found.append(self.done[before:])
        return found
