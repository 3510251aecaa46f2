"""A session that grows past its plan under a hard 8 GiB cap: with the monitor it finishes, without it runs out.

The plan is for a shorter text: Llama-3.1-8B's shape with random packed 4-bit weights and pages of `--bits` bits, all
that the card holds of them. The session then grows to 64 k tokens in turns of 2,048 tokens, each read in the plan's
chunks and answered with 32 tokens by `generate` on the same cache. A larger GPU plays the card: torch's allocator is
capped at 8 GiB less the CUDA context of this process. Two runs of the same session:

1. `static`: the plan as it is. It ends where the allocator refuses at the smallest prefill chunk.
2. `monitored`: `Monitor` with the actions of `planner/actions.py`, polled before forward passes (`watched`). Over 90 %
   of the card it stores the full pages with 8 bits and then 4. What it did, and when, is in the file.

The plan's byte budget is lifted in both: the card itself is the limit. Run from the repository root:
`PYTHONPATH=. python benchmarks/gpu/pressure.py`. `--tiny` is a toy on the CPU, where a budget plays the card.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import hf_ctxopt
from common import RESULTS, environment, tiny_llama, verdict, write_json
from hf_ctxopt.caches.base import PageCache
from hf_ctxopt.integration.compat import generate_argument
from hf_ctxopt.integration.record import record_of
from hf_ctxopt.integration.watch import watched
from hf_ctxopt.planner.actions import usual
from hf_ctxopt.planner.meters import bytes_meter, device_meter
from hf_ctxopt.planner.monitor import Meter, Monitor

GIB = 1 << 30
SHAPE, CONTEXT = "Llama-3.1-8B", 12288  # of the plan


@dataclass
class Card:
    """What both runs share.

    Args:
        model: patched for the session's cache.
        meter: how full the card is, of a cache.
        total: tokens of the session.
        turn: new tokens of a turn.
        new: tokens that are generated in each.
        seed: of the tokens.
        every: seconds between polls at least.
        facts: for the file.
    """

    model: Any
    meter: Callable[[PageCache], Meter]
    total: int
    turn: int
    new: int
    seed: int
    every: float
    facts: dict[str, Any] = field(default_factory=dict)


def rented(args: argparse.Namespace) -> Card:
    """The 8 GiB card, the plan and its model."""
    from card_8gb import shrink
    from plans import SHAPES, build

    torch.backends.cuda.enable_cudnn_sdp(False)  # as on consumer cards
    plan = hf_ctxopt.plan(SHAPES[SHAPE], vram=8 * GIB, context=CONTEXT, weights="Q4_K_M", kv_bits=args.bits)
    torch.manual_seed(args.seed)
    model = build(SHAPES[SHAPE], plan)
    torch.cuda.empty_cache()
    facts = {"plan": plan.to_dict(), "card": shrink(), "weights_gib": torch.cuda.memory_allocated() / GIB}
    hf_ctxopt.patch_model(model, plan={**plan.to_dict(), "kv_budget": 1 << 50})
    meter = device_meter("cuda:0")
    return Card(model, lambda cache: meter, args.total or 65536, 2048, 32, args.seed, 0.25, facts)


def toy(args: argparse.Namespace) -> Card:
    """A tiny model on the CPU; the cache's own budget stands for the card."""
    model, budget = tiny_llama(layers=2, heads=2, kv_heads=1, head_dim=16, seed=args.seed), 140 << 10
    options = {"kv_bits": args.bits, "page_size": 16, "budget": f"{budget}B"}
    hf_ctxopt.patch_model(model, "ctx_paged", **options)
    return Card(
        model, lambda cache: bytes_meter(lambda: cache.nbytes, budget), args.total or 1700, 100, 4, args.seed, 0.0,
        {"budget": budget},
    )  # fmt: skip


