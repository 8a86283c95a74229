"""What the kernels have to know of the optimizers whose step they take: options and state of SGD and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from . import cpu


class Base(NamedTuple):
    """The step of a base optimizer, as a kernel takes it."""

    rule: int
    options: dict[str, float]
    tensors: dict[str, list[Tensor | None]]
    """By the name of a field of the kernels, that tensor for each parameter."""
    first: list[bool]
    """Of each parameter, whether its first moment is still to begin."""


def base_of(optimizer: Optimizer, group: dict[str, Any], params: Sequence[Tensor]) -> Base | None:
    """The step of a known optimizer, with the state that it needs; ``None`` if the kernels cannot take it."""
    of = next((of for base, of in _BASES.items() if isinstance(optimizer, base)), None)
    if of is None or group.get("differentiable") or group.get("capturable"):
        return None
    if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in (group["lr"], group["weight_decay"])):
        return None  # to read it would wait for the device
    return of([optimizer.state.get(p, {}) for p in params], optimizer, group, params)


def _sgd(
    states: list[dict[str, Any]], optimizer: Optimizer, group: dict[str, Any], params: Sequence[Tensor]
) -> Base | None:
    options = {name: float(group[name]) for name in ("lr", "weight_decay", "momentum", "dampening", "nesterov")}
    if options["momentum"] == 0:
        return Base(cpu.SGD, options, {}, [False] * len(params))
    buffers = [state.get("momentum_buffer") for state in states]
    if not all(map(_is_alike, buffers, params)):
        return None
    first = [buffer is None for buffer in buffers]
    for i, p in enumerate(params):
        if first[i]:
            buffers[i] = optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return Base(cpu.SGD, options, {"first_moment": buffers}, first)


def _adamw(
    states: list[dict[str, Any]], optimizer: Optimizer, group: dict[str, Any], params: Sequence[Tensor]
) -> Base | None:
    options = {name: float(group[name]) for name in ("lr", "weight_decay", "eps")}
    options["beta1"], options["beta2"] = map(float, group["betas"])
    names = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
    if group["amsgrad"]:
        names["largest_moment"] = "max_exp_avg_sq"
    for state, p in zip(states, params, strict=True):
        if not state:
            continue
        steps = state.get("step")
        if not (
            isinstance(steps, Tensor) and steps.dtype is torch.float32 and steps.device.type in ("cpu", p.device.type)
        ):
            return None
        if not all(name in state and _is_alike(state[name], p) for name in names.values()):
            return None
    for i, p in enumerate(params):
        if not states[i]:
            states[i] = optimizer.state[p]
            states[i]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            states[i].update((name, torch.zeros_like(p)) for name in names.values())
        elif states[i]["step"].device != p.device:  # as torch leaves it without fused=True
            states[i]["step"] = states[i]["step"].to(p.device, non_blocking=True)
    tensors: dict[str, list[Tensor | None]] = {
        field: [state[name] for state in states] for field, name in {**names, "steps": "step"}.items()
    }
    return Base(cpu.ADAMW, options, tensors, [False] * len(params))


def _is_alike(tensor: Tensor | None, param: Tensor) -> bool:
    """Whether a state tensor, if there is one, lies in memory as its parameter does: kernels go by addresses."""
    if tensor is None:
        return True
    is_like = tensor.dtype is param.dtype and tensor.device == param.device
    return is_like and tensor.shape == param.shape and tensor.stride() == param.stride()


_BASES: dict[type[Optimizer], Callable[..., Base | None]] = {SGD: _sgd, AdamW: _adamw}
