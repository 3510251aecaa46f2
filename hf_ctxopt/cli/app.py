"""The typer application: names the commands and turns the package's errors into one clean line."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_ctxopt.cli import agents, bench, chat, console, env, plan, run
from hf_ctxopt.errors import CtxoptError, out_of_memory

EXIT_USAGE = 2
"""Exit code of every error that the user can mend: a bad option, a missing file, a full cache."""


class _Commands(TyperGroup):
    """The command group; errors a user can mend are shown without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CtxoptError as error:
            raise _exit(str(error)) from None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            hint = "use ctx_sink with a smaller --window, or a smaller --budget, --context or --dtype"
            raise _exit(f"out of memory; {hint}") from None


def _exit(message: str) -> typer.Exit:
    """Prints the error line and returns the exit to raise."""
    console.error(message)
    return typer.Exit(EXIT_USAGE)


app = typer.Typer(
    name="ctxopt",
    cls=_Commands,
    help="Run Hugging Face models with paged and streaming KV caches.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command(name="run")(run.run)
app.command(name="chat")(chat.chat)
app.command(name="agents")(agents.agents)
app.command(name="bench")(bench.bench)
app.command(name="env")(env.env)
app.command(name="plan")(plan.plan)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf_ctxopt {version('hf_ctxopt')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _root(_version: Version = False) -> None:
    """Makes `ctxopt` a group of commands even while typer could take a single one for the whole."""


def main() -> None:
    """Entry point of the `ctxopt` script."""
    app()
