"""Which units of a network can be removed, and which dimensions of which tensors go with each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .labels import CONSUMER, PRODUCER, Atoms, AxisKey, Mismatch, Propagation, Step, Value, core, counts_units, varied
from .operators import RULES
from .rehearsal import (
    Inputs,
    Plan,
    as_inputs,
    caches,
    culprit,
    export,
    first_names,
    forward,
    kept_indices,
    named_tensors,
    outputs,
    unknown_output,
)


class Axis(NamedTuple):
    """A dimension of a parameter or buffer whose indices belong to units of a group."""

    name: str
    """Qualified name of the parameter or buffer (the first one of tied parameters)."""
    dim: int
    units: Tensor
    """int64, [size of the dimension]: position in the group of the unit that each index belongs to, -1 for none."""


class Observation(NamedTuple):
    """Where a forward hook sees the activations of a group's units."""

    module: str
    """Qualified name of the module."""
    where: str
    """``"input"``: the first positional argument of a consumer; ``"output"``: what a producer returns."""
    dim: int
    """Dimension of that tensor, counted from the front."""
    units: Tensor
    """int64, [size of the dimension]: position in the group of the unit that each index belongs to, -1 for none."""


@dataclass
class UnitGroup:
    """Units of one kind, of which any can be removed as long as one is left."""

    name: str
    """The layer that produces the units."""
    original: Tensor
    """int64, [size]: the number that each unit had when the model was traced, ascending."""
    original_size: int
    producers: list[Axis] = field(default_factory=list)
    """Output side: weights, biases, norms, buffers."""
    consumers: list[Axis] = field(default_factory=list)
    """Weights that read the units."""
    observations: list[Observation] = field(default_factory=list)
    """Consumers' inputs first, then producers' outputs."""
    _first: int = 0  # number of the group's first unit in the numbering of the whole graph

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.original)

    def _numbers(self) -> Tensor:
        return self._first + self.original


_Counts = dict[tuple[str, str], list[Tensor | None]]


class _Place(NamedTuple):
    """A dimension seen by the whole graph: each index's unit in a numbering over all groups."""

    units: Tensor
    roles: frozenset[str] = frozenset()


