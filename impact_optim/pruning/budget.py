"""How much goes: which units make up a fraction of the MACs, parameters or units that there were."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .graph import UnitGraph, UnitGroup
from .plan import UNCUT, Plan
from .report import ModelSize, model_size, parameter_counts
from .statistics import UnitStatistics, complexity_lost

TARGETS = ("macs", "params", "units")
SPLITS = ("uniform", "rademacher")
_SHORTFALL = 0.01  # of what there was, from which on a report speaks of it
_TOLERANCE = 0.002  # of the MACs or parameters of the whole network, with which a search ends


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
        """What to remove so that a fraction of what there was is gone, as nearly as whole units allow."""
        gone = self.gone()
        if fraction <= gone or not scores.values or not self._original:
            return self.graph.plan({})
        order = self.order(scores)
        if self.target == "units":
            all_units = sum(group.original_size for group in self.groups().values())
            # What has no score stays, and the others go instead.
            return self.graph.plan(order.first(order.nearest((fraction - gone) * all_units)))
        count = parameter_counts if self.target == "params" else self.graph.rehearsal.macs
        wanted = (1 - fraction) * self._original
        plans: dict[int, Plan] = {0: self.graph.plan({})}

        def excess(steps: int) -> float:
            plans[steps] = self.graph.plan(order.first(steps))
            over = count(self.model, plans[steps])[""] - wanted
            return over if abs(over) > _TOLERANCE * self._original else 0.0

        return plans[nearest_zero(excess, self._measured(self.size) - wanted, -wanted, len(order.steps))]

    def order(self, scores: Scores) -> RemovalOrder:
        """The order in which units go."""
        groups = {name: self.graph.groups[name] for name in scores.values}
        stops = {
            name: possible_cuts(
                group.size,
                units_per_step(group, self.round_to),
                max(1, math.ceil(group.original_size * (1 - self.max_ratio) - 1e-9)),
            )
            for name, group in groups.items()
        }
        return removal_order(scores.values, stops, self.split, scores.statistics)


def nearest_zero(function: Callable[[int], float], first: float, beyond: float, last: int) -> int:
    """Where a falling function of the numbers 0 to ``last`` is nearest to zero.

    By the Illinois form of false position, and every third time in the middle, which bounds the number of tries.

    Args:
        function: asked at most once for a number, and not for 0.
        first: its value at 0, above zero.
        beyond: a value below zero for the number after the last.
    """
    low, high, values = 0, last + 1, {0: first}
    above, below, side = first, beyond, 0
    while high - low > 1:
        share = above / (above - below) if len(values) % 3 else 0.5
        i = min(max(low + round((high - low) * share), low + 1), high - 1)
        values[i] = value = function(i)
        if value == 0:
            return i
        if value > 0:  # an end that stays twice counts half, or the other would creep
            low, above, below, side = i, value, below / 2 if side > 0 else below, 1
        else:
            high, below, above, side = i, value, above / 2 if side < 0 else above, -1
    return min(values, key=lambda i: abs(values[i]))


def units_per_step(group: UnitGroup, channels: int) -> int:
    """The least number of units whose channels are a multiple of ``channels``: 1 for heads of 64, say."""
    most = max((int((axis.units >= 0).sum()) // group.size for axis in group.producers), default=1)
    return channels // math.gcd(channels, max(most, 1))


def possible_cuts(size: int, multiple: int, least: int) -> list[int]:
    """How many of so many units may go: none, or so many that a multiple not below the least is left.

    In a group smaller than twice the multiple, it is a multiple of its half, its quarter, and so on.
    """
    while multiple > 1 and 2 * multiple > size:
        multiple //= 2
    return [0, *(size - left for left in range((size - 1) // multiple * multiple, least - 1, -multiple))]


class RemovalOrder(NamedTuple):
    """The order in which units go."""

    positions: Mapping[str, Tensor]
    """By group, int64, [units]: its own order."""
    steps: Sequence[tuple[str, int]]
    """A group, and how many of its units have gone with this step and those before."""

    def first(self, number: int) -> dict[str, Tensor]:
        """What goes with so many steps: by group, the positions, int64, ascending; without groups that lose nothing."""
        removed = dict(self.steps[:number])
        return {name: order[: removed[name]].sort().values for name, order in self.positions.items() if name in removed}

    def nearest(self, units: float) -> int:
        """The number of steps that come nearest to so many units."""
        gone = dict.fromkeys(self.positions, 0)
        reached = [0]
        for name, number in self.steps:
            reached.append(reached[-1] + number - gone[name])
            gone[name] = number
        return min(range(len(reached)), key=lambda i: abs(reached[i] - units))


def removal_order(
    scores: Mapping[str, Tensor],
    stops: Mapping[str, Sequence[int]],
    split: str = "uniform",
    statistics: Mapping[str, Sequence[UnitStatistics]] | None = None,
) -> RemovalOrder:
    r"""The order in which the units of all groups go, so that a larger budget removes the same units and more.

    Within a group units go in the order of their scores, equal ones in the order of their positions, in steps from one
    of its stops to the next. All steps of all groups stand in one line, by what has gone by the middle of the step:

    - ``"uniform"``: which share of the group's units;
    - ``"rademacher"``: which share of the group's Rademacher complexity (:func:`complexity_lost`). All layers give the
      same share of what linear functions of them can do: many units where a few carry most of it, few where all count.

    Scores of different groups are not compared: they come with the scale of their layer (its fan-in, its activations).

    Args:
        scores: by group, [units].
        stops: by group, how many of its units may go, ascending from 0.
        split: one of the two.
        statistics: by group, for ``"rademacher"``.

    Raises:
        ValueError: a score is not finite, or statistics are missing.
    """
    orders, steps = {}, []
    for name, score in scores.items():
        score = score.detach().cpu().double()
        if not score.isfinite().all():
            raise ValueError(f"{int((~score.isfinite()).sum())} scores of {name!r} are not finite")
        orders[name] = order = score.argsort(stable=True)
        gone = _gone(split, name, order, statistics or {}).cummax(0).values  # rounding may let it fall
        steps += [((gone[a] + gone[b]).item(), name, b) for a, b in itertools.pairwise(stops[name])]
    steps.sort(key=lambda step: step[0])  # stable: the steps of a group stay in order
    return RemovalOrder(orders, [(name, gone) for _, name, gone in steps])


def _gone(split: str, name: str, order: Tensor, statistics: Mapping[str, Sequence[UnitStatistics]]) -> Tensor:
    """Which share of a group is gone once the first j units in the order are, [units + 1]."""
    if split == "uniform":
        return torch.arange(len(order) + 1, dtype=torch.float64) / len(order)
    places = statistics.get(name, ())
    if not any(place.seen.any() for place in places):
        raise ValueError(f'the split "rademacher" needs statistics of {name!r}, and there are none')
    # The same units seen in several places are as good as more vectors of signs.
    rows = [place.centred_projections() / place.seen.clamp_min(1) for place in places]
    return complexity_lost(torch.cat(rows).cpu(), order)
