"""Whether one choice of settings fits one card, and by how many bytes it does not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .facts import ModelFacts
from .footprint import ENDLESS, GRAPH, KvLayout, activation_bytes, logit_bytes
from .ladder import Rung
from .schemes import WeightBytes, weight_bytes


@dataclass(frozen=True, kw_only=True)
class Card:
    """The memory to plan for.

    Args:
        name: the device's or the profile's.
        vram: bytes in all.
        others: bytes that others use.
        context: bytes of the CUDA context.
        reserve: bytes to leave alone.
        bandwidth: bytes per second; `None` if unknown.
        accelerator: whether it is a GPU: decode graphs, and a host beside it.
        like: the card whose bandwidth stands for an unknown one; `None` if it is its own.
    """

    name: str
    vram: int
    others: int
    context: int
    reserve: int
    bandwidth: float | None
    accelerator: bool
    like: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the settings are for.

    Args:
        facts: the model.
        card: the memory.
        batch: sequences at once.
        agents: sequences whose pages are kept between calls.
        page_size: tokens of a page.
        kv_budget: bytes of pages that were asked for; `None` for what is left.
    """

    facts: ModelFacts
    card: Card
    batch: int = 1
    agents: int = 1
    page_size: int = 32
    kv_budget: int | None = None

    @property
    def rows(self) -> int:
        """Sequences whose pages are held."""
        return max(self.batch, self.agents)

    @property
    def longest(self) -> int:
        """Tokens that the model was trained on."""
        return self.facts.trained or ENDLESS


@dataclass(frozen=True)
class Choice:
    """Settings, and what they leave for pages.

    Args:
        task: what they are for.
        rung: weights and bits.
        chunk: tokens of a prefill chunk.
        host: parts of the model in the host's memory.
        sinks: first tokens kept, with `window`.
        window: last tokens kept; `None` keeps all.
    """

    task: Task
    rung: Rung
    chunk: int
    host: tuple[str, ...] = ()
    sinks: int = 0
    window: int | None = None

    @cached_property
    def layout(self) -> KvLayout:
        """The pages."""
        task = self.task
        bits = {"k": self.rung.keys, "v": self.rung.values}
        return KvLayout(
            task.facts.groups, bits, task.facts.item, task.rows, task.page_size, self.sinks, self.window
        )  # fmt: skip

    @cached_property
    def weights(self) -> WeightBytes:
        """The weights, wherever they are."""
        return weight_bytes(self.task.facts, self.rung.weights)

    @property
    def embeddings(self) -> int:
        """Bytes of embedding and head on the card."""
        weights = self.weights
        return (0 if "embedding" in self.host else weights.embedding) + (0 if "head" in self.host else weights.head)

    @property
    def replayed(self) -> bool:
        """Whether decode steps are CUDA graphs."""
        return self.task.card.accelerator and not self.host

    @cached_property
    def _beside(self) -> dict[str, int]:
        """Bytes by part, all but pages and activations."""
        card = self.task.card
        return {
            "weights": self.weights.layers,
            "embeddings": self.embeddings,
            "logits": logit_bytes(self.task.facts, self.task.batch),
            "graph": GRAPH if self.replayed else 0,
            "cuda_context": card.context,
            "others": card.others,
            "reserve": card.reserve,
        }

    @cached_property
    def _grown(self) -> int:
        """Growing pages there is memory for, no more than the trained length or the budget has.

        Each costs itself and its part in one layer again: while pages grow, one layer has old ones beside new ones.
        """
        task, layout = self.task, self.layout
        longest = layout.needed(min(task.longest, ENDLESS))
        if task.kv_budget is not None:
            return max(0, min(longest, (task.kv_budget - layout.fixed_bytes) // layout.page_bytes))
        free = task.card.vram - sum(self._beside.values()) - layout.fixed_bytes
        fit = min((free - self._reading) // layout.page_bytes, free // (layout.page_bytes + layout.layer_page_bytes))
        return max(0, min(longest, fit))

    @property
    def activations(self) -> int:
        """Bytes that reading a prompt needs, or growing pages to all that fit: never both at once, so the larger."""
        return max(self._reading, self._grown * self.layout.layer_page_bytes)

    @cached_property
    def _reading(self) -> int:
        """Bytes that reading a prompt needs."""
        task = self.task
        return activation_bytes(task.facts, self.weights, self.layout, self.chunk, task.batch)

    @property
    def left(self) -> int:
        """Bytes that all else leaves for pages; negative if it does not fit by itself."""
        return self.task.card.vram - sum(self._beside.values()) - self.activations

    @property
    def room(self) -> int:
        """Bytes of pages: those asked for, else those left; not those of a page more than could be grown to."""
        if self.task.kv_budget is not None:
            return self.task.kv_budget
        if self._grown == self.layout.needed(min(self.task.longest, ENDLESS)):
            return self.left
        return min(self.left, self.layout.fixed_bytes + (self._grown + 1) * self.layout.page_bytes - 1)

    @property
    def page_budget(self) -> int:
        """Bytes for growing pages."""
        return max(0, self.room - self.layout.fixed_bytes)

    @property
    def pages(self) -> int:
        """Growing pages that these bytes hold."""
        return self.page_budget // self.layout.page_bytes

    @property
    def capacity(self) -> int | None:
        """Tokens of each sequence that fit, at most the trained ones; `None` for any number."""
        if self.window is not None:
            return None if self.layout.bounded else self.task.longest
        if self.room < self.layout.fixed_bytes:
            return 0
        held = self.layout.tokens(self.pages)
        return self.task.facts.trained if held is None else min(held, self.task.longest)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the pages that `tokens` tokens of each sequence need."""
        return self.layout.fixed_bytes + self.layout.needed(tokens) * self.layout.page_bytes

    def missing(self, tokens: int) -> int:
        """Bytes that are missing for `tokens` tokens of each sequence; 0 or less if they fit.

        So many bytes more of memory do, or of `kv_budget` where that is too small for the tokens.
        """
        needed = self.kv_bytes(tokens)
        if self.task.kv_budget is not None:
            return max(needed - self.task.kv_budget, self.task.kv_budget - self.left)
        return needed + self._active(tokens) + sum(self._beside.values()) - self.task.card.vram

    def _active(self, tokens: int) -> int:
        """Bytes that reading a prompt needs, or growing pages to `tokens` tokens of each sequence."""
        return max(self._reading, self.layout.needed(tokens) * self.layout.layer_page_bytes)

    def largest_window(self) -> int:
        """The longest window that fits, in whole pages; 0 if none does."""
        pages = self.pages // self.task.rows - 1
        if not self.layout.quantized:
            pages -= -(-self.sinks // self.task.page_size)
        return max(0, pages * self.task.page_size) if self.room >= self.layout.fixed_bytes else 0

    def parts(self, tokens: int) -> dict[str, int]:
        """Bytes by part with `tokens` tokens in each sequence; pages have grown to no more than these."""
        kv = max(self.kv_bytes(tokens), self.task.kv_budget or 0)
        beside = self._beside
        first = {"weights": beside["weights"], "embeddings": beside["embeddings"], "kv": kv}
        return {**first, "activations": self._active(tokens), **beside}
