"""Networks whose units are silenced instead of removed: what a cut network is compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from impact_optim.pruning import UnitGraph


def randomised(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with statistics, scales and biases that are not what they are by default, so that none can be lost."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() < 2 or tensor.abs().max() < 1e-3:  # layer scales and heads that begin at zero as well
                scale = tensor.abs().mean().clamp(min=0.1)
                tensor.copy_(torch.randn_like(tensor) * 0.1 + (scale if name.endswith("weight") else 0.0))
    return model


def draw(graph: UnitGraph, generator: torch.Generator, share: float = 0.6) -> dict[str, list[int]]:
    """Units to remove: a different number in each group, at least one where two are left."""
    units = {}
    for name, group in graph.groups.items():
        most = min(group.size - 1, max(1, int(group.size * share)))
        count = int(torch.randint(0, most + 1, (), generator=generator)) if most else 0
        units[name] = torch.randperm(group.size, generator=generator)[:count].tolist()
    return units


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def deafened(model: nn.Module, graph: UnitGraph, units: Mapping[str, list[int]]) -> nn.Module:
    """A copy in which nothing reads the units: their columns in the weights that consume them are zero."""
    return _zeroed(model, graph, units, "consumers")


def silenced(model: nn.Module, graph: UnitGraph, units: Mapping[str, list[int]]) -> nn.Module:
    """A copy in which all that makes the units is zero, and so are they, if activations keep zero."""
    return _zeroed(model, graph, units, "producers")


@torch.no_grad()
def _zeroed(model: nn.Module, graph: UnitGraph, units: Mapping[str, list[int]], side: str) -> nn.Module:
    model = copy.deepcopy(model)
    named = tensors(model)
    for name, positions in units.items():
        for axis in getattr(graph.groups[name], side):
            gone = torch.isin(axis.units, torch.tensor(positions, dtype=torch.int64)).nonzero().reshape(-1)
            if named[axis.name].is_floating_point():
                named[axis.name].index_fill_(axis.dim, gone, 0)
    return model


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating point outputs of a forward pass."""
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference between outputs, relative to the spread of each."""
    assert len(first) == len(second) > 0
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        assert one.shape == other.shape
        scale = one.abs().max()
        assert scale > 0, "a network that outputs zeros tells nothing"
        worst = max(worst, ((one - other).abs().max() / scale).item())
    return worst
