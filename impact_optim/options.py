"""The options of a parameter group, every one once: its default, its range, a line of documentation.

They are keys of the base optimizer's own ``param_groups``: a scheduler may move them, a group may have its own, and a
checkpoint holds them. Two keys beside them are state: ``mask_step`` counts the steps, so that every step draws masks of
its own, and ``signal_scale`` is the running mean of the size of the signal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from numbers import Integral, Real
from textwrap import fill
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from .signals import SIGNALS


class ImpactOptions(TypedDict, total=False):
    """The options that the optimizers of this package take beside those of their base, for type checkers."""

    drop_rate: float
    importance: str
    importance_lr: float
    kl_weight: float
    drop: str
    rescale: str
    keep_floor: float
    sampling: str
    hold_zeros: bool
    seed: int


class Option(NamedTuple):
    """One option: its default, whether a value is in range, what the range is, and what the option does."""

    default: Any
    fits: Callable[[Any], bool]
    range: str
    doc: str


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, of Python or of NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, of Python or of NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, f"it must be one of {list(choices)}"


def _is_signal(value: Any) -> bool:
    return isinstance(value, str) and (value == "uniform" or value in SIGNALS)


_share = (lambda value: is_number(value) and 0.0 <= value < 1.0, "it must lie in [0, 1)")
_not_negative = (lambda value: is_number(value) and value >= 0.0, "it must be finite and not negative")

OPTIONS: dict[str, Option] = {
    "drop_rate": Option(0.1, *_share, "expected share of the weights of a group that a mask drops"),
    "importance": Option(
        "saliency",
        _is_signal,
        "it must be 'uniform' or a name in impact_optim.SIGNALS",
        "the signal h, a name in :data:`impact_optim.SIGNALS`, or ``'uniform'`` for classic DropConnect, which keeps "
        "no importances",
    ),
    "importance_lr": Option(0.01, *_not_negative, "η, the step size of the mirror descent; unitless"),
    "kl_weight": Option(
        10.0,
        *_not_negative,
        "λ, the temperature: a constant signal u leads to w ∝ exp(-u/λ), and 0 lets one weight take everything",
    ),
    "drop": Option(
        "unimportant",
        *_one_of("unimportant", "important"),
        "what is dropped first, ``'unimportant'`` or, to see that it hurts, ``'important'``",
    ),
    "rescale": Option(
        "inverse",
        *_one_of("inverse", "none"),
        "``'inverse'`` divides kept weights by π, so that the dense weights are what one evaluates (by "
        "``(1 - drop_rate) / 10`` where π is smaller still); ``'none'`` leaves them, and :meth:`expected` gives what "
        "to evaluate",
    ),
    "keep_floor": Option(0.01, *_share, "f, the smallest keep probability, at most ``1 - drop_rate``"),
    "sampling": Option(
        "bernoulli",
        *_one_of("bernoulli", "exact"),
        "``'bernoulli'``, or ``'exact'`` for masks that drop exactly ``round(drop_rate * n)`` weights",
    ),
    "hold_zeros": Option(
        False,
        lambda value: isinstance(value, bool),
        "it must be True or False",
        "keep every weight zero that is exactly zero before a step, and its state with it; :meth:`sparsify` sets it",
    ),
    "seed": Option(
        0,
        lambda value: is_integer(value) and 0 <= value < 2**63,
        "it must be an integer in [0, 2**63)",
        "of the masks. Every data-parallel rank needs the same; the members of an ensemble want different ones",
    ),
}
"""All options by name."""

STATE: dict[str, Any] = {"mask_step": 0, "signal_scale": 0.0}
"""What a group holds beside the options of its base and of this package, and how it starts."""

DEFAULTS: dict[str, Any] = {**{name: option.default for name, option in OPTIONS.items()}, **STATE}


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a group: those given, and the defaults of the others.

    Raises:
        TypeError: an unknown option.
        ValueError: a value out of range.
    """
    for name in given:
        if name not in OPTIONS:
            raise TypeError(f"unexpected option {name!r}{_suggestion(name, OPTIONS)}")
    options = {**DEFAULTS, **given}
    check(options)
    return {name: plain(value) for name, value in options.items()}


def check(group: Mapping[str, Any]) -> None:
    """Raises for an option of a group that is out of range; names it, its value and what it may be."""
    values = [group[name] for name in OPTIONS]
    try:
        _check_values(*values)
    except TypeError:  # not hashable
        _check_values.__wrapped__(*values)
    step, scale = group["mask_step"], group["signal_scale"]
    if not (is_integer(step) and step >= 0):
        raise ValueError(f"Invalid mask_step: {step!r}; it counts the steps taken")
    if not (is_number(scale) or (isinstance(scale, Tensor) and scale.dim() == 0 and scale.dtype == torch.float32)):
        raise ValueError(f"Invalid signal_scale: {scale!r}; it is the running mean that a step has left")


@lru_cache(maxsize=256, typed=True)  # since every pass and every step checks all groups
def _check_values(*values: Any) -> None:
    group = dict(zip(OPTIONS, values, strict=True))
    for name, option in OPTIONS.items():
        if not option.fits(group[name]):
            raise ValueError(f"Invalid {name}: {group[name]!r}; {option.range}")
    drop_rate, keep_floor = group["drop_rate"], group["keep_floor"]
    if drop_rate > 0.0 and keep_floor > 1.0 - drop_rate + 1e-9:
        raise ValueError(
            f"keep_floor={keep_floor} is above the budget: drop_rate={drop_rate} keeps {1 - drop_rate:.6g} of the "
            "weights on average; lower one of the two"
        )


def check_keys(group: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises for a key of a parameter group that is one slip away from an option.

    Other unknown keys are the user's own, as everywhere in torch.optim.
    """
    for key in group:
        if key not in known and key not in ("params", "param_names") and (hint := _suggestion(key, known)):
            raise ValueError(f"{key!r} is no option of a parameter group{hint}")


def plain(value: Any) -> Any:
    """A number of NumPy as one of Python, which any checkpoint can hold."""
    if isinstance(value, bool | Tensor | str):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def documentation(indent: str = " " * 8) -> str:
    """The options as lines of a docstring's section ``Args``."""
    lines = (f"{name} (optional): {option.doc} (default: {option.default!r})" for name, option in OPTIONS.items())
    return "\n".join(fill(line, 120, initial_indent=indent, subsequent_indent=indent + "    ") for line in lines)


def _suggestion(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(str(name), [str(key) for key in known], n=1, cutoff=0.85)
    return f"; did you mean {close[0]!r}?" if close else ""
