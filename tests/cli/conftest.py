"""Fixtures of the command line's tests: a model on disk, and a way to call `ctxopt`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_ctxopt.cli import app
from tests.cli.tiny import save_tiny

torch.set_num_threads(1)


class Result:
    """What one call of `ctxopt` gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Ctxopt = Callable[..., Result]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def ctxopt(monkeypatch: pytest.MonkeyPatch) -> Ctxopt:
    """Calls the command line in this process; an error that it does not handle is raised here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # commands set it: it must not stay

    def call(*arguments: str | Path, stdin: str = "") -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    return call
