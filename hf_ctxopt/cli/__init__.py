"""The `ctxopt` command: `run`, `chat`, `agents`, `bench`, `env` and `plan`, one file per command.

Nothing heavy is imported here; each command imports torch and transformers when it runs.
"""

from __future__ import annotations

from hf_ctxopt.cli.app import app, main

__all__ = ["app", "main"]