@dataclass
class UnitGraph:
    """The groups of a model, and what cannot be cut. Prints as a table."""

    groups: dict[str, UnitGroup] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    """What cannot be cut -> why."""
    _inputs: Inputs = ((), {})
    _training: tuple[bool, ...] = (False,)
    _axes: dict[AxisKey, _Place] = field(default_factory=dict)
    _sizes: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _known: set[tuple[str, str]] = field(default_factory=set)  # sizes that operators give a meaning
    _seen: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    _total: int = 0
    _opaque: dict[str, list[Any]] = field(default_factory=dict)
    _steps: list[Step] = field(default_factory=list)
    _norms: dict[str, str] = field(default_factory=dict)

    def plan(self, units: Mapping[str, Sequence[int] | Tensor]) -> Plan:
        """What removing units (group name -> positions in the group) changes.

        Raises:
            ValueError: a group is not known, a position is not in the group or given twice, or no unit would be left.
        """
        removed = torch.zeros(self._total + 1, dtype=torch.bool)
        touched = set()
        for name, positions in units.items():
            group = self.groups.get(name)
            if group is None:
                why = f": {self.frozen[name]}" if name in self.frozen else ""
                raise ValueError(f"{name!r} is not a group that can be cut{why}. The groups are {list(self.groups)}.")
            chosen = torch.as_tensor(positions).detach().cpu()
            if chosen.numel() == 0:
                continue
            if chosen.dim() != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
                raise ValueError(
                    f"{name!r}: positions must be a one-dimensional sequence of integers, not {positions!r}."
                )
            if chosen.min() < 0 or chosen.max() >= group.size or len(chosen.unique()) != len(chosen):
                raise ValueError(
                    f"{name!r} has units 0 to {group.size - 1}; each can be removed once, not {chosen.tolist()}."
                )
            if len(chosen) == group.size:
                raise ValueError(f"{name!r}: one of its {group.size} units must stay.")
            removed[group._numbers()[chosen]] = True
            touched.add(name)
        plan = Plan(opaque=self._opaque)
        for (name, dim), place in self._axes.items():
            kept = kept_indices(place.units, removed)
            if len(kept) < len(place.units):
                plan.kept.setdefault(name, {})[dim] = kept
        for key, labels in self._sizes.items():
            kept = kept_indices(labels, removed)
            if len(kept) < len(labels):
                plan.sizes[key] = len(kept)
        return plan

    def forget(self, units: Mapping[str, Sequence[int] | Tensor]) -> None:
        """Takes removed units out of the graph, once the model has been cut."""
        removed = torch.zeros(self._total + 1, dtype=torch.bool)
        for name, positions in units.items():
            group = self.groups[name]
            chosen = torch.as_tensor(positions, dtype=torch.int64).cpu()
            removed[group._numbers()[chosen]] = True
        axes = {
            key: place._replace(units=place.units[kept_indices(place.units, removed)])
            for key, place in self._axes.items()
        }
        sizes = {key: labels[kept_indices(labels, removed)] for key, labels in self._sizes.items()}
        seen = {key: labels[kept_indices(labels, removed)] for key, labels in self._seen.items()}
        before = dict(vars(self)), [(group, dict(vars(group))) for group in self.groups.values()]
        try:
            for group in self.groups.values():
                group.original = group.original[~removed[group._numbers()]]
            self._axes, self._sizes, self._seen = axes, sizes, seen
            self._relist()
        except BaseException:
            vars(self).update(before[0])
            for group, fields in before[1]:
                vars(group).update(fields)
            raise

    def freeze(self, names: Iterable[str], reason: str) -> None:
        """Takes groups out of the graph: their units stay."""
        for name in names:
            group = self.groups.pop(name)
            self.frozen[name] = reason
            numbers = group._numbers()

            def without(labels: Tensor, numbers: Tensor = numbers) -> Tensor:
                return labels.masked_fill(torch.isin(labels, numbers), -1)

            self._axes = {key: place._replace(units=without(place.units)) for key, place in self._axes.items()}
            self._sizes = {key: without(labels) for key, labels in self._sizes.items()}
            self._seen = {key: without(labels) for key, labels in self._seen.items()}
        self._relist()

    def _relist(self) -> None:
        """Lists each group's axes and observations anew."""
        position = torch.full((self._total + 1,), -1)
        owner = torch.full((self._total + 1,), -1)
        groups = list(self.groups.values())
        for number, group in enumerate(groups):
            units = group._numbers()
            position[units] = torch.arange(group.size)
            owner[units] = number
            group.producers, group.consumers, group.observations = [], [], []

        def split(units: Tensor) -> Iterable[tuple[UnitGroup, Tensor]]:
            known = units >= 0
            whose = torch.where(known, owner[units.clamp(min=0)], -1)
            for number in whose[whose >= 0].unique().tolist():
                yield groups[number], torch.where(whose == number, position[units.clamp(min=0)], -1)

        for (name, dim), place in self._axes.items():
            for group, units in split(place.units):
                if CONSUMER in place.roles:
                    group.consumers.append(Axis(name, dim, units))
                if CONSUMER not in place.roles or PRODUCER in place.roles:
                    group.producers.append(Axis(name, dim, units))
        for where in ("input", "output"):
            for (module, side, dim), labels in self._seen.items():
                if side == where:
                    for group, units in split(labels):
                        group.observations.append(Observation(module, side, dim, units))

    def __str__(self) -> str:
        rows = [("group", "units", "was", "cut in")]
        for group in self.groups.values():
            axes = [f"{axis.name}[{axis.dim}]" for axis in (*group.producers, *group.consumers)]
            shown = ", ".join(axes[:4]) + (f" and {len(axes) - 4} more" if len(axes) > 4 else "")
            rows.append((group.name, str(group.size), str(group.original_size), shown))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + [f"not cut: {name}: {reason}" for name, reason in self.frozen.items()])


