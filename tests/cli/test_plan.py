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
    digits = Plan.from_dict(json.loads(ctxopt("plan", llama, "--vram", 8 << 30, "--reserve", 0, "--json").out))
    assert (digits.vram, digits.bytes["reserve"]) == (8 << 30, 0)


def test_all_profiles(ctxopt: Ctxopt, llama: Path) -> None:
    result = ctxopt("plan", llama, "--all-gpus", "--context", 8192)
    assert result.code == 0
    assert all(name in result.out for name in PROFILES)
    found = json.loads(ctxopt("plan", llama, "--all-gpus", "--weights", "bf16", "--json").out)
    assert found["rtx4070"]["shortfall"] > 0
    assert Plan.from_dict(found["h100"]).weights == "bf16"
    assert ctxopt("plan", llama, "--all-gpus", "--vram", "8GiB").code == 2


def test_all_profiles_fit_a_terminal(ctxopt: Ctxopt, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for options in (("--context", 32768), ("--kv-bits", 16), ("--context", 100_000, "--weights", "bf16")):
        lines = ctxopt("plan", llama, "--all-gpus", *options).out.splitlines()
        assert sum(any(line.startswith(name + " ") for name in PROFILES) for line in lines) == len(PROFILES)
        assert "…" not in "".join(lines[3:])  # lines before: the title and the heads


def test_plot(ctxopt: Ctxopt, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = ctxopt("plan", llama, "--vram", "8GiB", "--plot", tmp_path / "plan.png")
    assert result.code == 0
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", ["x.txt", "plan", ".", "folder.png"])
def test_a_plot_that_cannot_be_written_is_refused_first(
    ctxopt: Ctxopt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    result = ctxopt("plan", "smollm2", "--vram", "1MiB", "--plot", name)
    assert result.code == 2
    assert "plot=" in result.err  # not what does not fit: nothing was planned
    assert len(result.err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_the_curve_meets_the_limit_where_the_plan_says() -> None:
    from hf_ctxopt import plan

    found = plan(facts("Llama-3.1-8B"), vram="8GiB", context=16384)
    assert found.capacity is not None
    at, last, beyond = curve(facts("Llama-3.1-8B"), found, (found.context, found.capacity, found.capacity + 1))
    assert at == found.bytes
    assert sum(last.values()) <= found.vram < sum(beyond.values())
    assert grid(found)[-1] > found.capacity


def test_the_curve_of_a_budget_counts_all_of_it() -> None:
    from hf_ctxopt import plan

    found = plan(facts("Llama-3.1-8B"), vram="12GiB", context=8192, kv_budget="2GiB")
    assert found.capacity is not None
    short, at, beyond = curve(facts("Llama-3.1-8B"), found, (32, found.context, found.capacity + 1))
    assert at == found.bytes
    assert short["kv"] == at["kv"] == 2 << 30 < beyond["kv"]


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


def test_a_broken_config_is_an_error_of_one_line(ctxopt: Ctxopt, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**KNOWN["Llama-3.1-8B"].config, "num_attention_heads": 33}))
    result = ctxopt("plan", file, "--vram", "8GiB")
    assert result.code == 2
    assert "33" in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt of 300 bytes, each a token of the tiny model."""
    file = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 7)
    return file


def test_a_prompt_is_measured(ctxopt: Ctxopt, folder: Path, prompt: Path) -> None:
    result = ctxopt("plan", folder, "--vram", "2GiB", "--prompt-file", prompt)
    assert result.code == 0
    assert "too short to tell anything of windows" in result.out
    assert "change of what attention returns on the prompt" in result.out
    raw = Plan.from_dict(json.loads(ctxopt("plan", folder, "--vram", "2GiB", "--prompt-file", prompt, "--json").out))
    chat = ctxopt("plan", folder, "--vram", "2GiB", "--prompt-file", prompt, "--instruct", "--json")
    assert raw.needs is not None
    assert raw.needs.tokens == len(prompt.read_text())
    needs = Plan.from_dict(json.loads(chat.out)).needs
    assert needs is not None
    assert needs.tokens > raw.needs.tokens
    every = json.loads(ctxopt("plan", folder, "--all-gpus", "--prompt-file", prompt, "--json").out)
    assert all(Plan.from_dict(found).needs == raw.needs for found in every.values())


def test_bad_prompt_files(ctxopt: Ctxopt, llama: Path, folder: Path, prompt: Path, tmp_path: Path) -> None:
    empty, binary, long, short = (tmp_path / name for name in ("empty", "binary", "long", "short"))
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    long.write_text("words " * 100)
    short.write_text("Hello")
    plot = ("--plot", tmp_path / "nowhere" / "plan.png")
    for arguments, words in (
        ((folder, "--prompt-file", tmp_path / "none"), "prompt_file"), ((folder, "--prompt-file", empty), "some text"),
        ((folder, "--prompt-file", binary), "UTF-8"), ((folder, "--prompt-file", long), "at most 512"),
        ((folder, "--prompt-file", short), "at least 32"), ((llama, "--prompt-file", prompt), "cannot load model"),
        ((folder, "--prompt-file", tmp_path), "prompt_file"), ((folder, "--instruct"), "--prompt-file"),
        ((folder, "--prompt-file", prompt, "--context", 64), "tokens of the prompt"), ((folder, *plot), "folder"),
    ):  # fmt: skip
        result = ctxopt("plan", *arguments, "--vram", "2GiB")
        assert result.code == 2, arguments
        assert words in result.err, arguments
        assert len(result.err.strip().splitlines()) == 1, result.err
        assert result.out == ""


def test_this_machine(ctxopt: Ctxopt, folder: Path) -> None:
    result = ctxopt("plan", folder, "--reserve", "1MiB", "--json")
    found = Plan.from_dict(json.loads(result.out))
    assert found.device == "cpu" or torch.cuda.is_available() or found.device == "mps"
