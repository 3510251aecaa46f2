"""Modules of a model that share one weight."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_LEAF = ".weight"


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of modules whose `weight` is one tensor, a list per tensor that two or more share, in the model's order.

    By what transformers will tie (`all_tied_weights_keys`, target -> source), which also holds on the meta device, and
    by the parameters themselves.
    """
    # Parameters only: a weight that is computed anew at each look has no id to go by.
    own = {name: module._parameters.get("weight") for name, module in model.named_modules()}
    order = [name for name, weight in own.items() if weight is not None]
    first: dict[str, str] = {}  # name -> a name of the same tensor, nearer the start of its chain
    owners: dict[int, str] = {}
    for name in order:
        _join(first, name, owners.setdefault(id(own[name]), name))
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target.endswith(_LEAF) and source.endswith(_LEAF):
            _join(first, target.removesuffix(_LEAF), source.removesuffix(_LEAF))
    groups: dict[str, list[str]] = {}
    for name in order:
        groups.setdefault(_root(first, name), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def with_tied(model: nn.Module, names: Iterable[str]) -> set[str]:
    """`names` and all that share a tensor with one of them."""
    found = set(names)
    for group in tied_groups(model):
        if not found.isdisjoint(group):
            found.update(group)
    return found


def _root(first: dict[str, str], name: str) -> str:
    while (before := first.get(name, name)) != name:
        name = before
    return name


def _join(first: dict[str, str], one: str, other: str) -> None:
    one, other = _root(first, one), _root(first, other)
    if one != other:
        first[one] = other
