"""What a decode graph can hold: which calls, and which models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Signature
from typing import Any

import torch
from torch import Tensor, nn

from ..caches.base import PageCache
from .compat import CACHE_NAMES, OUTPUT_HOOKS
from .positions import rebase_positions
from .rope import decoder_of, takes_positions

_IGNORED = {"use_cache": True, "return_dict": True, "output_attentions": False, "output_hidden_states": False}
_ONE_TOKEN = ("logits_to_keep", "num_logits_to_keep", "cache_position", "next_sequence_length")
_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Step:
    """A call of `forward` for one token of each row.

    Args:
        ids: `(batch, 1)`.
        positions: `(batch, 1)` or `(1, 1)`, of the text.
        cache_name: the parameter that takes the cache.
        extra: further arguments, constant and hashable.
        plain: bool on the device, whether the mask hides padding and nothing else; `None` if there is no mask. Asked
            after planning, which the device's answer then does not delay.
    """

    ids: Tensor
    positions: Tensor
    cache_name: str
    extra: tuple[tuple[str, Any], ...] = ()
    plain: Tensor | None = None

    def arguments(self, ids: Tensor, positions: Tensor, cache: PageCache) -> dict[str, Any]:
        """The call's arguments with other inputs. No mask: pages never hold padding."""
        return {
            "input_ids": ids, "position_ids": positions, "attention_mask": None, self.cache_name: cache,
            "use_cache": True, **dict(self.extra),
        }  # fmt: skip


def named_arguments(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; empty where they do not fit the signature (the model itself will say so)."""
    if not args:
        return kwargs
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return {}
    more = next((name for name, part in signature.parameters.items() if part.kind is part.VAR_KEYWORD), "")
    rest = bound.arguments.pop(more, {})
    return {**bound.arguments, **rest}


def read_step(cache: PageCache, given: dict[str, Any]) -> Step | str:
    """The step that a call asks for, or why no graph can hold it."""
    ids: Tensor = given["input_ids"]
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.is_autocast_enabled(ids.device.type):
        return "torch.autocast is on"  # its copies of the weights are gone when it ends
    extra = []
    for name, value in given.items():
        if name in ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES, *_ONE_TOKEN) or value is None:
            continue
        if name in _IGNORED and bool(value) == _IGNORED[name]:
            continue
        if name.startswith("output_") and not value:
            continue
        if isinstance(value, bool) and name not in _IGNORED and not name.startswith("output_"):
            extra.append((name, value))
            continue
        return f"the argument {name}"
    seen = cache.get_seq_length()
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (ids.shape[0], seen + 1)):
        return "an attention mask of another shape than (batch, tokens)"
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.full((1, 1), seen, dtype=torch.long, device=ids.device)
    if positions.dim() != 2:
        return f"position_ids of {positions.dim()} dimensions"
    name = next(name for name in CACHE_NAMES if given.get(name) is not None)
    pads = [row.pad for row in cache.context.groups[0].rows]
    if given.get("position_ids") is None and any(pads):
        return "padding without position_ids"  # some models work positions out from the mask
    plain = None if mask is None else _only_padding(mask, pads)
    return Step(ids, positions, name, tuple(sorted(extra)), plain)


def _only_padding(mask: Tensor, pads: Sequence[int]) -> Tensor:
    """Whether the mask `(batch, columns)` hides each row's first `pads` columns and nothing else, on its device."""
    if not any(pads):
        return mask.all()
    first = torch.tensor(pads).to(mask.device, non_blocking=True)[:, None]
    return ((torch.arange(mask.shape[1], device=mask.device) >= first) == mask.bool()).all()


def refusal(model: nn.Module) -> str | None:
    """Why this model's decode steps cannot be captured; `None` if they may be."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or []) - _LAYERS
    if kinds or getattr(text, "attention_chunk_size", None):
        return f"layers of type {', '.join(sorted(kinds)) or 'chunked_attention'}"
    if getattr(model, "rope_deltas", None) is not None or hasattr(decoder_of(model), "rope_deltas"):
        return f"{type(model).__name__} works out positions of its own"
    if not takes_positions(decoder_of(model)):
        return f"{type(model).__name__} takes no position_ids"
    devices = {str(part.device) for part in model.parameters()}
    if len(devices) > 1:
        return f"the model lies on {', '.join(sorted(devices))}"
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        moves = getattr(module, "_hf_hook", None)
        if not all(map(harmless, hooks)) or not _stays(moves, devices):
            return f"a hook on {name or type(model).__name__}"
    return None


def harmless(hook: Any) -> bool:
    """Our own hooks, or one of those that transformers leaves behind and that wait for somebody to ask for outputs."""
    ours = hook is rebase_positions or getattr(hook, "outside_graphs", False)
    return ours or getattr(hook, "__module__", None) == OUTPUT_HOOKS


def _stays(hook: Any, devices: set[str]) -> bool:
    """Whether accelerate's hook leaves everything on the model's one device (`device_map="auto"` on one GPU)."""
    if hook is None:
        return True
    device = getattr(hook, "execution_device", None)
    if type(hook).__name__ != "AlignDevicesHook" or getattr(hook, "offload", True) or device is None:
        return False
    place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return {str(place)} == devices
