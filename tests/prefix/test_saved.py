"""Saved contexts: round trips, files of others, damage of every kind, and a kill at any moment."""

from __future__ import annotations

import os
import random
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_ctxopt
from hf_ctxopt.errors import ConfigError, CorruptFileError
from hf_ctxopt.pages import snapshot
from tests.families import build
from tests.prefix.rig import STORE, draw, reused, same, say, store

TEXTS = [draw(60, 1) + draw(30, seed) for seed in range(3)]


def saved(path: Path, family: str = "llama", **config: Any) -> tuple[Any, Path]:
    model = build(family)
    for text in TEXTS:
        say(model, text, {"salt": "s", **config})
    file = path / "agents.kv"
    assert hf_ctxopt.save_store(STORE, file) == store().tree.pages > 10
    hf_ctxopt.drop_store(STORE)
    return model, file


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("bits", [16, 8, 2])
def test_a_store_comes_back_as_it_was(tmp_path: Path, family: str, bits: int) -> None:
    model, file = saved(tmp_path, family, kv_bits=bits)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    taken = hf_ctxopt.load_store(file, model, STORE, page_size=8, kv_bits=bits)
    store().check_integrity()
    assert taken == store().tree.pages
    for text in TEXTS:
        got = say(model, text, {"salt": "s", "kv_bits": bits})
        assert reused(got) >= 72
        if bits == 16:
            same(got, say(model, text))
    assert reused(say(model, TEXTS[0], {"kv_bits": bits})) == 0  # another salt
    assert hf_ctxopt.load_store(file, model, STORE, page_size=8, kv_bits=bits) == 0  # it has them all


def test_texts_in_the_host_are_saved_too(tmp_path: Path) -> None:
    model, file = saved(tmp_path, budget=128, cpu_budget="1MiB")
    hf_ctxopt.load_store(file, model, STORE, page_size=8)
    got = say(model, TEXTS[0], {"salt": "s"})
    assert reused(got) >= 80
    same(got, say(model, TEXTS[0]))


def test_files_of_others_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model, file = saved(tmp_path)
    other = build("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    foreign = [
        (other, {"page_size": 8}, "another model"),
        (model, {"page_size": 16}, "layout"),
        (model, {"page_size": 8, "kv_bits": 8}, "layout"),
        (model.to(torch.float16), {"page_size": 8}, "layout"),
        (build("gemma3"), {"page_size": 8}, "layout"),
        (build("llama"), {"page_size": 8, "budget": 32}, "budget"),
        (build("llama"), {"page_size": 8, "budget": "1KiB"}, "budget"),
    ]
    for asking, options, reason in foreign:
        with pytest.raises(CorruptFileError, match=reason):
            hf_ctxopt.load_store(file, asking, STORE, **options)
        assert STORE not in hf_ctxopt.stores()
    with pytest.raises(CorruptFileError):
        hf_ctxopt.load_store(tmp_path / "nothing", model, STORE)
    with pytest.raises(ConfigError, match="store"):
        hf_ctxopt.save_store("no such", file)


