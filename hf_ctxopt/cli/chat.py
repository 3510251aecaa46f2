"""`ctxopt chat`: a conversation on one cache, which is handed from turn to turn."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_ctxopt.cli import console, options
from hf_ctxopt.errors import CacheFullError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_ctxopt.cli.turns import Conversation

LEAVE = ("/exit", "/quit")
RESET = "/reset"
System = Annotated[str | None, typer.Option(help="A system message to begin with.")]


def chat(
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
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = 0,
    system: System = None,
) -> None:
    """Talk with a model. /reset forgets the conversation, /exit or end of input leaves, Ctrl-C ends a reply."""
    options.prefer_growing_segments()
    choice = options.cache_choice(
        cache, fused=fused, window=window, sinks=sinks, budget=budget, page_size=page_size, kv_bits=kv_bits
    )
    settings = {"max_new_tokens": max_new_tokens, **options.sampling(temperature, top_p, top_k)}
    from transformers import set_seed

    from hf_ctxopt.cli.models import load_model
    from hf_ctxopt.cli.streaming import cache_scope

    with console.progress(f"Loading {model}"):
        loaded, tokenizer = load_model(model, gguf_file, dtype, device)
    set_seed(seed)
    with cache_scope(loaded, choice) as arguments:
        talk(Talk(loaded, tokenizer, {**settings, "return_dict_in_generate": True}, arguments, system))


class Talk:
    """A conversation and the cache it lives in.

    Args:
        model: generates the replies.
        tokenizer: must have a chat template.
        settings: arguments of every `generate`.
        first: arguments of a `generate` that starts a new cache.
        system: system message, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        first: dict[str, Any],
        system: str | None,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.first = model, tokenizer, settings, first
        self.opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation and lets its cache go."""
        from hf_ctxopt.cli.turns import Conversation

        self.conversation: Conversation = Conversation(self.tokenizer, list(self.opening))
        self.cache: Any = None

    def turn(self, text: str) -> None:
        """Asks, streams the reply to standard output, and prints the status line."""
        import torch

        from hf_ctxopt.cli.run import status_line
        from hf_ctxopt.cli.streaming import Echo, Interrupt, figures, whole_lines
        from hf_ctxopt.integration.compat import cache_in, generate_argument

        if not self.conversation.ask(text):
            self.cache = None  # the template rewrote earlier turns: what the cache holds is not the conversation
        ids = torch.tensor([self.conversation.token_ids], device=self.model.device)
        cache = self.first if self.cache is None else {generate_argument(): self.cache}
        echo, interrupt = Echo(self.tokenizer, console.write), Interrupt()
        inputs = {"inputs": ids, "attention_mask": torch.ones_like(ids), "stopping_criteria": [interrupt]}
        with interrupt.listening(), whole_lines(echo):
            output: Any = self.model.generate(**inputs, streamer=echo, **cache, **self.settings)  # type: ignore[operator]
        self.cache = cache_in(output)
        self.conversation.answer(echo.token_ids)
        console.note(status_line(figures(self.cache), echo.rate))


def talk(session: Talk) -> None:
    """Reads messages until the user leaves or the input ends.

    Where a person sits in front of it, a full cache ends the conversation and not the program.

    Raises:
        CacheFullError: the budget is full, and the messages come from a pipe.
    """
    if sys.stdin.isatty():
        console.note("/reset forgets the conversation, /exit leaves, Ctrl-C ends a reply")
    while (text := read_message()) is not None:
        if text in LEAVE:
            return
        if text == RESET:
            session.reset()
            console.note("[a new conversation]")
        elif text:
            try:
                session.turn(text)
            except CacheFullError as error:
                if not sys.stdin.isatty():
                    raise
                console.error(str(error))
                session.reset()
                console.note("[a new conversation]")


def read_message() -> str | None:
    """Returns the next line, without spaces around it; None at the end of the input or on Ctrl-C."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("you> ").strip()
    except (EOFError, KeyboardInterrupt):
        console.write("\n")
        return None