def trace(model: nn.Module, example_inputs: Any, *, ignore: Iterable[nn.Module] = ()) -> UnitGraph:
    """Finds the groups of coupled units of a model.

    The model is exported in evaluation mode and, where that can be traced, in training mode (its modes are restored; it
    is run on tensors without data, its own are not touched), and labels of the units are carried through the program,
    see :mod:`.labels`. Where training cannot be traced and uses parameters that evaluation does not, all dimensions of
    the sizes of these stay. What has been found is
    then rehearsed: the model with some units of every group removed is exported again and must treat what is left in
    the same way. Groups whose code cannot follow, a view with fixed sizes for instance, are frozen, with the reason.

    Args:
        model: any module that ``torch.export`` can trace.
        example_inputs: the arguments of a forward pass: a tuple, a mapping of keyword arguments, or one tensor.
        ignore: modules that are never cut. They are run once, with their data, and not traced: a module that
            ``torch.export`` cannot trace can be left out so.

    Raises:
        RuntimeError: ``torch.export`` cannot trace the model.
    """
    caches.find()
    inputs = as_inputs(example_inputs)
    names = first_names(model)
    atoms, axes = Atoms(), dict[AxisKey, Tensor]()
    parts = list(ignore)
    uncut = Plan(opaque=outputs(model, inputs, parts) if parts else {})
    run = _propagate(model, inputs, uncut, (False,), atoms, axes, names, None)
    ignored = {names[name] for module in parts for name in _names_in(model, module)}
    modes: tuple[bool, ...] = (False, True)
    try:  # what only training runs, a head or noise, must follow as well
        _extend(run, model, inputs, uncut, True)
    except RuntimeError as error:
        modes = (False,)
        # It may read the units with parameters that evaluation does not use.
        unseen = {name: param for name, param in model.named_parameters() if name not in run.used | ignored}
        for name, param in unseen.items():
            reason = f"it may be what {name} is for, which only training uses, and training cannot be traced: {error}"
            for labels in axes.values():
                if len(labels) in param.shape:
                    atoms.freeze(labels, reason)
    for (name, _), labels in axes.items():
        if name in ignored:
            atoms.freeze(labels, "its module is ignored")
    run.settle()
    graph, counts = _build(model, run, atoms, axes)
    graph._inputs, graph._training, graph._opaque = inputs, modes, uncut.opaque
    first, last = _sample(graph, 0), _sample(graph, -1)
    _settle_sizes(model, graph, counts, first)
    _rehearse(model, graph, [first, last])
    return graph


def _names_in(model: nn.Module, part: nn.Module) -> list[str]:
    inside = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [name for name, tensor in tensors if id(tensor) in inside]


def _propagate(
    model: nn.Module,
    inputs: Inputs,
    plan: Plan,
    modes: Sequence[bool],
    atoms: Atoms,
    axes: dict[AxisKey, Tensor],
    names: dict[str, str],
    steps: Sequence[Step] | None,
) -> Propagation:
    run = Propagation(model, atoms, axes, names, RULES, steps)
    for training in modes:
        _extend(run, model, inputs, plan, training)
    run.end()
    return run


def _extend(run: Propagation, model: nn.Module, inputs: Inputs, plan: Plan, training: bool) -> None:
    try:
        program = export(model, inputs, plan, training)
    except Exception as error:
        if kind := unknown_output(model, inputs, plan, training):
            raise RuntimeError(
                f"torch.export cannot trace the model: its output contains a {kind}, which it does not know. Let the "
                "model return tensors, tuples, lists or dicts (for language models of Hugging Face: use_cache=False), "
                f"or register {kind} with torch.utils._pytree.register_pytree_node."
            ) from error
        module, line = culprit(model, error)
        where = f"in {module or 'the model itself'} ({line})" if line else "somewhere in it"
        raise RuntimeError(
            f"torch.export cannot trace the model: it stopped {where} with {type(error).__name__}: {error}. "
            "Change that line, or leave the module out with ignore=."
        ) from error
    run.run(program)


