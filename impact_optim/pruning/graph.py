"""Which units of a network can be removed, and which dimensions of which tensors go with each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


class Axis(NamedTuple):
    """A dimension of a parameter or buffer whose indices belong to units of a group."""

    name: str
    """Qualified name of the parameter or buffer (the first one of tied parameters)."""
    dim: int
    units: Tensor
    """int64, [size of the dimension]: position in the group of the unit that each index belongs to, -1 for none."""


class Observation(NamedTuple):
    """Where a forward hook sees the activations of a group's units."""

    module: str
    """Qualified name of the module."""
    where: str
    """``"input"``: the first positional argument of a consumer; ``"output"``: what a producer returns."""
    dim: int
    """Dimension of that tensor, counted from the front."""
    units: Tensor
    """int64, [size of the dimension]: position in the group of the unit that each index belongs to, -1 for none."""


@dataclass
class UnitGroup:
    """Units of one kind, of which any can be removed as long as one is left."""

    name: str
    """The layer that produces the units."""
    original: Tensor
    """int64, [size]: the number that each unit had when the model was traced, ascending."""
    original_size: int
    producers: list[Axis] = field(default_factory=list)
    """Output side: weights, biases, norms, buffers."""
    consumers: list[Axis] = field(default_factory=list)
    """Weights that read the units."""
    observations: list[Observation] = field(default_factory=list)
    """Consumers' inputs first, then producers' outputs."""

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.original)


@dataclass
class UnitGraph:
    """The groups of a model, and what cannot be cut."""

    groups: dict[str, UnitGroup] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    """What cannot be cut -> why."""


def trace(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any], *, ignore: Iterable[nn.Module] = ()
) -> UnitGraph:
    """Finds the groups of coupled units of a model."""
    raise NotImplementedError
