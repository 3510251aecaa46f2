"""How a model positions its keys, found out by asking the model.

The inverse frequencies come from the model's own rotary module. The layout (which channels, which pairing)
cannot be read from it, so it is tested: the decoder embeds four tokens at two places, and the layout is the
one under which the keys of the first place, turned by the distance, are the keys of the second. That also
tells layers without rotation, and models whose keys carry absolute positions.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..errors import out_of_memory
from ..kernels.rotate import RotaryFacts, rotate
from .compat import cache_argument

_DISTANCE = 7
_PROBE_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "embed_position")


@dataclass
class PositionFacts:
    """What a model does with positions.

    Args:
        rotary: layer index → facts; layers whose keys do not depend on the position are absent.
        refusal: why tokens cannot be evicted correctly; `None` if they can.
        table: number of absolute positions the model has learned, where it uses a table.
    """

    rotary: dict[int, RotaryFacts] = field(default_factory=dict)
    refusal: str | None = None
    table: int | None = None


_known: WeakKeyDictionary[nn.Module, PositionFacts] = WeakKeyDictionary()


def position_facts(model: nn.Module) -> PositionFacts:
    """The position facts of a model, found once per model.

    Args:
        model: a transformers model; its decoder runs twice on four tokens.
    """
    decoder = decoder_of(model)
    if decoder not in _known:
        try:
            facts = _find_out(model, decoder)
        except _PROBE_ERRORS as error:
            if out_of_memory(error):
                raise
            # any model code may run here; without an answer nothing may be evicted
            why = f"{type(model).__name__} did not answer the position probe ({type(error).__name__}: {error})"
            return PositionFacts(refusal=why)
        if facts.refusal is not None:
            return facts  # not remembered: it may be of the moment
        _known[decoder] = facts
    return _known[decoder]


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that turns token ids into hidden states."""
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if getter is not None else None
    return decoder if isinstance(decoder, nn.Module) else model


def takes_positions(decoder: nn.Module) -> bool:
    """Whether `position_ids` and a cache can be handed to the decoder."""
    forward = type(decoder).forward
    return "position_ids" in inspect.signature(forward).parameters and cache_argument(forward) is not None


def _find_out(model: nn.Module, decoder: nn.Module) -> PositionFacts:
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(text, "kv_lora_rank", None) is not None:
        return PositionFacts(refusal=f"{name} caches compressed latents (MLA), which carry no position to shift")
    if getattr(text, "alibi", False):  # Falcon keeps its rotary module beside the bias, and does not use it
        return PositionFacts(refusal=f"{name} adds a bias per distance (ALiBi), which counts the tokens that are held")
    table = _table(decoder)
    if table is not None:
        return PositionFacts(table=table)
    rotary = _rotary_module(decoder)
    if rotary is None or not takes_positions(decoder):
        return PositionFacts(refusal=f"{name} has no rotary positions: distances after an eviction would be wrong")
    near, far = _keys_at(decoder, text, 1), _keys_at(decoder, text, 1 + _DISTANCE)
    facts = PositionFacts()
    for index, (first, second) in enumerate(zip(near, far, strict=True)):
        if first is None or second is None:
            continue
        match = _match(first, second, list(_candidates(rotary, text, index, first.shape[-1])))
        if match is None:
            return PositionFacts(refusal=f"{name}, layer {index}: no known rotary layout explains its keys")
        if match.inv_freq is not _still:
            facts.rotary[index] = match
    return facts


def _table(decoder: nn.Module) -> int | None:
    """Size of a learned or sinusoidal table of absolute positions, if the decoder has one."""
    for name, module in decoder.named_modules():
        if name.rsplit(".", 1)[-1] in _POSITION_TABLES and isinstance(getattr(module, "weight", None), Tensor):
            return int(module.weight.shape[0]) - int(getattr(module, "offset", 0) or 0)
    return None


