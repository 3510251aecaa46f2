"""`ctxopt plan`: settings with which a model fits a card, what each byte is for, and why these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from hf_ctxopt.cli import console, options
from hf_ctxopt.cli.files import read
from hf_ctxopt.errors import ConfigError, CtxoptError, DoesNotFitError

if TYPE_CHECKING:
    from hf_ctxopt.planner.facts import ModelFacts
    from hf_ctxopt.planner.needs import Needs
    from hf_ctxopt.planner.plan import Plan

ModelName = Annotated[str, typer.Argument(help="Folder, config.json, .gguf file, Hub id, or 'smollm2' (packaged).")]
Gpu = Annotated[str | None, typer.Option(help="A card by its profile: rtx4070-laptop, rtx4070, rtx3090, t4 ...")]
Vram = Annotated[str | None, typer.Option(help="Memory to plan for, e.g. 8GiB.")]
Device = Annotated[str | None, typer.Option(help="A device of this machine; the best one if nothing is given.")]
Context = Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")]
Batch = Annotated[int, typer.Option(help="Sequences at once.")]
Agents = Annotated[int, typer.Option(help="Sequences whose pages stay between calls.")]
Goal = Annotated[str, typer.Option(help="quality, context or speed.")]
Weights = Annotated[str | None, typer.Option(help="Schemes to choose from: bf16, Q8_0, Q4_K_M, nf4 ...; with commas.")]
KvBudget = Annotated[str | None, typer.Option(help="Bytes of pages that must fit, e.g. 2GiB.")]
Reserve = Annotated[str | None, typer.Option(help="Memory to leave alone; 1 GiB up to 8 GiB, else 12 %.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Plot = Annotated[Path | None, typer.Option(help="Draw memory by part against context into this PNG.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(help="A prompt like those to come: window and bits are chosen by what it needs. Loads the weights."),
]
Instruct = Annotated[bool, typer.Option("--instruct/--raw", help="Wrap that prompt in the model's chat template.")]
AllGpus = Annotated[bool, typer.Option("--all-gpus", help="One line for each profile instead of one card.")]


def plan(
    model: ModelName,
    gpu: Gpu = None,
    vram: Vram = None,
    device: Device = None,
    context: Context = None,
    batch: Batch = 1,
    agents: Agents = 1,
    goal: Goal = "quality",
    weights: Weights = None,
    kv_bits: options.KvBits = None,
    kv_budget: KvBudget = None,
    reserve: Reserve = None,
    prompt_file: PromptFile = None,
    instruct: Instruct = False,
    as_json: AsJson = False,
    plot: Plot = None,
    all_gpus: AllGpus = False,
) -> None:
    """Choose settings with which a model fits a card, and say what each byte is for.

    Loads no weights, unless a prompt is to be measured.
    """
    from hf_ctxopt.planner.search import plan as make_plan

    _check_plot(plot)
    facts = _facts(model)
    wanted: dict[str, Any] = {
        "context": context, "batch": batch, "agents": agents, "goal": goal, "kv_budget": kv_budget, "reserve": reserve,
        "weights": None if weights is None else [name.strip() for name in weights.split(",")],
        "kv_bits": None if kv_bits is None else options.parse_bits(kv_bits),
    }  # fmt: skip
    if instruct and prompt_file is None:
        raise ConfigError("instruct", instruct, "unset without --prompt-file")
    if all_gpus:
        for name, value in (("gpu", gpu), ("vram", vram), ("device", device), ("plot", plot)):
            if value is not None:
                raise ConfigError(name, str(value), "unset with --all-gpus")
        wanted["probe"] = _needs(model, prompt_file, instruct)
        _show_all(facts, wanted, as_json)
        return
    wanted["probe"] = _needs(model, prompt_file, instruct)
    found = make_plan(facts, gpu=gpu, vram=vram, device=device, **wanted)
    if plot is not None:
        from hf_ctxopt.cli.plan_plot import draw

        draw(facts, found, plot)
        console.note(f"drawn: {plot}")
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    for table in (settings_table(found), bytes_table(found)):
        console.table(table)
    for reason in found.reasons:
        typer.echo(f"- {reason}")


def _check_plot(file: Path | None) -> None:
    """Refuses a plot that cannot be written, before anything is planned.

    Raises:
        ConfigError: if it is a folder, its folder is missing, or it ends otherwise than in `.png`.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise ConfigError("plot", str(file), "a file in a folder that exists")
    if file.suffix.lower() != ".png" or file.is_dir():
        raise ConfigError("plot", str(file), "a file name that ends in .png")


