"""`ctxopt run`: a prompt or a file in, text out."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_ctxopt.cli import console, options
from hf_ctxopt.cli.files import text_in
from hf_ctxopt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_ctxopt.cli.options import CacheChoice

Prompt = Annotated[str | None, typer.Argument(help="Text to continue; read from standard input when left out.")]
File = Annotated[Path | None, typer.Option("--file", "-f", help="Text file to read before the prompt.")]
Instruct = Annotated[bool, typer.Option("--instruct/--raw", help="Wrap the text in the model's chat template.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no status line.")]


def run(
    prompt: Prompt = None,
    file: File = None,
    model: options.Model = "smollm2",
    gguf_file: options.GgufFile = None,
    cache: options.CacheName = "ctx_sink",
    window: options.Window = None,
    sinks: options.Sinks = None,
    budget: options.Budget = None,
    page_size: options.PageSize = None,
    kv_bits: options.KvBits = None,
    fused: options.Fused = True,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = 0,
    instruct: Instruct = False,
    quiet: Quiet = False,
) -> None:
    """Generate text from a prompt or a file. The text goes to standard output, all else to standard error."""
    options.prefer_growing_segments()
    choice = options.cache_choice(
        cache, fused=fused, window=window, sinks=sinks, budget=budget, page_size=page_size, kv_bits=kv_bits
    )
    sampling = options.sampling(temperature, top_p, top_k)
    text = read_text(prompt, file)
    from transformers import set_seed

    from hf_ctxopt.cli.models import load_model

    with console.progress(f"Loading {model}"):
        loaded, tokenizer = load_model(model, gguf_file, dtype, device)
    set_seed(seed)
    generate(loaded, tokenizer, text, choice, instruct, quiet, {"max_new_tokens": max_new_tokens, **sampling})


def read_text(prompt: str | None, file: Path | None) -> str:
    """Joins the file and the prompt; with neither, reads standard input.

    Raises:
        ConfigError: if the file cannot be read, or there is no text at all.
    """
    parts: list[str] = []
    if file is not None:
        parts.append(text_in(file))
    if prompt is not None:
        parts.append(prompt)
    if not parts and not sys.stdin.isatty():
        parts.append(sys.stdin.read())
    text = "\n\n".join(parts)
    if not text.strip():
        raise ConfigError("prompt", text, "some text, as an argument, with --file, or on standard input")
    return text


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    choice: CacheChoice,
    instruct: bool,
    quiet: bool,
    settings: dict[str, Any],
) -> None:
    """Reads the text behind a bar, then streams what the model says."""
    import torch

    from hf_ctxopt.cli.streaming import Echo, Interrupt, cache_scope, count_tokens, figures, whole_lines
    from hf_ctxopt.cli.turns import encode, first_prompt
    from hf_ctxopt.integration.compat import cache_in

    ids = encode(tokenizer, first_prompt(tokenizer, text), False) if instruct else encode(tokenizer, text, True)
    ids = ids.to(model.device)
    # On a terminal the text itself shows how far the writing is; in a pipe the bar does.
    on_screen = sys.stdout.isatty()
    steps = ids.shape[1] + (0 if on_screen else settings["max_new_tokens"] - 1)
    label = f"Reading {ids.shape[1]} tokens" + ("" if on_screen else " and writing")
    interrupt = Interrupt()
    with ExitStack() as bars, cache_scope(model, choice) as arguments, interrupt.listening():
        bars.enter_context(count_tokens(model, bars.enter_context(console.progress(label, steps))))

        def write(piece: str) -> None:
            if on_screen:
                bars.close()
            console.write(piece)

        echo = Echo(tokenizer, write)
        inputs = {"inputs": ids, "attention_mask": torch.ones_like(ids), "stopping_criteria": [interrupt]}
        with whole_lines(echo):
            output: Any = model.generate(  # type: ignore[operator]
                **inputs, streamer=echo, return_dict_in_generate=True, **arguments, **settings
            )
    if not quiet:
        console.note(status_line(figures(cache_in(output)), echo.rate))


def status_line(held: Any, rate: float) -> str:
    """Returns the line under a reply: tokens seen, tokens held, bytes held, tokens per second."""
    return (
        f"[seen {held.tokens_seen:,} tokens | held {held.tokens_held:,} tokens, {console.size(held.bytes_held)}"
        f" | {rate:.1f} tokens/s]"
    )
