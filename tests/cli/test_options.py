"""Options that become something else on their way to the cache, and the allocator's setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_ctxopt.cli import options
from hf_ctxopt.errors import ConfigError
from tests.cli.conftest import Ctxopt


@pytest.mark.parametrize(
    ("text", "expected"), [("8", 8), ("16", 16), ("k8v4", {"k": 8, "v": 4}), (" K4V2 ", {"k": 4, "v": 2})]
)
def test_bits(text: str, expected: Any) -> None:
    assert options.parse_bits(text) == expected
    assert options.cache_choice("ctx_paged", kv_bits=text).options == {"kv_bits": expected}


@pytest.mark.parametrize("text", ["", "k8", "v4", "k8v", "4v8k", "eight", "-8", "8.0", "８", "k８v4", "9" * 5000])
def test_bad_bits(text: str) -> None:
    with pytest.raises(ConfigError, match="kv_bits"):
        options.parse_bits(text)


@pytest.mark.parametrize("command", ["run", "bench"])
def test_bits_reach_the_cache(ctxopt: Ctxopt, folder: Path, tmp_path: Path, command: str) -> None:
    text = "word " * 200
    if command == "run":
        held = [
            ctxopt("run", text, "-m", folder, "-c", "ctx_paged", "-n", "2", "--kv-bits", bits).err for bits in "84"
        ]
        assert all("held" in one for one in held)
        assert held[0] != held[1]
        return
    (tmp_path / "text").write_text(text)
    found = []
    for bits in ("16", "k8v4"):
        path = tmp_path / f"{bits}.json"
        arguments = ("-c", "ctx_paged", "--context", "160", "-n", "2", "-f", tmp_path / "text", "--json", path)
        assert ctxopt("bench", "-m", folder, *arguments, "--kv-bits", bits).code == 0
        found.append(json.loads(path.read_text())["caches"][0]["bytes_held"])
    assert found[1] < found[0]


@pytest.mark.skipif(sys.platform != "linux", reason="torch has no expandable segments elsewhere")
def test_the_allocator_is_set_up_unless_the_user_did(monkeypatch: pytest.MonkeyPatch) -> None:
    newer, older = options.ALLOCATOR_VARIABLES
    for name in options.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")
    options.prefer_growing_segments()
    assert os.environ[older] == "expandable_segments:True"
    for name, other in ((newer, older), (older, newer)):
        monkeypatch.setenv(name, "max_split_size_mb:64")
        monkeypatch.setenv(other, "")
        options.prefer_growing_segments()
        assert os.environ[name] == "max_split_size_mb:64"
        assert not os.environ[other]


@pytest.mark.skipif(sys.platform != "linux", reason="torch has no expandable segments elsewhere")
@pytest.mark.parametrize("command", ["run", "chat", "agents", "bench"])
def test_commands_set_it_before_they_import_torch(command: str) -> None:
    code = f"""
import sys
from hf_ctxopt.cli import app, options
def stop():
    print("torch" in sys.modules)
    raise SystemExit
options.prefer_growing_segments = stop
app([{command!r}])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, input="").stdout
    assert out.split() == ["False"]