def _rotary_module(decoder: nn.Module) -> nn.Module | None:
    module: nn.Module
    for name, module in decoder.named_modules():
        if "vision" in name or "audio" in name:
            continue
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
            return module
    return None


def _keys_at(decoder: nn.Module, text: Any, position: int) -> list[Tensor | None]:
    """Each layer's keys of four tokens placed at `position`, `(1, kv_heads, 4, head_dim)`, or `None`."""
    device = _device(decoder)
    ids = torch.arange(1, 5, device=device)[None] % int(text.vocab_size)
    places = torch.arange(4, device=device)[None] + position
    cache = DynamicCache(config=text)
    with torch.no_grad(), _without_dropout(decoder):
        given = {str(cache_argument(type(decoder).forward)): cache}
        decoder(input_ids=ids, position_ids=places, use_cache=True, **given)
    return [getattr(layer, "keys", None) for layer in cache.layers]


@contextmanager
def _without_dropout(decoder: nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as the probe runs; every module's own flag comes back."""
    training = [module for module in decoder.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _device(decoder: nn.Module) -> torch.device:
    """Where the decoder computes; under accelerate's offloading its weights are on the meta device."""
    for module in decoder.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((part.device for part in decoder.parameters() if part.device.type != "meta"), torch.device("cpu"))


def _still() -> Tensor:
    """Inverse frequencies of a layer that does not rotate."""
    return torch.zeros(0)


def _candidates(rotary: nn.Module, text: Any, layer: int, head_dim: int) -> Iterator[RotaryFacts]:
    yield RotaryFacts(_still)
    types = getattr(text, "layer_types", None) or []
    own = f"{types[layer]}_inv_freq" if layer < len(types) else None
    names = [name for name, _ in rotary.named_buffers(recurse=False) if name.endswith("inv_freq")]
    ordered = [name for name in (own, "inv_freq", *names) if name in names and "original" not in (name or "")]
    for name in dict.fromkeys(ordered):
        get = _getter(rotary, str(name))
        width = 2 * get().numel()
        for start in dict.fromkeys((0, head_dim - width)):
            if 0 <= start <= head_dim - width:
                yield RotaryFacts(get, start, interleaved=False)
                yield RotaryFacts(get, start, interleaved=True)


_getters: WeakKeyDictionary[nn.Module, dict[str, Callable[[], Tensor]]] = WeakKeyDictionary()


def _getter(rotary: nn.Module, name: str) -> Callable[[], Tensor]:
    """Reads the buffer; one function per buffer, so that layers which share it are seen to share it."""
    known = _getters.setdefault(rotary, {})
    return known.setdefault(name, _reader(rotary, name))


def _reader(rotary: nn.Module, name: str) -> Callable[[], Tensor]:
    module, buffers = weakref.ref(rotary), rotary._buffers
    left: list[Tensor] = []  # a cache may outlive its model: what the buffer was when the model went

    def inv_freq() -> Tensor:  # read anew each time: "dynamic" and "longrope" replace the buffer
        alive = module()
        found: Tensor = left[0] if alive is None else getattr(alive, name)
        return found

    def leave() -> None:
        left.append(buffers[name])  # type: ignore[arg-type]

    weakref.finalize(rotary, leave).atexit = False
    return inv_freq


def _match(first: Tensor, second: Tensor, candidates: list[RotaryFacts]) -> RotaryFacts | None:
    """The candidate under which `first`, turned by the distance, is `second`; `None` if there is none."""
    size = second.float().abs().amax().clamp_min(1e-9)
    tolerance = 1e-3 if second.dtype == torch.float32 else 6e-2

    def error(facts: RotaryFacts) -> float:
        turned = first if facts.inv_freq is _still else rotate(first, _DISTANCE, facts)
        return float((turned.float() - second.float()).abs().amax() / size)

    errors = [error(facts) for facts in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return candidates[best] if errors[best] < tolerance else None
