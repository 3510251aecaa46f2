"""Registration and its undo: what importing hf_ctxopt adds to transformers, what it costs, and that all of it goes.

Whatever depends on the order of imports, or on a process that has never seen hf_ctxopt, runs in a process of its own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.generation.configuration_utils as configuration
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import hf_ctxopt
from hf_ctxopt.integration.register import NAMES
from tests.families import VOCAB, build

HOOK = "_prepare_cache_for_generation"
IDS = torch.randint(2, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
ROOT = Path(__file__).parents[2]
CACHES = ["PagedCache", "SinkCache", "DynamicCache"]

PRELUDE = """
import json, sys

def snapshot():
    import transformers.generation.configuration_utils as configuration
    from transformers.generation.utils import GenerationMixin
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface
    return {
        "names": configuration.ALL_CACHE_IMPLEMENTATIONS,
        "hook": id(GenerationMixin._prepare_cache_for_generation),
        "attention": {name: id(f) for name, f in AttentionInterface._global_mapping.items()},
        "mask": {name: id(f) for name, f in AttentionMaskInterface._global_mapping.items()},
        "finders": [id(finder) for finder in sys.meta_path],
    }

def tiny():
    import transformers
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)

def caches(model):
    import torch
    ids, found = torch.ones(1, 4, dtype=torch.long), []
    for name in ("ctx_paged", "ctx_sink", "dynamic"):
        out = model.generate(ids, max_new_tokens=2, cache_implementation=name, return_dict_in_generate=True)
        found.append(type(out.past_key_values).__name__)
    return found

