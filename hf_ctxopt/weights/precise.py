"""Modules that must not be packed, because their model's code looks at the weight itself.

Some models cast activations to `layer.weight.dtype` (T5's `wo`, the heads of Mamba): packed, that is uint8, and the
activations would be lost. Others multiply with the weight past the layer, or take rows of it. Nothing in a config
tells of it, so the code is read.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .ties import with_tied

# What may be asked of a weight that is packed too; its dtype has a rule of its own.
_HARMLESS = frozenset({"shape", "device", "size", "requires_grad", "is_meta", "dtype"})
# Methods that a step does not come through: they make or tie weights, or find tokens from embeddings given alone.
_ELSEWHERE = re.compile(r"init|tie_|resize|reverse_embedding|get_per_layer_inputs")
# Calls that do not read values (`isinstance`), or only where a Mamba is trained by its own package's fused kernel,
# which keeps the large projections of all Mambas dense for a step that few take: it fails there, in words of its own.
_CALLS = ("isinstance", "mamba_inner_fn")
_FUSED = "outproj_weight"
# Whose code reads a weight where a key of the text config says so, and not in most models: (class, path) -> key.
_GUARDS = {
    ("Gemma4Model", "language_model.embed_tokens"): "hidden_size_per_layer_input",
    ("BloomAttention", "dense"): "slow_but_exact",
    ("BloomMLP", "dense_4h_to_h"): "slow_but_exact",
}
# Mark of a weight that is read by way of a local name: of a block in a loop (RWKV's outputs, which are rescaled), or
# of an argument (DeBERTa's embedding). Any module may be meant that is called so, or as what follows the name.
_ANYWHERE = "*"
_LIBRARIES = ("torch", "builtins", "transformers.modeling_utils", "transformers.generation", "transformers.utils")


def left_dense(model: nn.Module) -> set[str]:
    """Names of modules to leave dense whatever the rules say, with those that share their tensors.

    These are modules whose weight, or its dtype unless it minds uint8, the code of a module above them reads, and
    those that the model keeps in float32 (`_keep_in_fp32_modules`).
    """
    names = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    # As transformers finds them: whole parts of a name.
    exact = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:$|\.)" for name in sorted(names)) or r"(?!)")
    leaves = {name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Embedding | Conv1D)}
    found = {name for name in leaves if exact.search(name)}
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for owner, module in model.named_modules():
        if next(module.children(), None) is None:
            continue
        kind: Any = type(module)
        for path in _read(kind):
            key = _GUARDS.get((kind.__name__, path))
            if path.startswith(_ANYWHERE):
                found.update(name for name in leaves if f".{name}".endswith(path.removeprefix(_ANYWHERE)))
            elif key is None or getattr(text, key, True):
                found.add(f"{owner}.{path}" if owner else path)
    return with_tied(model, found & leaves)


@functools.lru_cache(1024)
def _read(kind: type[Any]) -> frozenset[str]:
    """Paths, from a module of `kind` or with `_ANYWHERE`, of the modules whose weight its code uses itself, or whose
    dtype without minding uint8."""
    found: set[str] = set()
    for code in _sources(kind):
        read = set(re.findall(r"self\.([\w.]+)\.weight\.dtype", code))
        minded = set(re.findall(r"self\.([\w.]+)\.weight\.dtype(?: != torch\.uint8|\)?\.is_floating_point)", code))
        found |= read - minded | set(_used(code))
    return frozenset(found)


def _sources(kind: type[Any]) -> Iterator[str]:
    """The source of each method of `kind` that a step may come through. None where there is no source:
    `gguf_matmul` refuses such activations when they come."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith(_LIBRARIES):
            continue
        for name, method in vars(base).items():
            if name in seen or not inspect.isfunction(method) or _ELSEWHERE.search(name):
                continue
            seen.add(name)
            try:
                code = textwrap.dedent(inspect.getsource(method))
            except (OSError, TypeError):
                continue
            if ".weight" in code:
                yield code


def _used(code: str) -> Iterator[str]:
    """Paths of the modules whose weight's values `code` reads, past the layer's own forward."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a lambda in the middle of a line
        return
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        path = ast.unparse(node.value)
        if _harmless(above[node]) or not re.fullmatch(r"[\w.]+", path):
            continue
        name, _, rest = path.partition(".")
        if name != "self":
            yield f"{_ANYWHERE}.{rest or name}"
        elif rest:
            yield rest


def _harmless(use: ast.AST) -> bool:
    if isinstance(use, ast.Attribute):
        return use.attr in _HARMLESS
    if isinstance(use, ast.keyword):
        return use.arg == _FUSED
    return isinstance(use, ast.Call) and ast.unparse(use.func) in _CALLS
