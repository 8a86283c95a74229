"""The arms of the study: what each of them passes to the optimizer."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..impact_adamw import ImpactAdamW
from ..impact_sgd import ImpactSGD
from ..options import OPTIONS, is_number

BASELINE, ADAMW, GRADUAL = "baseline", "adamw", "gradual-magnitude"

ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    ADAMW: {},
    "dropconnect": {"importance": "uniform"},
    "impacts": {"importance": "lookahead", "simplex": "tensor", "kl_weight": 0.0},
    "impacts+regularization": {"importance": "lookahead", "simplex": "tensor", "kl_weight": 1.0},
    "lookahead": {"importance": "lookahead"},
    "hypergradient": {"importance": "hypergradient"},
    "saliency": {"importance": "saliency"},
    "fisher": {"importance": "fisher"},
    "magnitude": {"importance": "magnitude"},
    "drop-important": {"importance": "saliency", "drop": "important"},
    GRADUAL: {"importance": "uniform", "drop_rate": 0.0},
}
"""Arms by name: the options of :class:`Impact` that make the arm what it is.

``impacts`` are the source's own, without and with KL: the loss of the same batch after the step, a simplex per tensor.
``baseline`` is the base alone, one of :data:`BASES`, and ``adamw`` is ``torch.optim.AdamW`` whatever the base;
``gradual-magnitude`` is the base that loses its smallest weights on the way to a final sparsity, and the same as
``baseline`` without one.
"""

DEFAULT_ARMS = ("baseline", "dropconnect", "impacts", "impacts+regularization")
"""The four that the source compares."""

# Masks that come to 0 and 1 on the way to a sparse network: importances that spread, and weights that are not enlarged.
# In one simplex for all, the first layer of an MLP would take more than half of what is left, and do worse by it.
RAMPED = {"rescale": "none", "importance_lr": 0.03, "kl_weight": 0.5, "simplex": "tensor"}
SGD = "sgd"
Masked = ImpactSGD | ImpactAdamW
BASES: dict[str, tuple[type[Optimizer], type[Masked]]] = {
    SGD: (torch.optim.SGD, ImpactSGD),
    ADAMW: (torch.optim.AdamW, ImpactAdamW),
}
"""What takes the steps, alone and with importances."""
LEARNING_RATES = {SGD: 0.05, ADAMW: 0.003}
"""Where to begin."""
_BASE_OPTIONS = {
    SGD: ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    ADAMW: ("lr", "betas", "eps", "weight_decay", "amsgrad"),
}
_OWN_OPTIONS = ("foreach", "fused", *(o for o in OPTIONS if o != "seed"), "simplex")
SETTABLE = (*dict.fromkeys(_BASE_OPTIONS[SGD] + _BASE_OPTIONS[ADAMW]), *_OWN_OPTIONS)
"""Options that :func:`arm_options` accepts overrides of. ``simplex`` is ``"group"``, one for all weights together, or
``"tensor"``, which puts every parameter in a group of its own."""


def arm_options(
    arms: Sequence[str], common: Mapping[str, Any], overrides: Sequence[str] = (), *, to_be_sparse: bool = False
) -> dict[str, dict[str, Any]]:
    """The optimizer's keyword arguments for each arm.

    Later ones win: ``common``; overrides for all arms; what makes the arm what it is; overrides for the one arm.

    Args:
        arms: names out of :data:`ARMS`.
        common: options for all arms, such as ``{"lr": 0.1}``; ``"base"`` is one of :data:`BASES`, by default SGD.
        overrides: ``"OPTION=VALUE"`` for all arms, ``"ARM.OPTION=VALUE"`` for one.
        to_be_sparse: whether the arms are given a final sparsity. Those with importances then begin from options that
            suit a ramp of the drop rate: ``rescale="none"``, importances that spread further, and a simplex per tensor.

    Raises:
        ValueError: an unknown arm or option, or a value that the optimizer does not take.

    Example:
        >>> arm_options(["fisher"], {"lr": 0.1}, ["fisher.lr=0.2"])
        {'fisher': {'lr': 0.2, 'importance': 'fisher'}}
    """
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"there is no arm {arm!r}; choose from {', '.join(ARMS)}")
    for_all: dict[str, Any] = {}
    for_one: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
    for override in overrides:
        key, equals, text = override.partition("=")
        arm, dot, name = key.rpartition(".")
        if not equals:
            raise ValueError(f"cannot read the override {override!r}: write OPTION=VALUE or ARM.OPTION=VALUE")
        if dot and arm not in ARMS:
            raise ValueError(f"{override!r} is for an arm {arm!r}, which does not exist; choose from {', '.join(ARMS)}")
        if name not in SETTABLE:
            raise ValueError(f"{override!r} sets {name!r}, which is no option; choose from {', '.join(SETTABLE)}")
        (for_one[arm] if dot else for_all)[name] = _value(text)
    ramped = [arm for arm in arms if to_be_sparse and ARMS[arm].get("importance", "uniform") != "uniform"]
    options = {
        arm: {**common, **(RAMPED if arm in ramped else {}), **for_all, **ARMS[arm], **for_one[arm]} for arm in arms
    }
    base = common.get("base", SGD)
    for arm, given in options.items():
        own = {BASELINE: _BASE_OPTIONS[base], ADAMW: ("lr", "weight_decay")}
        taken = own.get(arm, (*_BASE_OPTIONS[base], *_OWN_OPTIONS))
        for name in (*for_one[arm], *for_all):
            if arm not in own and name not in taken:
                raise ValueError(f"arm {arm}: {name} is no option of {BASES[base][1].__name__}")
        options[arm] = {name: value for name, value in given.items() if name in taken}
        if base != SGD and arm != ADAMW:
            options[arm]["base"] = base
    if to_be_sparse:
        if ADAMW in options:
            raise ValueError(f"arm {ADAMW} cannot be made sparse: leave it or the final sparsity out")
        for arm in arms:  # the ramp would drop what it then keeps
            if options[arm].get("drop") == "important":
                raise ValueError(f"arm {arm} cannot be made sparse: it drops the important; leave it out")
        if BASELINE in options:  # the same trajectory, of an optimizer that can
            options[BASELINE].update(ARMS[GRADUAL])
    for arm in arms:  # a wrong value shows now, not after the arms before it have trained
        for name in ("lr", "momentum", "dampening", "weight_decay"):
            if not is_number(value := options[arm].get(name, 0.0)):
                raise ValueError(f"arm {arm}: Invalid {name}: {value!r}; it must be a number")
        try:
            build_optimizer(arm, nn.Linear(2, 2), options[arm], seed=0)
        except (ValueError, TypeError) as error:
            raise ValueError(f"arm {arm}: {error}") from error
    return options


def build_optimizer(arm: str, model: nn.Module, options: Mapping[str, Any], seed: int) -> Optimizer:
    """The optimizer of an arm, attached to the model.

    Raises:
        ValueError: an option is out of range.
    """
    options = dict(options)
    plain, masked = BASES[ADAMW if arm == ADAMW else options.pop("base", SGD)]
    if arm == ADAMW or (arm == BASELINE and "importance" not in options):
        return plain(model.parameters(), **options)
    if (simplex := options.pop("simplex", "group")) not in ("group", "tensor"):
        raise ValueError(f"Invalid simplex: {simplex!r}; choose 'group' or 'tensor'")
    if simplex == "group":
        return masked(model, **options, seed=seed)
    optimizer = masked([{"params": [p]} for p in model.parameters()], **options, seed=seed)
    optimizer.attach(model)
    return optimizer


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
