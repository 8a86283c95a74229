"""Finds the units of a model: labels are carried through its program, and what has been found is rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attributes import SizeKey, settled_sizes
from .coupling import CONSUMER, PRODUCER
from .graph import LabelledAxis, UnitGraph, UnitGroup
from .labels import Atoms, AxisKey, Mismatch, Value, core, varied
from .operators import RULES
from .plan import Plan
from .propagation import Propagation
from .rehearsal import Rehearsal, as_inputs, culprit
from .stand_ins import caches, first_names, named_tensors
from .transcript import Transcript


def trace(model: nn.Module, example_inputs: Any, *, ignore: Iterable[nn.Module] = ()) -> UnitGraph:
    """Finds the groups of coupled units of a model.

    The model is exported in evaluation mode and, where that can be traced, in training mode (its modes are restored; it
    is run on tensors without data, its own are not touched), and labels of the units are carried through the program,
    see :mod:`.labels`. Where training cannot be traced and uses parameters that evaluation does not, all dimensions of
    the sizes of these stay. What has been found is then rehearsed: the model with some units of every group removed is
    exported again and must treat what is left in the same way. Groups whose code cannot follow, a view with fixed sizes
    for instance, are frozen, with the reason.

    Args:
        model: any module that ``torch.export`` can trace.
        example_inputs: the arguments of a forward pass: a tuple, a mapping of keyword arguments, or one tensor.
        ignore: modules that are never cut. They are run once, with their data, and not traced: a module that
            ``torch.export`` cannot trace can be left out so.

    Raises:
        RuntimeError: ``torch.export`` cannot trace the model.
    """
    caches.find()
    rehearsal, ignored = Rehearsal(*as_inputs(example_inputs)), list(ignore)
    if ignored:
        rehearsal.leave_out(model, ignored)
    atoms, names = Atoms(), first_names(model)
    run = Propagation(model, atoms, {}, RULES, Transcript())
    run.run(rehearsal.export(model))
    inside = {id(tensor) for part in ignored for tensor in (*part.parameters(), *part.buffers())}
    stays = {names[name] for name, tensor in named_tensors(model).items() if id(tensor) in inside}
    try:  # what only training runs, a head or noise, must follow as well
        run.run(rehearsal.export(model, training=True))
        rehearsal.modes = (False, True)
    except RuntimeError as error:
        # It may read the units with parameters that evaluation does not use.
        unseen = {name: param for name, param in model.named_parameters() if name not in run.used | stays}
        for name, param in unseen.items():
            reason = f"it may be what {name} is for, which only training uses, and training cannot be traced: {error}"
            for labels in run.axes.values():
                if len(labels) in param.shape:
                    atoms.freeze(labels, reason)
    for (name, _), labels in run.axes.items():
        if name in stays:
            atoms.freeze(labels, "its module is ignored")
    run.settle()
    graph, counts = _build(model, run, rehearsal)
    sample = _sample(graph)

    def works(sizes: dict[SizeKey, Tensor], names: list[str]) -> bool:
        graph.sizes = sizes
        return fault(model, graph, graph.plan({name: sample[name] for name in names})) is None

    known = {(size.module, size.attribute) for size in run.sizes if size.known}
    graph.sizes = settled_sizes(counts, known, graph.owners, works)
    _rehearse(model, graph, sample)
    return graph


# ------------------------------------------------------------------------------- what has been found


def _build(
    model: nn.Module, run: Propagation, rehearsal: Rehearsal
) -> tuple[UnitGraph, dict[SizeKey, list[Tensor | None]]]:
    """Sorts sets of atoms into groups: those that occur in the same axes are of the same kind.

    Returns:
        The graph, and what integer attributes may count: labels, ``None`` for what is not cut.
    """
    atoms, axes = run.atoms, run.axes
    owner: dict[int, AxisKey] = {int(atom): key for key, labels in axes.items() for atom in labels.tolist()}
    marked = {
        role: list(dict.fromkeys(owner[atom] for mark in marks for atom in mark.tolist() if atom in owner))
        for role, marks in run.roles.items()
    }
    roles = {key: frozenset(role for role, keys in marked.items() if key in keys) for key in axes}
    frozen = atoms.frozen()
    occurs: dict[int, dict[AxisKey, list[int]]] = {}
    for key, labels in axes.items():
        for index, root in enumerate(atoms.find(labels).tolist()):
            occurs.setdefault(root, {}).setdefault(key, []).append(index)
    order = {key: position for position, key in enumerate(marked[PRODUCER])}
    kinds: dict[tuple[tuple[AxisKey, ...], bool], list[int]] = {}
    for root, places in occurs.items():
        if any(roles[key] for key in places):
            kinds.setdefault((tuple(places), root in frozen), []).append(root)
    graph = UnitGraph(rehearsal=rehearsal)
    buffers = {name for name, _ in model.named_buffers()}
    label = torch.full((len(atoms) + 1,), -1)  # the last entry answers for -1
    # In the order in which the units are produced, parameters that no layer produces last.
    rank = {kind: min((order.get(key, len(order)) for key in kind[0]), default=0) for kind in kinds}
    for kind, members in sorted(kinds.items(), key=lambda item: rank[item[0]]):
        keys, fixed = kind
        produced = [key for key in keys if key in order]
        if fixed and not produced:
            continue
        lead = min(produced, key=lambda key: order[key]) if produced else keys[0]
        name = _layer(model, lead[0])
        held = [key[0] for key in keys if key[0] in buffers]
        if fixed:
            reason = next((frozen[root] for root in members if frozen[root] is not None), None)
            if reason is not None:
                graph.frozen.setdefault(name, reason)
        elif len(members) < 2:
            graph.frozen.setdefault(name, "all of it is one unit")
        elif held and all(CONSUMER in roles[key] or key[0] in buffers for key in keys):
            graph.frozen.setdefault(held[0], "it is an input: a buffer holds it, and no parameter makes it")
        else:
            unique, copy = name, 1
            while unique in graph.groups:
                copy += 1
                unique = f"{name}#{copy}"
            members.sort(key=lambda root: occurs[root][lead][0])
            positions = torch.arange(len(members))
            label[torch.tensor(members)] = graph.total + positions
            width = min(len(occurs[members[0]][key]) for key in keys if key == lead or CONSUMER in roles[key])
            graph.groups[unique] = UnitGroup(
                unique, positions, len(members), first=graph.total, kind=_kind(model, lead[0], width)
            )
            graph.total += len(members)

    def labelled(labels: Tensor) -> Tensor:
        return label[atoms.find(core(labels))]

    for key, labels in axes.items():
        if ((known := labelled(labels)) >= 0).any():
            graph.axes[key] = LabelledAxis(known, roles[key])
    graph.steps = [
        step._replace(results=[_uncounted(value, labelled) for value in step.results]) for step in run.transcript.steps
    ]
    for module, where, labels in run.sightings:
        dims = varied(known := labelled(labels))
        if len(dims) == 1 and (along := _along(known, dims[0])) is not None:
            graph.seen.setdefault((module, where, dims[0]), along)
    graph.relist()
    counts: dict[SizeKey, dict[Any, Tensor | None]] = {}
    for module, attribute, labels, dim, _ in run.sizes:
        counted = _along(labelled(labels), dim) if core(labels).size(dim) > 1 else None
        content = None if counted is None else tuple(counted.tolist())
        counts.setdefault((module, attribute), {}).setdefault(content, counted)
    return graph, {key: list(candidates.values()) for key, candidates in counts.items()}


def _uncounted(value: Value | None, labelled: Callable[[Tensor], Tensor]) -> tuple[int | None, ...] | None:
    """The sizes of a tensor, ``None`` along dimensions where they count units."""
    if value is None or 0 in value.shape:
        return None
    counting = {dim for labels in value.labels for dim in varied(labelled(labels))}
    return tuple(None if dim in counting else size for dim, size in enumerate(value.shape))


def _along(labels: Tensor, dim: int) -> Tensor | None:
    """Labels along one dimension, if they differ along no other and there are any."""
    if any(other != dim for other in varied(labels)):
        return None
    along = labels
    for other in reversed(range(labels.dim())):
        if other != dim:
            along = along.select(other, 0)
    return along.clone() if (along >= 0).any() else None


def _layer(model: nn.Module, name: str) -> str:
    """The name of the layer whose weight a parameter is, or the parameter's own."""
    base, _, last = name.partition(".parametrizations.")
    if last:
        base = f"{base}.{last.split('.')[0]}"
    module, _, attribute = base.rpartition(".")
    return module if "weight" in attribute.split("_") and module else base


