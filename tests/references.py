"""What DynamicCache gives in each cell of the matrix: run once per worker, shared by all tests of the family.

Tests that use it belong to the family's xdist group, so that under `--dist loadgroup` one worker runs a family.
"""

from __future__ import annotations

import functools

from tests.families import assistant_for, model_for
from tests.modes import MODES, Case, Outcome


@functools.cache
def reference(family: str, mode: str, attn: str | None = None) -> Outcome:
    """The outcome of a mode with transformers' own cache, under one attention implementation.

    Args:
        family: key of `tests.families.FAMILIES`.
        mode: key of `tests.modes.MODES`.
        attn: attention implementation; the family's own when None.
    """
    spec = MODES[mode]
    ids, mask = spec.prompt()
    model = model_for(family, "reference", spec.dtype, attn)
    assistant = assistant_for(family) if mode == "assisted" else None
    return spec.run(Case(model=model, ids=ids, mask=mask, assistant=assistant))
