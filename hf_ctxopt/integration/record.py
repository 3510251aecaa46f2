"""What `patch_model` changed on a model, kept on the model itself: it is copied, moved and dropped with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..caches.options import PageOptions
from ..planner.plan import Plan
from .offload import HostPart

ATTRIBUTE = "_ctxopt_patch"


@dataclass
class PatchRecord:
    """Every change of one patch.

    Args:
        cache: name of the cache that `generate` uses by default.
        options: its validated options.
        fused: whether attention was switched to the fused route.
        graph: whether decode steps are replayed as CUDA graphs.
        compiled: whether the replayed body goes through `torch.compile`.
        on_host: what is asked to be in the host's memory (see `offload.py`).
        moved: what was moved there.
        forward: what stands in the place of the model's `forward` (see `decode_graph.py`).
        chunk: tokens of a prefill chunk that a plan asks for.
        plan: the plan that the settings come from, if they do.
        attention: each config whose attention implementation was switched, and what it was.
    """

    cache: str
    options: PageOptions
    fused: bool
    graph: bool = True
    compiled: bool = False
    on_host: tuple[str, ...] = ()
    moved: list[HostPart] = field(default_factory=list)
    forward: Any = None
    chunk: int | None = None
    plan: Plan | None = None
    attention: list[tuple[Any, str | None]] = field(default_factory=list)


def record_of(model: Any) -> PatchRecord | None:
    """The model's patch, if it has one."""
    record = vars(model).get(ATTRIBUTE)
    return record if isinstance(record, PatchRecord) else None
