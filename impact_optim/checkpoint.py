"""What may be loaded into an optimizer that keeps importances: checks before anything changes, float32 kept after."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .importances import is_weight
from .options import DEFAULTS, check
from .simplex import LOG_BOUND

_LARGEST = 2 * LOG_BOUND  # of a log-importance, before it is normalised


def checked(optimizer: Optimizer, state_dict: dict[str, Any], name: Callable[[Tensor], str]) -> dict[str, Any]:
    """A state dict that is about to be loaded; an option that a group lacks is that of the group it is loaded into.

    Raises:
        TypeError, ValueError: it does not fit, or is damaged.
    """
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            raise TypeError(
                f"state_dict[{key!r}] must be a {kind.__name__}, but is {type(state_dict.get(key)).__name__}; pass "
                f"what {type(optimizer).__name__}.state_dict() returned"
            )
    own, loaded = optimizer.param_groups, state_dict["param_groups"]
    theirs = [len(group["params"]) if isinstance(group, dict) and "params" in group else None for group in loaded]
    if theirs != [len(group["params"]) for group in own]:
        raise ValueError(
            f"the state dict has parameter groups of sizes {theirs}, the optimizer of sizes "
            f"{[len(group['params']) for group in own]}; build the optimizer with the groups it was saved with"
        )
    groups = [{**{key: mine[key] for key in DEFAULTS}, **group} for mine, group in zip(own, loaded, strict=True)]
    params: dict[Any, Tensor] = {}
    for mine, group in zip(own, groups, strict=True):
        check(group)
        for key, value in mine.items():
            if key not in optimizer.defaults:
                continue  # the user's own
            _check_value(key, value, group.get(key, value))
        params.update(zip(group["params"], mine["params"], strict=True))
    state = state_dict["state"]
    if unknown := [key for key in state if key not in params]:
        raise ValueError(f"the state dict has a state for {unknown[0]!r}, which is in none of its parameter groups")
    for key, param in params.items():
        _check_state(name(param), param, state.get(key, {}), optimizer.state.get(param, {}))
    for group in groups:
        _check_complete(group, params, state, name)
    return {**state_dict, "param_groups": groups}


def restore(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Gives the log-importances back the precision that torch's load_state_dict takes from them, the parameter's."""
    for group, own in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
        for key, param in zip(group["params"], own["params"], strict=True):
            value = loaded["state"].get(key, {}).get("log_importance")
            found = optimizer.state.get(param, {}).get("log_importance")
            # Unless a hook of the user's has changed it.
            if value is not None and found is not None and torch.equal(value.to(param.device, param.dtype), found):
                optimizer.state[param]["log_importance"] = value.to(param.device, torch.float32, copy=True)


def _check_value(key: str, own: Any, value: Any) -> None:
    """Raises unless a value of a group is of the kind that the optimizer has: a flag, a number, or numbers."""
    if isinstance(own, bool):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{key} of a parameter group must be True or False, but is {value!r}")
    elif isinstance(own, Real | Tensor):
        if isinstance(value, bool) or not isinstance(value, Real | Tensor):
            raise TypeError(f"{key} of a parameter group must be a number, but is {value!r}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{key} of a parameter group must be a number, but has shape {tuple(value.shape)}")
        if not math.isfinite(float(value)) and math.isfinite(float(own)):
            raise ValueError(f"{key} of a parameter group is {float(value)}; the state dict is damaged")
    elif isinstance(own, tuple) and (not isinstance(value, tuple | list) or len(value) != len(own)):
        raise TypeError(f"{key} of a parameter group must be {len(own)} values, but is {value!r}")


def _check_state(name: str, param: Tensor, state: Any, own: dict[str, Any]) -> None:
    if not isinstance(state, dict):
        raise TypeError(f"the state of {name} must be a dict, but is {type(state).__name__}")
    for key, value in state.items():
        mine = own.get(key)
        if value is None and mine is not None:
            raise TypeError(f"{key} of {name} must be of type {type(mine).__name__}, but is None")
        if isinstance(mine, Tensor) and mine.dim() > 0:
            if not isinstance(value, Tensor):
                raise TypeError(f"{key} of {name} must be a tensor, but is of type {type(value).__name__}")
            if value.shape != mine.shape:
                raise ValueError(
                    f"{key} of {name} has shape {tuple(value.shape)}, not {tuple(mine.shape)}; load the state of the "
                    "same model"
                )
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise TypeError(f"{key} of {name} must be a dense tensor, but its layout is {value.layout}")
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{key} of {name} is not finite; the state dict is damaged")
    for key in ("log_importance", "last_step"):
        if key in state:
            value = state[key]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"{key} of {name} must be a floating point tensor, but is {type(value).__name__}")
            if value.shape != param.shape:
                raise ValueError(
                    f"{key} of {name} has shape {tuple(value.shape)}, but the parameter {tuple(param.shape)}; load the "
                    "state of the same model"
                )
    if "log_importance" in state and state["log_importance"].abs().amax() > _LARGEST:
        raise ValueError(f"log_importance of {name} is out of range; the state dict is damaged")


def _check_complete(
    group: dict[str, Any], params: dict[Any, Tensor], state: dict[Any, Any], name: Callable[[Tensor], str]
) -> None:
    states = {key: state[key] for key in group["params"] if state.get(key) and is_weight(params[key])}
    lacking = [key for key, entries in states.items() if "log_importance" not in entries]
    if lacking and len(lacking) < len(states) and params[lacking[0]].requires_grad:
        raise ValueError(
            f"the state of {name(params[lacking[0]])} lacks log_importance, which others of its group have; the state "
            "dict is damaged"
        )
