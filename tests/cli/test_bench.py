"""`ctxopt bench`: one table, one JSON file, one plot; the figures are those of the caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Ctxopt

SETTINGS = ("--context", "96", "-n", "8", "--rounds", "2", "--window", "32", "--sinks", "4", "--page-size", "16")


def test_table_json_and_plot(ctxopt: Ctxopt, folder: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "out" / "bench.json", "--plot", tmp_path / "out" / "bench.png")
    result = ctxopt("bench", "-m", folder, *SETTINGS, *files)
    assert result.code == 0
    for name in ("dynamic", "ctx_paged", "ctx_sink", "bytes", "ms/token"):
        assert name in result.out
    found = json.loads(files[1].read_text())
    rows = {row["cache"]: row for row in found["caches"]}
    assert list(rows) == ["dynamic", "ctx_paged", "ctx_sink"]
    # 2 layers x K and V x 2 heads x 8 dims x 4 bytes for each of 103 tokens
    assert rows["dynamic"]["bytes_held"] == 2 * 2 * 2 * 8 * 4 * 103
    assert rows["dynamic"]["tokens_held"] == rows["ctx_paged"]["tokens_held"] == 103
    assert rows["ctx_paged"]["same_tokens"] == 8
    assert rows["ctx_sink"]["tokens_seen"] == 103
    assert rows["ctx_sink"]["tokens_held"] == 36
    assert rows["ctx_sink"]["bytes_held"] < rows["dynamic"]["bytes_held"]
    assert all(len(row["ms_by_token"]) == 7 and row["ms_per_token"] > 0 for row in rows.values())
    assert found["environment"]["versions"]["transformers"]
    assert files[3].read_bytes().startswith(b"\x89PNG")


def test_only_the_caches_asked_for(ctxopt: Ctxopt, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("short", encoding="utf-8")
    result = ctxopt("bench", "-m", folder, "-c", "dynamic", "--context", "40", "-n", "4", "--rounds", "1", "-f", text)
    assert result.code == 0
    assert "ctx_sink" not in result.out
    assert "40 tokens in" in " ".join(result.out.split())


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"])
def test_unusable_text_file(ctxopt: Ctxopt, folder: Path, tmp_path: Path, content: bytes) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    result = ctxopt("bench", "-m", folder, "-c", "dynamic", "-f", text)
    assert result.code == 2
    assert "file=" in result.err
