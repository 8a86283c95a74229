"""What a cut did: a table of layers, their units, multiply-accumulates (MACs) and parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from .graph import UnitGraph
from .plan import UNCUT, Plan, PruneRecord
from .rehearsal import Inputs, Rehearsal


class ModelSize(NamedTuple):
    """MACs of one evaluation of the example inputs, and numbers of parameters."""

    macs: dict[str, int]
    """By module, with all that it contains; that of ``""`` is the model's."""
    parameters: dict[str, int]
    """The same of parameters; one that modules share counts once in each."""


class LayerReport(NamedTuple):
    """What a cut did to one group of units."""

    name: str
    units: tuple[int, int, int]
    """When the model was traced, before this cut, after it."""
    scores: tuple[float, float] | None
    """The least and the largest score of the units before the cut; ``None`` where none was asked for."""
    macs: tuple[int, int]
    """Of the layer that produces the units, before and after."""
    parameters: tuple[int, int]


@dataclass(frozen=True)
class PruneReport:
    """What :meth:`ActivationPruner.step` did; prints as a table."""

    epoch: int
    layers: list[LayerReport] = field(repr=False)
    macs: tuple[int, int]
    """Of the model on the example inputs, before and after."""
    parameters: tuple[int, int]
    records: list[PruneRecord] = field(default_factory=list, repr=False)
    """What was cut: parameter or buffer, dimension, kept indices. Empty when nothing was."""
    metric: tuple[float, float] | None = None
    """What the guard measured, before and after."""
    note: str = ""
    """Why nothing, or less than was asked, has been cut."""
    left_out: dict[str, str] = field(default_factory=dict, repr=False)
    """Groups that stay because they have no scores -> why."""

    def __str__(self) -> str:
        rows = [("layer", "units", "score", "MACs", "parameters")]
        for layer in self.layers:
            low_high = "" if layer.scores is None else f"{layer.scores[0]:.3g} … {layer.scores[1]:.3g}"
            units = _change(*layer.units[1:])
            rows.append((layer.name, units, low_high, _change(*layer.macs), _change(*layer.parameters)))
        rows.append(("total", "", "", _change(*self.macs), _change(*self.parameters)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"epoch {self.epoch}" + (f": {self.note}" if self.note else "")]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        if self.metric is not None:
            lines.append(f"metric {self.metric[0]:.6g} → {self.metric[1]:.6g}")
        lines += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def planned(
    graph: UnitGraph,
    plan: Plan,
    before: ModelSize,
    after: ModelSize,
    epoch: int,
    scores: Mapping[str, Tensor] | None = None,
) -> PruneReport:
    """What a plan does, before it is carried out."""
    scores = scores or {}
    layers = [
        LayerReport(
            name,
            (group.original_size, group.size, len(plan.left.get(name, group.original))),
            (scores[name].min().item(), scores[name].max().item()) if name in scores else None,
            (before.macs.get(name, 0), after.macs.get(name, 0)),
            (before.parameters.get(name, 0), after.parameters.get(name, 0)),
        )
        for name, group in graph.groups.items()
    ]
    totals = (before.macs[""], after.macs[""]), (before.parameters[""], after.parameters[""])
    return PruneReport(epoch, layers, *totals, plan.records)


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def model_size(model: nn.Module, inputs: Inputs | Rehearsal, plan: Plan = UNCUT) -> ModelSize:
    """Counts what one evaluation of a model takes, attention included, without computing or changing anything.

    Args:
        model: in any mode.
        inputs: positional and keyword arguments of a forward pass, or how else to run the model.
        plan: a cut to be counted as if it had been made, from :meth:`UnitGraph.plan`.
    """
    rehearsal = inputs if isinstance(inputs, Rehearsal) else Rehearsal(*inputs)
    return ModelSize(rehearsal.macs(model, plan), parameter_counts(model, plan))


def parameter_counts(model: nn.Module, plan: Plan = UNCUT) -> dict[str, int]:
    """Numbers of parameters as a plan would leave them, by module."""
    numel: dict[Tensor, int] = {}
    for name, param in model.named_parameters():
        kept = plan.kept.get(name, {})
        numel[param] = math.prod(len(kept[dim]) if dim in kept else size for dim, size in enumerate(param.shape))
    return {name: sum(numel[p] for p in module.parameters()) for name, module in model.named_modules()}