def test_damaged_files_are_refused_without_memory(tmp_path: Path) -> None:
    """Every header byte cut, bits flipped anywhere, absurd lengths: 0 accepted."""
    _, file = saved(tmp_path)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    bad = [good[:size] for size in range(0, header, max(1, header // 120))]
    bad += [good[:size] for size in (len(good) - 1, len(good) // 2, header)]
    bad += [good + b"\0", good + good]
    for _ in range(120):
        at = rng.choice((rng.randrange(header), rng.randrange(len(good))))
        bad.append(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
    for length in (0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, header - 9, header):
        bad.append(length.to_bytes(8, "little") + good[8:])
    text = good[8:header]
    for old, new in ((b'"F32"', b'"I64"'), (b'"F32"', b'"X9"'), (b'"shape":[', b'"shape":[9999999999,'),
                     (b'"data_offsets":[', b'"data_offsets":[1'), (b'"data_offsets":[', b'"data_offsets":[-'),
                     (b'"shape"', b'"shapes"'), (b"{", b"[", ), (b'"__metadata__"', b'"__metadat__"')):  # fmt: skip
        changed = text.replace(old, new)
        bad.append(len(changed).to_bytes(8, "little") + changed + good[header:])
    nested = b"[" * 100_000
    bad += [len(nested).to_bytes(8, "little") + nested, b"", b"\0" * 64]
    while len(bad) < 300:
        at = rng.randrange(header)
        bad.append(good[:at] + rng.randbytes(rng.randrange(1, 9)) + good[at + 8 :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = []
    for number, content in enumerate(bad):
        file.write_bytes(content)
        try:
            snapshot.read(file)
        except CorruptFileError:
            continue
        accepted.append(number)
    assert [number for number in accepted if bad[number] != good] == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB
    file.write_bytes(good)
    snapshot.read(file)


@pytest.mark.parametrize(
    "harm",
    [
        lambda body: body.update(name="other"),
        lambda body: body["nodes"][0].update(parent=5),
        lambda body: body["nodes"][0].update(pages=10**9),
        lambda body: body["nodes"][0].update(priorities=[500] * body["nodes"][0]["pages"]),
        lambda body: body["kinds"].append("o"),
        lambda body: body.update(kinds=["s" * len(kinds) for kinds in body["kinds"]]),
        lambda body: body["shapes"].popitem(),
        lambda body: body["shapes"].update({"0.0": [1, 2, 3]}),
        lambda body: body.pop("nodes"),
    ],
)
def test_a_checksum_alone_does_not_make_a_file_right(tmp_path: Path, harm: Any) -> None:
    model, file = saved(tmp_path)
    found = snapshot.read(file)
    with found.tensors() as opened:
        tensors = {name: opened.get_tensor(name) for name in found.shapes}
    harm(found.body)
    snapshot.write(file, tensors, found.body)
    hf_ctxopt.make_cache(model, "ctx_prefix", store=STORE, page_size=8).release()
    with pytest.raises(CorruptFileError):
        hf_ctxopt.load_store(file, model, STORE, page_size=8)
    store().check_integrity()
    assert store().tree.pages == 0


_KILLER = """
import os, signal, sys, time, torch
from hf_ctxopt.pages import snapshot
torch.set_num_threads(1)
path, last, parent = sys.argv[1], 0, os.getpid()
for moment in range(10):
    child = os.fork()
    if child == 0:
        number = last
        while os.getppid() == parent:
            number += 1
            snapshot.write(path, {"x": torch.full((1 << 19,), float(number))}, {"number": number})
        os._exit(1)
    while not os.path.exists(path) or snapshot.read(path).body["number"] == last:
        time.sleep(0.001)
    time.sleep(0.0011 * moment)  # somewhere in a later save
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = snapshot.read(path)
    with found.tensors() as opened:
        whole = opened.get_tensor("x")
    assert whole.eq(found.body["number"]).all()
    last = found.body["number"]
    print("killed", moment, last, flush=True)
"""


def test_kill_nine_at_ten_moments_of_saving_leaves_an_old_file_or_a_new_one(tmp_path: Path) -> None:
    file = tmp_path / "store.kv"
    one = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a pool of threads does not survive a fork
    command = [sys.executable, "-c", _KILLER, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=one)
    assert done.stdout.count("killed") == 10, done.stderr
    old = time.time() - 7200
    parts = [path for path in tmp_path.iterdir() if path != file]
    for part in parts:
        os.utime(part, (old, old))
    young = tmp_path / f".{file.name}.x.part"
    young.mkdir()
    snapshot.write(file, {"x": torch.zeros(3)}, {"number": 0})
    assert snapshot.read(file).body == {"number": 0}
    assert sorted(tmp_path.iterdir()) == sorted([file, young])


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "store.kv"
    snapshot.write(file, {"x": torch.zeros(3)}, {"number": 0})
    found = snapshot.read(file)
    snapshot.write(file, {"x": torch.ones(4)}, {"number": 1})
    with pytest.raises(CorruptFileError, match="place"):
        found.tensors()
    with snapshot.read(file).tensors() as opened:
        assert opened.get_tensor("x").sum() == 4


def test_no_pickle_anywhere() -> None:
    package = Path(hf_ctxopt.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("import pickle", "torch.load(", "torch.save(", 'eval("', "exec("):
            assert word not in text, f"{path.name}: {word}"
