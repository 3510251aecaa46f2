"""Every model family: the facts of its config are those of the model, and its cache holds the bytes they say."""

from __future__ import annotations

import pytest
import torch

from hf_ctxopt import UnsupportedModelError, plan
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.planner.footprint import KvLayout
from tests.families import FAMILIES, build

REFUSED = {"bart": "encoder-decoder", "t5": "encoder-decoder", "deepseek_v3": "latent"}
IDS = torch.randint(2, 100, (1, 70), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES])
def test_bytes_of_a_family(name: str) -> None:
    model = build(name)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
            facts_of(model)
        return
    facts, of_config = facts_of(model), facts_of(model.config)
    assert facts.groups == of_config.groups
    assert [matrix.name for matrix in facts.matrices] == [matrix.name for matrix in of_config.matrices]
    # Before the run: rotary types that rescale with the length replace their buffers.
    parts = {part.data_ptr(): part for part in [*model.parameters(), *model.buffers()]}
    held = sum(part.untyped_storage().nbytes() for part in parts.values())
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False, cache_implementation="ctx_paged",
        return_dict_in_generate=True,
    )  # fmt: skip
    cache = next(out[key] for key in ("cache", "past_key_values") if out.get(key) is not None)
    assert cache.nbytes == KvLayout(facts.groups, {"k": 16, "v": 16}, item=facts.item).nbytes(72)
    found = plan(facts, vram="4GiB")
    assert found.bytes["weights"] + found.bytes["embeddings"] == held
    positions = FAMILIES[name].positions
    assert (facts.window_limit is None) == (positions in ("learned", "alibi", "relative"))