def _build(model: nn.Module, run: Propagation, atoms: Atoms, axes: dict[AxisKey, Tensor]) -> tuple[UnitGraph, _Counts]:
    """Sorts sets of atoms into groups: those that occur in the same axes are of the same kind.

    Returns:
        The graph, and what integer attributes may count.
    """
    owner: dict[int, AxisKey] = {int(atom): key for key, labels in axes.items() for atom in labels.tolist()}
    marked: dict[str, list[AxisKey]] = {}
    for role, marks in run.roles.items():
        marked[role] = list(dict.fromkeys(owner[atom] for mark in marks for atom in mark.tolist() if atom in owner))
    roles = {key: frozenset(role for role, keys in marked.items() if key in keys) for key in axes}
    roots = {key: atoms.find(labels) for key, labels in axes.items()}
    frozen = atoms.frozen()
    occurs: dict[int, dict[AxisKey, int]] = {}
    for key, labels in roots.items():
        for index, root in enumerate(labels.tolist()):
            occurs.setdefault(root, {}).setdefault(key, index)
    order = {key: position for position, key in enumerate(marked[PRODUCER])}
    kinds: dict[tuple[tuple[AxisKey, ...], bool], list[int]] = {}
    for root, places in occurs.items():
        if any(roles[key] for key in places):
            kinds.setdefault((tuple(places), root in frozen), []).append(root)
    graph = UnitGraph()
    buffers = {name for name, _ in model.named_buffers()}
    number = torch.full((len(atoms) + 1,), -1)
    # In the order in which the units are produced, parameters that no layer produces last.
    rank = {kind: min((order.get(key, len(order)) for key in kind[0]), default=0) for kind in kinds}
    for kind, members in sorted(kinds.items(), key=lambda item: rank[item[0]]):
        keys, fixed = kind
        produced = [key for key in keys if key in order]
        if fixed and not produced:
            continue
        lead = min(produced, key=lambda key: order[key]) if produced else keys[0]
        name = _layer(model, lead[0])
        if fixed:
            reason = next((frozen[root] for root in members if frozen[root] is not None), None)
            if reason is not None:
                graph.frozen.setdefault(name, reason)
            continue
        if len(members) < 2:
            graph.frozen.setdefault(name, "all of it is one unit")
            continue
        held = [key[0] for key in keys if key[0] in buffers]
        if held and all(CONSUMER in roles[key] or key[0] in buffers for key in keys):
            graph.frozen.setdefault(held[0], "it is an input: a buffer holds it, and no parameter makes it")
            continue
        unique, copy = name, 1
        while unique in graph.groups:
            copy += 1
            unique = f"{name}#{copy}"
        members.sort(key=lambda root: occurs[root][lead])
        number[torch.tensor(members)] = torch.arange(graph._total, graph._total + len(members))
        graph.groups[unique] = UnitGroup(unique, torch.arange(len(members)), len(members), _first=graph._total)
        graph._total += len(members)

    def units(labels: Tensor) -> Tensor:
        return number[atoms.find(core(labels))]  # the last entry answers for -1

    graph._axes = {key: _Place(units(labels), roles[key]) for key, labels in axes.items()}
    graph._axes = {key: place for key, place in graph._axes.items() if (place.units >= 0).any()}
    graph._steps = [step._replace(results=[_uncounted(value, units) for value in step.results]) for step in run.steps]
    counts: _Counts = {}
    for module, attribute, counting, dim, sure in run.sizes:
        counted = _along(units(counting), dim) if core(counting).size(dim) > 1 else None
        candidates = counts.setdefault((module, attribute), [])
        if sure:
            graph._known.add((module, attribute))
        if counted is None and None not in candidates:
            candidates.append(None)
        elif counted is not None and not any(other is not None and torch.equal(counted, other) for other in candidates):
            candidates.append(counted)
    for module, where, labels in run.sightings:
        known = units(labels)
        dims = varied(known)
        if len(dims) == 1 and (along := _along(known, dims[0])) is not None:
            graph._seen.setdefault((module, where, dims[0]), along)
    for weight, means in run.norms.items():
        mean = next(iter(means))
        if len(means) == 1 and mean is not None and run.normed[mean] == {weight}:
            graph._norms[weight] = mean
    graph._relist()
    return graph, counts


def _uncounted(value: Value | None, units: Callable[[Tensor], Tensor]) -> tuple[int | None, ...] | None:
    """The sizes of a tensor, ``None`` along dimensions where they count units."""
    if value is None or 0 in value.shape:
        return None
    counting = {dim for labels in value.labels for dim in varied(units(labels))}
    return tuple(None if dim in counting else size for dim, size in enumerate(value.shape))


