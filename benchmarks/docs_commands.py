"""The reference of the `ctxopt` commands, made from their definitions."""

from __future__ import annotations

from typing import Any

import typer


def commands() -> str:
    """A heading, the help text and a table of arguments and options for every command."""
    from hf_ctxopt.cli.app import app

    group: Any = typer.main.get_command(app)
    parts: list[str] = []
    for name, command in group.commands.items():
        parts += [f"### `ctxopt {name}`", "", " ".join(str(command.help).split()), ""]
        parts += ["| option | default | meaning |", "|---|---|---|"]
        parts += [_row(parameter) for parameter in command.params if parameter.name != "help"]
        parts.append("")
    return "\n".join(parts).rstrip()


def _row(parameter: Any) -> str:
    argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
    return " | ".join(("| " + ", ".join(f"`{name}`" for name in names), _default(parameter), _text(parameter) + " |"))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if parameter.secondary_opts and isinstance(default, bool):  # a pair of flags: the one that holds
        return f"`{(parameter.opts if default else parameter.secondary_opts)[0]}`"
    if default is None or default is False or callable(default) or default == ():
        return ""
    if isinstance(default, (list, tuple)):
        default = ", ".join(map(str, default))
    return f"`{default}`"


def _text(parameter: Any) -> str:
    return " ".join(str(parameter.help or "").split()).replace("|", "\\|")
