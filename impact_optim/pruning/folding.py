"""What removed units contribute on average stays: the layers that read them take it into their biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .graph import UnitGraph
from .rehearsal import first_names, named_tensors

_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_CONVOLUTIONS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


class Folded(NamedTuple):
    """What a cut that keeps means does beside cutting."""

    values: dict[str, Tensor]
    """First qualified name of a bias or a running mean -> what it becomes, still with all units."""
    left_out: dict[str, str]
    """Layers that read removed units as zero -> why."""


@torch.no_grad()
def fold(
    model: nn.Module, graph: UnitGraph, units: Mapping[str, Sequence[int] | Tensor], means: Mapping[str, Tensor]
) -> Folded:
    r"""What biases and running means become if units are removed and their mean contribution stays.

    A layer :math:`y = W * x + b` that reads units R gets :math:`b + \sum_{u \in R} W_u \cdot m_u`, where m is the mean
    of what each column of W is multiplied with. A layer without a bias whose result only a batch norm reads leaves it
    to that norm's running mean, which falls by as much; in training mode the mean of the batch does so by itself.
    Other layers read zeros: those without either, transposed convolutions, and code that is not the plain ``nn.Linear``
    or ``nn.Conv`` of one or more dimensions.

    Nothing is changed.

    Args:
        model: before the cut.
        graph: its groups.
        units: group name -> positions in the group of the units to be removed.
        means: module -> m, of the shape [inputs, \*kernel], or [inputs] where it is the same for all taps.

    Raises:
        ValueError: a mean is of no module, or of another shape.
    """
    tensors, first = named_tensors(model), first_names(model)
    modules = dict(model.named_modules())
    for name in means.keys() - modules.keys():
        raise ValueError(f"there is a mean of {name!r}, which is no module of {type(model).__name__}")
    shifts: dict[str, list[tuple[str, Tensor]]] = {}
    left_out: dict[str, str] = {}
    for weight, gone in _read(graph, units).items():
        readers = [name for name, module in modules.items() if _is_plain(module) and module.weight is tensors[weight]]
        if not readers or gone is None:
            left_out[weight.removesuffix(".weight")] = "it is not a plain nn.Linear or nn.Conv"
            continue
        for name in readers:
            module = modules[name]
            home = _home(model, module, graph, weight)
            if name not in means:
                left_out[name] = "its inputs were not observed"
            elif home is not None:
                shifts.setdefault(first[home], []).append((name, _contribution(name, module, gone, means[name])))
            elif module.bias is not None:
                left_out[name] = "others share its bias"
            else:
                left_out[name] = "it has neither a bias nor a batch norm of its own behind it"
    values = {}
    for home, shares in shifts.items():
        if len(shares) > 1:
            left_out.update({name: "others share its batch norm" for name, _ in shares})
            continue
        old, (name, shift) = tensors[home], shares[0]
        shift = shift if modules[name].bias is not None else -shift
        values[home] = (old.to(shift.device, shift.dtype) + shift).to(old.device, old.dtype)
    return Folded(values, left_out)


def _read(graph: UnitGraph, units: Mapping[str, Sequence[int] | Tensor]) -> dict[str, Tensor | None]:
    """Weights that read any of the units -> which of their inputs are removed, None if those are no columns."""
    gone: dict[str, Tensor | None] = {}
    for group, positions in units.items():
        removed = torch.as_tensor(positions, dtype=torch.int64).cpu()
        for axis in graph.groups[group].consumers:
            mask = torch.isin(axis.units, removed)
            if mask.any():
                before = gone.get(axis.name, torch.zeros_like(mask))
                gone[axis.name] = None if axis.dim != 1 or before is None else before | mask
    return gone


def _is_plain(module: Any) -> bool:
    """Whether a layer computes nothing but W * x + b with its own weight."""
    if type(module).forward not in _FORWARDS or "forward" in vars(module):
        return False
    return isinstance(module, nn.Linear) or (type(module)._conv_forward in _CONVOLUTIONS and module.groups == 1)


def _home(model: nn.Module, module: nn.Module, graph: UnitGraph, weight: str) -> str | None:
    """The tensor that can take up what a layer's result loses."""
    if module.bias is None:
        return graph._norms.get(weight)
    owners = [name for part in model.modules() for name, p in part._parameters.items() if p is module.bias]
    names = [name for name, tensor in named_tensors(model).items() if tensor is module.bias]
    return names[0] if len(owners) == 1 else None


