"""Times and equality of a prefix store on a real model: turns against cold runs, a line, probes across salts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

import hf_ctxopt
from common import progress, real_text, real_tokens
from hf_ctxopt.integration.compat import cache_in
from hf_ctxopt.integration.messages import render

QUESTIONS = (
    "Which of these rules matters most to you?",
    "Give one example of it.",
    "What would break without it?",
    "Say the same in simpler words.",
    "Name an exception.",
    "How would you check it?",
)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""With one thread, seconds of the processor are what the wall shows on a machine that does nothing else."""


class FirstToken(BaseStreamer):
    """Notes when the first new token is there."""

    clock = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(self.clock())

    def end(self) -> None:
        """Called after the last token."""


class Timed:
    """One `generate`: its new tokens, seconds to the first of them, and what the store knew of the prompt."""

    def __init__(self, model: Any, ids: Sequence[int], new_tokens: int, config: dict[str, Any] | None) -> None:
        clock, prompt = FirstToken(), torch.tensor([list(ids)])
        ours = {} if config is None else {"cache_implementation": "ctx_prefix", "cache_config": config}
        begin = clock.clock()
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
            return_dict_in_generate=True, streamer=clock, **ours,
        )  # fmt: skip
        self.seconds = clock.times[1] - begin
        self.tokens: list[int] = out.sequences[0, len(ids) :].tolist()
        self.reused = 0
        if config is not None:
            cache = cache_in(out)
            self.reused = int(cache.stats()["prefix"]["reused_tokens"])
            cache.release()


def turns(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Agents with one system prompt over one store, every call beside the same one without a store."""
    system = tokenizer.decode(real_tokens(tokenizer, args.system_tokens)[0])
    talks = [
        [{"role": "system", "content": system}, {"role": "user", "content": f"You are agent {agent}. {QUESTIONS[0]}"}]
        for agent in range(args.agents)
    ]
    rows = []
    store = {"store": "turns", "budget": "2GiB", "page_size": 16}
    for turn in progress(range(args.turns), "turns"):
        for agent, talk in enumerate(talks):
            ids = render(tokenizer, talk, generate=True)
            order = [store, None] if (turn + agent) % 2 else [None, store]
            runs = {config is not None: Timed(model, ids, args.new_tokens, config) for config in order}
            ours, cold = runs[True], runs[False]
            rows.append({"turn": turn + 1, "agent": agent, "prompt_tokens": len(ids), "reused_tokens": ours.reused,
                         "seconds": ours.seconds, "cold_seconds": cold.seconds,
                         "same_tokens": ours.tokens == cold.tokens})  # fmt: skip
            question = QUESTIONS[(turn + 1) % len(QUESTIONS)]
            talk += [{"role": "assistant", "content": tokenizer.decode(ours.tokens, skip_special_tokens=True)},
                     {"role": "user", "content": question}]  # fmt: skip
    later = [row for row in rows if row["turn"] > 1]
    warm, cold_median = (statistics.median(row[key] for row in later) for key in ("seconds", "cold_seconds"))
    hf_ctxopt.drop_store("turns")
    return {
        "rows": rows, "later_seconds": warm, "later_cold_seconds": cold_median, "times_lower": cold_median / warm,
        "first_turn_seconds": [row["seconds"] for row in rows if row["turn"] == 1],
        "hit_rate": sum(row["reused_tokens"] for row in rows) / sum(row["prompt_tokens"] for row in rows),
        "all_tokens_same": all(row["same_tokens"] for row in rows),
    }  # fmt: skip


def line(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Time to the first token of prompts of one length, of which all but so many tokens are in the store."""
    total = args.line_tokens
    ids = real_tokens(tokenizer, total)[0].tolist()
    other = real_tokens(tokenizer, max(args.uncached) + 40 * args.rounds, start=total)[0].tolist()
    store = {"store": "line", "budget": "2GiB", "page_size": 16}
    Timed(model, ids, 1, store)
    times: dict[int, list[float]] = {count: [] for count in args.uncached}
    for turn in progress(range(args.rounds), "line"):
        for count in args.uncached[turn % len(args.uncached) :] + args.uncached[: turn % len(args.uncached)]:
            # The whole pages of one text, then tokens that nobody has asked yet at that place.
            tail = other[40 * turn :][:count]
            run = Timed(model, ids[: total - count] + tail, 1, store)
            times[count].append(run.seconds)
            uncached = total - run.reused
            if abs(uncached - count) > store["page_size"]:
                raise RuntimeError(f"{uncached} tokens were computed where {count} should be")
    hf_ctxopt.drop_store("line")
    medians = [statistics.median(times[count]) for count in args.uncached]
    slope, offset, fit = least_squares(args.uncached, medians)
    return {"uncached": args.uncached, "seconds": medians, "all_seconds": [times[c] for c in args.uncached],
            "seconds_per_token": slope, "offset_seconds": offset, "r_squared": fit}  # fmt: skip


def least_squares(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Returns slope, offset and R^2 of the least-squares line."""
    slope, offset = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    left = sum((y - offset - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, offset, 1 - left / sum((y - mean) ** 2 for y in ys)


def salts(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Time to the first token of probes: a text that the same salt has, that only another salt has, that nobody has.

    A ratio of 1 between the last two means that a tenant learns nothing about the texts of another.
    """
    length = args.probe_tokens
    secret = real_tokens(tokenizer, length)[0].tolist()
    text = tokenizer(real_text()[100_000 : 100_000 + 8 * length * (args.rounds + 1)]).input_ids
    Timed(model, secret, 1, {"store": "salts", "salt": "a", "budget": "2GiB", "page_size": 16})
    times: dict[str, list[float]] = {"same_salt": [], "other_salt": [], "unknown": []}
    hits = 0
    for turn in progress(range(args.rounds), "salts"):
        salted = {"store": "salts", "salt": f"b{turn}", "budget": "2GiB", "page_size": 16}
        probes = {"same_salt": (secret, {**salted, "salt": "a"}), "other_salt": (secret, salted),
                  "unknown": (text[turn * length : (turn + 1) * length], salted)}  # fmt: skip
        names = list(probes)
        for name in names[turn % 3 :] + names[: turn % 3]:
            run = Timed(model, probes[name][0], 1, probes[name][1])
            times[name].append(run.seconds)
            hits += run.reused if name != "same_salt" else 0
    hf_ctxopt.drop_store("salts")
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {"seconds": medians, "all_seconds": times, "reused_tokens_across_salts": hits,
            "other_salt_over_unknown": medians["other_salt"] / medians["unknown"],
            "same_salt_over_unknown": medians["same_salt"] / medians["unknown"]}  # fmt: skip