def _along(units: Tensor, dim: int) -> Tensor | None:
    """Units along one dimension, if they differ along no other and there are any."""
    if any(other != dim for other in varied(units)):
        return None
    along = units
    for other in reversed(range(units.dim())):
        if other != dim:
            along = along.select(other, 0)
    return along.clone() if (along >= 0).any() else None


def _layer(model: nn.Module, name: str) -> str:
    """The name of the layer whose weight a parameter is, or the parameter's own."""
    base, _, last = name.partition(".parametrizations.")
    if last:
        base = f"{base}.{last.split('.')[0]}"
    module, _, attribute = base.rpartition(".")
    return module if attribute == "weight" and module else base


def _sample(graph: UnitGraph, end: int) -> dict[str, Tensor]:
    """Units to rehearse with: the first or the last one and others, a different number in each group."""
    generator = torch.Generator().manual_seed(end % 2)
    units = {}
    for position, (name, group) in enumerate(graph.groups.items()):
        others = torch.randperm(group.size, generator=generator)
        outer = torch.arange(group.size)[end]
        others = others[others != outer][: (7 * position) % max(1, (group.size - 1) // 2)]
        units[name] = torch.cat([outer.reshape(1), others])
    return units


def _settle_sizes(model: nn.Module, graph: UnitGraph, counts: _Counts, chosen: Mapping[str, Tensor]) -> None:
    """Decides what attributes count; where several numbers agree by chance, by what the code survives."""
    cut = {key: [labels for labels in candidates if labels is not None] for key, candidates in counts.items()}
    graph._sizes = {key: candidates[0] for key, candidates in cut.items() if len(candidates) == 1}
    for module, attribute in list(graph._sizes):
        # As many heads as a head is wide: it is the heads that are cut.
        others = [name for owner, name in counts if owner == module and "heads" in name]
        if "head" in attribute and "heads" not in attribute and others:
            del graph._sizes[module, attribute]

    def settle(key: tuple[str, str], options: Sequence[Tensor | None], otherwise: Tensor | None) -> None:
        names = _owners(graph, torch.cat(cut[key]))
        # Alone as well: what two groups lose may be the same number.
        sets = [names, *([name] for name in names if len(names) > 1)]
        for labels in (*options, otherwise):
            graph._sizes.pop(key, None)
            if labels is not None:
                graph._sizes[key] = labels
            if not any(_fault(model, graph, {name: chosen[name] for name in some}) for some in sets):
                break

    for key, candidates in cut.items():
        if len(candidates) > 1:
            settle(key, [None, *candidates], None)
    # Others have the same number by chance: what has no telling name, and the code does not need, stays.
    together: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for key, labels in graph._sizes.items():
        if key not in graph._known:
            together.setdefault(tuple(_owners(graph, labels)), []).append(key)
    follows, stay = graph._sizes, set[tuple[str, str]]()
    decided: dict[frozenset[Any], set[Any]] = {}
    for names, keys in together.items():
        # Layers that differ in their numbers only decide alike: a deep model has hundreds of such attributes.
        kinds: dict[tuple[str, str], tuple[Any, ...]] = {
            key: (_numberless(key[0]), key[1], None in counts[key], *(_within(name, key[0]) for name in names))
            for key in keys
        }
        alike = frozenset([*kinds.values(), *map(_numberless, names)])
        if alike not in decided:
            some = {name: chosen[name] for name in names}

            def runs(without: set[Any], kinds: Mapping[Any, Any] = kinds, some: Mapping[str, Tensor] = some) -> bool:
                graph._sizes = {key: labels for key, labels in follows.items() if kinds.get(key) not in without}
                return not _fault(model, graph, some)

            every = set(kinds.values())
            vague = {kind for kind in every if not counts_units(kind[1], surely=True)}
            doubtful = {kind for kind in every if kind[2]}
            starts = [vague, set[Any](), vague | doubtful, every, doubtful, *(doubtful - {k} for k in doubtful)]
            found = set(next((start for start in [*starts, *({k} for k in every)] if runs(start)), ()))
            for kind in vague - found:
                if runs({*found, kind}):
                    found.add(kind)
            decided[alike] = found
        stay.update(key for key in keys if kinds[key] in decided[alike])
    graph._sizes = {key: labels for key, labels in follows.items() if key not in stay}


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _rehearse(model: nn.Module, graph: UnitGraph, samples: Iterable[Mapping[str, Tensor]]) -> None:
    """Freezes the groups that the model's code cannot follow."""
    for chosen in samples:
        while graph.groups:
            units = {name: chosen[name] for name in graph.groups}
            try:
                for training in graph._training:
                    forward(model, graph._inputs, graph.plan(units), training)
            except Exception as error:
                _blame(model, graph, units, error)
                continue
            fault = mismatch(model, graph, units)
            if fault is None:
                break
            guilty = _owners(graph, fault.units)
            guilty = guilty or [name for name in graph.groups if mismatch(model, graph, {name: chosen[name]})]
            graph.freeze(guilty or list(graph.groups), f"the cut model does not follow: {fault}")


def mismatch(model: nn.Module, graph: UnitGraph, units: Mapping[str, Sequence[int] | Tensor]) -> Mismatch | None:
    """Where the program that a model runs after a cut does not treat the kept units as the graph says."""
    plan = graph.plan(units)
    atoms = Atoms(fixed=graph._total)
    # The last unit of a group is everywhere or nowhere: nothing tells it from what is not cut.
    left = {name: group.size - len(units.get(name, ())) for name, group in graph.groups.items()}
    single = [graph.groups[name]._numbers() for name, count in left.items() if count == 1]
    axes, names = {}, first_names(model)
    for name, tensor in named_tensors(model).items():
        for dim, size in enumerate(tensor.shape if names[name] == name else ()):
            place = graph._axes.get((name, dim))
            labels = torch.full((size,), -1) if place is None else place.units
            labels = labels.masked_fill(torch.isin(labels, torch.cat(single)), -1) if single else labels
            kept = plan.kept.get(name, {}).get(dim)
            axes[name, dim] = labels if kept is None else labels[kept]
    try:
        _propagate(model, graph._inputs, plan, graph._training, atoms, axes, names, graph._steps)
    except Mismatch as fault:
        return fault
    return None


def _fault(model: nn.Module, graph: UnitGraph, units: Mapping[str, Tensor]) -> str | Mismatch | None:
    """Why a model does not do what it did after a cut, if so."""
    return _failure(model, graph, units) or mismatch(model, graph, units)


def _owners(graph: UnitGraph, units: Tensor) -> list[str]:
    """The groups that units, in the numbering of the whole graph, belong to."""
    return [name for name, group in graph.groups.items() if torch.isin(units, group._numbers()).any()]


def _blame(model: nn.Module, graph: UnitGraph, units: Mapping[str, Tensor], error: Exception) -> None:
    """Freezes the groups that a failed forward pass is due to, and those of other layers that fail as they do."""
    module, _ = culprit(model, error)
    near = [name for name in graph.groups if _touches(graph, name, module)] or list(graph.groups)
    failures = {name: failure for name in near if (failure := _failure(model, graph, {name: units[name]}))}
    alike = {_numberless(name) for name in failures}
    for name in graph.groups:
        if name not in near and _numberless(name) in alike and (failure := _failure(model, graph, {name: units[name]})):
            failures[name] = failure
    reason = f"the code of {module or 'the model'} cannot follow ({_first_line(error)})"
    for name, why in (failures or dict.fromkeys(near, reason)).items():
        graph.freeze([name], why)


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _touches(graph: UnitGraph, name: str, module: str) -> bool:
    group = graph.groups[name]
    places = [axis.name for axis in (*group.producers, *group.consumers)] + [seen.module for seen in group.observations]
    return any(place == module or place.startswith(f"{module}." if module else "") for place in places)


def _failure(model: nn.Module, graph: UnitGraph, units: Mapping[str, Tensor]) -> str | None:
    """Why the model does not run after a cut, if it does not."""
    for training in graph._training:
        try:
            forward(model, graph._inputs, graph.plan(units), training)
        except Exception as error:
            return f"the code of {culprit(model, error)[0] or 'the model'} cannot follow ({_first_line(error)})"
    return None
