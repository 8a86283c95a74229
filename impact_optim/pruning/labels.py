"""Labels: for each element of a tensor, which unit it belongs to.

A label is a number: of a unit or, before it is known what makes a unit, of an *atom*, an index of a dimension of a
parameter or buffer. A tensor carries *labels*: int64 tensors of its own shape, -1 for none. A weight carries one per
dimension, an activation one for its channels. Atoms that can only be removed together are joined (union-find). Where
removing an atom would change what the kept ones compute, it is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

AxisKey = tuple[str, int]
"""Qualified name of a parameter or buffer, and one of its dimensions."""


class Mismatch(Exception):
    """The program does not treat the units as the labels say."""

    def __init__(self, units: Tensor, reason: str) -> None:
        super().__init__(reason)
        self.units = units


class Atoms:
    """Sets of atoms that can only be removed together."""

    def __init__(self, fixed: int | None = None) -> None:
        """Empty; or, with a number, that many sets of one atom: what would join or freeze any raises Mismatch."""
        self._parent = torch.arange(fixed or 0)
        self._reason = torch.full((fixed or 0,), -1)
        self._reasons: list[str | None] = [None]
        self.fixed = fixed is not None

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, count: int) -> Tensor:
        """Fresh atoms."""
        start = len(self._parent)
        atoms = torch.arange(start, start + count)
        self._parent = torch.cat([self._parent, atoms])
        self._reason = torch.cat([self._reason, torch.full((count,), -1)])
        return atoms

    def find(self, atoms: Tensor) -> Tensor:
        """The representative of each atom's set; -1 stays -1."""
        known = atoms.clamp(min=0)
        root = self._parent[known]
        while not torch.equal(root, above := self._parent[root]):
            root = above
        self._parent[known.reshape(-1)] = root.reshape(-1)  # shorter paths next time
        return torch.where(atoms < 0, atoms, root)

    def join(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Joins atoms element by element; an atom that meets none is frozen."""
        first, second = self.find(first.reshape(-1)), self.find(second.reshape(-1))
        self.freeze(first[second < 0], reason)
        self.freeze(second[first < 0], reason)
        differ = (first != second) & (first >= 0) & (second >= 0)
        first, second = first[differ], second[differ]
        if self.fixed and len(first):
            raise Mismatch(torch.cat([first, second]).unique(), reason)
        before = torch.cat([first, second])
        while len(first):
            low, high = torch.minimum(first, second), torch.maximum(first, second)
            self._parent.scatter_reduce_(0, high, low, "amin")
            first, second = self.find(first), self.find(second)
            differ = first != second
            first, second = first[differ], second[differ]
        before = before[self._reason[before] >= 0]
        after = self.find(before)
        self._reason.scatter_reduce_(0, after, self._reason[before], "amax")

    def freeze(self, atoms: Tensor, reason: str | None) -> None:
        """Marks atoms as not to be removed; without a reason, they were never meant to be."""
        atoms = self.find(atoms[atoms >= 0])
        if not len(atoms):
            return
        if self.fixed:
            raise Mismatch(atoms.unique(), reason or "")
        # The first reason stays; 0 stands for none, which any other overrules.
        atoms = atoms[self._reason[atoms] < (reason is not None)]
        self._reason[atoms] = len(self._reasons) if reason is not None else 0
        if reason is not None:
            self._reasons.append(reason)

    def are_frozen(self, atoms: Tensor) -> bool:
        """Whether none of the atoms can be removed."""
        atoms = atoms[atoms >= 0]
        return bool((self._reason[self.find(atoms)] >= 0).all())

    def frozen(self) -> dict[int, str | None]:
        """Representative of each frozen set -> the reason."""
        roots = ((self._reason >= 0) & (self._parent == torch.arange(len(self._parent)))).nonzero().reshape(-1)
        return {
            root: self._reasons[reason]
            for root, reason in zip(roots.tolist(), self._reason[roots].tolist(), strict=True)
        }


@dataclass
class Value:
    """What is known about a tensor of the program."""

    shape: tuple[int, ...]
    labels: list[Tensor] = field(default_factory=list)
    weight: bool = True
    """Whether it is computed from parameters and constants alone."""
    uniform: bool = False
    """Whether all elements are the same number, so that it has no size of its own to keep."""
    constant: bool = False
    """Whether it is computed from constants alone."""
    recipe: tuple[str, int] | None = None
    """Of a constant: what tells it from others, its contents or how it is computed, where that is known."""


def varied(labels: Tensor) -> list[int]:
    """The dimensions along which labels differ."""
    labels = core(labels)
    return [
        dim
        for dim in range(labels.dim())
        if labels.size(dim) > 1 and not torch.equal(labels, labels.narrow(dim, 0, 1).expand_as(labels))
    ]


def core(labels: Tensor) -> Tensor:
    """Labels without the repetitions of their expanded dimensions."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.size(dim) > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def flat(labels: Tensor, *dims: int) -> Tensor:
    """Index 0 along the dimensions, everywhere."""
    shape = labels.shape
    for dim in dims:
        labels = labels.narrow(dim, 0, min(1, shape[dim]))
    return labels.expand(shape)


def index0(labels: Tensor, dims: Iterable[int], keepdim: bool = False) -> Tensor:
    """Labels at index 0 of some dimensions."""
    for dim in sorted(dims, reverse=True):
        labels = labels.narrow(dim, 0, 1) if keepdim else labels.select(dim, 0)
    return labels


def stretched(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels of another shape, which differs along dimensions where they are constant."""
    dims = varied(labels)
    return index0(labels, [dim for dim in range(labels.dim()) if dim not in dims], keepdim=True).expand(shape)


def paired(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two labels of one shape without the repetitions of either's constant dimensions."""
    for dim in range(first.dim()):
        if first.size(dim) and first.stride(dim) == 0 and second.stride(dim) == 0:
            first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
    return first, second


def is_value(value: Any) -> bool:
    """Where to stop when walking through arguments."""
    return isinstance(value, Value)
