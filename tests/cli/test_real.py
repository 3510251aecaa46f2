"""The command line on the packaged SmolLM2-135M, each command as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_ctxopt(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `ctxopt` in a process of its own, on one thread."""
    return subprocess.run(
        [sys.executable, "-c", "from hf_ctxopt.cli import main; main()", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_chat_remembers_the_turn_before() -> None:
    questions = "My cat is called Bruno. Say hello.\nWhat is the name of my cat?\n/exit\n"
    result = run_ctxopt("chat", "--model", "smollm2", "--window", "256", "-n", "24", stdin=questions)
    assert result.returncode == 0, result.stderr
    assert "Bruno" in result.stdout.splitlines()[-1]
    assert result.stderr.count("tokens/s") == 2
