"""Schedules of the drop rate, beside those of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from torch.optim import Optimizer

from .options import is_integer, is_number

__all__ = ["DropRateScheduler"]

_SHAPES = {"constant": 0, "linear": 1, "cubic": 3}


class DropRateScheduler:
    r"""Moves the drop rate of an optimizer with masks from where it starts to a target.

    .. math::
        r(t) = r_{target} + (r_{start} - r_{target}) \left(1 - \frac{t - t_0}{T}\right)^p
        \quad\text{for}\quad t_0 \le t \le t_0 + T,

    and constant before and after, with p = 1 for ``"linear"`` and 3 for ``"cubic"``, which moves fast at first;
    ``"constant"`` stays at the start until T steps are over, and then jumps. Warm-up is ``start=0``; decay is
    ``target=0``; the way to a sparse network is a ramp to its sparsity, then :meth:`Impact.sparsify`, which sets
    the drop rate to 0: no more :meth:`step` from there on.

    Like a learning rate scheduler it sets the first rate when it is made, and :meth:`step` the next one; call that
    after ``optimizer.step()``, or after each epoch. On resuming, make the schedule first and load the optimizer's state
    then: that has the rate.

    Args:
        optimizer: an ``ImpactSGD``, an ``ImpactAdamW``, or any optimizer inside an ``Impact``, wrapped or not. Groups
            added later are left alone.
        target: the drop rate at the end, one for all groups or a list of one per group.
        total_steps: T, how many :meth:`step` the way takes, at least 1.
        start: the drop rate at the beginning, likewise; by default what the groups have.
        begin: t₀, how many :meth:`step` go by first.
        shape: ``"constant"``, ``"linear"`` or ``"cubic"``.

    Raises:
        TypeError: its groups have no drop rate.
        ValueError: an argument is out of range, or a rate leaves no room for the group's ``keep_floor``.

    Source: the cubic ramp is that of Zhu & Gupta, To prune, or not to prune, 2017.

    Example:
        >>> schedule = DropRateScheduler(optimizer, target=0.9, total_steps=30, start=0.0, shape="cubic")
        >>> for epoch in range(40):
        ...     train_one_epoch(model, optimizer)
        ...     schedule.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        target: float | Sequence[float],
        total_steps: int,
        *,
        start: float | Sequence[float] | None = None,
        begin: int = 0,
        shape: str = "linear",
    ) -> None:
        groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [{}])
        if not all("drop_rate" in group for group in groups):
            raise TypeError(
                f"{type(optimizer).__name__} has no drop rate; DropRateScheduler takes an ImpactSGD, an ImpactAdamW, "
                "or an optimizer to which Impact(model, optimizer) was given"
            )
        _check_counts(total_steps=total_steps, begin=begin)
        _check_shape(shape)
        self.optimizer = optimizer
        self.targets = _per_group("target", target, groups)
        rates = [group["drop_rate"] for group in groups]
        self.starts = _per_group("start", rates if start is None else start, groups)
        self.total_steps = int(total_steps)
        self.begin = int(begin)
        self.shape = shape
        self.last_epoch = -1
        self.step()

    def step(self) -> None:
        """Sets the next drop rate of every group."""
        self.last_epoch += 1
        for group, rate in zip(self.optimizer.param_groups, self.get_last_drop_rate(), strict=False):
            group["drop_rate"] = rate

    def get_last_drop_rate(self) -> list[float]:
        """The drop rates that the schedule has set last, one per group."""
        left = 1.0 - min(max((self.last_epoch - self.begin) / self.total_steps, 0.0), 1.0)
        left = float(left > 0) if self.shape == "constant" else left ** _SHAPES[self.shape]
        return [target + (start - target) * left for start, target in zip(self.starts, self.targets, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """All that the schedule consists of, but for the optimizer."""
        return {name: copy(value) for name, value in self.__dict__.items() if name != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where another schedule was. The rate itself is in the optimizer's state dict.

        Raises:
            TypeError, ValueError: it is not the state of a schedule for these parameter groups. Nothing has changed
            then.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError("the state dict is not one of a DropRateScheduler; pass what its state_dict() returned")
        groups = self.optimizer.param_groups[: len(self.targets)]
        for name in ("targets", "starts"):
            if not isinstance(state_dict[name], list):
                raise TypeError(f"{name} must be a list of drop rates, but is {state_dict[name]!r}")
            _per_group(name, state_dict[name], groups)
        _check_counts(
            total_steps=state_dict["total_steps"], begin=state_dict["begin"], last_epoch=state_dict["last_epoch"]
        )
        _check_shape(state_dict["shape"])
        self.__dict__.update({name: copy(value) for name, value in state_dict.items()})


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, str) or shape not in _SHAPES:
        raise ValueError(f"Invalid shape: {shape!r}; choose from {list(_SHAPES)}")


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        least = int(name == "total_steps")
        if not is_integer(value) or value < least:
            raise ValueError(f"Invalid {name}: {value!r}; it must be an integer of at least {least}")


def _per_group(name: str, value: float | Sequence[float], groups: list[dict[str, Any]]) -> list[float]:
    """A rate for every group, in range."""
    rates = list(value) if isinstance(value, Sequence) else [value] * len(groups)
    if len(rates) != len(groups):
        raise ValueError(f"{name} has {len(rates)} drop rates, but the optimizer {len(groups)} parameter groups")
    for rate, group in zip(rates, groups, strict=True):
        if not (is_number(rate) and 0.0 <= rate < 1.0):
            raise ValueError(f"Invalid {name}: {rate}; a drop rate must lie in [0, 1)")
        if rate > 0 and group["keep_floor"] > 1.0 - rate + 1e-9:
            raise ValueError(
                f"{name}={rate} keeps {1 - rate:.6g} of the weights, less than the keep_floor={group['keep_floor']} of "
                "their group; lower one of the two"
            )
    return [float(rate) for rate in rates]
