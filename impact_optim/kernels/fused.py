"""How a parameter group uses the kernels: for its masks, and for its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..layout import memory_order
from ..masks import KernelDraw
from ..signals import SIGNALS, Signal, fisher, hypergradient, magnitude, saliency
from ..simplex import fill_target
from . import cpu
from .bases import Base, base_of

if TYPE_CHECKING:
    from ..importances import Simplex

_CODES: dict[Signal, int] = {saliency: 1, fisher: 2, magnitude: 3, hypergradient: 4}


class Weights(Protocol):
    """The weights of one parameter group as the kernels of a device take them."""

    dtype: torch.dtype
    flat: Tensor | None
    """Their log-importances, float32, one dimension."""

    def set_importances(self, flat: Tensor) -> None: ...

    def group(self, **fields: Any) -> Any:
        """What holds for all tensors of a group."""

    def copy(self, group: Any) -> Any: ...

    def set_level(self, group: Any, mean: float) -> None:
        """Sets the level at which min(1, c·w) has this mean over the weights that live."""

    def factor(self, group: Any, param: Tensor) -> Tensor: ...

    def masked(self, group: Any, param: Tensor) -> Tensor: ...

    def step(
        self,
        group: Any,
        tensors: Mapping[str, Sequence[Tensor | None]],
        masked: Sequence[bool],
        first: Sequence[bool],
        scale: Tensor | float,
    ) -> Tensor | float: ...


def kernels_for(members: Sequence[Tensor], is_wanted: bool = False) -> Any:
    """The module of kernels for some weights; ``None`` if there is none.

    Raises:
        RuntimeError: it is wanted, the weights fit it, and it cannot be had.
    """
    if not fits(members):
        return None
    if members[0].device.type == "cuda":
        if find_spec("triton") is not None:
            from . import gpu

            return gpu
        lacks = "Triton: pip install triton"
    elif cpu.library() is not None:
        return cpu
    else:
        lacks = "a C++ compiler: install g++ or clang++"
    if is_wanted:
        raise RuntimeError(f"fused=True needs {lacks}, or pass fused=None")
    return None


def fits(members: Sequence[Tensor]) -> bool:
    """Whether the kernels can work on some weights: of one dtype that they know, and without gaps in memory."""
    return bool(members) and all(
        p.dtype is members[0].dtype
        and p.dtype in cpu.DTYPES
        and p.device == members[0].device
        and p.device.type in ("cpu", "cuda")
        and p.untyped_storage().device.type == p.device.type  # a fake tensor has no memory
        and (p.is_contiguous() or p.permute(memory_order(p)).is_contiguous())
        for p in members
    )


def draw(simplex: Simplex, step: int, stream: int) -> KernelDraw | None:
    """The masks of a step; ``None`` where the tensor code is to draw them."""
    group = simplex.group
    if group["sampling"] != "bernoulli" or not simplex.normalized.isdisjoint(simplex.members):
        return None
    weights = simplex.weights()
    if weights is None:
        return None
    masks = weights.group(
        holds_zeros=group["hold_zeros"],
        drops_important=group["drop"] == "important",
        keep_floor=group["keep_floor"],
        divisor=simplex.smallest_divisor(),
        seed=group["seed"],
        step=step & 0xFFFFFFFF,
        group=simplex.number,
        stream=stream,
    )
    target = fill_target(group["drop_rate"], group["keep_floor"], group["drop"])
    if simplex.flat is None or group["importance"] == "uniform" or not 0.0 < target < 1.0:
        masks.is_constant, masks.level = True, 1.0 - group["drop_rate"]
    else:
        weights.set_level(masks, target)
    return KernelDraw(weights, masks)


@dataclass
class FusedStep:
    """A step of a parameter group that a kernel is going to take."""

    simplex: Simplex
    weights: Weights
    draw: KernelDraw | None
    signal: int
    base: Base
    grads: list[Tensor]
    last_steps: list[Tensor | None]
    masked: list[bool]

    @property
    def takes_base_step(self) -> bool:
        """Whether the step of the base is part of it."""
        return self.base.rule in (cpu.SGD, cpu.ADAMW)

    def run(self) -> dict[Tensor, Tensor | None]:
        """Takes the step.

        Returns:
            What stands for the gradient of each weight while the base steps: the masked gradient, or ``None`` where its
            step has been taken.
        """
        simplex, group, rule = self.simplex, self.simplex.group, self.base.rule
        tensors: dict[str, list[Tensor | None]] = {"grad": list(self.grads), **self.base.tensors}
        if rule == cpu.GRADIENT:
            tensors["out"] = [torch.empty_like(p) for p in simplex.members]
        if group["importance"] == "hypergradient" and self.takes_base_step:
            for i, p in enumerate(simplex.members):
                if self.last_steps[i] is None:
                    self.last_steps[i] = simplex.optimizer.state[p]["last_step"] = torch.zeros_like(p)
        tensors["last_step"] = self.last_steps
        options = {**self.base.options, "rule": rule, "maximize": bool(group.get("maximize"))}
        mirror(simplex, self.weights, self.signal, tensors, self.draw, options, self.masked, self.base.first)
        if self.takes_base_step:
            return dict.fromkeys(simplex.members)
        return dict(zip(simplex.members, tensors.get("out", tensors["grad"]), strict=True))


def plan(
    simplex: Simplex, grads: Mapping[Tensor, Tensor], masked: set[Tensor], may_take_base_step: bool
) -> FusedStep | None:
    """The step of a parameter group by a kernel; ``None`` where the tensor code is to take it.

    Args:
        grads: the dense gradients.
        masked: the weights whose gradient has come through the mask.
        may_take_base_step: whether the kernel may take the step of the base, too.
    """
    group, members = simplex.group, simplex.members
    name = group["importance"]
    signal = 0 if name in ("uniform", "lookahead") else _CODES.get(SIGNALS[name])
    weights = simplex.weights()
    if weights is None or signal is None or not all(p in grads and _fits(grads[p], p) for p in members):
        return None
    found = {simplex.mask.draws[p] for p in masked} if simplex.mask is not None else set()
    drawn = next(iter(found), None)
    if len(found) > 1 or not (drawn is None or (isinstance(drawn, KernelDraw) and drawn.is_of(weights))):
        return None  # the layout has changed since
    last_steps: list[Tensor | None] = [None] * len(members)
    if name == "hypergradient":
        last_steps = [simplex.optimizer.state.get(p, {}).get("last_step") for p in members]
        if all(last is None for last in last_steps):
            signal = 0
        elif any(
            last is None or not (_fits(last, p) and last.stride() == p.stride())
            for last, p in zip(last_steps, members, strict=True)
        ):
            return None
    changes_gradients = bool(masked) or group["hold_zeros"]
    base = base_of(simplex.optimizer, group, members) if may_take_base_step and changes_gradients else None
    if base is None:
        base = Base(cpu.GRADIENT if changes_gradients else cpu.IMPORTANCES, {}, {}, [False] * len(members))
    ordered = [laid_out_like(p, grads[p]) for p in members]
    return FusedStep(simplex, weights, drawn, signal, base, ordered, last_steps, [p in masked for p in members])


def update(simplex: Simplex, grads: Mapping[Tensor, Tensor], steps: Mapping[Tensor, Tensor] | None) -> bool:
    """The mirror step alone; whether a kernel has taken it. See :meth:`Simplex.update`."""
    members, signal = simplex.members, _CODES.get(SIGNALS[simplex.group["importance"]])
    weights = simplex.weights()
    given = [grads] if steps is None else [grads, steps]
    if weights is None or signal is None or not all(p in of and _fits(of[p], p) for of in given for p in members):
        return False
    tensors: dict[str, list[Tensor | None]] = {"grad": [laid_out_like(p, grads[p]) for p in members]}
    if steps is not None:
        tensors["last_step"] = [laid_out_like(p, steps[p]) for p in members]
    none = [False] * len(members)
    mirror(simplex, weights, signal, tensors, None, {"rule": cpu.IMPORTANCES}, none, none)
    return True


def mirror(
    simplex: Simplex,
    weights: Weights,
    signal: int,
    tensors: Mapping[str, list[Tensor | None]],
    drawn: KernelDraw | None,
    options: Mapping[str, float],
    masked: list[bool],
    first: list[bool],
) -> None:
    """The mirror step, and what ``options["rule"]`` says."""
    group = simplex.group
    step = weights.group() if drawn is None else weights.copy(drawn.group)
    step.signal, step.holds_zeros = signal, group["hold_zeros"]
    for key, value in options.items():
        setattr(step, key, int(value) if key in ("rule", "maximize", "nesterov") else value)
    step.shrink = 1.0 / (1.0 + group["importance_lr"] * group["kl_weight"])
    step.rate = group["importance_lr"] * step.shrink
    if signal:
        simplex.start()
    group["signal_scale"] = weights.step(step, tensors, masked, first, group["signal_scale"])


def _fits(tensor: Tensor, param: Tensor) -> bool:
    return tensor.shape == param.shape and tensor.dtype is param.dtype and tensor.device == param.device


def laid_out_like(param: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy that lies in memory as the parameter does."""
    tensor = tensor.detach()
    return tensor if tensor.stride() == param.stride() else torch.empty_like(param).copy_(tensor)