def _contribution(name: str, module: Any, gone: Tensor, mean: Tensor) -> Tensor:
    """What removed inputs add to each output on average."""
    weight = module.weight.detach()
    inputs = weight.shape[1:]
    if mean.shape not in (inputs, inputs[:1]):
        raise ValueError(f"the mean of {name} has the shape {tuple(mean.shape)}; it must have {tuple(inputs)}")
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device  # which has no float64
    index = gone.nonzero().flatten().to(device)
    columns = weight.to(device, torch.float64).index_select(1, index)
    read = mean.detach().to(device, torch.float64).index_select(0, index)
    read = read.reshape(*read.shape, *[1] * (len(inputs) - mean.dim()))
    return (columns * read).flatten(1).sum(1)


class MeanInput:
    """The mean of what each column of a layer's weight is multiplied with, over samples and places of the output.

    For a convolution it has an entry for each tap: at the border the taps read the padding.

    Args:
        module: a plain ``nn.Linear``, or convolution of one group.
        units: group name -> the position in the group of the unit that each column reads, -1 for none.
    """

    def __init__(self, module: Any, units: Mapping[str, Tensor]) -> None:
        weight = module.weight
        device = torch.device("cpu") if weight.device.type == "mps" else weight.device
        self.units = dict(units)
        self.total = torch.zeros(weight.shape[1:], dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, module: Any, x: Tensor) -> None:
        """Takes in an input of the layer. One that is not finite does not enter."""
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            if isinstance(module, nn.Linear):
                mean = x.detach().flatten(0, -2).mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
                n = x.numel() // x.shape[-1]
            else:
                mean, n = _mean_patch(module, x.detach())
            mean = mean.to(self.total.device, torch.float64)
            finite = mean.isfinite().all()
            self.total += torch.where(finite, mean * n, 0.0)
            self.count += n * finite

    def keep(self, kept: Mapping[str, Tensor], units: Mapping[str, Tensor]) -> None:
        """After a cut: keeps the columns that read the units at these positions; ``units`` is as of then."""
        stays = torch.ones(len(self.total), dtype=torch.bool)
        for group, positions in self.units.items():
            if group in kept:
                stays &= (positions < 0) | torch.isin(positions, kept[group])
        self.total = self.total[stays.to(self.total.device)]
        self.units = dict(units)


def _mean_patch(module: Any, x: Tensor) -> tuple[Tensor, int]:
    """The mean of the patches that a convolution sees, and their number."""
    batched = x.dim() == module.weight.dim()
    mean = (x if batched else x.unsqueeze(0)).mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
    # The mean of an output is linear in the weights, with the mean patch as its gradient, whatever the padding.
    with torch.enable_grad():
        probe = torch.zeros(1, *module.weight.shape[1:], dtype=mean.dtype, device=x.device, requires_grad=True)
        output = module._conv_forward(mean.unsqueeze(0), probe, None)
        (patch,) = torch.autograd.grad(output.mean(), probe)
    return patch[0], output.numel() * (len(x) if batched else 1)


def mean_inputs(model: nn.Module, graph: UnitGraph) -> dict[str, MeanInput]:
    """By module: empty statistics for each plain layer that reads units."""
    tensors = named_tensors(model)
    return {
        name: MeanInput(module, table)
        for weight, table in units_read(graph).items()
        for name, module in model.named_modules()
        if _is_plain(module) and module.weight is tensors[weight]
    }


def units_read(graph: UnitGraph) -> dict[str, dict[str, Tensor]]:
    """Weight -> group -> the position in the group of the unit that each of its columns reads, -1 for none."""
    tables: dict[str, dict[str, Tensor]] = {}
    for name, group in graph.groups.items():
        for axis in group.consumers:
            if axis.dim == 1:
                tables.setdefault(axis.name, {})[name] = axis.units
    return tables
