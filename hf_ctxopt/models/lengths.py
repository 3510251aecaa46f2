"""How long a text may be: the length that a model was trained on, and where its rotation changes with the length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""What configs call the trained length, in the order in which they are asked."""
_LENGTH_SCALED = ("dynamic", "longrope")


def trained_length(text: Any) -> int | None:
    """Tokens that a model was trained on; `None` if its config says nothing, or "any" as XLNet's -1 does.

    Args:
        text: a transformers config of a decoder.
    """
    given = (getattr(text, name, None) for name in _LENGTHS)
    return next((int(length) for length in given if isinstance(length, int | float) and length >= 1), None)


def rope_sets(text: Any) -> list[Mapping[str, Any]]:
    """The rotary parameters of a config: one set, or one for each type of layers."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [given] if "rope_type" in given else [part for part in given.values() if isinstance(part, Mapping)]


def length_limit(text: Any) -> int | None:
    """Longest text whose keys are rotated as those of any shorter one; `None` where length changes nothing."""
    trained = trained_length(text) or 0
    scaled = (part for part in rope_sets(text) if part.get("rope_type") in _LENGTH_SCALED)
    limits = (int(part.get("original_max_position_embeddings") or trained) for part in scaled)
    return min((limit for limit in limits if limit > 0), default=None)
