"""`ctxopt bench`: one model, several caches, one table; JSON and a plot if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from hf_ctxopt.cli import console, options
from hf_ctxopt.cli.files import check_output, read
from hf_ctxopt.cli.options import CacheChoice

Caches = Annotated[
    list[str],
    typer.Option("--cache", "-c", help="A cache to measure; repeat it. The first is compared with."),
]
Context = Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", "-n", min=2, help="Tokens to generate.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each cache runs; times are medians.")]
File = Annotated[Path | None, typer.Option("--file", "-f", help="Text to read; Python's own manual when left out.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
PlotPath = Annotated[Path | None, typer.Option("--plot", help="Write a plot to this PNG file.")]


def bench(
    model: options.Model = "smollm2",
    gguf_file: options.GgufFile = None,
    cache: Caches = ["dynamic", "ctx_paged", "ctx_sink"],  # noqa: B006 - typer copies it
    window: options.Window = None,
    sinks: options.Sinks = None,
    budget: options.Budget = None,
    page_size: options.PageSize = None,
    kv_bits: options.KvBits = None,
    fused: options.Fused = True,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    context: Context = 1024,
    new_tokens: NewTokens = 64,
    rounds: Rounds = 3,
    file: File = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
    seed: options.Seed = 0,
) -> None:
    """Compare caches on one model: bytes held, time to the first token, time per token."""
    options.prefer_growing_segments()
    given = {"window": window, "sinks": sinks, "budget": budget, "page_size": page_size, "kv_bits": kv_bits}
    choices = [bench_choice(name, given, fused) for name in cache]
    check_output("json", json_path)
    check_output("plot", plot_path, ".png")
    text = manual() if file is None else read(file)
    from transformers import set_seed

    from hf_ctxopt.cli import measure
    from hf_ctxopt.cli.models import load_model

    with console.progress(f"Loading {model}"):
        loaded, tokenizer = load_model(model, gguf_file, dtype, device)
    set_seed(seed)
    ids = measure.prompt_ids(tokenizer, text, context).to(loaded.device)
    steps = len(choices) * rounds * (context + new_tokens - 1)
    with console.progress("Measuring", steps) as advance:
        runs = measure.measure(loaded, ids, choices, new_tokens=new_tokens, rounds=rounds, advance=advance)
    result = {
        "environment": measure.environment(loaded, model, seed),
        "context": context,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "caches": [measure.summary(one, runs[0]) for one in runs],
    }
    publish(result, json_path, plot_path)


def bench_choice(name: str, given: dict[str, Any], fused: bool) -> CacheChoice:
    """Returns one cache of the comparison, with those of the options that it has."""
    own = options.option_names(name) if name in options.cache_names() else ()
    return options.cache_choice(name, fused=fused, **{key: value for key, value in given.items() if key in own})


def manual() -> str:
    """Returns 465 kB of real English that every Python has: the topics of its manual."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def publish(result: dict[str, Any], json_path: Path | None, plot_path: Path | None) -> None:
    """Prints the table and writes the files that were asked for."""
    console.table(figures_table(result))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.note(f"wrote {json_path}")
    if plot_path is not None:
        from hf_ctxopt.cli.plot import draw

        draw(result, plot_path)
        console.note(f"wrote {plot_path}")


def figures_table(result: dict[str, Any]) -> Table:
    """Returns the comparison as a table."""
    where = result["environment"]
    title = f"{where['model']}, {where['device']}, {where['dtype']}: {result['context']:,} tokens in, "
    title += f"{result['new_tokens']:,} out, median of {result['rounds']}"
    first = result["caches"][0]["cache"]
    caption = f"same: how many greedy tokens equal those of {first} until the first difference"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for head in ("cache", "held", "bytes", "prefill", "ms/token", "start", "end", "same"):
        table.add_column(head, justify="left" if head == "cache" else "right", no_wrap=True)
    for row in result["caches"]:
        times = [f"{row[key]:.1f}" for key in ("ms_per_token", "ms_per_token_start", "ms_per_token_end")]
        held = [f"{row['tokens_held']:,}", console.size(row["bytes_held"]), f"{row['prefill_s']:.2f} s"]
        table.add_row(row["cache"], *held, *times, f"{row['same_tokens']}/{result['new_tokens']}")
    return table
