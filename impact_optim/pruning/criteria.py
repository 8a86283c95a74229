"""Pruning criteria, what a unit is worth, and how a budget is spent on the least worthy.

A criterion is one function ``criterion(group, context) -> scores`` of one group, with

- ``group``: the :class:`~impact_optim.pruning.graph.UnitGroup`;
- ``context``: the :class:`Context`, what there is to read;
- ``scores``: one per unit, [units], finite. **The lowest go first.**

A criterion of your own is one line, usable at once by its name::

    CRITERIA["energy"] = lambda group, context: mean_over_places(group, context, UnitStatistics.std)
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .graph import Axis, UnitGroup
from .statistics import UnitStatistics, complexity_lost

# -- criteria -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What a criterion may read."""

    parameters: Mapping[str, Tensor]
    """By qualified name."""
    statistics: Mapping[str, Sequence[UnitStatistics]] = field(default_factory=dict)
    """By group, one for each place where it is observed."""
    importances: Mapping[str, Tensor] = field(default_factory=dict)
    """Of weights, by the name of the parameter and of its shape, for ``"importance"``."""
    seed: int = 0
    """Of ``"random"``."""


Criterion = Callable[[UnitGroup, Context], Tensor]


def entropy(group: UnitGroup, context: Context) -> Tensor:
    """Entropy of the response over inputs: removes units that answer every input alike.

    See :meth:`UnitStatistics.entropy`.
    """
    return mean_over_places(group, context, UnitStatistics.entropy)


def state_entropy(group: UnitGroup, context: Context) -> Tensor:
    """Entropy of on and off: removes units that are nearly always off, or nearly always on.

    See :meth:`UnitStatistics.state_entropy`.
    """
    return mean_over_places(group, context, UnitStatistics.state_entropy)


def rademacher(group: UnitGroup, context: Context) -> Tensor:
    r"""Rademacher complexity of what a unit contributes: removes the units whose contributions are simplest.

    .. math:: R_u = \|w_{out, u}\|_2 \cdot \tfrac{1}{n} E_\sigma \Big|\sum_i \sigma_i (a_u(x_i) - \bar a_u)\Big|

    of the class :math:`\{x \mapsto b \, (a_u(x) - \bar a_u) : |b| \le \|w_{out, u}\|\}`, with w_out the weights that
    read the unit. It does not change when a unit is scaled or shifted and its readers make up for it. See
    :meth:`UnitStatistics.rademacher`.
    """
    if not group.consumers:
        raise ValueError(f'no weights read the units of {group.name!r}, so that "rademacher" has no norm of them')
    outgoing, _ = _sum_per_unit(group.size, group.consumers, context.parameters, torch.square)
    return mean_over_places(group, context, UnitStatistics.rademacher) * outgoing.sqrt()


def apoz(group: UnitGroup, context: Context) -> Tensor:
    """One minus the average percentage of zeros: removes the units that are most often zero (or negative).

    See :meth:`UnitStatistics.active_share`.
    """
    return mean_over_places(group, context, UnitStatistics.active_share)


def l1(group: UnitGroup, context: Context) -> Tensor:
    """Sum of the absolute weights that produce a unit: removes the units with the smallest filters.

    Source: Li et al., Pruning filters for efficient ConvNets, ICLR 2017.
    """
    known = [axis for axis in group.producers if axis.name in context.parameters]
    weights = [axis for axis in known if context.parameters[axis.name].ndim > 1]  # neither biases nor norms
    if not weights:
        raise ValueError(f'no weights produce the units of {group.name!r}, so that "l1" has nothing to add up')
    return _sum_per_unit(group.size, weights, context.parameters, torch.abs)[0]


