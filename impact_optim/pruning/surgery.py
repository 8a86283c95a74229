"""Removes units from a network in place, exactly, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .graph import UnitGraph, mismatch
from .rehearsal import culprit, first_names, forward, named_tensors


class PruneRecord(NamedTuple):
    """What is left of one dimension of a parameter or buffer after a cut."""

    name: str
    """Qualified name (the first one of tied parameters)."""
    dim: int
    kept: Tensor
    """int64, the indices that were kept, ascending."""


def cut(model: nn.Module, graph: UnitGraph, units: Mapping[str, Sequence[int] | Tensor]) -> list[PruneRecord]:
    """Removes units from a model: it then computes what it computed with their activations zero where they are read.

    In place: parameters and buffers stay the same objects, their gradients are cut as well, attributes such as
    ``out_channels`` and ``num_heads`` follow, and so does ``graph``. A forward pass without data shows first that the
    model runs after the cut. On any failure the model and the graph are as they were.

    Args:
        model: the model that ``graph`` was traced from, with all cuts since.
        graph: from :func:`trace`.
        units: group name -> positions in the group, from 0 to its size less 1, of the units to remove.

    Returns:
        One record for each dimension of a parameter or buffer that was cut.

    Raises:
        ValueError: a group or a unit is not there, or a group would be left without any.
        RuntimeError: the model does not fit the graph, or would not run after the cut.
    """
    plan = graph.plan(units)
    tensors = named_tensors(model)
    first = first_names(model)
    for (name, dim), place in graph._axes.items():
        tensor = tensors.get(name)
        if tensor is None or first[name] != name or tensor.dim() <= dim or tensor.size(dim) != len(place.units):
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise RuntimeError(
                f"{name} {found}, but the graph expects {len(place.units)} along dimension {dim}: "
                "the model has changed since it was traced. Trace it again."
            )
    if not plan.kept:
        return []
    for training in graph._training:
        try:
            forward(model, graph._inputs, plan, training)
        except Exception as error:
            module, line = culprit(model, error)
            raise RuntimeError(
                f"The model would not run after the cut: {module or 'the model itself'} ({line}) stops with "
                f"{type(error).__name__}: {error}. Nothing was changed. Leave out the groups that this module uses."
            ) from error
    if (fault := mismatch(model, graph, units)) is not None:
        raise RuntimeError(
            f"The model would not compute the same after the cut: {fault}. Nothing was changed. Its code depends on "
            "which units there are, or on their number; remove others, or fewer."
        )
    modules = dict(model.named_modules())
    changes = []
    for name, kept in plan.kept.items():
        tensor = tensors[name]
        grad = None if tensor.grad is None else select(tensor.grad, kept)
        changes.append((tensor, select(tensor, kept), grad))
    before = [(tensor, tensor.data, tensor.grad) for tensor, *_ in changes]
    sizes = {key: getattr(modules[key[0]], key[1]) for key in plan.sizes}
    try:
        for tensor, data, grad in changes:
            _give(tensor, data, grad)
        for (module, attribute), size in plan.sizes.items():
            setattr(modules[module], attribute, size)
        graph.forget(units)
    except BaseException:
        for tensor, data, grad in before:
            _give(tensor, data, grad)
        for (module, attribute), size in sizes.items():
            if getattr(modules[module], attribute) != size:
                setattr(modules[module], attribute, size)
        raise
    return [PruneRecord(name, dim, kept) for name, dims in plan.kept.items() for dim, kept in sorted(dims.items())]


def _give(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Puts data of another shape into a tensor that stays the same object."""
    tensor.grad = None
    if tensor.requires_grad:
        # As long as anybody holds a loss of before the cut, autograd goes on expecting gradients of the old shape.
        # Data of another dtype makes it forget them.
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = grad


def select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept indices of some dimensions, in memory in the order that the tensor has; itself if all are kept."""
    selected = tensor.detach()
    for dim, indices in kept.items():
        selected = selected.index_select(dim, indices.to(tensor.device))
    if not kept or tensor.layout is not torch.strided:
        return selected
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if order == sorted(order):
        return selected
    # index_select forgets channels last.
    return torch.empty_permuted(selected.shape, order, dtype=tensor.dtype, device=tensor.device).copy_(selected)
