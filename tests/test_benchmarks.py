"""The benchmark scripts run end to end at toy size, and their measuring tools measure what they say.

Toy sizes say nothing about the bars, so no verdict is checked here; the figures come from the scripts at full size.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.cli.tiny import tiny_model, tiny_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


class ByteTokenizer:
    """Stands in for SmolLM2's tokenizer: one token per byte."""

    def __call__(self, text: str, return_tensors: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([list(text.encode("ascii", "replace"))]))

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, torch.Tensor]:
        ids = self(messages[-1]["content"], return_tensors="pt").input_ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return bytes(ids.tolist()).decode("latin-1")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a benchmark as Python would when it is run, with a tiny model in SmolLM2's place."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    common = importlib.import_module("common")
    threads = torch.get_num_threads()

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        if hasattr(module, "load_smollm2"):
            model = common.tiny_llama(layers=2, heads=2, kv_heads=1, head_dim=16)
            monkeypatch.setattr(module, "load_smollm2", lambda: (model, ByteTokenizer()))
        return module

    yield load
    torch.set_num_threads(threads)


def read(folder: Path, name: str) -> dict[str, Any]:
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    environment = result["environment"]
    for key in ("device", "versions", "dtype", "seed", "commit", "threads"):
        assert environment[key] is not None
    assert result["seconds"] > 0
    return result


