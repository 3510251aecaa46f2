"""One-token steps as replays of a captured CUDA graph.

A decode step of a small batch is bound by the launches of its kernels, not by the GPU. `patch_model` puts a
`DecodeGraph` in the place of the model's `forward`. It passes everything on but the one-token steps of our caches on
a GPU: those are planned on the host (`caches/planned.py`), their state is written to fixed device buffers, and the
whole forward pass is replayed as one graph. What a graph cannot hold runs as before, counted in
`cache.stats()["graph"]`.

A graph is bound to one cache's storages. The first step of a batch size runs eagerly and warms the kernels up, the
second captures; growth of the pages captures anew.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..caches.base import PageCache
from ..caches.context import NotReplayable, debugging
from ..caches.decode import DecodeState
from ..caches.planned import finish_step, plan_step, running
from ..errors import CtxoptError, IntegrityError, first_line, out_of_memory
from .capture import Capture, capture
from .compat import cache_in
from .compiled import CompiledLayers
from .fused import FusedParts
from .graph_rules import Step, named_arguments, read_step, refusal

# Largest difference of a replay and an eager run of the same kernels, as a share of the logits' norm. What a graph has
# taken from the host by mistake changes them altogether.
_CLOSE, _CLOSE_HALF = 1e-3, 3e-2


class DecodeGraph:
    """A model's `forward`, with decode steps replayed.

    Args:
        model: the model; kept weakly, as it keeps this object.
        compiled: whether the captured body goes through `torch.compile`.
        before: what stood in the place of the class's `forward` (accelerate's hooks), if anything did.
    """

    def __init__(self, model: nn.Module, compiled: bool = False, before: Callable[..., Any] | None = None) -> None:
        self._model, self.compiled, self.before = weakref.ref(model), compiled, before
        self._checked = False  # a replay has been compared with an eager run
        self._barred: str | None = None  # why this model's steps are not captured
        self._parts = CompiledLayers() if compiled else FusedParts()
        self.__signature__ = inspect.signature(functools.partial(type(model).forward, model))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(), self.compiled, self.before)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeGraph:
        model = self._alive()
        return DecodeGraph(memo.get(id(model), model), self.compiled, copy.deepcopy(self.before, memo))

    @property
    def _forward(self) -> Callable[..., Any]:
        model = self._alive()
        return functools.partial(type(model).forward, model) if self.before is None else self.before

    def _alive(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this decode graph is gone")
        return model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, forward = self._alive(), self._forward
        if not any(isinstance(part, Tensor) and part.device.type == DEVICE_TYPE for part in (*args, *kwargs.values())):
            return forward(*args, **kwargs)  # told before the arguments are put to names, which takes a while
        given = named_arguments(self.__signature__, args, kwargs)
        cache = cache_in(given)
        if not isinstance(cache, PageCache) or cache.context.planned or not self._is_decode_step(cache, given):
            return forward(*args, **kwargs)
        step, barred = read_step(cache, given), self._barred or cache.context.barred
        if model.training:
            barred = "the model is in training mode"
        if barred is not None or isinstance(step, str):
            cache.context.stay_eager(barred or str(step))
            return forward(*args, **kwargs)
        try:
            return self._decode(model, cache, step)
        except NotReplayable as reason:
            cache.context.stay_eager(str(reason))
            return forward(*args, **kwargs)  # goes on with the step if it has been planned

    @staticmethod
    def _is_decode_step(cache: PageCache, given: dict[str, Any]) -> bool:
        ids = given.get("input_ids")
        return (
            isinstance(ids, Tensor)
            and ids.shape[-1] == 1
            and cache.get_seq_length() > 0
            and cache.context.fused
            and ids.device.type == DEVICE_TYPE
        )

    def _decode(self, model: nn.Module, cache: PageCache, step: Step) -> Any:
        context = cache.context
        base = context.ledger.open(cache.get_seq_length(), 1) if cache.guard is not None else 0
        states = plan_step(cache, step.ids.shape[0])
        if step.plain is not None and not bool(step.plain):
            raise NotReplayable("an attention mask that hides more than left padding")
        key = _key(model, cache, states, step)
        held: Capture | None = context.captured
        if held is None or held.key != key:
            if context.warmed != key:
                context.barred = refusal(model)
                if context.barred is not None:
                    raise NotReplayable(context.barred)
                context.captured, context.warmed = None, key  # the old graph's memory goes before the new one's comes
                context.graph["warm-ups"] += 1
                output = self._warm_up(model, cache, step, base)
                finish_step(cache)
                return output
            held = self._capture(model, cache, step, base, key)
            check = False  # in the captured step itself what was taken from the host by mistake is still right
        else:
            check = not self._checked
        expected = None
        if check or debugging():
            with self._parts.inside(model):  # the same kernels: what differs then was taken from the host
                expected = self._run(cache, step, base, trusted=True)
        output = held.replay(step.ids, step.positions, base, cache)
        if expected is not None:
            self._compare(expected, output)
        finish_step(cache)
        context.graph["replays"] += 1
        return output

    def _run(self, cache: PageCache, step: Step, base: int, trusted: bool) -> Any:
        """The planned step as an ordinary run."""
        try:
            with running(cache.context, trusted):
                return self._forward(**step.arguments(step.ids, step.positions - base, cache))
        except NotReplayable as reason:
            cache.context.barred = str(reason)  # it is the model's way, and not to be tried at every step
            raise

    def _warm_up(self, model: nn.Module, cache: PageCache, step: Step, base: int) -> Any:
        """The planned step with the kernels that will be captured; what compiles itself does so when captured."""
        if self.compiled:
            return self._run(cache, step, base, trusted=False)
        with self._parts.inside(model):
            return self._run(cache, step, base, trusted=False)

    def _capture(self, model: nn.Module, cache: PageCache, step: Step, base: int, key: tuple[Any, ...]) -> Capture:
        context, forward = cache.context, self._forward

        def body(ids: Tensor, positions: Tensor) -> Any:
            with running(context, trusted=True):
                return forward(**step.arguments(ids, positions, cache))

        try:
            with self._parts.inside(model):
                held = capture(body, step.ids, step.positions - base, key, warm=self.compiled)
        except CtxoptError:
            raise
        except RuntimeError as error:
            if out_of_memory(error):
                context.forget_graph()
                context.barred = "no memory for a graph"
                raise NotReplayable(context.barred) from error
            # the model does something during its forward pass that no graph can hold
            self._barred = f"{type(model).__name__} cannot be captured ({first_line(error)[:200]})"
            raise NotReplayable(self._barred) from error
        context.captured = held
        context.graph["captures"] += 1
        return held

    def _compare(self, expected: Any, found: Any) -> None:
        """A model's first replay of a later step, and in debug mode every one, must give what an eager run gives."""
        want, got = expected.logits.float(), found.logits.float()
        finite = want.isfinite()
        if bool((finite != got.isfinite()).any()):
            want, got = want.nan_to_num(), got.nan_to_num()
        else:  # a masked vocabulary has infinite logits
            want, got = want[finite], got[finite]
        difference = float((want - got).norm() / want.norm().clamp_min(1e-6))
        close = _CLOSE if expected.logits.dtype == torch.float32 else _CLOSE_HALF
        if difference <= close:
            self._checked = True
            return
        message = f"the replayed step's logits differ from the eager ones by {difference:.2g} of their norm"
        if debugging():
            raise IntegrityError(message)
        self._barred = message
        raise NotReplayable(message)


DEVICE_TYPE = "cuda"
"""Steps on other devices are passed on at once; tests that stand in for a GPU change it."""


def _key(model: Any, cache: PageCache, states: list[DecodeState], step: Step) -> tuple[Any, ...]:
    """What a graph depends on besides the contents of its buffers: their addresses, above all."""
    parameters = [next(model.parameters()), model.get_output_embeddings()]
    places: list[Any] = [weakref.ref(model)]
    places += [getattr(part, "weight", part).data_ptr() for part in parameters if part is not None]
    for group, state in zip(cache.context.groups, states, strict=True):
        places += [state, group, group.arena.storage_version]
    return (step.ids.shape[0], step.extra, *places)
