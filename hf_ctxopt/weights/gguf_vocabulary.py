"""A fast tokenizer's vocabulary as `.gguf` files hold it, and the special tokens that they name.

Byte-level BPE (GPT-2, Llama-3, Qwen) is kept as tokens and merges; BPE made of a SentencePiece model (Llama-2, Gemma,
Mistral) as tokens, scores and merges. Source: llama.cpp `gguf-py/gguf/vocab.py` and `constants.py` (`TokenType`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError
from .gguf_file import GgufFile

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>$")
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


@dataclass(frozen=True)
class Vocabulary:
    """What is written.

    Args:
        model: `"gpt2"` or `"llama"`, llama.cpp's names of the two kinds.
        texts: of every token, in the order of their numbers.
        types: of every token.
        merges: pairs with a space between, best first.
        tokens: metadata key -> value of the special tokens, and of how texts are split.
        template: of chats.
    """

    model: str
    texts: list[str]
    types: list[int]
    merges: list[str]
    tokens: dict[str, str | int | float | bool]
    template: str | None

    def write(self, writer: Any) -> None:
        """Put it in a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_token_list(self.texts)
        writer.add_token_types(self.types)
        if self.model == "llama":  # SentencePiece's scores of a BPE model are the order of its tokens
            writer.add_token_scores([-float(number) for number in range(len(self.texts))])
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.template is not None:
            writer.add_chat_template(self.template)


def named_as_in(file: GgufFile, tokenizer: Any) -> Any:
    """`tokenizer`, which transformers read from `file`, with the special tokens that the file names.

    transformers 5.17 gives Llama's and its like the first token of a text for the last one, and no token to pad with.
    """
    for key, name in _TOKENS.items():
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        text = (
            tokenizer.convert_ids_to_tokens(number) if type(number) is int and 0 <= number < len(tokenizer) else None
        )
        if text is not None and getattr(tokenizer, name.removesuffix("_id")) != text:
            setattr(tokenizer, name.removesuffix("_id"), text)
    return tokenizer


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        size: tokens of the model; numbers that the tokenizer does not use are filled.

    Raises:
        UnsupportedModelError: a slow tokenizer, one that is not BPE, or one with more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    held = {} if backend is None else json.loads(backend.to_str())
    kind = held.get("model", {}).get("type")
    if kind != "BPE":
        said = type(tokenizer).__name__ if kind is None else kind
        raise UnsupportedModelError(f"no .gguf is written with the tokenizer {said}; written are fast ones of BPE")
    numbers = tokenizer.get_vocab()
    if max(numbers.values(), default=0) >= size:
        raise UnsupportedModelError(f"the tokenizer has the token {max(numbers.values())}, the model {size} tokens")
    texts, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    added = {entry["id"]: bool(entry["special"]) for entry in held.get("added_tokens", ())}
    for text, number in numbers.items():
        texts[number] = text
        types[number] = BYTE if _BYTE.match(text) else NORMAL
        if number in added:
            types[number] = CONTROL if added[number] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in held["model"]["merges"]]
    byte_level = '"ByteLevel"' in json.dumps([held.get("pre_tokenizer"), held.get("decoder")])
    tokens: dict[str, str | int | float | bool] = {"tokenizer.ggml.add_bos_token": _begins(tokenizer)}
    if byte_level:
        tokens["tokenizer.ggml.pre"] = "default"
    for key, name in _TOKENS.items():
        number = getattr(tokenizer, name, None)
        if isinstance(number, int) and number >= 0:
            tokens[f"tokenizer.ggml.{key}_token_id"] = number
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        "gpt2" if byte_level else "llama",
        texts,
        types,
        merges,
        tokens,
        template if isinstance(template, str) else None,
    )


def _begins(tokenizer: Any) -> bool:
    """Whether it puts a token before a text."""
    first = tokenizer.bos_token_id
    return first is not None and tokenizer("a").input_ids[:1] == [first]