def importance(group: UnitGroup, context: Context) -> Tensor:
    """Mean importance of all weights that would go with a unit: removes the units with the least important weights.

    See :meth:`~impact_optim.Impact.importance`.
    """
    known = [axis for axis in (*group.producers, *group.consumers) if axis.name in context.importances]
    total, number = _sum_per_unit(group.size, known, context.importances)
    if not (number > 0).all():
        raise ValueError(
            f"there are no importances of the weights of {group.name!r}; hand in an optimizer that keeps them, such as "
            "ImpactSGD or Impact"
        )
    return total / number


def random(group: UnitGroup, context: Context) -> Tensor:
    """Uniform numbers that depend on the seed and the group's name alone: the baseline."""
    generator = torch.Generator().manual_seed(context.seed ^ zlib.crc32(group.name.encode()))
    # Numbers of units as they were when the model was traced: a cut does not change what a unit draws.
    return torch.rand(group.original_size, dtype=torch.float64, generator=generator)[group.original]


CRITERIA: dict[str, Criterion] = {
    "entropy": entropy,
    "state_entropy": state_entropy,
    "rademacher": rademacher,
    "apoz": apoz,
    "l1": l1,
    "importance": importance,
    "random": random,
}
"""Criteria by name."""


def mean_over_places(group: UnitGroup, context: Context, read: Callable[[UnitStatistics], Tensor]) -> Tensor:
    """What ``read`` says of each unit, float64 [units] on the CPU: its mean over the places where the unit was seen.

    Raises:
        ValueError: a unit has not been seen.
    """
    places = context.statistics.get(group.name, ())
    if not places:
        raise ValueError(f"there are no statistics of {group.name!r}: nothing shows the activations of its units")
    was_seen = torch.stack([place.seen > 0 for place in places]).cpu()
    if not was_seen.any(0).all():
        left_out = sum(int(place.nonfinite.sum()) for place in places)
        raise ValueError(
            f"{int((~was_seen.any(0)).sum())} of {group.size} units of {group.name!r} have not been seen"
            + (f" ({left_out} responses were not finite)" if left_out else "")
            + "; attach the statistics, and train the model before scores are read"
        )
    values = torch.stack([read(place).double() for place in places]).cpu()
    return torch.where(was_seen, values, 0.0).sum(0) / was_seen.sum(0)


def _sum_per_unit(
    size: int,
    axes: Iterable[Axis],
    tensors: Mapping[str, Tensor],
    function: Callable[[Tensor], Tensor] = lambda values: values,
) -> tuple[Tensor, Tensor]:
    """The sum of a function of all elements that belong to a unit, and how many they are; float64 [units]."""
    total, number = torch.zeros(2, size, dtype=torch.float64)
    for axis in axes:
        values = function(tensors[axis.name].detach().float()).movedim(axis.dim, 0)
        owned = axis.units >= 0
        total.index_add_(0, axis.units[owned], values.reshape(len(values), -1).sum(1).cpu().double()[owned])
        number += torch.bincount(axis.units[owned], minlength=size) * values[0].numel()
    return total, number


# -- budgets --------------------------------------------------------------------------------------------------------

SPLITS = ("uniform", "global", "rademacher")


