"""The masks of a step: what they are, and how long."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Draw(Protocol):
    """The masks of a group, as they were drawn."""

    def factor(self, param: Tensor) -> Tensor:
        """What each weight is multiplied with, 0 where it is dropped; float32."""

    def masked(self, param: Tensor) -> Tensor:
        """The masked weight."""


class TensorDraw:
    """Masks that are held as factors."""

    def __init__(self, factors: dict[Tensor, Tensor]) -> None:
        self._factors = factors

    def factor(self, param: Tensor) -> Tensor:
        return self._factors[param]

    def masked(self, param: Tensor) -> Tensor:
        return param * self._factors[param].to(param.dtype)


class KernelDraw:
    """Masks that a kernel computes from the importances whenever they are asked for."""

    def __init__(self, weights: Any, group: Any) -> None:
        self.weights, self.group = weights, group
        self._flat = weights.flat  # which lives as long as the draw

    def is_of(self, weights: Any) -> bool:
        """Whether these are the weights, and their importances still those that the masks were drawn from."""
        return self.weights is weights and (bool(self.group.is_constant) or self._flat is weights.flat)

    def factor(self, param: Tensor) -> Tensor:
        return self.weights.factor(self.group, param)

    def masked(self, param: Tensor) -> Tensor:
        return self.weights.masked(self.group, param)


class Mask:
    """The masks of a group for one step: drawn at the first read, over with the step."""

    def __init__(self, draws: dict[Tensor, Draw], stamp: tuple[Any, ...]) -> None:
        self.draws = draws
        """The draw that each weight belongs to."""
        self.stamp = stamp
        self.is_read = False
        """Whether a pass that may train has read it: from there on it stays as it is until the step."""
        self.is_over = False
        self.contributed: dict[Tensor, int] = {}
        """The parameters to which a gradient has come through a masked read, and the backward pass it last came by."""
        self.changes: dict[Tensor, list[int]] = {}
        """Of each parameter that was read, its version then, and how often that has changed."""

    def factor(self, param: Tensor) -> Tensor:
        """What each weight is multiplied with, 0 where it is dropped; float32."""
        return self.draws[param].factor(param)

    def masked(self, param: Tensor) -> Tensor:
        """The masked weight."""
        return self.draws[param].masked(param)
