"""Files with a right checksum and wrong content, stores that are nearly full, and loads that are interrupted."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_ctxopt
from hf_ctxopt.caches import saved_texts, slot, store_file
from hf_ctxopt.errors import CorruptFileError
from hf_ctxopt.pages import snapshot
from tests.families import build
from tests.prefix.rig import STORE, draw, reused, same, say, store

TEXTS = [draw(60, 1) + draw(30, seed) for seed in range(3)]


def saved(path: Path, **config: Any) -> tuple[Any, Path, int]:
    """A model, a file with `TEXTS`, and its pages."""
    model, file = build("llama"), path / "agents.kv"
    for text in TEXTS:
        say(model, text, config)
    pages = hf_ctxopt.save_store(STORE, file)
    hf_ctxopt.drop_store(STORE)
    return model, file, pages


def first(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Give every page of the first node other values."""

    def change(body: dict[str, Any]) -> None:
        node = body["nodes"][0]
        node.update({name: value * node["pages"] for name, value in values.items()})

    return change


@pytest.mark.parametrize(
    "harm",
    [
        first(durations=[]),
        first(durations=["x"]),
        first(durations=[-1.0]),
        first(durations=[float("nan")]),
        first(priorities=[], durations=[]),
        first(priorities=[35.5]),
        lambda body: body["nodes"][0].update(durations=[None]),
        lambda body: body["nodes"][0].update(namespace=[["model", "x"], ["salt", ""]]),
        lambda body: body["kinds"].__setitem__(0, body["kinds"][0].replace("o", "-")),
        lambda body: body["kinds"].__setitem__(0, body["kinds"][0].replace("o", "x")),
        lambda body: body["kinds"].__setitem__(0, body["kinds"][0].replace("o", "s")),
    ],
)
def test_content_that_no_store_has_is_refused(tmp_path: Path, harm: Any) -> None:
    model, file, _ = saved(tmp_path)
    found = snapshot.read(file)
    kinds = list(found.body["kinds"])
    with found.tensors() as opened:
        tensors = {name: opened.get_tensor(name) for name in found.shapes}
    harm(found.body)
    if found.body["kinds"] != kinds:  # tensors for pages of that kind are not missed
        tensors = {"tokens": tensors["tokens"]}
    snapshot.write(file, tensors, found.body)
    hf_ctxopt.make_cache(model, "ctx_prefix", store=STORE, page_size=8).release()
    with pytest.raises(CorruptFileError):
        hf_ctxopt.load_store(file, model, STORE, page_size=8)
    store().check_integrity()
    assert store().tree.pages == 0
    same(say(model, TEXTS[0], {}), say(model, TEXTS[0]))


def test_a_long_chain_of_nodes_takes_no_squared_memory(tmp_path: Path) -> None:
    model, count, file = build("llama"), 12_000, tmp_path / "chain.kv"
    say(model, draw(20, 1), {"page_size": 1})
    node = {"namespace": [["model", "x"], ["salt", ""]], "pages": 1, "priorities": [35], "durations": [None]}
    body = {"name": saved_texts.NAME, "layout": store().description, "page_size": 1, "shapes": {},
            "kinds": ["o" * count], "nodes": [{**node, "parent": at - 1} for at in range(count)]}  # fmt: skip
    snapshot.write(file, {"tokens": torch.zeros(count, dtype=torch.int64)}, body)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptFileError):
        hf_ctxopt.load_store(file, model, STORE, page_size=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


@pytest.mark.parametrize("spare", range(1, 8, 2))
def test_what_the_store_has_already_does_not_go_to_make_room(tmp_path: Path, spare: int) -> None:
    """The beginning of the file's texts is what the store would give up first."""
    model, file, pages = saved(tmp_path)
    budget = f"{(pages + spare) * 4096}B"
    say(model, TEXTS[0][:60], {"budget": budget, "priorities": [[0, None, 1]]}, max_new_tokens=1)
    say(model, draw(40, 77), {"budget": budget, "priorities": [[0, None, 90]]}, max_new_tokens=1)
    assert store().arenas[0].page_bytes == 4096
    assert hf_ctxopt.load_store(file, model, STORE, page_size=8, budget=budget) == pages - 7
    store().check_integrity()
    assert store().stats()["locked_pages"] == 0
    for text in TEXTS:
        got = say(model, text, {})
        same(got, say(model, text))
        assert reused(got) >= 80


def test_what_lies_in_the_host_is_not_lost_to_a_file(tmp_path: Path) -> None:
    model, file, pages = saved(tmp_path)
    config = {"budget": 30 * 8, "cpu_budget": "1MiB"}
    say(model, TEXTS[0][:60], config, max_new_tokens=1)
    for seed in (77, 78):
        say(model, draw(100, seed), config, max_new_tokens=1)
    assert store().stats()["sent_away_pages"] > 0
    hf_ctxopt.load_store(file, model, STORE, page_size=8, budget="1GiB", cpu_budget="1MiB")
    store().check_integrity()
    for text in TEXTS:
        got = say(model, text, {"budget": "1GiB"})
        same(got, say(model, text))
        assert reused(got) >= 80


def test_an_interrupted_load_takes_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file, pages = saved(tmp_path)
    say(model, TEXTS[0][:60], {})
    gc.collect()
    store().collect()
    used = store().arenas[0].used
    kept = store_file.LayerStorage.kept
    calls = iter(range(100))

    def interrupted(self: Any, kind: str) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return kept(self, kind)

    monkeypatch.setattr(store_file.LayerStorage, "kept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_ctxopt.load_store(file, model, STORE, page_size=8)
    store().check_integrity()
    assert store().arenas[0].used == used
    assert hf_ctxopt.load_store(file, model, STORE, page_size=8) == pages - 7
    same(say(model, TEXTS[1], {}), say(model, TEXTS[1]))


@pytest.mark.parametrize("where", ["away", "back"])
def test_an_interrupted_move_to_or_from_the_host_loses_no_page(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    model, config = build("llama"), {"budget": 20 * 8, "cpu_budget": "1MiB"}
    say(model, TEXTS[0], config)
    if where == "back":
        say(model, draw(80, 9), config, max_new_tokens=1)
        store().reclaim(2)
        away = next(one for node in store().tree.walk() for one in node.items if one.host)
    with monkeypatch.context() as patch:
        patch.setattr(slot if where == "away" else away, "_copy" if where == "away" else "host", _Interrupted())
        with pytest.raises(KeyboardInterrupt):
            away.bring_back(store().arenas) if where == "back" else say(model, draw(80, 10), config)
    gc.collect()
    store().check_integrity()
    same(say(model, TEXTS[0], config), say(model, TEXTS[0]))


class _Interrupted:
    """The user presses Ctrl-C when the page's content is copied."""

    def __call__(self, *_: Any) -> Any:
        raise KeyboardInterrupt

    __getitem__ = __call__
