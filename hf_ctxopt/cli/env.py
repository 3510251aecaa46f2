"""`ctxopt env`: versions, devices, memory, and what is fast here and why not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_ctxopt.cli import console

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

STATES = {True: "[green]yes[/green]", False: "no", None: "-"}


def env(as_json: AsJson = False) -> None:
    """Show versions, devices, memory, and which fast paths are open on this machine."""
    from hf_ctxopt.cli.probe import report

    found = report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for table in (versions_table(found), devices_table(found["devices"]), features_table(found["features"])):
        console.table(table)


def versions_table(found: dict[str, Any]) -> Table:
    """Returns the table of the system and the packages."""
    table = Table("package", "version", title="Versions", title_justify="left")
    for name, value in {**found["system"], **found["versions"]}.items():
        table.add_row(name, value or "[dim]not installed[/dim]")
    return table


def devices_table(devices: list[dict[str, Any]]) -> Table:
    """Returns the table of devices and their memory."""
    table = Table("device", "name", "free", "total", "capability", title="Devices", title_justify="left")
    for device in devices:
        amounts = [device["memory_free"], device["memory_total"]]
        free, total = ("unknown" if amount is None else console.size(amount) for amount in amounts)
        table.add_row(device["device"], escape(device["name"]), free, total, str(device.get("capability", "")))
    return table


def features_table(features: list[dict[str, Any]]) -> Table:
    """Returns the table of fast paths."""
    table = Table("fast path", "open", "why", title="What is fast here", title_justify="left")
    for feature in features:
        table.add_row(feature["name"], STATES[feature["active"]], escape(feature["why"]))
    return table