def units_to_remove(
    scores: Mapping[str, Tensor],
    fraction: float,
    *,
    split: str = "uniform",
    statistics: Mapping[str, Sequence[UnitStatistics]] | None = None,
    round_to: int | Mapping[str, int] = 8,
    min_units: int | Mapping[str, int] = 1,
) -> dict[str, Tensor]:
    r"""The units with the lowest scores that make up a fraction of the network.

    Within a group units go in the order of their scores, equal ones in the order of their positions, and in steps that
    leave multiples of ``round_to``. All steps of all groups stand in one line by a key, and as many are taken from its
    front as come nearest to the budget, as far as the limits of the groups allow, so that a larger budget removes the
    same units and more. The key is

    - ``"uniform"``: the share of the group's units that has gone by the middle of the step;
    - ``"global"``: the mean score of the step's units, over the root mean square of the group's scores. Without that
      the layers with the smallest scores would vanish: scores come with the scale of their layer (its fan-in, its
      activations). After Molchanov et al., Pruning convolutional neural networks for resource efficient inference,
      ICLR 2017, but with the mean square instead of the sum, which would put a tax on wide layers;
    - ``"rademacher"``: the share of the group's Rademacher complexity that has gone by the middle of the step
      (:func:`complexity_lost`). All layers give the same share of what linear functions of them can do: many units
      where a few carry most of it, few where all count.

    Args:
        scores: by group, [units].
        fraction: of all units, in [0, 1].
        split: one of the three.
        statistics: by group, for ``"rademacher"``.
        round_to: the number of units left is a multiple of it, or all; in a group smaller than twice that, of its
            half, its quarter, and so on. One number, or by group; see :func:`units_per_step`.
        min_units: units that must be left, at least 1. One number, or by group.

    Returns:
        By group, the positions to remove, int64, ascending; groups that lose nothing are left out.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], but is {fraction}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
    orders, steps = {}, []
    for name, score in scores.items():
        score = score.detach().cpu().double()
        if not score.isfinite().all():
            raise ValueError(f"{int((~score.isfinite()).sum())} scores of {name!r} are not finite")
        orders[name] = order = score.argsort(stable=True)
        height = _height(split, name, score[order], order, statistics)
        key, stops = -math.inf, _stops(len(score), _of_group(round_to, name), _of_group(min_units, name))
        for a, b in itertools.pairwise(stops):
            key = max(key, ((height[b] - height[a]) / (b - a) if split == "global" else height[a] + height[b]).item())
            steps.append(_Step(key, name, b, b - a))
    steps.sort(key=lambda step: step.key)  # stable: the steps of a group stay in order
    reached = list(itertools.accumulate((step.units for step in steps), initial=0))
    wanted = fraction * sum(map(len, scores.values()))
    number = min(range(len(reached)), key=lambda i: abs(reached[i] - wanted))
    removed = {step.group: step.removed for step in steps[:number]}
    return {name: order[: removed[name]].sort().values for name, order in orders.items() if name in removed}


def units_per_step(group: UnitGroup, channels: int = 8) -> int:
    """The least number of units whose channels are a multiple of ``channels``: 1 for heads of 64, say."""
    most = max((int((axis.units >= 0).sum()) // group.size for axis in group.producers), default=1)
    return channels // math.gcd(channels, max(most, 1))


class _Step(NamedTuple):
    key: float
    group: str
    removed: int  # units of the group that have gone after it
    units: int  # of this step


def _height(
    split: str,
    name: str,
    score: Tensor,
    order: Tensor,
    statistics: Mapping[str, Sequence[UnitStatistics]] | None,
) -> Tensor:
    """What has been given once the first j units in the order have gone, [units + 1]."""
    if split == "uniform":
        return torch.arange(len(score) + 1, dtype=torch.float64) / len(score)
    if split == "global":
        scale = score.square().mean().sqrt().item() or 1.0
        return torch.nn.functional.pad((score / scale).cumsum(0), (1, 0))
    places = (statistics or {}).get(name, ())
    if not any(place.seen.any() for place in places):
        raise ValueError(f'the split "rademacher" needs statistics of {name!r}, and there are none')
    # The same units seen in several places are as good as more vectors of signs.
    rows = [place.centred_projections() / place.seen.clamp_min(1) for place in places]
    return complexity_lost(torch.cat(rows).cpu(), order)


def _stops(size: int, multiple: int, least: int) -> list[int]:
    """How many units may go: none, or so many that a multiple not below the least is left."""
    while multiple > 1 and 2 * multiple > size:
        multiple //= 2
    return [0, *(size - left for left in range((size - 1) // multiple * multiple, least - 1, -multiple))]


def _of_group(option: int | Mapping[str, int], name: str) -> int:
    value = option if isinstance(option, int) else option[name]
    if value < 1:
        raise ValueError(f"round_to and min_units must be at least 1, but one of them is {value} for {name!r}")
    return value