def session(card: Card, monitored: bool) -> dict[str, Any]:
    """The session, as far as it goes: figures of every turn, and what ended it."""
    patch = record_of(card.model)
    cache = hf_ctxopt.make_cache(card.model, patch.cache, **vars(patch.options))
    meter = card.meter(cache)
    actions = usual(lambda: [cache], lambda: [], lambda: monitor)  # the session has no prefix store
    events: list[dict[str, Any]] = []
    monitor: Monitor = Monitor(
        meter, actions if monitored else [],
        callback=lambda event: events.append({**asdict(event), "tokens": cache.get_seq_length()}),
    )  # fmt: skip
    device = next(card.model.parameters()).device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    draw = torch.Generator().manual_seed(card.seed)
    vocabulary = card.model.config.vocab_size
    ids = torch.zeros(1, 0, dtype=torch.long, device=device)
    turns: list[dict[str, Any]] = []
    ended, finite = None, True
    with watched(card.model, monitor, every=card.every):
        while ids.shape[1] < card.total:
            fresh = torch.randint(2, vocabulary, (1, min(card.turn, card.total - ids.shape[1])), generator=draw)
            start = time.perf_counter()
            try:
                ids, logits = answer(card, cache, torch.cat([ids, fresh.to(device)], dim=1))
            except (torch.OutOfMemoryError, hf_ctxopt.CacheFullError) as error:
                ended = f"{type(error).__name__}: {str(error)[:200]}"
                break
            finite = finite and bool(torch.isfinite(logits).all())
            turns.append({"tokens": ids.shape[1], "seconds": time.perf_counter() - start, "use": meter(),
                          "cache_bytes": cache.nbytes, "kv_bits": cache.stats()["kv_bits"]})  # fmt: skip
    cache.settle()
    cache.check_integrity()
    stats = cache.stats()
    return {
        "finished": ended is None, "ended": ended, "tokens": turns[-1]["tokens"] if turns else 0, "finite": finite,
        "seen": cache.get_seq_length(), "turns": turns, "events": events, "monitor": monitor.stats(),
        "relief": stats["relief"], "fallbacks": stats["fallbacks"], "graph": stats["graph"],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }  # fmt: skip


@torch.inference_mode()
def answer(card: Card, cache: PageCache, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The text with the answer, and the logits of its last token."""
    out = card.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=card.new, min_new_tokens=card.new, do_sample=False,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True, **{generate_argument(): cache},
    )  # fmt: skip
    return out.sequences, out.logits[-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Both runs, a line for each, and the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bits", type=int, default=16, help="of the plan's pages")
    parser.add_argument("--total", type=int, help="tokens of the session")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("static", "monitored"))
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_pressure.json")
    args = parser.parse_args(argv)
    if not args.tiny:
        from card_8gb import with_growing_segments

        with_growing_segments()
    card = toy(args) if args.tiny else rented(args)
    dtype = next(part.dtype for part in card.model.parameters() if part.is_floating_point())
    result: dict[str, Any] = {
        "environment": environment(seed=args.seed, dtype=dtype, model="tiny" if args.tiny else f"{SHAPE}, random"),
        "settings": {"total": card.total, "turn": card.turn, "new": card.new, "bits": args.bits}, **card.facts,
    }  # fmt: skip
    if args.commit:
        result["environment"]["commit"] = args.commit
    for name in ("static", "monitored"):
        if args.only in (None, name):
            result[name] = found = session(card, name == "monitored")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            write_json(args.out, result)
            print(f"{name}: {found['tokens']} tokens, {found['ended'] or 'finished'}", flush=True)
            for event in found["events"]:
                print(f"   at {event['tokens']}: {event['kind']} {event['action']}, {event['before']:.1%} to "
                      f"{event['after']:.1%}", flush=True)  # fmt: skip
    if args.only is None:
        passed = result["monitored"]["finished"] and result["monitored"]["finite"] and not result["static"]["finished"]
        print("finishes only with the monitor:", verdict(passed))


if __name__ == "__main__":
    main()
