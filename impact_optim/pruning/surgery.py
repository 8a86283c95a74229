"""Removes units from a network in place, exactly, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .graph import UnitGraph


class PruneRecord(NamedTuple):
    """What is left of one dimension of a parameter or buffer after a cut."""

    name: str
    """Qualified name (the first one of tied parameters)."""
    dim: int
    kept: Tensor
    """int64, the indices that were kept, ascending."""


def cut(model: nn.Module, graph: UnitGraph, units: Mapping[str, Sequence[int] | Tensor]) -> list[PruneRecord]:
    """Removes units: group name -> positions in the group of the units to remove."""
    raise NotImplementedError
