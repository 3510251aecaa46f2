"""What `make demo` runs: SmolLM2-135M reads a long real text as a stream through three caches at once.

DynamicCache keeps everything and is the dense model that the others are held against; `ctx_paged` keeps
everything in pages; `ctx_sink` keeps 4 sinks and a 512-token window. One table, one plot, one JSON file, and a
chat answer. KL, top-1 agreement and perplexity count the positions after the window first overflowed: before that
nothing has been evicted and all caches must agree.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import hf_ctxopt
from common import SMOLLM2, arguments, load_smollm2, real_tokens, twin, write_results
from measure import new_figure, save_figure
from streaming import Reader, read_together, rolling

README = Path(__file__).resolve().parents[1] / "README.md"
MARKS = ("<!-- demo-table -->", "<!-- /demo-table -->")
PROMPT = "What is a cache in a computer? Answer in two sentences."
HEADER = (
    "cache",
    "MiB held",
    "ms/token start",
    "ms/token end",
    "KL (nats)",
    "same top-1",
    "perplexity",
)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the demo and returns what it wrote as JSON."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    console.print("loading SmolLM2-135M-Instruct (unpacked on the first run, about 20 s) ...")
    dense, tokenizer = load_smollm2()
    # The stock model stays as it is; the second object shares its weights and is the one that is patched.
    fused = hf_ctxopt.patch_model(twin(dense), cache="ctx_sink", window=args.window, sinks=args.sinks)
    readers = _readers(dense, fused, args)
    console.print(f"reading {args.tokens} tokens of Python's manual through {len(readers)} caches ...")
    ids = real_tokens(tokenizer, args.tokens)
    read_together(readers, ids, chunk=args.chunk, burst=args.burst, every=args.every)
    first = args.window + args.sinks
    rows = [reader.summary(first) for reader in readers]
    console.print(_rich_table(rows, args))
    _plot(readers, args.out / "demo.png")
    answer = _chat(fused, tokenizer, args)
    console.print(f"[bold]> {PROMPT}[/bold]\n{answer}")
    figures = {
        "quality_from_token": first,
        "rows": rows,
        "stats": {r.name: r.cache.stats() for r in readers if hasattr(r.cache, "stats")},
        "chat": {"prompt": PROMPT, "answer": answer},
    }
    result = write_results(args, "demo", SMOLLM2, figures)
    if args.update_readme:
        _update_readme(args.readme, rows, result)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.set_defaults(chunk=128)
    parser.add_argument("--tokens", type=int, default=3072, help="length of the stream")
    parser.add_argument("--burst", type=int, default=12, help="one-token steps timed at each mark")
    parser.add_argument("--every", type=int, default=512, help="tokens between marks")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--update-readme", action="store_true", help="put this run's table into the README")
    parser.add_argument("--readme", type=str, default=str(README))
    return parser


def _readers(dense: Any, fused: Any, args: argparse.Namespace) -> list[Reader]:
    sink = hf_ctxopt.make_cache(fused, "ctx_sink", window=args.window, sinks=args.sinks)
    return [
        Reader(name="DynamicCache", model=dense, cache=DynamicCache(config=dense.config)),
        Reader(name="ctx_paged", model=fused, cache=hf_ctxopt.make_cache(fused, "ctx_paged")),
        Reader(name=f"ctx_sink {args.sinks}+{args.window}", model=fused, cache=sink),
    ]


def _chat(model: Any, tokenizer: Any, args: argparse.Namespace) -> str:
    """Returns the model's greedy answer to the prompt, generated with `ctx_sink`."""
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(
        **inputs,
        cache_implementation="ctx_sink",
        cache_config={"window": args.window, "sinks": args.sinks},
        max_new_tokens=args.answer_tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["cache"],
        f"{row['bytes_held'] / 2**20:.1f}",
        f"{row['ms_per_token_start']:.1f}",
        f"{row['ms_per_token_end']:.1f}",
        f"{abs(row['kl_vs_dense']):.2g}",
        f"{row['top1_agreement']:.1%}",
        f"{row['perplexity']:.2f}",
    ]


def _rich_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    table = Table(
        title=f"SmolLM2-135M, {args.tokens} tokens",
        caption=f"KL and top-1 against DynamicCache; quality from token {args.window + args.sinks} on",
        box=SIMPLE,
        pad_edge=False,
    )
    for index, name in enumerate(HEADER):
        # Two-line headers: the whole table then fits 80 columns.
        table.add_column(name.replace(" ", "\n"), justify="right" if index else "left")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _plot(readers: list[Reader], path: Path) -> Path:
    """Draws bytes held, ms per token, perplexity and KL against tokens seen."""
    figure, axes = new_figure(4)
    for reader in readers:
        axes[0].plot(*_columns([(seen, held / 2**20) for seen, held in reader.held]), label=reader.name)
        axes[1].plot(*_columns(reader.burst_ms), marker="o", label=reader.name)
        positions, means = rolling(torch.cat(reader.nll), 256)
        axes[2].plot(positions, torch.tensor(means).exp().tolist(), label=reader.name)
        if reader is not readers[0]:
            axes[3].plot(*rolling(torch.cat(reader.kl), 256), label=reader.name)
    titles = ("MiB held", "ms per token", "perplexity of 256 tokens", "KL to dense, mean of 256 tokens (nats)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="tokens seen", ylim=(0, None))
        axis.legend(fontsize="small")
    return save_figure(figure, path)


def _columns(pairs: list[Any]) -> tuple[list[Any], list[Any]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _update_readme(path: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Replaces what stands between the two marks in the README by this run's table and plot.

    Raises:
        ValueError: if the README does not hold both marks, once each.
    """
    readme = Path(path)
    text = readme.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"{readme} must hold {MARKS[0]} and {MARKS[1]} once each")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{_markdown(rows, result)}\n{MARKS[1]}{after}", encoding="utf-8")


def _markdown(rows: list[dict[str, Any]], result: dict[str, Any]) -> str:
    env, settings = result["environment"], result["settings"]
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    versions = env["versions"]
    lines += [
        "",
        f"SmolLM2-135M-Instruct, fp32, a stream of {settings['tokens']} tokens; KL and top-1 against DynamicCache,"
        f" quality from token {result['quality_from_token']} on. {env['processor']}, {env['threads']} threads,"
        f" torch {versions['torch']}, transformers {versions['transformers']}, seed {env['seed']}.",
        "",
        "![Bytes held, ms per token, perplexity and KL against tokens seen](benchmarks/results/demo.png)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
