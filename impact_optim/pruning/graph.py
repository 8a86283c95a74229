"""Which units of a network can be removed, and which dimensions of which tensors go with each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .attributes import SizeKey
from .coupling import CONSUMER, PRODUCER
from .labels import AxisKey
from .plan import Plan, PruneRecord
from .rehearsal import Rehearsal
from .transcript import Step


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
    """int64, [size]: the position that each unit had when the model was traced, ascending."""
    original_size: int
    producers: list[Axis] = field(default_factory=list)
    """Output side: weights, biases, norms, buffers."""
    consumers: list[Axis] = field(default_factory=list)
    """Weights that read the units."""
    observations: list[Observation] = field(default_factory=list)
    """Consumers' inputs first, then producers' outputs."""
    first: int = 0
    """Label of what was the group's first unit: the labels of a graph go on from group to group."""
    kind: str = "units"
    """What people call them, ``"channels"`` for instance."""

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.original)

    @property
    def labels(self) -> Tensor:
        """The units' labels, by position."""
        return self.first + self.original

    def __str__(self) -> str:
        count = f"{self.size}" if self.size == self.original_size else f"{self.size} of {self.original_size}"
        return f"{count} {self.kind}"


class LabelledAxis(NamedTuple):
    """A dimension seen by the whole graph."""

    labels: Tensor
    roles: frozenset[str] = frozenset()


@dataclass
class UnitGraph:
    """The groups of a model, and what cannot be cut. Prints as a table: ``.conv2`` is beside the group's own layer.

    Labels number the units over all groups. They stay with a unit whatever else is cut, where a position in a group
    does not.
    """

    groups: dict[str, UnitGroup] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    """What cannot be cut -> why."""
    rehearsal: Rehearsal = field(default_factory=lambda: Rehearsal(()))
    """How the model is run."""
    axes: dict[AxisKey, LabelledAxis] = field(default_factory=dict)
    """Dimensions of parameters and buffers that have units."""
    sizes: dict[SizeKey, Tensor] = field(default_factory=dict)
    """Attributes that count units -> their labels."""
    seen: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    """Module, input or output, and dimension -> labels of what a hook sees there."""
    steps: list[Step] = field(default_factory=list)
    """What the model's program does."""
    total: int = 0
    """Number of labels."""

    def plan(self, units: Mapping[str, Sequence[int] | Tensor]) -> Plan:
        """What removing units (group name -> positions in the group) changes.

        Raises:
            ValueError: a group is not known, a position is not in the group or given twice, or no unit would be left.
        """
        removed = torch.zeros(self.total + 1, dtype=torch.bool)
        left = {}
        for name, positions in units.items():
            group = self.groups.get(name)
            if group is None:
                why = f": {self.frozen[name]}" if name in self.frozen else ""
                raise ValueError(f"{name!r} is not a group that can be cut{why}. The groups are {list(self.groups)}.")
            chosen = torch.as_tensor(positions).detach().cpu()
            if chosen.numel() == 0:
                continue
            if chosen.dim() != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
                raise ValueError(
                    f"{name!r}: positions must be a one-dimensional sequence of integers, not {positions!r}."
                )
            if chosen.min() < 0 or chosen.max() >= group.size or len(chosen.unique()) != len(chosen):
                raise ValueError(
                    f"{name!r} has units 0 to {group.size - 1}; each can be removed once, not {chosen.tolist()}."
                )
            if len(chosen) == group.size:
                raise ValueError(f"{name!r}: one of its {group.size} units must stay.")
            removed[group.labels[chosen]] = True
            left[name] = (~removed[group.labels]).nonzero().flatten()
        plan = Plan(left=left, removed=removed, made_for={name: group.original for name, group in self.groups.items()})
        for (name, dim), axis in self.axes.items():
            if (gone := removed[axis.labels]).any():
                kept = (~gone).nonzero().flatten()
                plan.kept.setdefault(name, {})[dim] = kept
                plan.records.append(PruneRecord(name, dim, kept, len(gone)))
        for key, labels in self.sizes.items():
            if (gone := removed[labels]).any():
                plan.sizes[key] = int((~gone).sum())
        return plan

    def forget(self, plan: Plan) -> None:
        """Takes removed units out of the graph, once the model has been cut."""

        def left(labels: Tensor) -> Tensor:
            return labels[~plan.removed[labels]]

        for group in self.groups.values():
            group.original = left(group.labels) - group.first
        self._relabel(left)

    def freeze(self, name: str, reason: str) -> None:
        """Takes a group out of the graph: its units stay."""
        gone = self.groups.pop(name).labels
        self.frozen[name] = reason
        self._relabel(lambda labels: labels.masked_fill(torch.isin(labels, gone), -1))

    def owners(self, labels: Tensor) -> list[str]:
        """The groups that some labels belong to."""
        return [name for name, group in self.groups.items() if torch.isin(labels, group.labels).any()]

    def snapshot(self) -> Callable[[], None]:
        """Returns what puts the graph back to how it is now; it can be called again."""
        own = {**vars(self), "groups": dict(self.groups), "frozen": dict(self.frozen)}
        groups = [(group, dict(vars(group))) for group in self.groups.values()]

        def restore() -> None:
            vars(self).update(own)
            for group, fields in groups:
                vars(group).update(fields)

        return restore

    def _relabel(self, change: Callable[[Tensor], Tensor]) -> None:
        self.axes = {key: axis._replace(labels=change(axis.labels)) for key, axis in self.axes.items()}
        self.sizes = {key: change(labels) for key, labels in self.sizes.items()}
        self.seen = {key: change(labels) for key, labels in self.seen.items()}
        self.relist()

    def relist(self) -> None:
        """Lists each group's axes and observations anew."""
        position = torch.full((self.total + 1,), -1)  # the last entries answer for the label -1
        owner = torch.full((self.total + 1,), -1)
        groups = list(self.groups.values())
        for number, group in enumerate(groups):
            position[group.labels] = torch.arange(group.size)
            owner[group.labels] = number
            group.producers, group.consumers, group.observations = [], [], []

        def split(labels: Tensor) -> Iterable[tuple[UnitGroup, Tensor]]:
            whose = owner[labels]
            for number in whose[whose >= 0].unique().tolist():
                yield groups[number], torch.where(whose == number, position[labels], -1)

        for (name, dim), axis in self.axes.items():
            for group, units in split(axis.labels):
                if CONSUMER in axis.roles:
                    group.consumers.append(Axis(name, dim, units))
                if CONSUMER not in axis.roles or PRODUCER in axis.roles:
                    group.producers.append(Axis(name, dim, units))
        for where in ("input", "output"):
            for (module, side, dim), labels in self.seen.items():
                if side == where:
                    for group, units in split(labels):
                        group.observations.append(Observation(module, side, dim, units))

    def __str__(self) -> str:
        rows = [("group", "units", "made by", "read by")]
        for group in self.groups.values():
            module = group.name.rpartition(".")[0]
            made, read = _layers(group.producers, module), _layers(group.consumers, module)
            rows.append((group.name, str(group), made, read))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + [f"not cut: {name}: {reason}" for name, reason in self.frozen.items()])


def _layers(axes: Iterable[Axis], module: str, most: int = 4) -> str:
    """The layers that have axes, those inside of a module as ``.name``."""
    names = list(dict.fromkeys(axis.name.rpartition(".")[0] or axis.name for axis in axes))
    shown = [name.removeprefix(module) if name.startswith(f"{module}.") else name for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
