"""Keeping positions small: a hook on the decoder that subtracts the base of the cache's current era.

A cache that evicts attaches the hook when it is made; the hook goes with the last such cache. It changes nothing for
forward passes with other caches.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..caches.base import PageCache, attention_cache
from ..errors import ConfigError
from .compat import cache_in

_lock = threading.RLock()  # re-entrant: a guard may be collected while another is made
_attached: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()


def padding_of(attention_mask: Tensor | None) -> list[int] | None:
    """Left-padding columns of each row of a `(batch, seq)` mask; `None` where nothing is known.

    Raises:
        ConfigError: the mask is not two-dimensional.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else attention_mask
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ConfigError("attention_mask", shape, "a tensor of shape (batch, seq)")
    return [int(n) for n in (attention_mask.long().cumsum(-1) == 0).sum(-1).tolist()]


class _Attachment:
    """The hook's handle on one decoder and the number of caches that want it."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self.handle, self.count = handle, 1


class PositionGuard:
    """Keeps the hook on a decoder for as long as it lives.

    Args:
        decoder: the module whose forward takes `position_ids` and a cache.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = weakref.ref(decoder)
        with _lock:
            attachment = _attached.get(decoder)
            if attachment is None:
                _drop_copies(decoder)
                handle = decoder.register_forward_pre_hook(rebase_positions, with_kwargs=True)
                _attached[decoder] = _Attachment(handle)
            else:
                attachment.count += 1
        weakref.finalize(self, _release, self._decoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> PositionGuard | None:
        decoder = self._decoder()
        return None if decoder is None else PositionGuard(decoder)


def _drop_copies(decoder: nn.Module) -> None:
    """A model copied while it was guarded carries the hook of the original; two would subtract twice."""
    copies = [key for key, hook in decoder._forward_pre_hooks.items() if hook is rebase_positions]
    for key in copies:
        del decoder._forward_pre_hooks[key]
        decoder._forward_pre_hooks_with_kwargs.pop(key, None)


def _release(reference: weakref.ref[nn.Module]) -> None:
    decoder = reference()
    if decoder is None:
        return
    with _lock:
        attachment = _attached[decoder]
        attachment.count -= 1
        if attachment.count == 0:
            attachment.handle.remove()
            del _attached[decoder]


def rebase_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: `position_ids` count from the base of the cache's era."""
    if kwargs is None:
        return None  # removed while torch was going through its hooks: no cache of ours is left
    if args:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
        given = dict(bound.arguments)
        given.pop("self", None)
    else:
        given = kwargs
    cache = attention_cache(cache_in(kwargs) if cache_in(kwargs) is not None else cache_in(given))
    inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if cache is None or inputs is None or cache.context.planned:
        return None  # a planned step comes with the positions it wants
    seen, queries = cache.get_seq_length(), inputs.shape[1]
    if not seen:
        _learn_padding(cache, given.get("attention_mask"))
    base = cache.context.ledger.open(seen, queries)
    if base == 0:
        return None
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(seen, seen + queries, device=inputs.device)[None]
    if args:
        return _rebuilt(module, args, kwargs, positions - base)
    return args, {**kwargs, "position_ids": positions - base}


def _learn_padding(cache: PageCache, attention_mask: Any) -> None:
    """The first forward pass tells the padding of a cache that was made without a mask."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        for group in cache.groups:
            group.pads = padding_of(attention_mask) if group.pads is None else group.pads


def _rebuilt(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with `position_ids` replaced, wherever it stands."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    place = names.index("position_ids")
    if place < len(args):
        return (*args[:place], positions, *args[place + 1 :]), kwargs
    return args, {**kwargs, "position_ids": positions}