def loaded():
    return {name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")}

"""
SCRIPTS = {
    "before": "import hf_ctxopt\nfound = caches(tiny())",
    "off and on": "import hf_ctxopt\nhf_ctxopt.unregister()\nhf_ctxopt.register()\nfound = caches(tiny())",
    "after transformers": """
import transformers
before = loaded()
import hf_ctxopt
found = [sorted(loaded() - before), caches(tiny())]
""",
    "off, then on after generation": """
import transformers, hf_ctxopt
hf_ctxopt.unregister()
off = snapshot()
hf_ctxopt.register()
found = [off, caches(tiny())]
""",
    "loaders": """
import copy, hf_ctxopt, importlib.util
from hf_ctxopt.integration.register import _EDITS, _EditingLoader
copy.deepcopy(_EditingLoader(importlib.util.find_spec("json").loader, "json"))
caches(tiny())
found = [type(sys.modules[name].__spec__.loader).__name__ for name in _EDITS]
""",
    "after everything": """
model = tiny()
before = snapshot()
import hf_ctxopt
inside = [snapshot() != before, caches(model)]
hf_ctxopt.patch_model(model)
caches(model)
hf_ctxopt.unpatch_model(model)
hf_ctxopt.unregister()
found = [inside, before, snapshot()]
""",
}
"""Each runs in a process that has torch loaded, but neither transformers nor hf_ctxopt, and leaves `found`."""
FORKS = """
import json, os, sys
import accelerate, huggingface_hub, tokenizers, torch, torch._dynamo, torch.distributed.tensor
torch.set_num_threads(1)
assert "transformers" not in sys.modules
prelude, scripts = json.load(sys.stdin)
answers = {}
for name, script in scripts.items():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        space = {}
        exec(prelude + script, space)
        os.write(writer, json.dumps(space["found"]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        answers[name] = json.loads(answer.read() or "null")
    os.waitpid(child, 0)
print(json.dumps(answers))
"""
"""Loading torch takes longest, so it is loaded once and the process is forked for each script."""


def run(code: str, *flags: str, given: str = "") -> tuple[str, str]:
    """What a fresh interpreter prints, on stdout and on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], input=given, capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What each of `SCRIPTS` found."""
    out, errors = run(FORKS, given=json.dumps([PRELUDE, SCRIPTS]))
    answers: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert None not in answers.values(), errors[-3000:]
    return answers


@pytest.fixture(autouse=True)
def _registered_afterwards() -> Iterator[None]:
    yield
    hf_ctxopt.register()


def _once() -> None:
    """Every registry has our entries exactly once."""
    from hf_ctxopt.integration import register

    assert [configuration.ALL_CACHE_IMPLEMENTATIONS.count(name) for name in NAMES] == [1] * len(NAMES)
    assert getattr(GenerationMixin, HOOK).__wrapped__ is _original()
    assert sys.meta_path.count(register._finder) == 1
    assert "ctxopt" in AttentionInterface._global_mapping
    assert "ctxopt" in AttentionMaskInterface._global_mapping


def _original() -> Callable[..., Any]:
    """transformers' own method, under our wrapper."""
    return inspect.unwrap(getattr(GenerationMixin, HOOK))


def _cache_of(model: Any, **options: Any) -> str:
    out = model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, **options)
    return type(out.past_key_values).__name__


def test_importing_again_adds_nothing() -> None:
    _once()
    importlib.reload(hf_ctxopt)
    hf_ctxopt.register()
    _once()


def test_register_unregister_register() -> None:
    original, model = _original(), build("llama")
    for _ in range(3):
        hf_ctxopt.unregister()
        hf_ctxopt.unregister()
        assert getattr(GenerationMixin, HOOK) is original
        with pytest.raises(ValueError, match="ctx_paged"):
            model.generate(IDS, max_new_tokens=2, cache_implementation="ctx_paged")
        hf_ctxopt.register()
        _once()
        assert _cache_of(model, cache_implementation="ctx_paged") == "PagedCache"
        assert _original() is original


def test_unregistering_restores_every_registry(fresh: dict[str, Any]) -> None:
    """Compared with what transformers had before it ever met hf_ctxopt, the method by its identity."""
    (changed, caches), before, after = fresh["after everything"]
    assert changed
    assert caches == CACHES
    assert before == after


@pytest.mark.parametrize("name", ["ctx_pagd", "ctx_", "CTX_PAGED", "ctxopt", ""])
def test_unknown_names_are_still_refused(name: str) -> None:
    for switch in (hf_ctxopt.register, hf_ctxopt.unregister):
        switch()
        if name:
            with pytest.raises(ValueError, match="cache_implementation"):
                GenerationConfig(cache_implementation=name)
        with pytest.raises(ValueError, match="cache"):
            build("llama").generate(IDS, max_new_tokens=1, cache_implementation=name)


@pytest.mark.parametrize("name", NAMES)
def test_our_names_are_accepted_while_registered(name: str) -> None:
    assert GenerationConfig(cache_implementation=name).cache_implementation == name
    hf_ctxopt.unregister()
    with pytest.raises(ValueError, match=name):
        GenerationConfig(cache_implementation=name)


@pytest.mark.parametrize("order", ["before", "off and on"])
def test_imported_before_transformers(fresh: dict[str, Any], order: str) -> None:
    assert fresh[order] == CACHES


def test_imported_after_transformers(fresh: dict[str, Any]) -> None:
    new_modules, caches = fresh["after transformers"]
    assert new_modules == []
    assert caches == CACHES


def test_edited_modules_have_their_own_loader_again(fresh: dict[str, Any]) -> None:
    assert set(fresh["loaders"]) == {"SourceFileLoader"}


def test_unregistered_before_transformers_is_loaded(fresh: dict[str, Any]) -> None:
    off, caches = fresh["off, then on after generation"]
    assert not set(NAMES) & set(off["names"])
    assert "ctxopt" not in {**off["attention"], **off["mask"]}
    assert caches == CACHES


def test_the_import_alone_loads_neither_torch_nor_transformers() -> None:
    out, _ = run("import sys, hf_ctxopt; print({'torch', 'transformers'} & set(sys.modules))")
    assert out.strip() == "set()"


def test_the_import_is_cheap() -> None:
    """Below 50 ms beyond torch and transformers, and no further module of theirs is loaded for it."""
    code = (
        "import gc, sys, torch, transformers.generation.utils\n"
        "gc.freeze()\n"  # a collection of all their objects takes 160 ms, wherever it falls
        "before = set(sys.modules)\n"
        "import hf_ctxopt\n"
        "print([n for n in set(sys.modules) - before if n.split('.')[0] in ('torch', 'transformers')])\n"
    )
    found: list[dict[str, int]] = []
    for _ in range(5):  # the least of a few: a busy machine may take the processor away in the middle of an import
        out, times = run(code, "-X", "importtime")
        assert out.strip() == "[]"
        rows = [line.removeprefix("import time:").split("|") for line in times.splitlines() if "import time:" in line]
        own = {name.strip(): int(spent) for spent, _, name in rows if name.strip().split(".")[0] == "hf_ctxopt"}
        assert "hf_ctxopt" in own
        assert "hf_ctxopt.caches" not in own
        found.append(own)
        if sum(own.values()) < 50_000:  # microseconds
            return
    raise AssertionError(found)


@pytest.mark.parametrize("polite", [True, False], ids=["functools.wraps", "plain"])
def test_a_later_wrapper_of_somebody_else_survives(polite: bool) -> None:
    """Unregistering takes our part out of the chain and leaves theirs; registering again puts ours back."""
    ours, calls = getattr(GenerationMixin, HOOK), []

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return ours(self, *args, **kwargs)

    theirs = functools.wraps(ours)(prepare) if polite else prepare
    model = hf_ctxopt.patch_model(build("llama"))
    setattr(GenerationMixin, HOOK, theirs)
    try:
        hf_ctxopt.unregister()
        assert getattr(GenerationMixin, HOOK) is theirs
        model.set_attn_implementation("sdpa")
        assert _cache_of(model) == "DynamicCache"
        hf_ctxopt.register()
        assert _cache_of(model, cache_implementation="ctx_sink") == "SinkCache"
        assert len(calls) == 2
    finally:
        setattr(GenerationMixin, HOOK, ours)
    _back_to_normal(_original())


def test_an_earlier_wrapper_with_any_signature_is_no_reason_to_fail() -> None:
    """Other libraries wrap with `*args, **kwargs`; that says nothing about transformers having changed."""
    hf_ctxopt.unregister()
    original = getattr(GenerationMixin, HOOK)

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    setattr(GenerationMixin, HOOK, theirs)
    try:
        hf_ctxopt.register()
        assert _cache_of(build("llama"), cache_implementation="ctx_paged") == "PagedCache"
        hf_ctxopt.unregister()
        assert getattr(GenerationMixin, HOOK) is theirs
    finally:
        setattr(GenerationMixin, HOOK, original)
    _back_to_normal(original)


def test_registering_again_repairs_a_method_that_somebody_put_back() -> None:
    """Else our names would pass the check and silently give a DynamicCache."""
    original, model = _original(), build("llama")
    setattr(GenerationMixin, HOOK, original)
    hf_ctxopt.register()
    assert _cache_of(model, cache_implementation="ctx_paged") == "PagedCache"
    _back_to_normal(original)


def _back_to_normal(original: Callable[..., Any]) -> None:
    """Nothing of a test with foreign wrappers stays, and registration works as ever."""
    hf_ctxopt.unregister()
    assert getattr(GenerationMixin, HOOK) is original
    hf_ctxopt.register()
    _once()
