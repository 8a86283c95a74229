"""How much goes: which units make up a fraction of the MACs, parameters or units that there were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from .criteria import units_per_step, units_to_remove
from .graph import UnitGraph, UnitGroup
from .plan import UNCUT, Plan
from .report import ModelSize, model_size, parameter_counts
from .statistics import UnitStatistics

TARGETS = ("macs", "params", "units")
_SHORTFALL = 0.01  # of what there was, from which on a report speaks of it
_TRIES, _TOLERANCE = 12, 0.002  # of the MACs or parameters of the whole network


class Scores(NamedTuple):
    """What a criterion says."""

    values: Mapping[str, Tensor]
    """By group, one for each unit."""
    statistics: Mapping[str, Sequence[UnitStatistics]]
    left_out: dict[str, str]
    """Groups that have none -> why."""


@dataclass
class Budget:
    """Turns a fraction of what there was into a plan; its arguments are those of :class:`ActivationPruner`."""

    model: nn.Module
    graph: UnitGraph
    target: str
    split: str
    round_to: int
    max_ratio: float
    reads_activations: bool
    """Whether groups whose activations no module shows stay."""

    def __post_init__(self) -> None:
        self.size = self.size_with(UNCUT)
        """What the model takes now."""
        self._original = self._measured(self.size)

    def size_with(self, plan: Plan) -> ModelSize:
        """What the model would take."""
        return model_size(self.model, self.graph.rehearsal, plan)

    def _measured(self, size: ModelSize) -> int:
        return size.parameters[""] if self.target == "params" else size.macs[""]

    def groups(self) -> dict[str, UnitGroup]:
        """What can be scored and cut."""
        return {n: group for n, group in self.graph.groups.items() if group.observations or not self.reads_activations}

    def gone(self, plan: Plan = UNCUT, size: ModelSize | None = None) -> float:
        """The fraction of what there was that is gone, once a plan has been carried out that leaves this size."""
        if self.target != "units":
            return 1 - self._measured(size or self.size) / self._original if self._original else 0.0
        groups = self.groups()
        left = sum(len(plan.left.get(name, group.original)) for name, group in groups.items())
        return 1 - left / all_units if (all_units := sum(group.original_size for group in groups.values())) else 0.0

    def shortfall(self, fraction: float, plan: Plan, scores: Scores, size: ModelSize) -> str:
        """Why nothing, or notably less than a fraction of what there was, is gone after a cut."""
        if not scores.values:
            where = "report.left_out" if self.graph.groups else "pruner.graph.frozen"
            return f"no group of units can be cut: see {where}"
        gone = self.gone(plan, size)
        if plan.left and gone >= fraction - _SHORTFALL:
            return ""
        return (
            f"{gone:.3g} of the {self.target} can go, not {fraction:.3g}: what can be cut is too little, or too wide "
            f"apart with round_to={self.round_to} and max_ratio={self.max_ratio}"
        )

    def plan(self, fraction: float, scores: Scores) -> Plan:
        """What to remove so that a fraction of what there was is gone."""
        gone = self.gone()
        if fraction <= gone or not scores.values:
            return self.graph.plan({})
        if self.target == "units":
            groups = self.groups()
            # What has no score stays, and the others go instead.
            scored = sum(groups[name].size for name in scores.values) / sum(group.size for group in groups.values())
            return self.lowest(min((fraction - gone) / (1 - gone) / scored, 1.0), scores)

        # MACs and parameters go about with the square of the widths, and widths with the fraction of units: a straight
        # line between two roots of them meets the wanted one after few trials.
        wanted = (1 - fraction) * self._original
        low, high = (0.0, self._measured(self.size) ** 0.5), (1.0, 0.0)
        best = (math.inf, UNCUT)
        for i in range(_TRIES if self._original else 0):
            asked = low[0] + (high[0] - low[0]) * (low[1] - wanted**0.5) / (low[1] - high[1])
            if i % 2:  # a line alone may creep up on it from one side
                asked = (low[0] + high[0]) / 2
            plan = self.lowest(asked, scores)
            left = (
                parameter_counts(self.model, plan)
                if self.target == "params"
                else self.graph.rehearsal.macs(self.model, plan)
            )[""]
            best = min(best, (abs(left - wanted), plan), key=lambda pair: pair[0])
            if best[0] <= _TOLERANCE * self._original:
                break
            if left > wanted:
                low = (asked, left**0.5)
            else:
                high = (asked, left**0.5)
        return best[1]

    def lowest(self, fraction: float, scores: Scores) -> Plan:
        """What to remove so that a fraction of the units that there are is gone."""
        groups = {name: self.graph.groups[name] for name in scores.values}
        least = {name: math.ceil(group.original_size * (1 - self.max_ratio) - 1e-9) for name, group in groups.items()}
        return self.graph.plan(
            units_to_remove(
                scores.values,
                fraction,
                split=self.split,
                statistics=scores.statistics,
                round_to={name: units_per_step(group, self.round_to) for name, group in groups.items()},
                min_units={name: max(1, units) for name, units in least.items()},
            )
        )
