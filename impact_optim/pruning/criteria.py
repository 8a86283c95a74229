"""Pruning criteria: what a unit is worth.

A criterion is one function ``criterion(group, context) -> scores`` of one group, with

- ``group``: the :class:`~impact_optim.pruning.graph.UnitGroup`;
- ``context``: the :class:`Context`, what there is to read;
- ``scores``: one per unit, [units], finite. **The lowest go first.**

A criterion of your own is one line, usable at once by its name::

    CRITERIA["energy"] = lambda group, context: mean_over_places(group, context, UnitStatistics.std)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .graph import Axis, UnitGroup
from .statistics import UnitStatistics


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
    "rademacher": rademacher,
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
        raise ValueError(
            f"{int((~was_seen.any(0)).sum())} of {group.size} units of {group.name!r} have not been seen, or with "
            "values that are not finite alone; attach the statistics, and train the model before scores are read"
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