def _kind(model: nn.Module, parameter: str, width: int) -> str:
    """What people call units that have so many indices at least wherever they are made or read."""
    if named_tensors(model)[parameter].dim() > 2:  # the kernel of a convolution
        return "channels" if width == 1 else f"groups of {width} channels"
    return "neurons" if width == 1 else f"heads of {width}"


# ------------------------------------------------------------------------------- rehearsed


class Fault(NamedTuple):
    """Why a cut cannot be made."""

    reason: str
    labels: Tensor
    """Of the units that it is due to, where that is known."""
    error: Exception | None = None
    """What the code of the model raises."""


def fault(model: nn.Module, graph: UnitGraph, plan: Plan) -> Fault | None:
    """Why a model would not do what it did with units of a plan removed, if so."""
    # By itself too: code may ask whether it is being exported.
    if (error := graph.rehearsal.failure(model, plan)) is not None:
        return _failed(model, error)
    atoms = Atoms(fixed=graph.total)
    # The last unit of a group is everywhere or nowhere: nothing tells it from what is not cut.
    single = [group.labels for name, group in graph.groups.items() if len(plan.left.get(name, group.original)) == 1]
    axes, names = dict[AxisKey, Tensor](), first_names(model)
    for name, tensor in named_tensors(model).items():
        for dim, size in enumerate(tensor.shape if names[name] == name else ()):
            known = graph.axes.get((name, dim))
            labels = torch.full((size,), -1) if known is None else known.labels
            labels = labels.masked_fill(torch.isin(labels, torch.cat(single)), -1) if single else labels
            kept = plan.kept.get(name, {}).get(dim)
            axes[name, dim] = labels if kept is None else labels[kept]
    transcript = Transcript(graph.steps)
    run = Propagation(model, atoms, axes, RULES, transcript)
    try:
        for training in graph.rehearsal.modes:
            try:
                program = graph.rehearsal.export(model, plan, training)
            except RuntimeError as untraceable:
                return _failed(model, untraceable)
            run.run(program)
        transcript.end()
    except Mismatch as mismatch:
        return Fault(f"the cut model does not follow: {mismatch}", mismatch.units)
    return None


