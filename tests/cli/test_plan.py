"""`ctxopt plan`: tables, JSON, the plot, all profiles, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_ctxopt import Plan
from hf_ctxopt.cli.plan_plot import grid
from hf_ctxopt.planner.curve import curve
from hf_ctxopt.planner.profiles import PROFILES
from tests.cli.conftest import Ctxopt
from tests.planner.models import KNOWN, facts


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the config of Llama-3.1-8B, and no weights."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(KNOWN["Llama-3.1-8B"].config))
    return folder


def test_tables(ctxopt: Ctxopt, llama: Path) -> None:
    result = ctxopt("plan", llama, "--gpu", "rtx4070-laptop", "--context", 16384)
    assert result.code == 0
    for words in (
        "Q4_K_M",
        "16,384 tokens",
        "keys and values",
        "reserve",
        "CUDA context",
        "rejected: Q5_K_M",
        "chosen",
    ):
        assert words in result.out


def test_json_is_the_plan(ctxopt: Ctxopt, llama: Path) -> None:
    result = ctxopt("plan", llama / "config.json", "--vram", "8GiB", "--context", 16384, "--json")
    found = Plan.from_dict(json.loads(result.out))
    assert (found.weights, found.context, found.window) == ("Q4_K_M", 16384, None)
    assert found.model == str(llama)


def test_options_reach_the_plan(ctxopt: Ctxopt, llama: Path) -> None:
    result = ctxopt(
        "plan", llama, "--vram", "24GiB", "--batch", 2, "--goal", "speed", "--weights", "nf4, Q8_0", "--kv-bits",
        "k8v4", "--reserve", "512MiB", "--json",
    )  # fmt: skip
    found = Plan.from_dict(json.loads(result.out))
    assert (found.batch, found.goal, found.weights, dict(found.kv_bits)) == (2, "speed", "nf4", {"k": 8, "v": 4})
    assert found.bytes["reserve"] == 512 << 20


def test_all_profiles(ctxopt: Ctxopt, llama: Path) -> None:
    result = ctxopt("plan", llama, "--all-gpus", "--context", 8192)
    assert result.code == 0
    assert all(name in result.out for name in PROFILES)
    found = json.loads(ctxopt("plan", llama, "--all-gpus", "--weights", "bf16", "--json").out)
    assert found["rtx4070"]["shortfall"] > 0
    assert Plan.from_dict(found["h100"]).weights == "bf16"
    assert ctxopt("plan", llama, "--all-gpus", "--vram", "8GiB").code == 2


def test_plot(ctxopt: Ctxopt, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = ctxopt("plan", llama, "--vram", "8GiB", "--plot", tmp_path / "plan.png")
    assert result.code == 0
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_curve_meets_the_limit_where_the_plan_says() -> None:
    from hf_ctxopt import plan

    found = plan(facts("Llama-3.1-8B"), vram="8GiB", context=16384)
    assert found.capacity is not None
    at, last, beyond = curve(facts("Llama-3.1-8B"), found, (found.context, found.capacity, found.capacity + 1))
    assert at == found.bytes
    assert sum(last.values()) <= found.vram < sum(beyond.values())
    assert grid(found)[-1] > found.capacity


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vram", "2GiB"), "bytes ("),
        (("--gpu", "voodoo2"), "rtx4070-laptop"),
        (("--vram", "8GiB", "--gpu", "t4", "--device", "cpu"), "unset with"),
        (("--vram", "8GiB", "--goal", "wealth"), "quality, context, speed"),
        (("--vram", "8GiB", "--kv-budget", "6GiB"), "would fit"),
    ],
)
def test_errors_are_one_line(ctxopt: Ctxopt, llama: Path, arguments: tuple[str, ...], words: str) -> None:
    result = ctxopt("plan", llama, *arguments)
    assert result.code == 2
    assert result.out == ""
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_this_machine(ctxopt: Ctxopt, folder: Path) -> None:
    result = ctxopt("plan", folder, "--reserve", "1MiB", "--json")
    found = Plan.from_dict(json.loads(result.out))
    assert found.device == "cpu" or torch.cuda.is_available() or found.device == "mps"
