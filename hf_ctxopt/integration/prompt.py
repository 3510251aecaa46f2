"""The prompt of a batch as a prefix store knows texts, and why equal token ids might not mean equal states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caches.layer import PageLayer
from ..caches.prefix import PrefixCache
from ..models.lengths import length_limit
from .fingerprint import fingerprint
from .generate import only_text
from .positions import padding_of


@dataclass(frozen=True)
class Prompt:
    """The prompt of a batch.

    Args:
        texts: token ids of each row, padding excluded.
        pads: left-padding columns of each row.
        columns: of the batch.
        device: of the ids.
        typed: whether token_type_ids, all of them zero, came with it: some models (GPT-2) add an embedding for zero.
    """

    texts: list[list[int]]
    pads: list[int]
    columns: int
    device: torch.device
    typed: bool = False


def prompt_of(model: Any, cache: PrefixCache, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Prompt | None:
    """The whole text that the cache will hold after the prefill; `None`, counted, where that is not known."""
    pads = cache.groups[0].pads or [0] * input_ids.shape[0]
    typed = model_kwargs.get("token_type_ids") is not None
    why, namespace, texts = _obstacle(model, cache, input_ids, model_kwargs), None, []
    if why is None:
        namespace = (
            ("model", fingerprint(model)),
            ("salt", cache.options.salt),
            *((("types", "0"),) if typed else ()),
        )
        texts = [row[pad:] for row, pad in zip(input_ids.tolist(), pads, strict=True)]
        if cache.get_seq_length() and not cache.continues(namespace, texts):
            why = "the cache holds another text than the prompt begins with, or states of another kind"
    if why is not None:
        cache.namespace = cache.texts = None
        cache.context.compute_all(why)
        return None
    cache.namespace, cache.texts = namespace, texts
    return Prompt(texts, list(pads), input_ids.shape[1], input_ids.device, typed)


def _obstacle(model: Any, cache: PrefixCache, input_ids: Tensor, model_kwargs: dict[str, Any]) -> str | None:
    """Why equal token ids would not mean equal states."""
    if model.config.is_encoder_decoder:
        return "an encoder's output decides about the states, not the tokens alone"
    if not only_text(model_kwargs):
        return "the prompt is more than token ids"
    if model.training:
        return "the model is in training mode"
    if "prepare_inputs_for_generation" in vars(model):  # prompt tuning (PEFT) puts virtual tokens before the prompt
        return "the model's inputs are prepared by somebody else"
    if [group.arena for group in cache.groups] != cache.store.arenas:
        return "the store holds pages of another layout by now"
    other = next((layer for layer in cache.layers if not isinstance(layer, PageLayer)), None)
    if other is not None and type(other).__name__ != "DummyLayer":  # that one only reads another layer's pages
        return f"a {type(other).__name__} keeps a state that pages do not hold"
    if any(_per_row(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()):
        return "adapters chosen row by row"
    mask = model_kwargs.get("attention_mask")
    columns = input_ids.shape[1]
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != columns):
        return "only new tokens were passed" if cache.get_seq_length() else "a mask of another shape than the prompt"
    if cache.get_seq_length() and columns <= cache.get_seq_length():
        return "only new tokens were passed"
    if mask is not None and bool((mask[:, :-1].bool() & ~mask[:, 1:].bool()).any()):
        return "zeros in attention_mask behind a row's first token"
    types = model_kwargs.get("token_type_ids")
    if types is not None and bool((types != 0).any()):
        return "token_type_ids"
    limit = length_limit(model.config.get_text_config(decoder=True))
    if limit is not None and max(columns, *(group.expected or 0 for group in cache.groups)) > limit:
        return "rotary frequencies change with the text's length"
    positions = model_kwargs.get("position_ids")
    if positions is not None and not _usual(positions, mask, columns):
        return "position_ids of the caller's own"
    return None


def _per_row(hook: Any) -> bool:
    """Whether a hook is PEFT's for `adapter_names`: rows of one batch then differ in more than their tokens."""
    return (getattr(getattr(hook, "func", None), "__module__", None) or "").startswith("peft.")


def _usual(positions: Tensor, mask: Tensor | None, columns: int) -> bool:
    """Whether positions count the tokens of each row, as `generate` itself does."""
    if positions.dim() != 2 or positions.shape[1] != columns:
        return False
    pads = torch.tensor(padding_of(mask) or [0] * positions.shape[0], device=positions.device)[:, None]
    wanted = torch.arange(columns, device=positions.device)[None] - pads
    return bool(((positions == wanted) | (wanted < 0)).all())