def _failed(model: nn.Module, error: Exception) -> Fault:
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    reason = f"the code of {culprit(model, error)[0] or 'the model'} cannot follow ({first_line})"
    return Fault(reason, torch.empty(0, dtype=torch.int64), error)


def _sample(graph: UnitGraph) -> dict[str, Tensor]:
    """Units to rehearse with: at both ends, but not alike, and others; another number than in the group before.

    Code must not pass because two groups lose as many, which only those of fewer than seven units always do. Two are
    left where there are three or more: what a single one is, nothing tells from what is not cut.
    """
    generator = torch.Generator().manual_seed(0)
    units = {}
    for position, (name, group) in enumerate(graph.groups.items()):
        first, last = (2, 1) if group.size > 4 else (1, int(group.size == 4))
        inner = first + torch.randperm(max(0, group.size - first - last), generator=generator)
        others = inner[: position % max(1, (group.size - 3) // 2)]
        every = torch.arange(group.size)
        units[name] = torch.cat([every[:first], others, every[group.size - last :]])
    return units


def _rehearse(model: nn.Module, graph: UnitGraph, sample: Mapping[str, Tensor]) -> None:
    """Freezes the groups that the model's code cannot follow."""
    while graph.groups:
        found = fault(model, graph, graph.plan({name: sample[name] for name in graph.groups}))
        if found is None:
            return
        alone = {name: graph.plan({name: sample[name]}) for name in graph.groups}
        if found.error is not None:
            errors = {name: graph.rehearsal.failure(model, plan) for name, plan in alone.items()}
            guilty = {name: _failed(model, error).reason for name, error in errors.items() if error is not None}
        else:
            names = graph.owners(found.labels) or [n for n, plan in alone.items() if fault(model, graph, plan)]
            guilty = dict.fromkeys(names, found.reason)
        for name, reason in (guilty or dict.fromkeys(graph.groups, found.reason)).items():
            graph.freeze(name, reason)
