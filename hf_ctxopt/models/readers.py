"""Models that read or change the tensors in their cache's layers themselves, instead of asking `Cache.update`.

Pages have no such tensors. transformers' models are many and mostly read what `update` returns; those that do not are
listed here, by what their `model_type` begins with. `tests/models/test_readers.py` looks for new ones.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError

READERS = {
    "diffusion_gemma": "its decoder reads keys and values from the cache's layers and stores none",
    "dory": "its looped layers read the tensors of the cache's layers, or store into copies of those layers",
    "inkling2_loop": "its looped layers store into copies of the cache's layers",
    "mllama": "its cross-attention layers read the image's keys and values from the cache's layers",
    "rag": "it reorders beams by the tensors of the cache's layers",
    "vibevoice": "it overwrites keys and values in the cache's layers",
}
"""Family → what it does."""

SPLITTERS = {"whisper": "it splits the tensors of the cache's layers into rows when it returns a dictionary"}
"""The same of families that only do so to give their cache back."""


def check_reads(config: Any, returns_dict: bool = False) -> None:
    """Refuse the models above.

    Args:
        config: the model's config.
        returns_dict: whether the call is one that gives the cache back (`return_dict_in_generate`).

    Raises:
        UnsupportedModelError: the model reads or changes the tensors in its cache's layers.
    """
    kinds = {str(part.model_type) for part in (config, config.get_text_config(decoder=True))}
    for family, reason in (READERS | SPLITTERS if returns_dict else READERS).items():
        if any(f"{kind}_".startswith(f"{family}_") for kind in kinds):
            instead = "leave return_dict_in_generate unset, or use" if family in SPLITTERS else "use"
            raise UnsupportedModelError(
                f"{family}: {reason}, and pages have no such tensors; {instead} one of transformers' own caches"
            )
