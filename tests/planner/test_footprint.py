"""The formula's bytes against what is really held and what was measured."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ctxopt.errors import DoesNotFitError
from hf_ctxopt.integration.build import build_cache, parse_options
from hf_ctxopt.integration.compat import generate_argument
from hf_ctxopt.planner import schemes
from hf_ctxopt.planner.facts import facts_of
from hf_ctxopt.planner.fit import Card, Choice, Task
from hf_ctxopt.planner.footprint import GRAPH, KvLayout, activation_bytes, logit_bytes, reserve_of
from hf_ctxopt.planner.ladder import Rung
from hf_ctxopt.planner.schemes import SCHEMES, weight_bytes
from hf_ctxopt.planner.search import plan
from hf_ctxopt.planner.speed import token_ms
from hf_ctxopt.weights.in_memory import quantize_
from tests.planner.models import GIB, KNOWN, facts
from tests.weights.file_sizes import size_of

CACHE = generate_argument()
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BASE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gqa": {"model_type": "llama", **BASE},
    "mqa": {"model_type": "llama", **BASE, "num_key_value_heads": 1},
    "mha": {"model_type": "llama", **BASE, "num_key_value_heads": 4},
    "sliding": {"model_type": "mistral", **BASE, "sliding_window": 96},
    "hybrid": {"model_type": "gemma3_text", **BASE, "head_dim": 32, "sliding_window": 64,
               "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "fused": {"model_type": "phi3", **BASE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip


def _held(config: dict[str, Any], cache: str, options: dict[str, Any], tokens: int, rows: int) -> int:
    """Bytes that a cache really holds after `tokens` tokens in each row."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    held = build_cache(model, cache, parse_options(cache, options), expected=tokens)
    ids = torch.randint(0, 128, (rows, tokens))
    with torch.no_grad():
        for start in range(0, tokens - 1, 100):
            model(ids[:, start : min(start + 100, tokens - 1)], **{CACHE: held})
        model(ids[:, -1:], **{CACHE: held})
    return held.nbytes


@pytest.mark.parametrize("bits", [16, 8, 4, 2, {"k": 8, "v": 4}])
@pytest.mark.parametrize("name", list(TINY))
def test_pages_are_counted(name: str, bits: Any) -> None:
    tokens, rows = 330, 2
    found = facts_of(TINY[name])
    both = bits if isinstance(bits, dict) else {"k": bits, "v": bits}
    layout = KvLayout(found.groups, both, item=4, rows=rows)
    held = _held(TINY[name], "ctx_paged", {"kv_bits": bits}, tokens, rows)
    # Sealed storage grows towards the bound that is counted, and may be a page of a row short of it.
    assert 0 <= layout.nbytes(tokens) - held <= (0 if bits == 16 else rows * layout.page_bytes)
    assert layout.nbytes(tokens) == layout.fixed_bytes + layout.needed(tokens) * layout.page_bytes


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", ["gqa", "sliding", "hybrid"])
def test_windows_are_counted(name: str, bits: int) -> None:
    tokens, window = 500, 70
    layout = KvLayout(facts_of(TINY[name]).groups, {"k": bits, "v": bits}, item=4, sinks=4, window=window)
    options = {"kv_bits": bits, "sinks": 4, "window": window}
    held = _held(TINY[name], "ctx_sink", options, tokens, 1)
    assert 0 <= layout.nbytes(tokens) - held <= (0 if bits == 16 else layout.page_bytes)
    assert layout.bounded
    assert layout.nbytes(1 << 30) == layout.nbytes(tokens)
    assert layout.tokens(layout.needed(1 << 30)) is None


@pytest.mark.parametrize("bits", [16, 8])
def test_pages_hold_the_tokens_they_are_said_to(bits: int) -> None:
    layout = KvLayout(facts("Llama-3.1-8B").groups, {"k": bits, "v": bits}, rows=3)
    for pages in (3, 300, 301, 302):
        tokens = layout.tokens(pages)
        assert tokens is not None
        assert layout.needed(tokens) <= pages < layout.needed(tokens + 1)


