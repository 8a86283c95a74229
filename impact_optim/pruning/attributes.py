"""Integer attributes of modules (``out_channels``, ``num_heads``): which count units, and follow a cut.

An operator says so of its own layer's. Of others only the number and the words of the name tell: a guess, which holds
only if the model, rehearsed, does after a cut what it did before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SizeKey = tuple[str, str]
"""Qualified name of a module, and an integer attribute of it."""
Works = Callable[[dict[SizeKey, Tensor], list[str]], bool]
"""Whether a model does what it did, if attributes count the units of labels, and units of some groups are cut."""

_TELLING = {"heads", "nhead", "channels", "chans", "features", "planes", "filters", "units"}
_VAGUE = {"head", "dim", "dims", "size", "width", "hidden", "inner", "model", "c", "ch", "nf"}
_OTHER = {"kernel", "stride", "group", "groups"}
_OF_LAYERS = ("groups", "num_groups", "num_parameters")


def surely_counts_units(attribute: str) -> bool:
    """Whether the name of an attribute says that it counts units."""
    words = set(attribute.lower().strip("_").split("_"))
    return not words.isdisjoint(_TELLING) and words.isdisjoint(_OTHER)


def may_count_units(attribute: str) -> bool:
    """Whether the name of an attribute leaves it open that it counts units."""
    words = set(attribute.lower().strip("_").split("_"))
    return not words.isdisjoint(_TELLING | _VAGUE) and words.isdisjoint(_OTHER)


def may_shrink(attribute: str, value: Any) -> bool:
    """Whether a cut, or code that follows one, may make an attribute smaller."""
    return isinstance(value, list | tuple) or may_count_units(attribute) or attribute in _OF_LAYERS


# ------------------------------------------------------------------------------- which follow


def settled_sizes(
    counts: Mapping[SizeKey, list[Tensor | None]],
    known: set[SizeKey],
    owners: Callable[[Tensor], list[str]],
    works: Works,
) -> dict[SizeKey, Tensor]:
    """What each attribute counts, by what the code of the model bears.

    Args:
        counts: attribute -> the labels that it may count, ``None`` for a size that stays.
        known: attributes of which an operator says so.
        owners: the groups whose units are among labels.
        works: asked for every guess.

    Returns:
        Attribute -> labels that it counts, of those that follow a cut.
    """
    options = {key: [labels for labels in found if labels is not None] for key, found in counts.items()}
    sizes = {key: found[0] for key, found in options.items() if len(found) == 1}
    for module, attribute in list(sizes):
        # As many heads as a head is wide: it is the heads that are cut.
        others = [name for owner, name in counts if owner == module and "heads" in name]
        if "head" in attribute and "heads" not in attribute and others:
            del sizes[module, attribute]
    for key, found in options.items():
        if len(found) > 1:
            names = owners(torch.cat(found))
            # Alone as well: what two groups lose may be the same number.
            sets = [names, *([name] for name in names if len(names) > 1)]
            for labels in (None, *found):
                tried = sizes if labels is None else {**sizes, key: labels}
                if all(works(tried, some) for some in sets):
                    sizes = tried
                    break
    # Others have the same number by chance: what has no telling name, and the code does not need, stays.
    together: dict[tuple[str, ...], list[SizeKey]] = {}
    for key, labels in sizes.items():
        if key not in known:
            together.setdefault(tuple(owners(labels)), []).append(key)
    stay = set[SizeKey]()
    decided: dict[frozenset[Any], set[Any]] = {}
    for groups, keys in together.items():
        # Layers that differ in their numbers only decide alike: a deep model has hundreds of such attributes.
        kinds: dict[SizeKey, tuple[Any, ...]] = {
            key: (numberless(key[0]), key[1], None in counts[key], *(_within(name, key[0]) for name in groups))
            for key in keys
        }
        alike = frozenset([*kinds.values(), *map(numberless, groups)])
        if alike not in decided:
            decided[alike] = _staying(kinds, sizes, list(groups), works)
        stay.update(key for key in keys if kinds[key] in decided[alike])
    return {key: labels for key, labels in sizes.items() if key not in stay}


def _staying(
    kinds: Mapping[SizeKey, tuple[Any, ...]], sizes: dict[SizeKey, Tensor], groups: list[str], works: Works
) -> set[Any]:
    """Of kinds of attributes (layer, name, whether it is also the number of what stays, ...), those that stay."""

    def bears(stay: set[Any]) -> bool:
        return works({key: labels for key, labels in sizes.items() if kinds.get(key) not in stay}, groups)

    every = set(kinds.values())
    vague = {kind for kind in every if not surely_counts_units(kind[1])}
    doubtful = {kind for kind in every if kind[2]}
    starts = [vague, set[Any](), vague | doubtful, every, doubtful, *(doubtful - {k} for k in doubtful)]
    stay = set(next((start for start in [*starts, *({k} for k in every)] if bears(start)), ()))
    for kind in vague - stay:
        if bears({*stay, kind}):
            stay.add(kind)
    return stay


def numberless(name: str) -> str:
    """A qualified name without the numbers of layers."""
    return re.sub(r"\d+", "", name)


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


# ------------------------------------------------------------------------------- what a model has


def integer_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name -> attribute -> value, of the attributes that are integers, or lists or tuples of integers."""
    attributes = {}
    for name, module in model.named_modules():
        found = {key: value for key, value in vars(module).items() if is_integral(value)}
        if found:
            attributes[name] = found
    return attributes


def set_integer_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives the modules of a model the values of :func:`integer_attributes`, for the attributes that they have."""
    for name, module in model.named_modules():
        for key, value in attributes.get(name, {}).items():
            old = vars(module).get(key)
            if isinstance(value, list | tuple) and isinstance(old, list | tuple):
                value = type(old)(value)  # JSON has lists only
            if is_integral(old) and old != value:
                setattr(module, key, value)


def is_integral(value: Any) -> bool:
    """Whether a value is an integer, or a list or tuple of such."""
    if isinstance(value, list | tuple):
        return all(map(is_integral, value))
    return isinstance(value, int) and not isinstance(value, bool)
