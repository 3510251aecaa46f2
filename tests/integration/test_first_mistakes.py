"""What people get wrong in their first hour is told as a `ConfigError` that says what would do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_ctxopt
from hf_ctxopt.errors import ConfigError
from tests.cli.tiny import tiny_model, tiny_tokenizer

Call = Callable[[Any, Path], Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize(
    ("call", "field", "words"),
    [
        (lambda model, _: hf_ctxopt.patch_model(model, cache="sink"), "cache", "ctx_auto"),
        (lambda model, _: hf_ctxopt.Session(model, tiny_tokenizer()).send(5), "messages", "a text"),  # type: ignore[arg-type]
        (lambda model, _: hf_ctxopt.Session(model, tiny_tokenizer()).send(["hi"]), "messages", "a text"),  # type: ignore[list-item]
        (lambda _, path: hf_ctxopt.save_store("absent", path / "x.kv"), "store", "a store of this process"),
        (lambda _, path: hf_ctxopt.load("somewhere", context=64), "context", "hf_ctxopt.plan(..., context=...)"),
        (lambda _, path: hf_ctxopt.load_gguf(path / "x.gguf"), "path", "a .gguf file"),
        (lambda model, path: hf_ctxopt.save_gguf(model, path / "absent" / "x.gguf"), "path", "a folder that exists"),
    ],
)  # fmt: skip
def test_a_first_mistake(model: Any, tmp_path: Path, call: Call, field: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        call(model, tmp_path)
    assert refused.value.field == field
    assert words in refused.value.allowed
    assert not list(tmp_path.iterdir())


def test_a_store_is_not_saved_into_a_folder_that_is_not_there(model: Any, tmp_path: Path) -> None:
    hf_ctxopt.Session(model, tiny_tokenizer(), store="first-mistakes", max_new_tokens=2).send("hi")
    with pytest.raises(ConfigError, match="a folder that exists"):
        hf_ctxopt.save_store("first-mistakes", tmp_path / "absent" / "x.kv")
    hf_ctxopt.drop_store("first-mistakes")
