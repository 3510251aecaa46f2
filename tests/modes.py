"""The ways to generate that every cache must serve, as a table of functions over one `Case`.

A mode takes a model, a prompt and cache options and returns what came out. Called with empty options it runs
on transformers' DynamicCache and so gives its own reference. Prompts cross several pages of 4 and 8 tokens.

`EXCLUDED` names the cells that transformers itself gets wrong with DynamicCache, with the reason; nothing is
skipped at run time.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hf_ctxopt.integration.compat import generate_argument
from tests.families import VOCAB

PROMPT_TOKENS = 18
NEW_TOKENS = 8
LEFT_PADS = (0, 9)
"""Pads of the two rows of a padded batch: none, and more than one page of 8 tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a mode runs on.

    Attributes:
        model: the model under test.
        ids: prompt `(batch, seq)`.
        mask: attention mask `(batch, seq)`, zero at left pads.
        cache: options of `generate` that choose the cache; empty for DynamicCache.
        assistant: near copy of the model, with its own weights; only assisted decoding uses it.
    """

    model: nn.Module
    ids: torch.Tensor
    mask: torch.Tensor
    cache: dict[str, Any] = field(default_factory=dict)
    assistant: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a mode gave.

    Attributes:
        sequences: tokens `(rows, seq)`, prompt included unless the family is encoder-decoder.
        logits: raw logits `(steps, rows, vocab)`, one entry per new token; empty where the mode has none.
        cache: the cache that generate used, None where the mode does not return it.
    """

    sequences: torch.Tensor
    logits: torch.Tensor
    cache: Any = None


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to generate.

    Attributes:
        name: key in `MODES`.
        run: the mode itself.
        padded: the prompt is a batch of two with different left padding, else one row.
        repeats: the prompt repeats itself, so that prompt lookup finds candidates.
        dtype: dtype of the model.
    """

    name: str
    run: Callable[[Case], Outcome]
    padded: bool = False
    repeats: bool = False
    dtype: torch.dtype = torch.float32

    def prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and attention mask, both `(batch, seq)`; the same tensors in every process."""
        rows = 2 if self.padded else 1
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(2, VOCAB, (rows, PROMPT_TOKENS), generator=generator)
        if self.repeats:
            ids = ids[:, :6].repeat(1, 3)
        mask = torch.ones_like(ids)
        if self.padded:
            for row, pads in enumerate(LEFT_PADS):
                ids[row, :pads] = 0
                mask[row, :pads] = 0
        return ids, mask


def _generate(case: Case, **options: Any) -> Outcome:
    """Runs generate with raw logits and gathers the outcome; `options` win over the greedy defaults."""
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **case.cache, **options}
    out = case.model.generate(
        case.ids,
        attention_mask=case.mask,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return Outcome(sequences=out.sequences, logits=torch.stack(out.logits), cache=out.past_key_values)


def _sampling(case: Case, **options: Any) -> Outcome:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return _generate(case, do_sample=True, temperature=0.8, top_k=20, **options)


def _everything(case: Case) -> Outcome:
    """Scores and hidden states are asked for too; greedy scores are compared in the place of raw logits."""
    out = case.model.generate(
        case.ids,
        attention_mask=case.mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        **case.cache,
    )
    return Outcome(sequences=out.sequences, logits=torch.stack(out.scores), cache=out.past_key_values)


class _Collector(BaseStreamer):
    """Keeps what the streamer was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def _streamer(case: Case) -> Outcome:
    """No dictionary is asked for: generate returns the bare tensor, and the same tokens one by one before."""
    collector = _Collector()
    tokens = case.model.generate(
        case.ids,
        attention_mask=case.mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        streamer=collector,
        **case.cache,
    )
    if not collector.ended or collector.tokens[-NEW_TOKENS:] != tokens[0, -NEW_TOKENS:].tolist():
        raise AssertionError("the streamer was given other tokens than generate returned")
    return Outcome(sequences=tokens, logits=torch.empty(0, len(tokens), VOCAB))


def _multi_turn(case: Case) -> Outcome:
    """Three turns: each passes the returned cache back with all ids so far, as a chat does.

    An encoder-decoder model continues the decoder's side; its prompt stays what it was.
    """
    outcome = _generate(case, max_new_tokens=3)
    logits, mask = [outcome.logits], case.mask
    for turn in range(2):
        said = torch.randint(2, VOCAB, (len(case.ids), 4), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([outcome.sequences, said], dim=1)
        if case.model.config.is_encoder_decoder:
            again, more = replace(case, cache={}), {"decoder_input_ids": ids}
        else:
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
            again, more = replace(case, cache={}, ids=ids, mask=mask), {}
        outcome = _generate(again, max_new_tokens=3, **{generate_argument(): outcome.cache}, **more)
        logits.append(outcome.logits)
    return Outcome(sequences=outcome.sequences, logits=torch.cat(logits), cache=outcome.cache)


def _saved_config(case: Case) -> Outcome:
    """The cache options live in a GenerationConfig that went through a file."""
    config = copy.deepcopy(case.model.generation_config)
    config.update(do_sample=False, max_new_tokens=NEW_TOKENS, **case.cache)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = GenerationConfig.from_pretrained(folder)
    out = case.model.generate(
        case.ids,
        attention_mask=case.mask,
        generation_config=loaded,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Outcome(sequences=out.sequences, logits=torch.stack(out.logits), cache=out.past_key_values)


def _assisted(case: Case) -> Outcome:
    """The assistant's candidates are partly right: both full acceptance and crops happen."""
    return _generate(case, assistant_model=case.assistant)


_ROWS = [
    Mode(name="greedy", run=_generate),
    Mode(name="sampling", run=_sampling),
    Mode(name="beams", run=lambda case: _generate(case, num_beams=3), padded=True),
    Mode(name="return_sequences", run=lambda case: _sampling(case, num_return_sequences=2), padded=True),
    Mode(name="left_padding", run=_generate, padded=True),
    Mode(name="prefill_chunk", run=lambda case: _generate(case, prefill_chunk_size=5), padded=True),
    Mode(name="prompt_lookup", run=lambda case: _generate(case, prompt_lookup_num_tokens=3), repeats=True),
    Mode(name="assisted", run=_assisted),
    Mode(name="streamer", run=_streamer),
    Mode(name="return_dict", run=_everything),
    Mode(name="multi_turn", run=_multi_turn, padded=True),
    Mode(name="saved_config", run=_saved_config, padded=True),
    Mode(name="bf16", run=_generate, padded=True, dtype=torch.bfloat16),
]
MODES: dict[str, Mode] = {row.name: row for row in _ROWS}

_CHUNKED_ENCODER_DECODER = (
    "GenerationMixin._prefill cuts `attention_mask`, which here is the encoder's, to the decoder's chunk: "
    "left-padded rows then attend to pads of the encoder"
)
_DOGE_WITHOUT_MASK = (
    "transformers 5.17 gives Doge no mask for an unpadded chunk, and its dynamic mask is not causal: tokens of the "
    "chunk see later ones"
)
EXCLUDED: dict[tuple[str, str], str] = {
    ("doge", "assisted"): _DOGE_WITHOUT_MASK,
    ("bart", "prefill_chunk"): _CHUNKED_ENCODER_DECODER,
    ("t5", "prefill_chunk"): _CHUNKED_ENCODER_DECODER,
}
