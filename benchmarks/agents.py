"""Many agents over one prefix store: hit rates of seeded traces, times to the first token, sessions without leaks.

Hit rates come from the package's radix tree alone, over budgets, for eviction by recency and by priority, without and
with one-off requests that flood the store; the trace at 16,384 tokens also runs through `generate` on a tiny model,
which must find what the tree says. Times are SmolLM2's, every call beside the same one without a store.
Bars: hit rate >= 90 % at 16,384 tokens, with floods by priority; time to the first token from the second turn on
>= 5 times lower than without a store, on a line in uncached tokens (R^2 >= 0.9); equal greedy tokens; 1,000 sessions
opened, forked and closed leave no page and grow memory by < 1 %.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from pathlib import Path
from typing import Any

import torch

import hf_ctxopt
from agent_times import CLOCKS, FirstToken, least_squares, line, salts, turns
from agent_trace import Generated, Shape, Simulated, replay
from common import SMOLLM2, arguments, load_smollm2, progress, tiny_llama, verdict, write_results
from measure import new_figure, save_figure

RATE, LOWER, FIT, GROWTH = 0.90, 5.0, 0.9, 0.01
KINDS = {"recency": False, "priority": True}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the verdicts and returns what it wrote as JSON."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    parts = dict(zip(("system", "role", "user", "answer", "flood"), args.trace, strict=True))
    shape = Shape(agents=args.trace_agents, turns=args.trace_turns, **parts)
    curves = _curves(args, shape)
    through = [_through_generate(args, shape, floods, kind) for floods, kind in ((0, "recency"), (1, "priority"))]
    FirstToken.clock = staticmethod(CLOCKS[args.clock])
    model, tokenizer = load_smollm2()
    model.generation_config.eos_token_id = None  # every answer has its length
    real = {"turns": turns(model, tokenizer, args), "line": line(model, tokenizer, args),
            "salts": salts(model, tokenizer, args)}  # fmt: skip
    sessions = _sessions(tokenizer, args)
    passed = _report(args, curves, through, real, sessions)
    _plot(args, curves, real["line"], args.out / "agents.png")
    figures = {"hit_rates": curves, "through_generate": through, **real, "sessions": sessions, "passed": passed}
    return write_results(args, "agents", SMOLLM2, figures)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    budgets = [4096, 6144, 8192, 10240, 12288, 14336, 16384, 20480, 24576, 28672, 32768]
    parser.add_argument("--budgets", type=int, nargs="+", default=budgets, help="tokens of the store")
    parser.add_argument("--mark", type=int, default=16384, help="the budget of the bars")
    parser.add_argument("--trace", type=int, nargs=5, default=[1024, 128, 64, 64, 1024],
                        help="tokens of system prompt, role, question, answer and one-off request")  # fmt: skip
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a busy machine, --threads 1")
    parser.add_argument("--trace-agents", type=int, default=8)
    parser.add_argument("--trace-turns", type=int, default=12)
    parser.add_argument("--agents", type=int, default=8, help="agents on SmolLM2")
    parser.add_argument("--turns", type=int, default=4, help="turns of each of them")
    parser.add_argument("--system-tokens", type=int, default=800)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--line-tokens", type=int, default=1152, help="prompt of the line")
    parser.add_argument("--uncached", type=int, nargs="+", default=[16, 64, 128, 256, 384, 512, 768, 1024])
    parser.add_argument("--probe-tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=1000, help="sessions opened, forked and closed")
    return parser


def _curves(args: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    """Hit rates over budgets; `answers` tells whether answers are kept when they are generated, or with the next
    prompt (as in the simulation that the bars come from)."""
    ways = list(itertools.product((0, 1, 2), KINDS, (True, False)))
    found = []
    for floods, kind, answers in progress(ways, "traces"):
        rates = {}
        for budget in sorted({*args.budgets, args.mark}):
            served = Simulated(budget, ranked=KINDS[kind], answers=answers, seed=args.seed, vocab=256)
            rates[str(budget)] = replay(served, shape, floods=floods, seed=args.seed, vocab=256).hit_rate
        found.append({"floods": floods, "kind": kind, "answers": answers, "hit_rate": rates})
    return found


def _rate(curves: list[dict[str, Any]], floods: int, kind: str, mark: int, answers: bool = True) -> float:
    chosen = next(c for c in curves if (c["floods"], c["kind"], c["answers"]) == (floods, kind, answers))
    return float(chosen["hit_rate"][str(mark)])


def _through_generate(args: argparse.Namespace, shape: Shape, floods: int, kind: str) -> dict[str, Any]:
    """The trace of the bars on a tiny model, each call beside the tree alone."""
    model = tiny_llama(layers=1, heads=2, kv_heads=1, head_dim=16, seed=args.seed)
    beside = Simulated(args.mark, ranked=KINDS[kind], answers=True, seed=args.seed, vocab=256)
    served = Generated(model, args.mark, ranked=KINDS[kind], store="trace", beside=beside)
    tally = replay(served, shape, floods=floods, seed=args.seed, vocab=256)
    store = hf_ctxopt.stores()["trace"]
    store.check_integrity()
    stats = store.stats()
    hf_ctxopt.drop_store("trace")
    return {
        "floods": floods, "kind": kind, "budget": args.mark, "hit_rate": tally.hit_rate, "store": stats,
        "simulated": served.simulated.hit_rate, "calls": served.calls, "differing_calls": served.differing,
    }  # fmt: skip


def _sessions(tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Sessions opened, forked and closed: pages that nobody accounts for, and memory."""
    vocab = max(len(tokenizer), 256)
    model = tiny_llama(layers=2, heads=2, kv_heads=1, head_dim=16, vocab=vocab, seed=args.seed)
    begun = max(1, args.cycles // 4)  # until then the store fills up
    resident: list[int] = []
    for cycle in progress(range(args.cycles), "sessions"):
        session = hf_ctxopt.Session(
            model, tokenizer, store="sessions", max_new_tokens=4, do_sample=False,
            cache_config={"budget": 4096, "page_size": 16},
        )  # fmt: skip
        with session:
            session.send([{"role": "system", "content": "You are brief."},
                          {"role": "user", "content": f"Question {cycle}."}])  # fmt: skip
            with session.fork() as twin:
                twin.send("And then?")
        if cycle + 1 >= begun:
            resident.append(_resident())
    gc.collect()
    store = hf_ctxopt.stores()["sessions"]
    store.check_integrity()
    locked = store.stats()["locked_pages"]
    unowned = sum(store.arenas[0].used) - store.tree.pages
    store.clear()
    left = sum(sum(arena.used) for arena in store.arenas)
    hf_ctxopt.drop_store("sessions")
    return {"cycles": args.cycles, "locked_pages": locked, "leaked_pages": unowned + left,
            "resident_bytes": [resident[0], resident[-1]], "growth": resident[-1] / resident[0] - 1}  # fmt: skip


def _resident() -> int:
    """Bytes of the process that are in memory (Linux), 1 elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 1
    return pages * 4096


def _report(args: argparse.Namespace, curves: list[dict[str, Any]], through: list[dict[str, Any]],
            real: dict[str, Any], sessions: dict[str, Any]) -> dict[str, bool]:  # fmt: skip
    mark = args.mark
    quiet, recent = _rate(curves, 0, "recency", mark), _rate(curves, 1, "recency", mark)
    ranked, ranked2 = _rate(curves, 1, "priority", mark), _rate(curves, 2, "priority", mark)
    times, fitted, probes = real["turns"], real["line"], real["salts"]
    passed = {
        "hit_rate": quiet >= RATE, "floods": min(ranked, ranked2) >= RATE and ranked - recent >= 0.15,
        "store_as_simulated": all(abs(one["hit_rate"] - one["simulated"]) < 0.01 for one in through),
        "times_lower": times["times_lower"] >= LOWER, "line": fitted["r_squared"] >= FIT,
        "same_tokens": times["all_tokens_same"], "no_hits_across_salts": probes["reused_tokens_across_salts"] == 0,
        "no_leak": sessions["leaked_pages"] == sessions["locked_pages"] == 0 and sessions["growth"] < GROWTH,
    }  # fmt: skip
    print(f"hit rate at {mark} tokens: {quiet:.1%}; one flood a call: recency {recent:.1%}, priority {ranked:.1%}; "
          f"two: priority {ranked2:.1%}")  # fmt: skip
    for one in through:
        print(f"through generate, {one['floods']} floods, {one['kind']}: {one['hit_rate']:.1%}, simulated "
              f"{one['simulated']:.1%}, {one['differing_calls']} of {one['calls']} calls differ")  # fmt: skip
    print(f"time to first token from turn 2 on: {1000 * times['later_seconds']:.0f} ms, without a store "
          f"{1000 * times['later_cold_seconds']:.0f} ms: {times['times_lower']:.1f} times lower")  # fmt: skip
    print(f"line: {1000 * fitted['seconds_per_token']:.2f} ms per uncached token + "
          f"{1000 * fitted['offset_seconds']:.0f} ms, R^2 {fitted['r_squared']:.4f}")  # fmt: skip
    print(f"probe of a text that only another salt has / that nobody has: {probes['other_salt_over_unknown']:.3f}; "
          f"that the same salt has: {probes['same_salt_over_unknown']:.3f}")  # fmt: skip
    print(f"{sessions['cycles']} session cycles: {sessions['leaked_pages']} pages leaked, memory "
          f"{sessions['growth']:+.2%}")  # fmt: skip
    for name, good in passed.items():
        print(f"{name}: {verdict(good)}")
    return passed


def _plot(args: argparse.Namespace, curves: list[dict[str, Any]], fitted: dict[str, Any], path: Path) -> None:
    figure, (rates, times) = new_figure(2)
    colors = ("tab:green", "tab:orange", "tab:red")
    for curve in (curve for curve in curves if curve["answers"]):
        xs = [int(budget) for budget in curve["hit_rate"]]
        rates.plot(xs, [100 * y for y in curve["hit_rate"].values()], color=colors[curve["floods"]],
                   linestyle="-" if KINDS[curve["kind"]] else "--", marker=".",
                   label=f"{curve['kind']}, {curve['floods']} floods")  # fmt: skip
    rates.axvline(args.mark, color="grey", linewidth=0.5)
    rates.set(xlabel="budget of the store (tokens)", ylabel="hit rate of the agents' prompts (%)", ylim=(0, 100))
    rates.legend(fontsize=7)
    xs, ys = fitted["uncached"], [1000 * y for y in fitted["seconds"]]
    slope, offset, _ = least_squares(xs, ys)
    times.plot(xs, ys, "o")
    times.plot([0, max(xs)], [offset, offset + slope * max(xs)], color="grey", linewidth=0.8)
    times.set(
        xlabel=f"uncached tokens of a prompt of {args.line_tokens}", ylabel="ms to the first token", ylim=(0, None)
    )
    save_figure(figure, path)


if __name__ == "__main__":
    main()
