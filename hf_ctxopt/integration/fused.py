"""Norms and rotary embeddings as one kernel each, for as long as a decode step is warmed up and captured.

In eager torch they are eight to ten kernels each, most of those of a layer, and a replay waits for every one of them.

Nothing is known by name alone. A norm is taken over if, on random inputs and a random weight, its own class computes
what a form of `kernels/fused.py` computes, to the bit; so is a modeling file's `apply_rotary_pos_emb`. All else, and a
module whose `forward` is somebody else's, stays as it is.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import fused
from ..kernels.dispatch import FusedKernels, fused_kernels
from ..kernels.fused import NormForm

ROTARY = "apply_rotary_pos_emb"
_OTHER = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a function that computes something else may raise when it is given a probe."""


class FusedParts:
    """The parts of one model that are taken over while `inside` is open; what they are is found out once."""

    def __init__(self) -> None:
        self._forms: weakref.WeakKeyDictionary[nn.Module, tuple[Any, NormForm | None]] = weakref.WeakKeyDictionary()
        self._rotaries: dict[tuple[Any, ...], bool] = {}

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The recognized parts of `model` run as one kernel each; on a device without kernels, nothing changes."""
        weight = next(model.parameters())
        kernels = fused_kernels(weight.device)
        if kernels is None or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
            yield
            return
        norms = [(part, form) for part in model.modules() if (form := self._form(part)) is not None]
        dtype = _weight(norms[0][0]).dtype if norms else weight.dtype
        files = {name: function for name, function in _rotaries(model) if self._turns_halves(function, weight, dtype)}
        with ExitStack() as undo:
            for part, form in norms:
                part.forward = functools.partial(_norm, part, form, kernels)
                undo.callback(delattr, part, "forward")
            for name, function in files.items():
                _take_over(name, function, kernels)
                undo.callback(_give_back, name)
            yield

    def _form(self, part: nn.Module) -> NormForm | None:
        weight, eps = part._parameters.get("weight"), _eps(part)
        if weight is None or eps is None or weight.dim() != 1 or "forward" in vars(part):
            return None
        if len(part._parameters) != 1 or part._modules or not weight.is_floating_point():
            return None
        # Of each module by itself: two of one class may differ in a flag.
        key, (known, form) = (weight.dtype, weight.shape, weight.device, eps), self._forms.get(part, (None, None))
        if known != key:
            form = _recognize(part, weight, eps)
            self._forms[part] = key, form
        return form

    def _turns_halves(self, function: Callable[..., Any], weight: Tensor, dtype: torch.dtype) -> bool:
        key = (function, weight.device, dtype)
        if key not in self._rotaries:
            self._rotaries[key] = dtype.is_floating_point and _is_plain_rotary(function, weight.device, dtype)
        return self._rotaries[key]


_LOCK = threading.Lock()
_TAKEN: dict[str, tuple[int, Callable[..., Any]]] = {}
"""Modeling files whose rotary function is replaced -> by how many models at once, and the file's own."""


def _take_over(name: str, function: Callable[..., Any], kernels: FusedKernels) -> None:
    with _LOCK:
        users, own = _TAKEN.get(name, (0, function))
        _TAKEN[name] = users + 1, own
        if not users:
            setattr(sys.modules[name], ROTARY, _rotary(own, kernels))


def _give_back(name: str) -> None:
    with _LOCK:
        users, own = _TAKEN.pop(name)
        if users > 1:
            _TAKEN[name] = users - 1, own
        else:
            setattr(sys.modules[name], ROTARY, own)


def _weight(part: nn.Module) -> Tensor:
    weight: Tensor = part._parameters["weight"]  # type: ignore[assignment]
    return weight


def _eps(part: nn.Module) -> float | None:
    found = [getattr(part, name, None) for name in ("variance_epsilon", "eps")]
    return next((float(value) for value in found if isinstance(value, int | float)), None)


@torch.no_grad()
def _recognize(part: nn.Module, weight: Tensor, eps: float) -> NormForm | None:
    """The form that a norm's class computes; `None` if it is none of them."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, weight.shape[0], generator=draw)
    x[1] *= 30.0
    x[2] *= eps**0.5  # where it matters how eps enters
    x = x.to(weight)
    probe = copy.copy(part)
    other = torch.randn(weight.shape, generator=draw).to(weight)
    probe._parameters = {"weight": nn.Parameter(other, requires_grad=False)}
    try:
        want = type(part).forward(probe, x)
    except _OTHER:  # it takes other arguments than a norm does
        return None
    if not isinstance(want, Tensor) or want.dtype != x.dtype:
        return None
    forms = (form for form in NormForm if torch.equal(fused.rms_norm(x, other, eps, form), want))
    return next(forms, None)


def _rotaries(model: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """The modeling files of a model's modules that define `apply_rotary_pos_emb`."""
    names = sorted({type(part).__module__ for part in model.modules()})
    with _LOCK:  # a file that another model has taken over is known by its own function
        taken = {name: own for name, (_, own) in _TAKEN.items()}
    found = [
        (name, taken.get(name) or getattr(sys.modules.get(name), ROTARY, None)) for name in names if "modeling" in name
    ]
    return [(name, function) for name, function in found if callable(function)]


@torch.no_grad()
def _is_plain_rotary(function: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool:
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 4, 3, 16), (2, 2, 3, 16), (2, 3, 16), (2, 3, 16)
    given = [torch.randn(shape, generator=draw).to(device=device, dtype=dtype) for shape in shapes]
    try:
        got = function(*given)
    except _OTHER:
        return False
    pair = isinstance(got, tuple) and len(got) == 2
    return pair and all(map(torch.equal, got, fused.rotary(*given)))


def _norm(part: nn.Module, form: NormForm, kernels: FusedKernels, *args: Any, **kwargs: Any) -> Tensor:
    if len(args) == 1 and not kwargs and _served(part, args[0]) and (eps := _eps(part)) is not None:
        return kernels.norm(args[0], _weight(part), eps, form)
    result: Tensor = type(part).forward(part, *args, **kwargs)
    return result


def _served(part: nn.Module, x: Any) -> bool:
    """Whether a norm's kernel can take `x`: channels, dtype and device are its weight's, and no gradients are kept."""
    weight = _weight(part)
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or x.shape[-1:] != weight.shape:
        return False
    return x.dtype == weight.dtype and x.device == weight.device


def _rotary(function: Callable[..., Any], kernels: FusedKernels) -> Callable[..., Any]:
    """`function`, by the kernel where the call is plain. The file is shared by all models of a kind."""

    @functools.wraps(function)
    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or torch.is_grad_enabled() or not _plain(q, k, cos, sin):
            return function(q, k, cos, sin, *args, **kwargs)
        return kernels.rotary(q, k, cos, sin)

    return turn


def _plain(query: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whole heads on a device with kernels, tables of their dtype and length, and channels next to each other."""
    if query.dim() != 4 or keys.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    if fused_kernels(query.device) is None or query.shape[-1] % 2 or query.shape[-1] != cos.shape[-1]:
        return False
    if cos.shape[1] != query.shape[2] or cos.shape[0] not in (1, query.shape[0]) or keys.shape[2] != query.shape[2]:
        return False
    alike = {(part.dtype, part.device, part.stride(-1)) for part in (query, keys, cos, sin)}
    return alike == {(query.dtype, query.device, 1)}
