"""Holding the plan while running: acts when memory runs short, and takes back what it can when there is room again.

A meter says how full memory is, 0 to 1. Crossing `high` (90 %) upwards runs actions, the mildest first, and measures
again after each; at most `most` (2) run for one crossing. Actions that have run stay in force until use is under `low`
(75 %), when those that can be are undone, last first: the gap between the two marks keeps it from swinging. A use that
has gone on rising by `step` since the last action is a crossing of its own: pressure that grows is answered. So is, at
every poll, a use over `FULL`, above which there is no room to rise.

`poll()` must be called between steps, by the thread that runs the model: actions change caches.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

logger = logging.getLogger(__name__)

HIGH, LOW, STEP, MOST = 0.90, 0.75, 0.03, 2
FULL = 0.98
Meter = Callable[[], float]


@dataclass(frozen=True)
class Action:
    """Something that makes room.

    Args:
        name: for logs and counters.
        act: does it; returns how much it did (bytes, tokens, windows), 0 for nothing.
        undo: takes it back; `None` where that cannot be done.
        again: whether it may run at a later crossing while it is in force.
    """

    name: str
    act: Callable[[], int]
    undo: Callable[[], None] | None = None
    again: bool = False


@dataclass(frozen=True)
class Event:
    """One action that was taken or undone.

    Args:
        action: its name.
        kind: `"act"` or `"undo"`.
        before: use before it.
        after: use after it.
        amount: what `act` returned.
        at: of `time.monotonic`, or of the clock that the monitor was given.
    """

    action: str
    kind: str
    before: float
    after: float
    amount: int
    at: float


class Monitor:
    """Watches one meter, and acts.

    Args:
        meter: share of the memory in use, 0 to 1 (`meters.py`).
        actions: what to do, mildest first (`actions.py`).
        high: use above which it acts.
        low: use below which it takes back.
        step: rise since the last action that counts as a new crossing.
        most: most actions for one crossing.
        callback: told of every event.
        clock: for the events' times.

    Attributes:
        accepting: whether new work should be begun; `refuse_new_work` clears it. Whoever admits work asks.
        use: what the meter said last.

    Raises:
        ConfigError: marks that are not `0 < low < high <= 1`, or numbers out of range.
    """

    def __init__(
        self,
        meter: Meter,
        actions: Sequence[Action],
        *,
        high: float = HIGH,
        low: float = LOW,
        step: float = STEP,
        most: int = MOST,
        callback: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < low < high <= 1:
            raise ConfigError("high", (low, high), "0 < low < high <= 1")
        if not step > 0:
            raise ConfigError("step", step, "more than 0")
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ConfigError("most", most, "an integer >= 1")
        self.meter, self.actions = meter, tuple(actions)
        self.high, self.low, self.step, self.most = high, low, step, most
        self.callback, self._clock = callback, clock
        self.accepting = True
        self.use = 0.0
        self.crossings = 0
        self.counts: Counter[str] = Counter()
        self.events: list[Event] = []
        self._in_force: list[Action] = []
        self._mark = high  # use above which the next crossing lies

    @property
    def in_force(self) -> tuple[str, ...]:
        """Names of the actions that have run and were not undone, in order."""
        return tuple(action.name for action in self._in_force)

    def poll(self) -> list[Event]:
        """Measure once, and act if it must be; returns what was done."""
        before = len(self.events)
        self.use = self.meter()
        if self.use > self._mark:
            self._press()
        elif self.use < self.low:
            self._relax()
        return self.events[before:]

    def _press(self) -> None:
        self.crossings += 1
        done = 0
        try:
            for action in self.actions:
                if done == self.most or self.use <= self.high:
                    break
                if action in self._in_force and not action.again:
                    continue
                amount = action.act()
                if not amount:
                    continue  # there was nothing to do: that is no action
                done += 1
                if action not in self._in_force:
                    self._in_force.append(action)
                self._note(action, "act", amount)
        finally:  # an action that raised is asked again at the next crossing, not at every poll
            self._mark = max(self.high, min(self.use + self.step, FULL))

    def _relax(self) -> None:
        self._mark = self.high
        while self._in_force:
            undo = self._in_force[-1].undo
            if undo is not None:
                undo()  # one that raises stays in force, and is undone at the next poll; those before it are done
            action = self._in_force.pop()
            if undo is None:
                continue
            self._note(action, "undo", 0)
            if self.use >= self.low:  # taking it back has filled memory again: the rest waits
                return

    def _note(self, action: Action, kind: str, amount: int) -> None:
        before, self.use = self.use, self.meter()
        event = Event(action.name, kind, before, self.use, amount, self._clock())
        self.events.append(event)
        self.counts[f"{kind} {action.name}"] += 1
        logger.warning("memory at %.0f %%: %s %s (%d), now %.0f %%", 100 * before, kind, action.name, amount,
                       100 * self.use)  # fmt: skip
        if self.callback is not None:
            self.callback(event)

    def stats(self) -> dict[str, Any]:
        """Use, crossings and counts of actions, as plain JSON values."""
        return {
            "use": self.use,
            "accepting": self.accepting,
            "crossings": self.crossings,
            "in_force": list(self.in_force),
            "counts": dict(self.counts),
        }
