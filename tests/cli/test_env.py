"""`ctxopt env` and `ctxopt --help`: they tell what is here, and do so without loading a model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from hf_ctxopt.cli import probe
from tests.cli.conftest import Ctxopt


def test_json(ctxopt: Ctxopt) -> None:
    found = json.loads(ctxopt("env", "--json").out)
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["threads"] == torch.get_num_threads()
    assert {feature["name"] for feature in found["features"]} >= {
        "CUDA",
        "Triton",
        "flash-attn",
        "expandable segments",
    }
    assert all(feature["why"] for feature in found["features"])


def test_version(ctxopt: Ctxopt) -> None:
    assert ctxopt("--version").out == f"hf_ctxopt {probe.installed('hf_ctxopt')}\n"


def test_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_ctxopt.kernels.native import build

    monkeypatch.setattr(build.shutil, "which", lambda _name: "/usr/bin/g++")
    monkeypatch.setenv("CTXOPT_NATIVE", "1")
    found = {feature.name: feature for feature in probe.features()}["CPU kernels"]
    assert found.active
    monkeypatch.setattr(build.shutil, "which", lambda _name: None)
    found = {feature.name: feature for feature in probe.features()}["CPU kernels"]
    assert (found.active, "g++" in found.why) == (False, True)
    monkeypatch.setenv("CTXOPT_NATIVE", "0")
    assert "CTXOPT_NATIVE" in {feature.name: feature for feature in probe.features()}["CPU kernels"].why


def test_tables(ctxopt: Ctxopt) -> None:
    result = ctxopt("env")
    assert result.code == 0
    for text in ("transformers", "cpu", "What is fast here"):
        assert text in result.out


@pytest.mark.parametrize(
    ("variable", "value", "active"),
    [
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", True),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True", True),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:False", False),
    ],
)
def test_expandable_segments(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, active: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in probe.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    feature = {one.name: one for one in [probe._allocator()]}["expandable segments"]
    assert feature.active is active


@pytest.mark.parametrize("command", ["run", "chat", "bench", "env"])
def test_help(ctxopt: Ctxopt, command: str) -> None:
    result = ctxopt(command, "--help")
    assert result.code == 0
    assert command in ctxopt("--help").out
