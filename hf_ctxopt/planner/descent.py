"""Going down the ladder of quality until something fits: which choices are tried, in which order."""

from __future__ import annotations

from ..errors import ConfigError, DoesNotFitError
from .fit import Choice, Task
from .footprint import chunks_for
from .ladder import Rung
from .needs import ERROR, LEAST_WINDOW, SINKS, Needs, described
from .outcome import milliseconds, plan_of, refusal
from .plan import Plan
from .remedies import rejections
from .schemes import LOADED
from .valid import HOST_PARTS

USUAL_CONTEXT = 8192
"""Tokens planned for where none are asked for, if the model was trained on so many."""
LEAST_CONTEXT = 2048
"""Fewest tokens that are worth planning for where none are asked for; or the usual ones, if those are fewer."""
WINDOW_CHUNK, SHORTER_CHUNK = 256, 512  # what windows and contexts that fill the card leave for chunks
ALIKE = 1.05  # times this close together count as equal: the better quality is taken


class Descent:
    """One search down the ladder: what is tried, in order, and what came of it.

    Args:
        task: what the settings are for.
        rungs: weights and bits to try, best first.
        goal: as of `plan`.
        context: the tokens that were asked for.
        needs: what the prompt needs that is planned for.
    """

    def __init__(
        self, task: Task, rungs: list[Rung], goal: str, context: int | None, needs: Needs | None = None
    ) -> None:
        self.task, self.rungs, self.goal, self.asked, self.needs = task, rungs, goal, context, needs
        trained = task.facts.trained
        usual = USUAL_CONTEXT if goal != "context" else trained or USUAL_CONTEXT
        self.wanted = context if context is not None else min(usual, trained or usual)
        if needs is not None and context is None:
            self.wanted = max(self.wanted, needs.tokens)
        self.notes: list[str] = []
        self.tried: list[Choice] = []
        if task.facts.other_layers:
            self.notes.append(f"the states of {task.facts.other_layers} layers without attention are not counted")
        if task.facts.unpacked is not None:
            self.notes.append(f"its checkpoint is stored as {task.facts.unpacked}: unpacked to 16 bits while it loads")
        if trained is None:
            self.notes.append("its config does not say what length it was trained on")
        if needs is not None:
            self._heed(needs)
        if task.kv_budget is not None and goal != "speed":
            self._best_weights(task.kv_budget)
        # Bits that were asked for are no last resort.
        self.fine = [rung for rung in self.rungs if not rung.coarse] or self.rungs

    def _best_weights(self, kv_budget: int) -> None:
        """A budget of pages holds the same beside any weights: only the best that leave it are of use."""
        smallest = chunks_for(self.task.card.vram)[-1]
        bits = dict.fromkeys((rung.keys, rung.values) for rung in self.rungs)
        for scheme in dict.fromkeys(rung.weights for rung in self.rungs):
            rungs = [Rung(scheme, *pair) for pair in bits]
            if min(Choice(self.task, rung, smallest).left for rung in rungs) >= kv_budget:
                self.rungs = rungs
                return

    def _heed(self, needs: Needs) -> None:
        """Leave out bits that change too much for the prompt, and say what was measured."""
        self.notes.extend(described(needs))
        kept = [rung for rung in self.rungs if needs.error(rung.keys, rung.values) <= ERROR]
        gone = dict.fromkeys(rung.pages for rung in self.rungs if rung not in kept)
        if not kept:  # bits that were asked for
            self.notes.append(f"{' and '.join(gone)} change more than that, and were asked for")
            return
        if gone:
            self.notes.append(f"not tried, they change more than that: {', '.join(gone)}")
        self.rungs = kept

    def run(self) -> Plan:
        """The plan.

        Raises:
            ConfigError, DoesNotFitError: see `plan`.
        """
        trained, limit = self.task.facts.trained, self.task.facts.window_limit
        if trained is not None and self.wanted > trained:
            allowed = f"at most {trained}, the length that the model was trained on"
            if limit is None:
                raise ConfigError("context", self.wanted, f"{allowed}; its positions do not allow a sink window")
            if self.task.agents > 1:
                raise ConfigError("context", self.wanted, f"{allowed}: a prefix store keeps whole texts")
            if self.needs is not None and self.needs.window is None:
                self.notes.append("the prompt needs its far tokens, and those that leave the window are lost")
            self.notes.append(
                f"{self.wanted:,} tokens are more than the {trained:,} the model was trained on: sinks and a window "
                "keep it fluent at any length, and forget what has left the window"
            )
            return self._windowed(limit - SINKS if (window := self._enough(limit)) is None else window)
        if (window := self._enough(limit)) is not None:
            if self.goal == "speed" or self._try(self.rungs[0], self.wanted) is None:
                return self._windowed(window)
            self.notes.append("the whole text fits beside the best weights and pages: no window is needed")
        found = self._fastest() if self.goal == "speed" else None
        if found is not None:
            return self._plan(found, self.wanted)
        if (staged := self._staged()) is not None:
            choice, tokens = staged
            if tokens < self.wanted:
                self.notes.append(f"{self.wanted:,} tokens do not fit: planned for the {tokens:,} that do")
            return self._plan(choice, tokens)
        if limit is None or self.task.agents > 1 or self.asked is None:
            raise self._refusal()
        self.notes.append("nothing holds the whole text: a window forgets what leaves it")
        return self._windowed(min(self.wanted, limit) - SINKS)

    def _staged(self) -> tuple[Choice, int] | None:
        """The first choice that holds the context, and its tokens; fewer of them where none were asked for.

        Two-bit pages are for a context that was asked for. Without one they get the fewest tokens that are of use,
        which no larger card falls below.
        """
        coarse = [rung for rung in self.rungs if rung.coarse]
        whole = self._first(self._stages([] if self.asked is None else coarse), self.wanted)
        if whole is not None:
            return whole, self.wanted
        if self.asked is not None:
            return None
        least = min(LEAST_CONTEXT, self.wanted)
        if (shorter := self._shorter(least)) is not None:
            return shorter
        found = self._first([(host, coarse) for host in self._hosts()], least)
        return None if found is None else (found, least)

    def _shorter(self, least: int) -> tuple[Choice, int] | None:
        """The choice that holds most of the context, the card alone where others hold no more, and its tokens.

        Chunks too short to be read fast are for the fewest tokens that are of use, which no larger card falls below.
        """
        for chunk in (SHORTER_CHUNK, chunks_for(self.task.card.vram)[-1]):
            choices = [Choice(self.task, rung, chunk, host) for host in self._hosts() for rung in self.fine]
            most = max(choices, key=lambda choice: choice.capacity or 0)
            if most.missing(least) <= 0:
                return most, int(most.capacity or 0) if chunk == SHORTER_CHUNK else least
        return None

    def _enough(self, limit: int | None) -> int | None:
        """The window that holds what the prompt needs, where the model and its cache can have one."""
        window = None if self.needs is None else self.needs.window
        if window is None or limit is None or window + SINKS > min(limit, self.wanted - 1) or self.task.agents > 1:
            return None
        return window

    def _stages(self, coarse: list[Rung]) -> list[tuple[tuple[str, ...], list[Rung]]]:
        """(host parts, rungs) to try one after the other.

        What costs only time, the host, comes before two-bit pages, unless time is what matters.
        """
        on_card, *hosts = self._hosts()
        slow = [(host, self.fine) for host in hosts]
        order = [(on_card, coarse), *slow] if self.goal == "speed" else [*slow, (on_card, coarse)]
        return [(on_card, self.fine), *order, *((host, coarse) for host in hosts)]

    def _first(self, stages: list[tuple[tuple[str, ...], list[Rung]]], tokens: int) -> Choice | None:
        """The first choice that holds so many tokens."""
        found = (self._try(rung, tokens, host) for host, rungs in stages for rung in rungs)
        return next((choice for choice in found if choice is not None), None)

    def _fastest(self, window: int | None = None) -> Choice | None:
        """The fastest choice that holds the context, or a window, with 4 bits or more; of equally fast the better."""
        found = [self._try(rung, self.wanted, (), window) for rung in self.rungs if not rung.coarse]
        whole = [choice for choice in found if choice is not None]
        times = [milliseconds(choice, self.wanted) or 0.0 for choice in whole]
        alike = (choice for choice, time in zip(whole, times, strict=True) if time <= ALIKE * min(times))
        return next(alike, None)

    def _windowed(self, most: int) -> Plan:
        """A plan with sinks and a window of at most `most` tokens: whole if a rung holds it, else what fits."""
        if self.goal == "speed" and (fastest := self._fastest(most)) is not None:
            return self._plan(fastest, self.wanted)
        tries = (self._try(rung, self.wanted, host, most) for host in self._hosts() for rung in self.fine)
        found = next((choice for choice in tries if choice is not None), None) or self._narrower(most)
        if found is None:
            raise self._refusal()
        return self._plan(found, self.wanted)

    def _narrower(self, most: int) -> Choice | None:
        """The choice with most of the window, the card alone where others have no more: what costs less is spent."""
        rungs = [(rung, host) for host in self._hosts() for rung in self.fine]
        choices = [Choice(self.task, rung, WINDOW_CHUNK, host, SINKS, most) for rung, host in rungs]
        best = max(choices, key=Choice.largest_window)
        window = min(best.largest_window(), most)
        if window < min(LEAST_WINDOW, most) or (self.needs is not None and not self.needs.holds(window)):
            return None
        return self._try(best.rung, self.wanted, best.host, window)

    def _hosts(self) -> list[tuple[str, ...]]:
        """Parts of the model that may go to the host, the card for all of them first."""
        if not self.task.card.accelerator or self.rungs[0].weights == LOADED:
            return [()]
        return [(), HOST_PARTS] if self.task.facts.tied else [(), HOST_PARTS[:1], HOST_PARTS]

    def _try(self, rung: Rung, tokens: int, host: tuple[str, ...] = (), window: int | None = None) -> Choice | None:
        """The choice with the largest chunk that holds `tokens`; `None` if none does."""
        sinks = 0 if window is None else SINKS
        for chunk in chunks_for(self.task.card.vram):
            choice = Choice(self.task, rung, chunk, host, sinks, window)
            if choice.missing(tokens) <= 0:
                return choice
        self.tried.append(choice)
        return None

    def _refusal(self) -> DoesNotFitError:
        lost = self.needs is not None and any(choice.window is not None for choice in self.tried)
        return refusal(self.task, self.tried, self.wanted, lost)

    def _plan(self, choice: Choice, context: int) -> Plan:
        why = list(rejections(self.tried, context))
        alone = max((tried.capacity or 0 for tried in self.tried if not tried.host), default=0)
        host = f"the card alone holds {alone:,} tokens" if alone >= LEAST_CONTEXT else "nothing less fits"
        return plan_of(choice, context, self.goal, [*self.notes, *why], host, self.needs)
