"""The site builds without a warning, and what pages link to in the repository is part of it."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers.python")


def _missing() -> list[str]:
    """Packages of the group `docs` that are not installed."""
    tops = [name.split(".")[0] for name in NEEDED]
    return [name for name, top in zip(NEEDED, tops, strict=True) if importlib.util.find_spec(top) is None]


@pytest.mark.skipif(bool(_missing()), reason="the group `docs` is not installed (make docs installs it)")
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert logging.getLevelName(logging.WARNING) not in done.stderr
    for path in ("index.html", "settings/index.html", "repository/benchmarks/results/demo.png", "api/index.html"):
        assert (tmp_path / "site" / path).is_file(), path
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for anchor in ("hf_ctxopt.patch_model", "hf_ctxopt.Session.stream", "hf_ctxopt.caches.options.SinkOptions"):
        assert f'id="{anchor}"' in reference, anchor
