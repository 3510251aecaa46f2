"""Measures caches side by side: the same prompt and the same number of greedy tokens, in alternating order.

Bytes are those of storages that exist (`cache.nbytes`), times are medians over the rounds. Does not judge quality:
`same_tokens` only says how long the greedy text equals the first cache's.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from hf_ctxopt.cli.probe import PACKAGES, installed
from hf_ctxopt.cli.streaming import cache_scope, count_tokens, figures
from hf_ctxopt.integration.compat import cache_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_ctxopt.cli.options import CacheChoice


class Clock(BaseStreamer):
    """Notes when each generated token came, and which it was."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.begin: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt `(1, seq)` first, which starts the clock, then the new token `(1,)` of each step."""
        if self.begin is None:
            self.begin = time.perf_counter()
            return
        self.tokens.extend(value.flatten().tolist())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by generate after the last token."""

    @property
    def prefill(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.times[0] - (self.begin or 0.0)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass
class Runs:
    """Every round of one cache.

    Attributes:
        choice: the cache and its options.
        prefill: seconds to the first token, per round.
        gaps: seconds of each decoded token, per round.
        tokens: the generated tokens of the first round.
        held: tokens and bytes held at the end of the first round.
        peak: largest memory allocated on the GPU in any round, bytes; None on a CPU.
    """

    choice: CacheChoice
    prefill: list[float] = field(default_factory=list)
    gaps: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    peak: int | None = None


def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    choices: Sequence[CacheChoice],
    *,
    new_tokens: int,
    rounds: int,
    advance: Callable[[int], None],
) -> list[Runs]:
    """Generates with every cache in every round, the order turning by one each round.

    Args:
        model: the model, unpatched.
        ids: the prompt, shape `(1, seq)`.
        choices: caches to compare.
        new_tokens: tokens to generate each time.
        rounds: how often each cache runs.
        advance: told the tokens of every forward pass, for a progress bar.
    """
    runs = [Runs(choice) for choice in choices]
    for turn in range(rounds):
        shift = turn % len(runs)
        for one in runs[shift:] + runs[:shift]:
            with count_tokens(model, advance):
                _run_once(model, ids, one, new_tokens)
    return runs


def _run_once(model: PreTrainedModel, ids: torch.Tensor, runs: Runs, new_tokens: int) -> None:
    """Adds one round to `runs`."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    clock = Clock()
    with cache_scope(model, runs.choice) as arguments:
        output: Any = model.generate(  # type: ignore[operator]
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            streamer=clock,
            return_dict_in_generate=True,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            **arguments,
        )
    runs.prefill.append(clock.prefill)
    runs.gaps.append(clock.gaps)
    if not runs.tokens:
        runs.tokens = clock.tokens
        runs.held = vars(figures(cache_in(output)))
    if on_gpu:
        runs.peak = max(runs.peak or 0, torch.cuda.max_memory_allocated(model.device))


def summary(runs: Runs, first: Runs) -> dict[str, Any]:
    """Returns one row of the result; times are medians over the rounds, in seconds and milliseconds."""
    by_token = [1000 * statistics.median(column) for column in zip(*runs.gaps, strict=True)]
    quarter = max(1, len(by_token) // 4)
    pairs = zip(runs.tokens, first.tokens, strict=True)
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), len(runs.tokens))
    return {
        "cache": runs.choice.name,
        "options": runs.choice.options,
        "route": "fused" if runs.choice.fused else "dense",
        **runs.held,
        "peak_gpu_bytes": runs.peak,
        "prefill_s": statistics.median(runs.prefill),
        "ms_per_token": statistics.median(by_token),
        "ms_per_token_start": statistics.median(by_token[:quarter]),
        "ms_per_token_end": statistics.median(by_token[-quarter:]),
        "ms_by_token": by_token,
        "same_tokens": same,
    }


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> torch.Tensor:
    """Returns the first `count` tokens of the text, repeated from its start if it is shorter; shape `(1, count)`."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return ids.repeat(1, -(-count // ids.shape[1]))[:, :count]


def environment(model: PreTrainedModel, name: str, seed: int) -> dict[str, Any]:
    """Returns what stands beside the figures: model, device, dtype, versions, seed."""
    device = model.device
    return {
        "model": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in PACKAGES},
        "seed": seed,
    }
