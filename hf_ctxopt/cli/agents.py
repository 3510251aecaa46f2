"""`ctxopt agents`: agents that share a system prompt over one prefix store, in a live table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from hf_ctxopt.cli import console, options
from hf_ctxopt.cli.files import check_output, read

if TYPE_CHECKING:
    from hf_ctxopt import Session
    from hf_ctxopt.cli.streaming import FirstToken

STORE = "ctxopt agents"
PRIORITIES = {"system": 90, "tool": 60}
ROLES = ("planner", "critic", "researcher", "editor", "tester", "analyst", "translator", "archivist")
QUESTIONS = (
    "What is your part in this?",
    "Which rule above matters most for it?",
    "Give one example.",
    "What could go wrong?",
    "Say it in one short sentence.",
    "What would you do next?",
)
SYSTEM = (
    "You work in a team of agents that share one model and this text. Each of you has a role of its own and answers "
    "for that role alone. Read what you are asked, say what you know, and say so where you do not know. Keep to the "
    "point: one or two sentences, no lists, no greetings. Do not repeat the question. Where a fact decides, name it "
    "and where it comes from. Where two facts disagree, say which one you trust more and why. Numbers have units. "
    "Names are spelled as they are given to you. If a task is larger than one step, say the first step only. If a "
    "task belongs to another role, name that role and stop. What an earlier agent has decided stays decided unless "
    "you can show that it is wrong; then show it in one sentence. Never invent a source, a number or a quotation."
)

Agents = Annotated[int, typer.Option(min=1, help="How many agents.")]
Turns = Annotated[int, typer.Option(min=1, help="Turns of each agent.")]
StoreBudget = Annotated[
    str, typer.Option(help="Most that the shared store holds: tokens ('16384') or bytes ('1GiB').")
]
CpuBudget = Annotated[str | None, typer.Option(help="Bytes of host memory for pages pushed out of a full store.")]
SystemFile = Annotated[Path | None, typer.Option(help="The shared system prompt; a text of 170 words when left out.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer.

    Attributes:
        agent: number from 1 on.
        turn: likewise.
        prompt_tokens: of the whole conversation so far.
        reused_tokens: of them, found in the store.
        hit_rate: of the store so far, all agents together.
        bytes_used: of the store's pages after the answer.
        first_token_s: seconds from the question to the first token of the answer.
        answer: its text.
    """

    agent: int
    turn: int
    prompt_tokens: int
    reused_tokens: int
    hit_rate: float
    bytes_used: int
    first_token_s: float
    answer: str


def agents(
    model: options.Model = "smollm2",
    gguf_file: options.GgufFile = None,
    agents: Agents = 4,
    turns: Turns = 3,
    store_budget: StoreBudget = "1GiB",
    cpu_budget: CpuBudget = None,
    page_size: options.PageSize = None,
    kv_bits: options.KvBits = None,
    system_file: SystemFile = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    max_new_tokens: options.MaxNewTokens = 24,
    json_path: JsonPath = None,
) -> None:
    """Let agents that share a system prompt take turns over one prefix store."""
    options.prefer_growing_segments()
    config = store_config(store_budget, cpu_budget, page_size, kv_bits)
    check_output("json", json_path)
    system = SYSTEM if system_file is None else read(system_file).strip()
    import hf_ctxopt
    from hf_ctxopt.cli.models import load_model
    from hf_ctxopt.cli.streaming import FirstToken

    with console.progress(f"Loading {model}"):
        loaded, tokenizer = load_model(model, gguf_file, dtype, device)
    clock = FirstToken()
    sessions = [
        hf_ctxopt.Session(
            loaded, tokenizer, store=STORE, priorities=PRIORITIES, max_new_tokens=max_new_tokens,
            cache_config=config, stopping_criteria=[clock], do_sample=False, temperature=None, top_p=None, top_k=None,
        )
        for _ in range(agents)
    ]  # fmt: skip
    hf_ctxopt.drop_store(STORE)
    try:
        done = converse(sessions, system, turns, clock)
        stats = hf_ctxopt.stores()[STORE].stats()
    finally:
        hf_ctxopt.drop_store(STORE)
    console.note(summary(stats, done))
    if json_path is not None:
        found = {"model": model, "agents": agents, "turns": [asdict(turn) for turn in done], "store": stats}
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        console.note(f"wrote {json_path}")


