"""The family matrix and the modes themselves, on DynamicCache alone.

A matrix of equalities proves nothing when its models are insensitive or its references are wrong. Here: every
family builds alike twice, looks at old tokens, decides without near-ties, and gives in the modes that must not
change greedy decoding what a plain greedy run gives.
"""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, assistant_for, build, model_for
from tests.modes import EXCLUDED, MODES, NEW_TOKENS, Case
from tests.references import reference

MIN_GAP = 1e-3
"""Ten times the tolerance of the equality matrix: no rounding within it can turn a greedy choice."""
GREEDY_MODES = ["greedy", "left_padding", "prompt_lookup", "multi_turn"]
SAME_AS_GREEDY = ["assisted", "streamer", "return_dict"]
SAME_AS_PADDED = ["prefill_chunk", "saved_config"]
EACH_FAMILY = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_builds_alike_twice(family: str) -> None:
    first, second = build(family).state_dict(), build(family).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_an_old_token_moves_the_logits(family: str) -> None:
    """Hiding one key in the middle shows far above the matrix's tolerance; behind an encoder, changing one token."""
    ids = torch.arange(2, 22)[None]
    if FAMILIES[family].encoder_decoder:
        inputs = {"input_ids": ids, "decoder_input_ids": ids}
        other = {**inputs, "decoder_input_ids": torch.cat([ids[:, :10], ids[:, 11:12], ids[:, 11:]], dim=1)}
    else:
        mask = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(20)[None]}
        other = {**inputs, "attention_mask": mask.index_fill(1, torch.tensor([14]), 0)}
    model = model_for(family, "reference")
    with torch.no_grad():
        moved = model(**inputs).logits[0, -1] - model(**other).logits[0, -1]
    assert moved.abs().amax() > 5e-3


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_greedy_choices_are_no_near_ties(family: str) -> None:
    for mode in GREEDY_MODES:
        best = reference(family, mode).logits.topk(2).values
        assert (best[..., 0] - best[..., 1]).amin() > MIN_GAP, mode


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_modes_that_decode_greedily_agree(family: str) -> None:
    """transformers' own result in these modes is right, so it can be the reference."""
    for plain, modes in (("greedy", SAME_AS_GREEDY), ("left_padding", SAME_AS_PADDED)):
        expected = reference(family, plain)
        for mode in (mode for mode in modes if (family, mode) not in EXCLUDED):
            got = reference(family, mode)
            assert torch.equal(got.sequences, expected.sequences), mode
            if len(got.logits):
                torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_generation_runs_to_its_length(family: str) -> None:
    outcome = reference(family, "greedy")
    assert outcome.logits.shape[0] == NEW_TOKENS


def test_assistants_are_right_sometimes() -> None:
    """Both branches of assisted decoding happen: candidates accepted, and candidates cropped away."""
    spec = MODES["assisted"]
    ids, mask = spec.prompt()
    rounds = {}
    for family in ("llama", "qwen3", "gemma3", "gpt2"):
        model, lengths = model_for(family, "reference"), []
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs, lengths=lengths: lengths.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        try:
            spec.run(Case(model=model, ids=ids, mask=mask, assistant=assistant_for(family)))
        finally:
            hook.remove()
        rounds[family] = len(lengths)
    assert all(1 < count for count in rounds.values())
    assert any(count < NEW_TOKENS for count in rounds.values())
    assert any(count > NEW_TOKENS // 4 for count in rounds.values())