def _facts(model: str) -> ModelFacts:
    """Returns what the planner needs to know, with the packaged weights found by their name."""
    from hf_ctxopt.cli.models import PACKAGED, locate
    from hf_ctxopt.planner.facts import facts_of

    if model == PACKAGED:
        folder, file = locate(model, None)
        model = str(Path(folder) / str(file))
    with console.without_bars():
        return facts_of(model)


def _needs(model: str, file: Path | None, instruct: bool) -> Needs | None:
    """Measures a prompt with the model's weights; nothing without one.

    Raises:
        ConfigError: if there is no text in the file, or no chat template to wrap it in.
        CtxoptError: if the weights cannot be loaded.
    """
    if file is None:
        return None
    text = read(file, "prompt_file")
    from hf_ctxopt.cli.models import load_model
    from hf_ctxopt.cli.turns import encode, first_prompt
    from hf_ctxopt.integration.probe import probe

    try:
        with console.progress(f"Loading {model}"):
            loaded, tokenizer = load_model(str(Path(model).parent) if Path(model).name == "config.json" else model)
    except CtxoptError as error:
        raise CtxoptError(f"measuring a prompt takes the model's weights and tokenizer: {error}") from error
    ids = encode(tokenizer, first_prompt(tokenizer, text), False) if instruct else encode(tokenizer, text, True)
    with console.progress(f"Reading {ids.shape[1]:,} tokens"):
        return probe(loaded, ids)


def settings_table(found: Plan) -> Table:
    """Returns the table of the settings."""
    from hf_ctxopt.planner.words import settings

    table = Table("setting", "value", title="Plan", title_justify="left")
    for name, value in settings(found):
        table.add_row(name, escape(value))
    return table


def bytes_table(found: Plan) -> Table:
    """Returns the table of what the memory is for."""
    from hf_ctxopt.planner.words import parts, size

    table = Table("memory for", title="Memory", title_justify="left")
    table.add_column("size", justify="right")
    table.add_column("of the card", justify="right")
    for name, count in parts(found):
        table.add_row(name, size(count), f"{count / found.vram:.1%}")
    table.add_section()
    table.add_row("in all", size(found.total_bytes), f"{found.total_bytes / found.vram:.1%}")
    return table


def _show_all(facts: ModelFacts, wanted: dict[str, Any], as_json: bool) -> None:
    """Prints one plan for each profile: a row, or its JSON; where nothing fits, by how much."""
    from hf_ctxopt.planner.profiles import PROFILES
    from hf_ctxopt.planner.search import plan as make_plan

    table = _cards_table(facts.name)
    results: dict[str, Any] = {}
    for card in sorted(PROFILES.values(), key=lambda card: (card.vram, card.bandwidth)):
        gib = f"{card.vram / 2**30:.0f}"
        try:
            found = make_plan(facts, gpu=card.name, **wanted)
        except DoesNotFitError as error:
            results[card.name] = {"shortfall": error.shortfall, "error": str(error)}
            needed = f"{(card.vram + error.shortfall) / 2**30:.2f}"
            table.add_row(card.name, gib, *[""] * 5, f"[red]{needed}[/red]", "", "[red]too much[/red]")
            continue
        results[card.name] = found.to_dict()
        keys, values = found.kv_bits["k"], found.kv_bits["v"]
        table.add_row(
            card.name, gib, found.weights + ("*" if found.on_host else ""),
            str(keys) if keys == values else f"{keys}/{values}",
            "all" if found.window is None else f"{found.sinks}+{found.window:,}", f"{found.context:,}",
            "any" if found.capacity is None else f"{found.capacity:,}", f"{found.total_bytes / 2**30:.2f}",
            "" if found.ms_per_token is None else f"{found.ms_per_token:.1f}", found.quality.split(",")[0],
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        console.table(table)


def _cards_table(name: str) -> Table:
    """Returns the empty table of all cards, narrow enough for 80 columns."""
    caption = "GiB: of the card, and used; KV: bits; keeps: all tokens (ctx_paged), or the first and last (ctx_sink); "
    caption += "room: for tokens; ms: per token; *: embedding (and head) in the host's memory"
    table = Table(
        title=escape(Path(name).name or name), title_justify="left", caption=caption, caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, padding=0,
    )  # fmt: skip
    for head in ("card", "GiB", "weights", "KV", "keeps", "context", "room", "used", "ms", "quality"):
        left = head in ("card", "weights", "quality")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    return table
