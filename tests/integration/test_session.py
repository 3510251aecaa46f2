"""`Session`: what it says is what `generate` says, whoever shares its pages, and nothing of it stays behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import hf_ctxopt
from hf_ctxopt.errors import ConfigError, CtxoptError
from hf_ctxopt.integration import session as module
from hf_ctxopt.integration.messages import render
from tests.cli.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SYSTEM = {"role": "system", "content": "Be brief and name your source. " * 3}
CONFIG = {"page_size": 8, "budget": 4096}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(autouse=True)
def _no_store() -> Iterator[None]:
    hf_ctxopt.drop_store("sessions")
    yield
    gc.collect()
    for store in hf_ctxopt.stores().values():
        store.check_integrity()
    hf_ctxopt.drop_store("sessions")


def opened(model: Any, **options: Any) -> hf_ctxopt.Session:
    return hf_ctxopt.Session(
        model, TOKENIZER, **{"max_new_tokens": 8, "do_sample": False, "cache_config": CONFIG, **options}
    )


def expected(model: Any, talk: list[dict[str, Any]]) -> str:
    """The answer without a store."""
    ids = torch.tensor([render(TOKENIZER, talk, generate=True)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return str(TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("way", ["send", "stream"])
@pytest.mark.parametrize("route", ["dense", "fused"])
def test_answers_are_those_of_generate(model: Any, way: str, route: str) -> None:
    talk: list[dict[str, Any]] = []
    wants = []
    questions = [[SYSTEM, asked("one?")], [asked("two?")], [{"role": "tool", "content": "2"}, asked("three?")]]
    for question in questions:
        talk += question
        wants.append(expected(model, talk))
        talk.append({"role": "assistant", "content": wants[-1]})
    if route == "fused":
        hf_ctxopt.patch_model(model, cache="ctx_paged")
    try:
        session = opened(model)
        prompt = 0
        for question, want in zip(questions, wants, strict=True):
            got = session.send(question) if way == "send" else "".join(session.stream(question))
            assert got == want
            assert session.messages[-1] == {"role": "assistant", "content": want}
            # A random model's bytes are no text: its answers come back as other tokens, earlier prompts as they were.
            assert session.last["reused_tokens"] >= prompt - 8
            prompt = session.last["prompt_tokens"]
        assert session.messages == talk
    finally:
        if route == "fused":
            hf_ctxopt.unpatch_model(model)


def test_a_text_is_a_message_of_the_user(model: Any) -> None:
    one, other, third = opened(model), opened(model), opened(model)
    assert one.send("hello") == other.send(asked("hello")) == third.send([asked("hello")])
    assert one.messages == other.messages == third.messages


def test_a_fork_shares_and_leaves_its_parent_alone(model: Any) -> None:
    parent = opened(model)
    parent.send([SYSTEM, asked("one?")])
    before, prompt = [dict(message) for message in parent.messages], parent.last["prompt_tokens"]
    twin = parent.fork()
    want = expected(model, [*before, asked("and then?")])
    assert twin.send("and then?") == want
    assert twin.last["reused_tokens"] >= prompt - 8
    assert parent.messages == before
    twin.messages[0]["content"] = "something else"
    assert parent.messages[0] == SYSTEM
    other = expected(model, [*before, asked("why?")])
    twin.close()
    assert parent.send("why?") == other
    assert not parent._closed


def test_a_closed_session_is_over_and_its_pages_serve_others(model: Any) -> None:
    with opened(model) as session:
        session.send([SYSTEM, asked("one?")])
    for call in (session.send, session.fork, lambda: next(session.stream("x"))):
        with pytest.raises(CtxoptError, match="closed"):
            call("x") if call == session.send else call()  # type: ignore[operator]
    assert session.messages == []
    other = opened(model)
    other.send([SYSTEM, asked("two?")])
    assert other.last["reused_tokens"] >= len(render(TOKENIZER, [SYSTEM])) - 8


def test_sessions_of_other_salts_share_nothing(model: Any) -> None:
    opened(model, salt="a").send([SYSTEM, asked("one?")])
    for salt, shared in (("b", False), ("", False), ("a", True)):
        session = opened(model, salt=salt)
        session.send([SYSTEM, asked("one?")])
        assert (session.last["reused_tokens"] > 0) == shared
        twin = session.fork()
        twin.send("more")
        assert twin.last["reused_tokens"] > 0  # of its own salt
    assert opened(model, store="sessions", salt="c").fork().cache_config["salt"] == "c"


def test_whole_turns_go_when_the_conversation_grows_too_long(model: Any) -> None:
    system, most = {"role": "system", "content": "short"}, 120
    session = opened(model, max_context=most)
    talk: list[dict[str, Any]] = [system]
    session.messages = [dict(system)]
    gone = 0
    for turn in range(8):
        question = asked(f"question number {turn}")
        conversation = [*talk, question]
        while len(render(TOKENIZER, conversation, generate=True)) + 8 > most:
            del conversation[1:3]  # a question and its answer
            gone += 2
        want = expected(model, conversation)
        assert session.send(question) == want
        talk = [*conversation, {"role": "assistant", "content": want}]
        assert session.messages == talk
        assert session.shifted == gone
        assert session.messages[0] == system
        assert [m["role"] for m in session.messages[1:]] == ["user", "assistant"] * ((len(talk) - 1) // 2)
    assert gone >= 6


def test_answers_of_tools_go_with_the_question_that_asked_for_them(model: Any) -> None:
    session = opened(model, max_context=120)
    late = {"role": "system", "content": "a later rule"}
    session.messages = [
        asked("first"), {"role": "assistant", "content": "a call"}, {"role": "tool", "content": "x" * 30},
        {"role": "assistant", "content": "so"}, late, asked("second"), {"role": "assistant", "content": "yes"},
    ]  # fmt: skip
    session.send("third")
    assert session.messages[:3] == [late, asked("second"), {"role": "assistant", "content": "yes"}]
    assert session.shifted == 4


def test_what_is_too_long_is_refused_before_anything(model: Any) -> None:
    session = opened(model, max_context=90)
    session.send("hello")
    before = [dict(message) for message in session.messages]
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for way in (session.send, lambda text: next(session.stream(text))):
            with pytest.raises(ConfigError, match="max_context"):
                way("x" * 100)
        with pytest.raises(ConfigError, match="messages"):
            session.send([])
    finally:
        hook.remove()
    assert calls == []
    assert session.messages == before
    assert session.shifted == 0
    session.send("on")


def test_a_stream_that_is_broken_off_leaves_the_conversation_as_it_was(model: Any) -> None:
    """And the model stops: it does not go on for nobody."""
    session = opened(model, max_new_tokens=300)
    session.messages = [dict(SYSTEM)]
    before, threads = [dict(SYSTEM)], threading.active_count()
    going, closing = threading.Event(), threading.Event()
    calls: list[int] = []

    def pace(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 20:
            going.set()
            closing.wait(20)

    hook = model.register_forward_pre_hook(pace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TextIteratorStreamer", _EachToken)
        pieces = session.stream("tell me much")
        next(pieces)
        assert going.wait(20)
        threading.Timer(0.2, closing.set).start()
        pieces.close()
    hook.remove()
    assert len(calls) < 30
    assert threading.active_count() <= threads + 1  # the timer may be going
    assert session.messages == before
    session.max_new_tokens = 8
    assert session.send("two?") == expected(model, [*before, asked("two?")])


class _EachToken(TextIteratorStreamer):
    """Hands on every token at once: a random model has no words that end."""

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.on_finalized_text(f"{value.numel()} ")


def test_what_goes_wrong_in_a_stream_reaches_its_reader(model: Any) -> None:
    session = opened(model)
    session.send("one?")
    before = [dict(message) for message in session.messages]

    def fail(*_: Any) -> None:
        raise RuntimeError("no luck")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="no luck"):
            list(session.stream("two?"))
        with pytest.raises(RuntimeError, match="no luck"):
            session.send("two?")
    finally:
        hook.remove()
    assert session.messages == before
    assert session.send("two?") == expected(model, [*before, asked("two?")])


def test_priorities_by_role_reach_the_pages(model: Any) -> None:
    session = opened(model, priorities={"system": 90, "user": 10})
    session.send([SYSTEM, asked("one? " * 8)])
    store = hf_ctxopt.stores()["sessions"]
    ids = render(TOKENIZER, session.messages[:2], generate=True)
    node = store.tree.match(store.tree.roots()[0][0], ids).node
    worth = [priority for one in node.path() for priority in one.priorities]
    system = len(render(TOKENIZER, [SYSTEM]))
    assert worth[: -(-system // 8)] == [90] * -(-system // 8)
    assert set(worth[-(-system // 8) : -3]) == {10}


@pytest.mark.parametrize(
    "options", [{"max_context": 0}, {"max_context": True}, {"max_new_tokens": 0}, {"max_new_tokens": 1.5},
                {"store": ""}, {"salt": 3}, {"cache_config": {"window": 4}}, {"cache_config": {"page_size": 7}}],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        opened(model, **options)
    assert "sessions" not in hf_ctxopt.stores()


def test_priorities_out_of_range_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="system"):
        opened(model, priorities={"system": 101}).send([SYSTEM, asked("one?")])


def test_a_tokenizer_without_a_chat_template_is_refused(model: Any) -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        hf_ctxopt.Session(model, bare)


@pytest.mark.slow
def test_a_thousand_sessions_leave_no_page_and_no_memory(model: Any) -> None:
    resident = []
    for cycle in range(1_000):
        with opened(model, max_new_tokens=1, cache_config={"page_size": 8, "budget": 512}) as session:
            session.send([SYSTEM, asked(f"question {cycle}")])
            with session.fork() as twin:
                twin.send("more")
        if cycle == 249:
            gc.collect()
            resident.append(_resident())
    gc.collect()
    resident.append(_resident())
    store = hf_ctxopt.stores()["sessions"]
    store.check_integrity()
    assert store.stats()["locked_pages"] == 0
    assert store._leases == []
    assert sum(store.arenas[0].used) == store.tree.pages <= 512 // 8
    store.clear()
    assert store.arenas[0].used == (0, 0)
    assert resident[1] < 1.01 * resident[0]


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        pytest.skip("no /proc/self/statm")
