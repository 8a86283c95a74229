"""What happens to labels that meet in an operator: they are joined, frozen, or carried along."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .labels import Atoms, AxisKey, Mismatch, Value, core, flat, index0, is_value, paired, varied
from .transcript import Transcript

PRODUCER, CONSUMER = "producer", "consumer"


class Coupling:
    """What the rules of operators are made of.

    Args:
        atoms: the sets that the labels refer to.
        axes: labels of parameters' and buffers' dimensions.
        tables: names of the buffers.
        transcript: hears of sizes that enter the arithmetic.
    """

    def __init__(
        self, atoms: Atoms, axes: dict[AxisKey, Tensor], tables: Iterable[str], transcript: Transcript
    ) -> None:
        self.atoms, self.axes, self.transcript = atoms, axes, transcript
        self.roles: dict[str, list[Tensor]] = {PRODUCER: [], CONSUMER: []}
        self._tables = set(tables)
        self._grids: list[Tensor] = []

    def where(self) -> str:
        """The current operator and its module, for people."""
        raise NotImplementedError

    def freeze(self, what: Any, reason: str | None) -> None:
        """Freezes all atoms of a tensor, or those of one of its labels; anything else has none."""
        for labels in what.labels if is_value(what) else [what] if isinstance(what, Tensor) else []:
            self.atoms.freeze(core(labels).reshape(-1).unique(), reason)

    def tidy(self, labels: Iterable[Tensor]) -> list[Tensor]:
        """Labels with their constant dimensions expanded, those that say nothing left out."""
        kept = []
        for array in labels:
            dims = varied(array)
            array = flat(array, *(dim for dim in range(array.dim()) if dim not in dims))
            if not dims:
                if array.numel():
                    self.freeze(array, f"{self.where()} picks out a single index")
            elif len(dims) == 1:
                kept.append(array)
            elif not self.atoms.are_frozen(core(array)):
                kept.append(array)
                self.grid(array)
        return kept

    def grid(self, labels: Tensor) -> None:
        """Notes that labels must stay a product of index sets, one for each dimension."""
        if not self.atoms.fixed:
            self._grids.append(labels)
        elif len(dims := varied(labels)) > 1:
            atoms = core(labels).unique()
            raise Mismatch(atoms[atoms >= 0], f"units differ along dimensions {dims}")

    def join_over(self, labels: Tensor, dims: Sequence[int]) -> None:
        """Joins what differs along some dimensions only."""
        self.atoms.join(*paired(labels, flat(labels, *dims)), f"{self.where()} ties them to what is not cut")

    def mix(self, value: Value, dims: Iterable[int], why: str = "mixes the units") -> Value:
        """Labels along dimensions whose elements an operator mixes: only what is the same along them can be cut."""
        mixed = {dim % max(len(value.shape), 1) for dim in dims}
        if value.uniform:
            # A tensor of one number has no size of its own, but its sum or its softmax does.
            self.transcript.enters(value, [value.shape[dim] for dim in sorted(mixed) if dim < len(value.shape)])
        kept = []
        for labels in value.labels:
            over = [dim for dim in varied(labels) if dim in mixed]
            rest = [dim for dim in varied(labels) if dim not in mixed]
            if not over:
                kept.append(labels)
            elif rest:
                self.join_over(labels, over)
                kept.append(flat(labels, *over))
            else:
                self.freeze(labels, f"{self.where()} {why}")
        return Value(value.shape, kept, value.weight, value.uniform)

    def combine(self, shape: Sequence[int], values: Iterable[Value]) -> Value:
        """Elementwise: what meets after broadcasting is cut together."""
        shape, found = tuple(shape), list[Tensor]()
        spread = []
        for value in values:
            arrays = [labels.broadcast_to(shape) for labels in value.labels]
            lead = len(shape) - len(value.shape)
            sizes = [1] * lead + list(value.shape)
            fixed = {dim for dim, size in enumerate(sizes) if size != 1 and size == shape[dim]}
            spread.append((arrays, set() if value.uniform else fixed))
            for labels in arrays:
                dims = set(varied(labels))
                rest = list[Tensor]()
                for other in found:
                    if dims.isdisjoint(varied(other)):
                        rest.append(other)
                        continue
                    if dims > set(varied(other)) and self._is_table(other):
                        labels = self._spread(labels, other)
                        dims = set(varied(labels))
                        continue
                    if dims < set(varied(other)) and self._is_table(labels):
                        rest.append(self._spread(other, labels))
                        labels, dims = flat(labels, *dims), set()
                        continue
                    self.atoms.join(*paired(labels, other), f"{self.where()} combines them with what is not cut")
                    if len(varied(other)) > len(dims):
                        labels, dims = other, set(varied(other))
                found = [*rest, labels] if dims else rest
        kept = []
        for labels in found:
            missing = set[int]()
            for arrays, fixed in spread:
                missing |= fixed.intersection(varied(labels)) - {dim for array in arrays for dim in varied(array)}
            if missing and missing.issuperset(varied(labels)):
                self.freeze(labels, f"{self.where()} combines them with what is not cut")
            elif missing:  # a table for all heads, say: heads can be cut, what they consist of cannot
                self.join_over(labels, sorted(missing))
                labels = flat(labels, *missing)
            kept.append(labels)
        return Value(shape, kept)

    def _is_table(self, labels: Tensor) -> bool:
        """Whether labels are those of a buffer."""
        labels = core(labels)
        keys = [key for key in self.axes if key[0] in self._tables]
        return bool(keys) and bool(torch.isin(labels, torch.cat([self.axes[key] for key in keys])).all())

    def _spread(self, labels: Tensor, table: Tensor) -> Tensor:
        """Labels that meet a table with fewer dimensions, rotary frequencies for instance, which is not cut.

        It is the same for all heads; joined with each of them, it would make all heads one unit.
        """
        self.freeze(table, f"{self.where()} uses it for all of several units")
        dims = varied(table)
        self.join_over(labels, dims)
        return flat(labels, *dims)

    def contract(self, first: Value, second: Value, letters: tuple[str, str, str]) -> Value:
        """A product summed over the letters that the result lacks, as in einsum."""
        one, two, out = letters
        weight = second if second.weight else first if first.weight else None
        if weight is not None:
            axes = two if weight is second else one
            for labels in weight.labels:
                inner = [axes[dim] not in out for dim in varied(labels)]
                self.roles[CONSUMER if all(inner) else PRODUCER].append(core(labels).reshape(-1).unique())
        joint = "".join(dict.fromkeys(one + two))
        sizes = dict(zip(one, first.shape, strict=True))
        for letter, size in zip(two, second.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))

        def placed(value: Value, axes: str) -> Value:
            order = [axes.index(letter) for letter in joint if letter in axes]
            arrays = [labels.permute(order) for labels in value.labels]
            shape = [value.shape[axes.index(letter)] if letter in axes else 1 for letter in joint]
            for dim, letter in enumerate(joint):
                if letter not in axes:
                    arrays = [labels.unsqueeze(dim) for labels in arrays]
            return Value(tuple(shape), arrays)

        product = self.combine([sizes[letter] for letter in joint], [placed(first, one), placed(second, two)])
        summed = [dim for dim, letter in enumerate(joint) if letter not in out]
        kept = []
        for labels in product.labels:
            over, rest = [d for d in varied(labels) if d in summed], [d for d in varied(labels) if d not in summed]
            if over and rest:
                self.join_over(labels, over)
            if rest:
                labels = index0(labels, summed)
                order = [letter for letter in joint if letter in out]
                kept.append(labels.permute([order.index(letter) for letter in out]))
        return Value(tuple(sizes[letter] for letter in out), self.tidy(kept))

    def settle(self) -> None:
        """Joins atoms until all labels can be cut by cutting single dimensions."""
        changed = True
        while changed:
            changed = False
            for labels in self._grids:
                labels = self.atoms.find(core(labels))
                dims = varied(labels)
                if len(dims) < 2 or self.atoms.are_frozen(labels):
                    continue
                keep = max(dims, key=lambda dim: (labels.size(dim), dim))
                self.join_over(labels, [dim for dim in dims if dim != keep])
                changed = True