def test_scales_cost_three_quarters_of_a_bit() -> None:
    """The README's 9.0, 5.0 and 3.0 bits per value are these and the open pages of its text."""
    groups = facts_of({**TINY["gqa"], "hidden_size": 256}).groups
    assert groups[0].key_dim == 64
    values = 32 * 2 * 64 * groups[0].kv_heads * groups[0].layers
    for bits in (8, 4, 2):
        page = KvLayout(groups, {"k": bits, "v": bits}).page_bytes
        assert 8 * page / values == bits + (32 / 32 + 32 / 64) / 2  # 32 bits for 32 values of K, and for 64 of V


@pytest.mark.parametrize("name", list(KNOWN))
def test_weights_are_those_of_published_files(name: str) -> None:
    found = facts(name)
    assert weight_bytes(found, "bf16").total == 2 * KNOWN[name].parameters
    for mix, gigabytes in KNOWN[name].gguf.items():
        assert weight_bytes(found, mix).total == pytest.approx(1e9 * gigabytes, rel=0.02), mix


def test_a_mix_differs_from_its_file_by_what_stays_in_16_bits() -> None:
    config = AutoConfig.for_model(**KNOWN["Llama-3.1-8B"].config)
    plain = sum(matrix.numel for matrix in facts("Llama-3.1-8B").matrices if len(matrix.shape) < 2)
    assert weight_bytes(facts("Llama-3.1-8B"), "Q4_K_M").total == size_of(config, "Q4_K_M") - 2 * plain


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "falcon",
            "vocab_size": 128,
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        {"model_type": "gpt2", "vocab_size": 128, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_linears_of_other_classes_are_planned_as_they_are_packed(config: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    quantize_(model, "Q4_K_M")
    held = sum(part.nbytes for part in model.parameters())
    assert weight_bytes(facts_of(config), "Q4_K_M").total == held


def test_nf4_is_what_bitsandbytes_held() -> None:
    """Measured: 3.63 GiB of a Llama-2-7B and 7.08 GiB of a Gemma-3-12B (gpu.md, section D)."""
    assert weight_bytes(facts("Llama-2-7B"), "nf4").total == pytest.approx(3.63 * GIB, rel=0.01)
    assert weight_bytes(facts("Gemma-3-12B"), "nf4").total == pytest.approx(7.08 * GIB, rel=0.01)


def test_every_scheme_keeps_embedding_and_layers_apart() -> None:
    for scheme in SCHEMES:
        tied, apart = weight_bytes(facts("Phi-4-mini"), scheme), weight_bytes(facts("Llama-2-7B"), scheme)
        assert tied.head == 0 < tied.embedding
        assert tied.read == tied.total
        assert apart.read == apart.total - apart.embedding
        assert (tied.unpacked == 0) == (scheme == "bf16")


def test_experts_that_are_not_chosen_are_held_and_not_read() -> None:
    mixture = facts_of({"model_type": "mixtral", **BASE, "num_local_experts": 8, "num_experts_per_tok": 2})
    found = weight_bytes(mixture, "bf16")
    experts = sum(2 * matrix.numel for matrix in mixture.matrices if "experts" in matrix.name)
    assert experts > 0
    assert found.read == found.total - found.embedding - experts * 3 // 4


def test_reserve() -> None:
    assert [reserve_of(size * GIB) for size in (4, 8)] == [GIB, GIB]
    assert reserve_of(24 * GIB) == 24 * GIB * 12 // 100


def test_measured_peaks_of_an_8_gb_card() -> None:
    """`gpu_fit_8gb.json`: pages to the byte, and the whole peak within 5 % (its weights are 3.76 GiB)."""
    record = json.loads((RESULTS / "gpu_fit_8gb.json").read_text())
    found = facts("Llama-2-7B")
    weights = weight_bytes(found, "nf4")
    checked = 0
    for row in record["fit"]:
        bits = {"ctx_paged int4": 4, "ctx_paged int2": 2, "ctx_sink bf16": 16}.get(row["cache"])
        if bits is None or "peak_gib" not in row:
            continue
        window = (4, 4092) if "sink" in row["cache"] else (0, None)
        layout = KvLayout(found.groups, {"k": bits, "v": bits}, sinks=window[0], window=window[1])
        pages = layout.nbytes(row["context"] + 32)
        assert pages == pytest.approx(row["held_gib"] * GIB, abs=1), row["cache"]
        rest = activation_bytes(found, weights, layout, 1024, 1) + logit_bytes(found, 1) + GRAPH
        assert weights.total + pages + rest == pytest.approx(row["peak_gib"] * GIB, rel=0.05), row["cache"]
        checked += 1
    assert checked == 3


def test_measured_times() -> None:
    """`gpu_decode.json` on an H200 of 4.8 TB/s, within 20 %; `gpu_weights.json`, within 30 %."""
    rows = json.loads((RESULTS / "gpu_decode.json").read_text())["decode"]
    read = weight_bytes(facts("Llama-3.1-8B"), "bf16").read
    kv = 131072
    measured = [(row["context"], row["batch"], row["ms"]) for row in rows if row["cache"] == "ctx_paged"]
    assert len(measured) == 4
    for tokens, batch, ms in measured:
        found = token_ms(read, kv * tokens * batch, 32, 4.8e12, replayed=True)
        assert found == pytest.approx(ms, rel=0.2), (tokens, batch)
    for row in json.loads((RESULTS / "gpu_weights.json").read_text())["decode"]:
        if "weights" not in row or row["compile"]:
            continue
        read = int(row["held_gib"] * GIB) - 32000 * 4096 * (2 if row["weights"] == "nf4" else 0.56)
        foreign = row["weights"] == "nf4"
        found = token_ms(int(read), 32 * 2 * 32 * 128 * 2 * row["context"], 32, 4.8e12, replayed=True, foreign=foreign)
        assert found == pytest.approx(row["ms"], rel=0.3), row
    assert token_ms(1, 1, 1, None, replayed=True) is None


def test_growing_pages_are_there_twice_for_one_layer() -> None:
    card = Card(name="c", vram=64 * GIB, others=0, context=0, reserve=0, bandwidth=None, accelerator=True)
    choice = Choice(Task(facts=facts("Llama-2-7B"), card=card), Rung("bf16", 16, 16), 128)
    long = Choice(Task(facts=facts("Llama-3.1-8B"), card=card), Rung("bf16", 16, 16), 128)
    assert choice.activations < 0.2 * GIB
    assert long.activations == 131072 * 4096  # K and V of one layer, 8 heads of 128 in bf16, for each trained token
    assert long.activations > choice.activations
    assert long.parts(131072)["activations"] == long.activations
    assert long.parts(8192)["activations"] < 0.2 * GIB  # no more pages have been grown there


@pytest.mark.parametrize("full", [1, 2, 8])
def test_memory_that_is_kept_for_growth_is_that_of_the_pages_that_fit(full: int) -> None:
    """Where one layer grows, it is there twice while it does: half of the memory is for pages, not none."""
    kinds = ["full_attention"] * full + ["sliding_attention"] * (12 - full)
    config = {**TINY["hybrid"], "num_hidden_layers": 12, "layer_types": kinds, "max_position_embeddings": 1 << 30}
    found = facts_of(config)
    before = 0
    for vram in range(GIB, GIB + 100_000, 997):
        card = Card(name="c", vram=vram, others=0, context=0, reserve=0, bandwidth=None, accelerator=False)
        choice = Choice(Task(facts=found, card=card), Rung("bf16", 16, 16), 128)
        held, page = choice.capacity or 0, choice.layout.page_bytes
        assert held >= before  # a larger card never holds less
        assert choice.missing(held) <= 0 < choice.missing(held + 1)
        assert choice.pages * 32 == held
        assert choice.left - choice.room <= page // full
        before = held
    assert before / 32 * page == pytest.approx(GIB * full / (full + 1), rel=0.01)


def test_the_bytes_of_a_scheme_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts_of(TINY["gqa"])
    counted: list[tuple[str, str]] = []
    real = schemes._bytes
    monkeypatch.setattr(
        schemes, "_bytes", lambda matrix, scheme, of: counted.append((matrix.name, scheme)) or real(matrix, scheme, of)
    )
    for vram in ("1GiB", "2GiB"):
        with contextlib.suppress(DoesNotFitError):
            plan(found, vram=vram)
    assert counted
    assert len(counted) == len(set(counted))