def test_demo_writes_table_plot_json_and_readme(script, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- demo-table -->\nold\n<!-- /demo-table -->\nafter\n", encoding="utf-8")
    sizes = "--tokens 160 --window 32 --chunk 16 --burst 4 --every 48 --answer-tokens 3 --threads 1".split()
    script("demo").main([*sizes, "--out", str(tmp_path), "--update-readme", "--readme", str(readme)])
    dense, paged, sink = read(tmp_path, "demo")["rows"]
    assert dense["kl_vs_dense"] == 0
    assert dense["top1_agreement"] == 1
    assert paged["kl_vs_dense"] == pytest.approx(0, abs=1e-6)
    assert paged["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert sink["bytes_held"] < dense["bytes_held"]
    assert (tmp_path / "demo.png").stat().st_size > 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| DynamicCache | " in text
    assert "demo.png" in text
    assert "> What is a cache" in capsys.readouterr().out


def test_readme_without_marks_is_left_alone(script, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="demo-table"):
        script("demo")._update_readme(str(readme), [], {})
    assert readme.read_text(encoding="utf-8") == "no marks"


def test_latency(script, tmp_path: Path) -> None:
    sizes = "--marks 48 64 96 --window 16 --chunk 16 --block 2 --dense-block 2 --rounds 2 --threads 1".split()
    script("latency").main([*sizes, "--out", str(tmp_path)])
    figures = read(tmp_path, "latency")["figures"]
    for name in ("ctx_sink", "DynamicCache"):
        assert len(figures[name]["ms_per_token"]) == 3
        assert all(len(blocks) == 2 for blocks in figures[name]["blocks_ms"].values())
    assert (tmp_path / "latency.png").stat().st_size > 0


def test_position_jump(script, tmp_path: Path) -> None:
    sizes = "--jumps 0 300 --tokens 60 --window 16 --chunk 8 --start 0 --threads 1".split()
    script("position_jump").main([*sizes, "--out", str(tmp_path)])
    figures = read(tmp_path, "position_jump")["figures"]
    # Positions are relative on both routes, so a random model too must not notice the jump.
    assert figures["fused"]["worst"] < 1e-4
    assert figures["dense"]["worst"] < 1e-4
    assert figures["no shift"]["mean_nll"].keys() == {"0", "300"}


def test_negative_control(script, tmp_path: Path) -> None:
    sizes = "--tokens 96 --window 16 --chunk 8 --samples 5 --batch 2 --threads 1".split()
    script("negative_control").main([*sizes, "--out", str(tmp_path)])
    result = read(tmp_path, "negative_control")
    assert result["positions"][0] == 20
    assert result["positions"][-1] == 95
    assert all(ratio > 0 for ratio in result["ratios"].values())


def test_memory(script, tmp_path: Path) -> None:
    sizes = "--marks 64 128 --prompts 64 256 --window 24 --chunk 16 --page-size 8 --threads 1".split()
    script("memory").main([*sizes, "--out", str(tmp_path)])
    result = read(tmp_path, "memory")
    for by_mark in result["bytes_held"].values():
        assert set(by_mark.values()) == {result["bytes_formula"]}
    assert result["peak_ratio"]["DynamicCache"] > result["peak_ratio"]["ctx_sink (fused)"]


def test_segments_cover_the_text_once_and_end_with_a_burst(script) -> None:
    segments = script("streaming").segments
    for total, chunk, burst, every in ((3072, 64, 12, 512), (160, 16, 4, 48), (100, 64, 8, 32)):
        pieces = segments(total, chunk=chunk, burst=burst, every=every)
        assert [start for start, _, _ in pieces] == [0, *(end for _, end, _ in pieces[:-1])]
        assert pieces[-1] == (total - burst, total, True)
        assert all(end - start == burst if timed else end - start <= chunk for start, end, timed in pieces)


def test_robust_slope_ignores_one_disturbed_point(script) -> None:
    measure = script("measure")
    xs = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert measure.theil_sen(xs, [2 * x for x in xs]) == pytest.approx(2)
    assert measure.theil_sen(xs, [5.0, 5.0, 90.0, 5.0, 5.0]) == 0
    assert measure.relative_drift(xs, [10.0, 11.0, 12.0, 13.0, 14.0]) == pytest.approx(4 / 12)


def test_kl_divergence_against_the_definition(script) -> None:
    measure = script("measure")
    first, second = torch.randn(4, 7), torch.randn(4, 7)
    p, q = first.softmax(-1), second.softmax(-1)
    assert torch.allclose(measure.kl_divergence(first, second), (p * (p / q).log()).sum(-1), atol=1e-6)
    assert measure.kl_divergence(first, first).abs().max() < 1e-6
    assert measure.nll(first, torch.zeros(4, dtype=torch.long)).tolist() == pytest.approx(
        [-math.log(row[0]) for row in p.tolist()], rel=1e-4
    )


def test_held_bytes_counts_each_storage_of_a_stock_cache_once(script) -> None:
    common = script("common")
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 8, 4)
    cache.update(keys, keys, 0)
    per_tensor = keys.numel() * 4
    assert common.held_bytes(cache) == 2 * per_tensor


def test_peak_sees_a_temporary_that_is_gone_again(script) -> None:
    memory = script("memory")

    class Model:
        def generate(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
            large = torch.ones(1 << 20)
            del large
            return ids + 1

    peak = memory._peak(Model(), torch.zeros(1, 4, dtype=torch.long), {}, 4)
    assert 4 << 20 <= peak < 5 << 20


def test_twin_shares_weights_and_nothing_else(script) -> None:
    common = script("common")
    model = common.tiny_llama(layers=1, heads=2, kv_heads=1, head_dim=16)
    other = common.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.config is not model.config
    assert other.model.layers[0].self_attn is not model.model.layers[0].self_attn
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_real_text_is_cut_where_asked(script) -> None:
    common = script("common")
    whole = common.real_tokens(ByteTokenizer(), 50)
    assert torch.equal(common.real_tokens(ByteTokenizer(), 20, start=30), whole[:, 30:])
    with pytest.raises(ValueError, match="tokens"):
        common.real_tokens(ByteTokenizer(), 10**6)


@pytest.mark.real
def test_dense_copy_of_smollm2_reads_the_real_text(script) -> None:
    common, measure = script("measure") and importlib.import_module("common"), script("measure")
    model, tokenizer = common.load_smollm2()
    assert "quantization_config" not in model.config.to_dict()
    ids = common.real_tokens(tokenizer, 65)
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
    assert measure.nll(logits, ids[0, 1:]).mean() < 4


def test_agents(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("agents")
    monkeypatch.setattr(module, "load_smollm2", lambda: (tiny_model(1024), tiny_tokenizer()))
    trace = (
        "--budgets 512 --mark 768 --trace 128 16 16 4 128 --trace-turns 4 --cycles 4 --rounds 2 --threads 1".split()
    )
    real = "--agents 2 --turns 2 --system-tokens 60 --new-tokens 3 --line-tokens 160 --probe-tokens 50".split()
    module.main([*trace, *real, "--uncached", "16", "64", "--out", str(tmp_path)])
    result = read(tmp_path, "agents")
    for one in result["through_generate"]:
        assert one["differing_calls"] == 0  # the store finds what the tree alone says, call by call
        assert one["calls"] == 32 * (1 + one["floods"])
    assert {(c["floods"], c["kind"]) for c in result["hit_rates"]} >= {(0, "recency"), (1, "priority")}
    assert result["turns"]["all_tokens_same"]
    assert result["salts"]["reused_tokens_across_salts"] == 0
    assert result["sessions"]["leaked_pages"] == 0
    assert (tmp_path / "agents.png").stat().st_size > 0


def test_the_trace_of_the_reference_gives_its_hit_rates(script) -> None:
    """systems.md 6(e)4 and 8(e)2: 92.5 % without floods; with one a call 73 % by recency, 92.5 % by priority."""
    trace = script("agent_trace")

    def rate(floods: int, ranked: bool) -> float:
        served = trace.Simulated(16_384, ranked=ranked, answers=False, seed=0, vocab=256)
        return trace.replay(served, trace.Shape(), floods=floods, seed=0, vocab=256).hit_rate

    assert rate(0, False) == pytest.approx(0.925, abs=0.002)
    assert rate(1, False) == pytest.approx(0.73, abs=0.02)
    assert rate(1, True) == pytest.approx(0.925, abs=0.002)
    assert rate(2, True) == pytest.approx(0.925, abs=0.002)


def test_least_squares_against_a_known_line(script) -> None:
    times = script("agent_times")
    assert times.least_squares([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 3, 1))
    assert times.least_squares([0, 1, 2, 3], [0, 1, 1, 0])[2] == pytest.approx(0)


def test_a_session_under_pressure_finishes_with_the_monitor_only(script, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    script("pressure").main(["--tiny", "--out", str(tmp_path / "pressure.json")])
    result = json.loads((tmp_path / "pressure.json").read_text(encoding="utf-8"))
    static, monitored = result["static"], result["monitored"]
    assert not static["finished"]
    assert "CacheFullError" in static["ended"]
    assert monitored["finished"]
    assert monitored["finite"]
    assert monitored["tokens"] >= 1700 > static["tokens"] == static["seen"] + 1
    assert [event["action"] for event in monitored["events"]] == ["seal_colder", "seal_colder"]
    assert [turn["kv_bits"]["k"] for turn in monitored["turns"]] == sorted(
        (turn["kv_bits"]["k"] for turn in monitored["turns"]), reverse=True
    )
    assert result["environment"]["seed"] == 0
