"""Cuts units that carry little information out of a network while it trains, exactly, and keeps what is left.

The words:

- **unit**: what is removed or stays: a channel, a neuron, a head, with all that makes and reads it.
- **group**: units of one kind, of which any can go as long as one is left. It is named after the layer that makes them.
- **position**: the place of a unit in its group, from 0; the units after it move up when it goes. Its *original*
  position is that of before all cuts.
- **axis**: a dimension of a parameter or buffer. Its indices belong to units.
- **label**: a number for each index of an axis, and for each element of an activation: of the unit that it belongs
  to, in a numbering over all groups which no cut changes; -1 for none. While a model is traced, and it is not known
  yet what makes a unit, each index has a label of its own, an **atom**.
- **producer** and **consumer**: the axes that make units, and those that read them.
- **frozen**: what cannot be cut, with the reason.
- **graph**: the groups of a model, by what :func:`trace` has found.
- **plan**: one cut, from the choice of units to the repair of what is shaped like them: the positions that stay, the
  indices that are kept of each axis, and the sizes that follow.
- **record**: what a plan keeps of one axis.
- **rehearsal**: running a model as a plan would leave it, on tensors without data, before anything is touched.

An example. A convolution and its batch norm make four channels, which a linear layer reads, four places of each:

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
>>> images = torch.randn(2, 3, 4, 4)
>>> graph = trace(model, images)
>>> print(graph)
group  units       made by  read by
0      4 channels  0, 1     4
not cut: 4: it is an output of the model

The axes of the group say which index belongs to the unit at which position:

>>> [(axis.name, axis.dim, axis.units.tolist()) for axis in graph.groups["0"].producers][:2]
[('0.weight', 0, [0, 1, 2, 3]), ('0.bias', 0, [0, 1, 2, 3])]
>>> [(axis.name, axis.dim, axis.units.tolist()) for axis in graph.groups["0"].consumers]
[('4.weight', 1, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])]

A plan follows from the positions to be removed. It is rehearsed, and carried out in one go or not at all:

>>> plan = graph.plan({"0": [1, 2]})
>>> plan.left["0"].tolist(), plan.kept["4.weight"][1].tolist(), plan.sizes["0", "out_channels"]
([0, 3], [0, 1, 2, 3, 12, 13, 14, 15], 2)
>>> records = cut(model, graph, plan)
>>> print(graph)
group  units            made by  read by
0      2 of 4 channels  0, 1     4
not cut: 4: it is an output of the model
>>> model(images).shape
torch.Size([2, 2])

What is shaped like the parameters follows by the records: ``repair(records, model, optimizers=optimizer)``.
:class:`ActivationPruner` does all of this by itself, at set epochs, with the units whose activations tell least.
"""

from .architecture import load_pruned, save_pruned
from .attention import open_heads
from .criteria import CRITERIA
from .graph import Axis, Observation, UnitGraph, UnitGroup
from .plan import Plan, PruneRecord
from .pruner import ActivationPruner
from .repair import repair
from .report import LayerReport, PruneReport
from .schedule import ramp
from .surgery import cut
from .tracing import trace

__all__ = [
    "CRITERIA",
    "ActivationPruner",
    "Axis",
    "LayerReport",
    "Observation",
    "Plan",
    "PruneRecord",
    "PruneReport",
    "UnitGraph",
    "UnitGroup",
    "cut",
    "load_pruned",
    "open_heads",
    "ramp",
    "repair",
    "save_pruned",
    "trace",
]
