"""Models whose layers differ in heads or widths (Gemma 3n, Gemma 4, ERNIE 4.5 VL), and what a token reads of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_ctxopt
from hf_ctxopt.caches.options import PageOptions
from hf_ctxopt.integration.chunking import affordable
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.planner.footprint import KvLayout
from hf_ctxopt.planner.layers import LayerShape
from hf_ctxopt.planner.schemes import weight_bytes
from hf_ctxopt.planner.search import plan

IDS = torch.randint(2, 100, (1, 70), generator=torch.Generator().manual_seed(0))
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "sliding_window": 10, "layer_types": KINDS, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128, "max_position_embeddings": 512, "eos_token_id": None,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gemma4_text": {**COMMON, "intermediate_size": 96, "global_head_dim": 32, "num_kv_shared_layers": 0},
    "gemma3n_text": {
        **COMMON, "intermediate_size": [96, 96, 128, 128], "num_kv_shared_layers": 1, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
}  # fmt: skip
GROUPS = {
    "gemma4_text": (LayerShape(2, 2, 16, 16, 10), LayerShape(2, 2, 32, 32, None)),
    "gemma3n_text": (LayerShape(2, 2, 16, 16, 10), LayerShape(1, 2, 16, 16, None)),  # the last reads the second's
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY[kind])).eval()


@pytest.mark.parametrize("kind", TINY)
def test_bytes_are_those_of_the_cache(kind: str) -> None:
    model = model_of(kind)
    facts = facts_of(model)
    assert facts.groups == facts_of(model.config).groups == GROUPS[kind]
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2, "do_sample": False}
    wanted = model.generate(IDS, **asked)
    out = model.generate(IDS, cache_implementation="ctx_paged", return_dict_in_generate=True, **asked)
    assert out.past_key_values.nbytes == KvLayout(facts.groups, {"k": 16, "v": 16}, item=4).nbytes(72)
    hf_ctxopt.patch_model(model)
    assert torch.equal(model.generate(IDS, **asked), wanted)
    hf_ctxopt.patch_model(model, "ctx_prefix", store=kind)
    assert torch.equal(model.generate(IDS, **asked), wanted)
    hf_ctxopt.drop_store(kind)
    assert affordable(model, PageOptions(), 4096, 1024, 1 << 30) == 1024


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "gemma4_unified_text", "ernie4_5_vl_moe"])
def test_configs_are_planned_for(kind: str) -> None:
    found = plan({"model_type": kind}, vram="80GiB", context=4096)
    assert found.total_bytes <= found.vram


def test_a_token_does_not_read_the_table_of_each_layers_inputs() -> None:
    facts = facts_of({"model_type": "gemma3n_text"})
    table = next(matrix for matrix in facts.matrices if "embed_tokens_per_layer" in matrix.name)
    weights = weight_bytes(facts, "bf16")
    assert table.numel > 2e9
    assert weights.read == weights.total - 2 * table.numel


@pytest.mark.parametrize(("kind", "share"), [("aria_text", 2 / 8), ("jetmoe", 2 / 8), ("mixtral", 2 / 8)])
def test_a_token_reads_its_own_experts(kind: str, share: float) -> None:
    facts = facts_of({"model_type": kind})
    parts = ("experts.", ".mlp.input_linear", ".mlp.output_linear")
    routed = sum(
        2 * m.numel for m in facts.matrices if any(part in m.name for part in parts) and "shared" not in m.name
    )
    weights = weight_bytes(facts, "bf16")
    unread = weights.total - weights.read - (0 if facts.tied else weights.embedding)
    assert unread == pytest.approx((1 - share) * routed, rel=1e-3)