def store_config(budget: str, cpu_budget: str | None, page_size: int | None, kv_bits: str | None) -> dict[str, Any]:
    """Returns the options of the store, checked before any model is loaded.

    Raises:
        ConfigError: if one is out of range.
    """
    from hf_ctxopt.caches.options import PrefixOptions

    bits = None if kv_bits is None else options.parse_bits(kv_bits)
    given = {"budget": options.parse_budget(budget), "cpu_budget": cpu_budget, "page_size": page_size, "kv_bits": bits}
    config = {name: value for name, value in given.items() if value is not None}
    PrefixOptions.parse(config)
    return config


def converse(sessions: list[Session], system: str, turns: int, clock: FirstToken) -> list[Turn]:
    """Lets every agent take its turns, one after the other, and shows each as it comes."""
    done: list[Turn] = []
    with console.live(turns_table(done, len(sessions))) as live:
        for turn in range(turns):
            for number, session in enumerate(sessions):
                clock.start()
                answer = session.send(_asked(system, number, turn))
                done.append(_turn(number + 1, turn + 1, session.last, clock.seconds, answer))
                live.update(turns_table(done, len(sessions)), refresh=True)
    return done


def _asked(system: str, agent: int, turn: int) -> list[dict[str, str]]:
    question = QUESTIONS[turn % len(QUESTIONS)]
    if turn:
        return [{"role": "user", "content": question}]
    role = f"You are agent {agent + 1}, the {ROLES[agent % len(ROLES)]}. "
    return [{"role": "system", "content": system}, {"role": "user", "content": role + question}]


def _turn(agent: int, turn: int, found: dict[str, Any], seconds: float, answer: str) -> Turn:
    store = found["store"]
    return Turn(
        agent=agent, turn=turn, prompt_tokens=found["prompt_tokens"], reused_tokens=found["reused_tokens"],
        hit_rate=store["hit_rate"], bytes_used=store["bytes_used"], first_token_s=seconds, answer=answer,
    )  # fmt: skip


def turns_table(done: list[Turn], agents: int) -> Table:
    """Returns each agent's newest turn as a table."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)  # what is left of 80 columns is for the answers
    for head in ("agent", "turn", "prompt", "reused", "hit rate", "bytes", "first token"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("answer")
    newest = {turn.agent: turn for turn in done}
    for number in range(1, agents + 1):
        turn = newest.get(number)
        if turn is None:
            table.add_row(str(number), *[""] * 7)
            continue
        share = f"{turn.reused_tokens / turn.prompt_tokens:.0%}"
        table.add_row(str(number), str(turn.turn), f"{turn.prompt_tokens:,}", f"{turn.reused_tokens:,}", share,
                      console.size(turn.bytes_used), f"{1000 * turn.first_token_s:.0f} ms",
                      Text(" ".join(turn.answer.split()), no_wrap=True, overflow="ellipsis"))  # fmt: skip
    return table


def summary(stats: dict[str, Any], done: list[Turn]) -> str:
    """Returns one line about the store."""
    text = (
        f"{stats['reused_tokens']:,} of {stats['prompt_tokens']:,} prompt tokens reused ({stats['hit_rate']:.1%}) | "
        f"{stats['tokens']:,} tokens in {stats['pages']:,} pages, {console.size(stats['bytes_used'])} used of "
        f"{console.size(stats['bytes_held'])} held, {console.size(stats['host_bytes'])} in the host | "
        f"{stats['evicted_pages']:,} pages evicted"
    )
    times = {
        name: sorted(turn.first_token_s for turn in done if (turn.turn == 1 and turn.agent == 1) == cold)
        for name, cold in (("cold", True), ("later", False))
    }
    if times["later"]:
        middle = times["later"][len(times["later"]) // 2]
        text += f" | first token {1000 * times['cold'][0]:.0f} ms cold, {1000 * middle:.0f} ms later"
    return text
