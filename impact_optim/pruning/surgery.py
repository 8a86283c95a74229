"""Removes units from a network in place, exactly, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .graph import UnitGraph
from .plan import Plan, PruneRecord
from .stand_ins import first_names, named_tensors
from .tracing import fault


def cut(model: nn.Module, graph: UnitGraph, units: Mapping[str, Sequence[int] | Tensor] | Plan) -> list[PruneRecord]:
    """Removes units from a model: it then computes what it computed with their activations zero where they are read.

    In place: parameters and buffers stay the same objects, their gradients are cut as well, attributes such as
    ``out_channels`` and ``num_heads`` follow, and so does ``graph``. A forward pass without data shows first that the
    model runs after the cut. On any failure the model and the graph are as they were.

    Args:
        model: the model that ``graph`` was traced from, with all cuts since.
        graph: from :func:`trace`.
        units: group name -> positions in the group, from 0 to its size less 1, of the units to remove; or a plan for
            that, from :meth:`UnitGraph.plan`.

    Returns:
        One record for each dimension of a parameter or buffer that was cut.

    Raises:
        ValueError: a group or a unit is not there, a group would be left without any, or another cut has been made
            since the plan was.
        RuntimeError: the model does not fit the graph, or would not run after the cut.
    """
    plan = units if isinstance(units, Plan) else graph.plan(units)
    tensors = named_tensors(model)
    _check_fit(model, graph, plan, tensors)
    if not plan.kept:
        return []
    if (found := fault(model, graph, plan)) is not None:
        raise RuntimeError(
            f"The model would not compute the same after the cut: {found.reason}. Nothing was changed. Its code "
            "depends on which units there are, or on their number; remove others, or fewer."
        ) from found.error
    modules = dict(model.named_modules())
    changes = []
    for name, kept in plan.kept.items():
        tensor = tensors[name]
        grad = None if tensor.grad is None else select(tensor.grad, kept)
        changes.append((tensor, select(tensor, kept), grad))
    before = Snapshot([model], graph)
    try:
        for tensor, data, grad in changes:
            _give(tensor, data, grad)
        for (module, attribute), size in plan.sizes.items():
            setattr(modules[module], attribute, size)
        graph.forget(plan)
    except BaseException:
        before.restore()
        raise
    return plan.records


class Snapshot:
    """What a cut and an evaluation after it may change of models and their graph, to go back to.

    Parameters by reference: a cut gives them other memory, and an evaluation does not train.
    """

    def __init__(self, models: Iterable[nn.Module], graph: UnitGraph) -> None:
        modules = [module for model in models for module in model.modules()]
        self._attributes = [(module, dict(vars(module))) for module in modules]
        params = {p: None for module in modules for p in module.parameters(recurse=False)}
        buffers = {b: None for module in modules for b in module.buffers(recurse=False)}
        self._params = [(param, param.data, param.grad) for param in params]
        self._buffers = [(buffer, buffer.data, buffer.clone()) for buffer in buffers]
        self._restore_graph = graph.snapshot()

    @torch.no_grad()
    def restore(self) -> None:
        """Can be called again."""
        for module, attributes in self._attributes:
            for key in vars(module).keys() - attributes.keys():
                delattr(module, key)
            vars(module).update(attributes)
        for param, data, grad in self._params:
            param.grad = None
            param.data = data
            param.grad = grad
        for buffer, data, values in self._buffers:
            buffer.data = data.copy_(values)
        self._restore_graph()


def _check_fit(model: nn.Module, graph: UnitGraph, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Raises where a plan, a graph and a model are not of the same cuts."""
    sizes = {name: group.original for name, group in graph.groups.items()}
    if sizes.keys() != plan.made_for.keys() or not all(torch.equal(plan.made_for[name], sizes[name]) for name in sizes):
        raise ValueError("another cut has been made since this plan was: make a new one")
    first = first_names(model)
    for (name, dim), axis in graph.axes.items():
        tensor = tensors.get(name)
        if tensor is None or first[name] != name or tensor.dim() <= dim or tensor.size(dim) != len(axis.labels):
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise RuntimeError(
                f"{name} {found}, but the graph expects {len(axis.labels)} along dimension {dim}: "
                "the model has changed since it was traced. Trace it again."
            )


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
