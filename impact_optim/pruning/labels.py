"""Labels that follow the elements of tensors through a program of ATen operators.

Every index of every dimension of a parameter or buffer is an *atom*. A tensor carries *labels*: int64 tensors of its
own shape that say which atom an element belongs to, -1 for none. A weight carries one per dimension, an activation
one for its channels. Operators that move data are run on the labels themselves; where an operator combines elements,
their atoms are joined (union-find): they can only be removed together. Where removing an atom would change what the
kept ones compute, it is frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

AxisKey = tuple[str, int]
"""Qualified name of a parameter or buffer, and one of its dimensions."""

PRODUCER, CONSUMER = "producer", "consumer"


class Mismatch(Exception):
    """The program does not treat the units as the labels say."""

    def __init__(self, units: Tensor, reason: str) -> None:
        super().__init__(reason)
        self.units = units


class Atoms:
    """Sets of atoms that can only be removed together."""

    def __init__(self, fixed: int | None = None) -> None:
        """Empty; or, with a number, that many sets of one atom: what would join or freeze any raises Mismatch."""
        self._parent = torch.arange(fixed or 0)
        self._reason = torch.full((fixed or 0,), -1)
        self._reasons: list[str | None] = [None]
        self.fixed = fixed is not None

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, count: int) -> Tensor:
        """Fresh atoms."""
        start = len(self._parent)
        atoms = torch.arange(start, start + count)
        self._parent = torch.cat([self._parent, atoms])
        self._reason = torch.cat([self._reason, torch.full((count,), -1)])
        return atoms

    def find(self, atoms: Tensor) -> Tensor:
        """The representative of each atom's set; -1 stays -1."""
        known = atoms.clamp(min=0)
        root = self._parent[known]
        while not torch.equal(root, above := self._parent[root]):
            root = above
        self._parent[known.reshape(-1)] = root.reshape(-1)  # shorter paths next time
        return torch.where(atoms < 0, atoms, root)

    def join(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Joins atoms element by element; an atom that meets none is frozen."""
        first, second = self.find(first.reshape(-1)), self.find(second.reshape(-1))
        self.freeze(first[second < 0], reason)
        self.freeze(second[first < 0], reason)
        differ = (first != second) & (first >= 0) & (second >= 0)
        first, second = first[differ], second[differ]
        if self.fixed and len(first):
            raise Mismatch(torch.cat([first, second]).unique(), reason)
        before = torch.cat([first, second])
        while len(first):
            low, high = torch.minimum(first, second), torch.maximum(first, second)
            self._parent.scatter_reduce_(0, high, low, "amin")
            first, second = self.find(first), self.find(second)
            differ = first != second
            first, second = first[differ], second[differ]
        before = before[self._reason[before] >= 0]
        after = self.find(before)
        self._reason.scatter_reduce_(0, after, self._reason[before], "amax")

    def freeze(self, atoms: Tensor, reason: str | None) -> None:
        """Marks atoms as not to be removed; without a reason, they were never meant to be."""
        atoms = self.find(atoms[atoms >= 0])
        if not len(atoms):
            return
        if self.fixed:
            raise Mismatch(atoms.unique(), reason or "")
        # The first reason stays; 0 stands for none, which any other overrules.
        atoms = atoms[self._reason[atoms] < (reason is not None)]
        self._reason[atoms] = len(self._reasons) if reason is not None else 0
        if reason is not None:
            self._reasons.append(reason)

    def are_frozen(self, atoms: Tensor) -> bool:
        """Whether none of the atoms can be removed."""
        atoms = atoms[atoms >= 0]
        return bool((self._reason[self.find(atoms)] >= 0).all())

    def frozen(self) -> dict[int, str | None]:
        """Representative of each frozen set -> the reason."""
        roots = ((self._reason >= 0) & (self._parent == torch.arange(len(self._parent)))).nonzero().reshape(-1)
        return {
            root: self._reasons[reason]
            for root, reason in zip(roots.tolist(), self._reason[roots].tolist(), strict=True)
        }


@dataclass
class Value:
    """What is known about a tensor of the program."""

    shape: tuple[int, ...]
    labels: list[Tensor] = field(default_factory=list)
    weight: bool = True
    """Whether it is computed from parameters and constants alone."""
    uniform: bool = False
    """Whether all elements are the same number, so that it has no size of its own to keep."""
    constant: bool = False
    """Whether it is computed from constants alone."""
    recipe: tuple[str, int] | None = None
    """Of a constant: what tells it from others, its contents or how it is computed, where that is known."""


class Sighting(NamedTuple):
    """The input or output of a layer."""

    module: str
    where: str
    labels: Tensor


class Size(NamedTuple):
    """An integer attribute of a module that counts indices of labels, or has the same number by chance."""

    module: str
    attribute: str
    labels: Tensor
    dim: int
    known: bool
    """Whether the operator says so; if not, only the number does."""


class Step(NamedTuple):
    """An operator of the program, and what of it a cut leaves as it is."""

    name: str
    numbers: list[Any]
    """That enter the arithmetic."""
    results: list[Any]
    """When traced: what it computes from activations. Later: the sizes, ``None`` where units are counted."""
    recipes: list[tuple[str, int] | None]
    """Of the constants that it takes."""


def varied(labels: Tensor) -> list[int]:
    """The dimensions along which labels differ."""
    labels = core(labels)
    return [
        dim
        for dim in range(labels.dim())
        if labels.size(dim) > 1 and not torch.equal(labels, labels.narrow(dim, 0, 1).expand_as(labels))
    ]


def core(labels: Tensor) -> Tensor:
    """Labels without the repetitions of their expanded dimensions."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.size(dim) > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def flat(labels: Tensor, *dims: int) -> Tensor:
    """Index 0 along the dimensions, everywhere."""
    shape = labels.shape
    for dim in dims:
        labels = labels.narrow(dim, 0, min(1, shape[dim]))
    return labels.expand(shape)


def index0(labels: Tensor, dims: Iterable[int], keepdim: bool = False) -> Tensor:
    """Labels at index 0 of some dimensions."""
    for dim in sorted(dims, reverse=True):
        labels = labels.narrow(dim, 0, 1) if keepdim else labels.select(dim, 0)
    return labels


def stretched(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels of another shape, which differs along dimensions where they are constant."""
    dims = varied(labels)
    return index0(labels, [dim for dim in range(labels.dim()) if dim not in dims], keepdim=True).expand(shape)


def _pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two labels of one shape without the repetitions of either's constant dimensions."""
    for dim in range(first.dim()):
        if first.size(dim) and first.stride(dim) == 0 and second.stride(dim) == 0:
            first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
    return first, second


class Propagation:
    """Carries labels through exported programs of one model.

    Args:
        model: the module that was exported.
        atoms: the sets that the labels refer to.
        axes: labels of parameters' and buffers' dimensions; what is missing gets fresh atoms.
        names: any qualified name of a parameter or buffer -> its first name.
        rules: name of an ATen operator -> what it does to labels.
        steps: what an earlier propagation has noted, to be compared with what this one meets.
    """

    def __init__(
        self,
        model: nn.Module,
        atoms: Atoms,
        axes: dict[AxisKey, Tensor],
        names: dict[str, str],
        rules: Mapping[str, Rule],
        steps: Sequence[Step] | None = None,
    ) -> None:
        self.modules = dict(model.named_modules())
        self.atoms, self.axes, self.names = atoms, axes, names
        self.roles: dict[str, list[Tensor]] = {PRODUCER: [], CONSUMER: []}
        self.sightings: list[Sighting] = []
        self.sizes: list[Size] = []
        self.grids: list[Tensor] = []
        self.steps: list[Step] = []
        self.used: set[str] = set()
        self.norms: dict[str, set[str | None]] = {}
        """Weight of a layer without a bias -> the running means of what reads its results, None for anything else."""
        self.normed: dict[str, set[str | None]] = {}
        """Running mean -> the weights of such layers that it is subtracted from the results of, None likewise."""
        self._tables = [name for name, _ in model.named_buffers()]
        self._rules, self._expected = rules, steps
        self._node: Node | None = None
        self._step = Step("", [], [], [])
        self._memory: dict[int, list[tuple[Value, Tensor]]] = {}

    # -- the walk --

    def run(self, program: ExportedProgram) -> None:
        """Carries labels through one program."""
        specs = iter(program.graph_signature.input_specs)
        values: dict[Node, Any] = {}
        self._memory = {}
        live = _live(program)
        for node in program.graph.nodes:
            self._node = node
            if node.op not in ("placeholder", "output") and node not in live:
                continue
            if node.op == "placeholder":
                spec = next(specs)
                values[node] = self._placeholder(node, spec.kind, spec.target)
                if spec.kind == InputKind.CONSTANT_TENSOR:
                    values[node].constant = True
                    values[node].recipe = _contents(program.constants.get(spec.target or ""))
            elif node.op == "output":
                for value in tree_leaves(tree_map_only(Node, values.get, node.args), is_leaf=is_value):
                    self.freeze(value, "it is an output of the model")
            elif node.op == "call_function":
                try:
                    values[node] = self._call(node, tree_map_only(Node, values.get, (node.args, node.kwargs)))
                except Mismatch as mismatch:
                    raise Mismatch(mismatch.units, f"{mismatch} ({self.where()})") from None
            else:
                values[node] = Value(tuple(getattr(node.meta.get("val"), "shape", ())))
            val = node.meta.get("val")
            if isinstance(val, Tensor) and val.layout is torch.strided:
                self._memory.setdefault(val.untyped_storage()._cdata, []).append((values[node], val))
        self._note_norms(program)

    def end(self) -> None:
        """After all programs: none of the expected operators may be missing."""
        if self._expected is not None and len(self.steps) < len(self._expected):
            raise Mismatch(torch.empty(0, dtype=torch.int64), _OTHER_PROGRAM)

    def _note_norms(self, program: ExportedProgram) -> None:
        """Notes which layers without a bias feed which batch norms."""
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        tensors = {
            node: self.names.get(spec.target or "")
            for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True)
        }
        front: dict[Node, str] = {}
        for node in program.graph.nodes:
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            name, bound = node.target._schema.name, _bind(node.target, node.args, node.kwargs)
            if name == "aten::batch_norm":
                weight, mean = front.get(bound["input"]), tensors.get(bound["running_mean"])
                if mean is not None:
                    self.normed.setdefault(mean, set()).add(weight)
                if weight is not None:
                    self.norms.setdefault(weight, set()).add(mean)
            elif (name == "aten::linear" or name.startswith("aten::conv")) and bound.get("bias") is None:
                weight = tensors.get(bound.get("weight"))
                if weight is not None and [user.target for user in node.users] == [torch.ops.aten.batch_norm.default]:
                    front[node] = weight
                elif weight is not None:
                    self.norms.setdefault(weight, set()).add(None)

    def settle(self) -> None:
        """Joins atoms until all labels can be cut by cutting single dimensions."""
        changed = True
        while changed:
            changed = False
            for labels in self.grids:
                labels = self.atoms.find(core(labels))
                dims = varied(labels)
                if len(dims) < 2 or self.atoms.are_frozen(labels):
                    continue
                keep = max(dims, key=lambda dim: (labels.size(dim), dim))
                self.join_over(labels, [dim for dim in dims if dim != keep])
                changed = True

    def module(self) -> str:
        """Qualified name of the module that the current operator runs in."""
        stack = list((self._node.meta.get("nn_module_stack") or {}).values()) if self._node else []
        return stack[-1][0].split("@")[0] if stack else ""

    def where(self) -> str:
        """The current operator and its module, for people."""
        return f"{self.operator()} in {self.module() or 'the model'}"

    def operator(self) -> str:
        """The current operator's name."""
        target = self._node.target if self._node else ""
        return target._schema.name if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "")

    def _placeholder(self, node: Node, kind: InputKind, target: str | None) -> Value:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return Value(())
        shape = tuple(value.shape)
        if kind not in (InputKind.PARAMETER, InputKind.BUFFER) or target is None:
            return Value(shape, weight=kind != InputKind.USER_INPUT)
        name = self.names[target]
        if node.users:
            self.used.add(name)
        labels = []
        for dim, size in enumerate(shape):
            if size < 2:
                continue
            if (name, dim) not in self.axes:
                self.axes[name, dim] = self.atoms.new(size)
            along = [1] * len(shape)
            along[dim] = size
            labels.append(self.axes[name, dim].reshape(along).expand(shape))
        return Value(shape, [array for array in labels if varied(array)])

    def _call(self, node: Node, inputs: tuple[Any, Any]) -> Any:
        args, kwargs = inputs
        if node.target is operator.getitem:
            return args[0][args[1]]
        given = [value for value in tree_leaves(inputs, is_leaf=is_value) if is_value(value)]
        result: Any
        if not isinstance(node.target, torch._ops.OpOverload):
            constant = self._begin_step(self.operator(), given, [])
            result = self.unknown(given, node)
        else:
            name = node.target._schema.name.removeprefix("aten::")
            in_place = name.endswith("_") and not name.endswith("__")
            name = name.rstrip("_") if in_place else name
            bound = _bind(node.target, args, kwargs)
            if self._in_multihead(node):
                # Its forward computes the width of a head from embed_dim, which is the width of the input as well.
                for value in given:
                    if not value.weight:
                        self.freeze(value, "nn.MultiheadAttention derives its sizes from embed_dim")
            constant = self._begin_step(name, given, _numbers(node.target, bound))
            rule = self._rules.get(name)
            result = rule(self, bound, node) if rule else self.unknown(given, node)
            if in_place and name not in _RENAMED and isinstance(result, Value) and is_value(bound.get("self")):
                self._written(bound["self"], result, node)
        weight = constant or all(value.weight for value in given)
        for position, value in enumerate(result if isinstance(result, list) else [result]):
            if isinstance(value, Value):
                value.weight = weight
                value.constant = constant
                if constant:
                    value.recipe = self._recipe(given, position)
                elif not weight:
                    self._note_sizes(value)
                    self._end_step(value, given)
        return result

    def unknown(self, given: list[Value], node: Node) -> Any:
        """Freezes what reaches an operator that nothing is known about."""
        for value in given:
            self.freeze(value, f"{self.where()} has no rule")
            if value.weight:  # nothing that follows tells that a layer has them
                self.roles[PRODUCER] += [core(labels).reshape(-1).unique() for labels in value.labels]
        return blank(node)

    def _in_multihead(self, node: Node) -> bool:
        stack = (node.meta.get("nn_module_stack") or {}).values()
        return any(isinstance(self.modules.get(name.split("@")[0]), nn.MultiheadAttention) for name, _ in stack)

    def _written(self, target: Value, result: Value, node: Node) -> None:
        """What an operator in place does to everything that shares memory with its target."""
        # Other names of the same memory are not told what has been written into it.
        covered = {dim for labels in target.labels for dim in varied(labels)}
        for labels in result.labels:
            if not covered.issuperset(varied(labels)):
                self.freeze(labels, f"{self.where()} writes them into another tensor")
        own = node.meta["val"]
        storage = own.untyped_storage()
        elements = storage.nbytes() // own.element_size()
        everything = own.numel() == elements
        written = torch.zeros(0 if everything else elements, dtype=torch.bool)
        if not everything:
            written.as_strided(own.shape, own.stride(), own.storage_offset()).fill_(True)
        for value, val in self._memory.get(storage._cdata, ()):
            value.uniform = value.uniform and result.uniform and everything
            if everything or not value.labels:
                continue
            if val.element_size() != own.element_size():
                self.freeze(value, f"{self.where()} writes into them under another type")
                continue
            mask = written.as_strided(val.shape, val.stride(), val.storage_offset())
            parted = varied(mask)
            for labels in value.labels:
                over = [dim for dim in varied(labels) if dim in parted]
                if over and len(over) < len(varied(labels)):
                    self.join_over(labels, over)
                elif over:
                    self.freeze(labels, f"{self.where()} writes into some of them, by position")

    def _begin_step(self, name: str, given: Sequence[Value], numbers: list[Any]) -> bool:
        """Compares an operator and its numbers with those of the program before the cut.

        Returns:
            Whether it makes a constant. Those are compared where activations meet them: code may keep them for later,
            so that not every program computes them.
        """
        constants = [value for value in given if value.constant]
        self._step = Step(name, numbers, [], [value.recipe for value in constants])
        if len(constants) == len(given) or name in CREATED:
            return True
        if name == "contiguous":  # which torch leaves out where a tensor is, as that of a single head
            return False
        self.steps.append(self._step)
        self._compare(given)
        return False

    def _compare(self, given: Sequence[Value]) -> None:
        """Compares what is known of the current operator with the one that was there before."""
        if self._expected is None:
            return
        position, now = len(self.steps) - 1, self._step
        before = self._expected[position] if position < len(self._expected) else None
        if (
            before is None
            or before.name != now.name
            or before.numbers[: len(now.numbers)] != now.numbers
            or len(before.recipes) != len(now.recipes)
            or any(map(_is_another, before.recipes, now.recipes))
        ):
            self._differ(given, _OTHER_PROGRAM)

    def _recipe(self, given: Sequence[Value], position: int) -> tuple[str, int] | None:
        recipes = [value.recipe for value in given if value.constant]
        if self._step.name in ("lift_fresh_copy", "detach", "clone", "alias") and recipes:
            return recipes[0]
        kinds = {None if recipe is None else recipe[0] for recipe in recipes}
        if None in kinds:
            return None
        return "computed from contents" if kinds - {"computed"} else "computed", hash(
            (repr(self._step[:2]), *recipes, position)
        )

    def _end_step(self, value: Value, given: Sequence[Value]) -> None:
        """Compares the sizes of a result that do not count units. What is the same number throughout has none."""
        if not self.steps or self._step is not self.steps[-1]:
            return
        results = self._step.results
        results.append(None if value.uniform else value)
        if self._expected is None or value.uniform:
            return
        before = self._expected[len(self.steps) - 1].results
        sizes = before[len(results) - 1] if len(results) <= len(before) else None
        if sizes is not None and (
            len(sizes) != len(value.shape)
            or any(size not in (None, now) for size, now in zip(sizes, value.shape, strict=True))
        ):
            self._differ(given, f"{self.where()} gives a tensor of the shape {value.shape}, {tuple(sizes)} before")

    def _differ(self, given: Sequence[Value], reason: str) -> None:
        atoms = [core(labels).reshape(-1) for value in given for labels in value.labels]
        units = torch.cat(atoms).unique() if atoms else torch.empty(0, dtype=torch.int64)
        raise Mismatch(units[units >= 0], reason)

    def _note_sizes(self, value: Value) -> None:
        stack = list((self._node.meta.get("nn_module_stack") or {}).values()) if self._node else []
        for name, _ in stack[-2:]:
            name = name.split("@")[0]
            module = self.modules.get(name)
            if module is None or type(module).__module__.startswith("torch.nn."):
                continue
            for attribute, size in vars(module).items():
                if type(size) is not int or size < 2 or not counts_units(attribute):
                    continue
                for labels in value.labels:
                    for dim in range(labels.dim()):
                        if labels.size(dim) == size and labels.stride(dim) != 0:
                            self.sizes.append(Size(name, attribute, labels, dim, False))

    def size_follows(self, attribute: str, labels: Tensor, dim: int) -> None:
        """Notes that an attribute of the current layer counts the indices of a dimension."""
        module = self.modules.get(self.module())
        # A property follows by itself.
        if module is not None and vars(module).get(attribute) == labels.size(dim):
            self.sizes.append(Size(self.module(), attribute, labels, dim, True))

    # -- what the rules are made of --

    def freeze(self, what: Any, reason: str | None) -> None:
        """Freezes all atoms of a tensor, or those of one of its labels; anything else has none."""
        for labels in what.labels if is_value(what) else [what] if isinstance(what, Tensor) else []:
            self.atoms.freeze(core(labels).reshape(-1).unique(), reason)

    def tidy(self, labels: Iterable[Tensor]) -> list[Tensor]:
        """Labels with their constant dimensions expanded, those that say nothing left out."""
        kept = []
        for array in labels:
            dims = varied(array)
            array = flat(array, *(dim for dim in range(array.dim()) if dim not in dims))
            if not dims:
                if array.numel():
                    self.freeze(array, f"{self.where()} picks out a single index")
            elif len(dims) == 1:
                kept.append(array)
            elif not self.atoms.are_frozen(core(array)):
                kept.append(array)
                self.grid(array)
        return kept

    def grid(self, labels: Tensor) -> None:
        """Notes that labels must stay a product of index sets, one for each dimension."""
        if not self.atoms.fixed:
            self.grids.append(labels)
        elif len(dims := varied(labels)) > 1:
            atoms = core(labels).unique()
            raise Mismatch(atoms[atoms >= 0], f"units differ along dimensions {dims}")

    def join_over(self, labels: Tensor, dims: Sequence[int]) -> None:
        """Joins what differs along some dimensions only."""
        self.atoms.join(*_pair(labels, flat(labels, *dims)), f"{self.where()} ties them to what is not cut")

    def mix(self, value: Value, dims: Iterable[int], why: str = "mixes the units") -> Value:
        """Labels along dimensions whose elements an operator mixes: only what is the same along them can be cut."""
        mixed = {dim % max(len(value.shape), 1) for dim in dims}
        if value.uniform:
            # A tensor of one number has no size of its own, but its sum or its softmax does.
            self._step.numbers.extend(value.shape[dim] for dim in sorted(mixed) if dim < len(value.shape))
            if self.steps and self._step is self.steps[-1]:
                self._compare([value])
        kept = []
        for labels in value.labels:
            over = [dim for dim in varied(labels) if dim in mixed]
            rest = [dim for dim in varied(labels) if dim not in mixed]
            if not over:
                kept.append(labels)
            elif rest:
                self.join_over(labels, over)
                kept.append(flat(labels, *over))
            else:
                self.freeze(labels, f"{self.where()} {why}")
        return Value(value.shape, kept, value.weight, value.uniform)

    def combine(self, shape: Sequence[int], values: Iterable[Value]) -> Value:
        """Elementwise: what meets after broadcasting is cut together."""
        shape, found = tuple(shape), list[Tensor]()
        spread = []
        for value in values:
            arrays = [labels.broadcast_to(shape) for labels in value.labels]
            lead = len(shape) - len(value.shape)
            sizes = [1] * lead + list(value.shape)
            fixed = {dim for dim, size in enumerate(sizes) if size != 1 and size == shape[dim]}
            spread.append((arrays, set() if value.uniform else fixed))
            for labels in arrays:
                dims = set(varied(labels))
                rest = list[Tensor]()
                for other in found:
                    if dims.isdisjoint(varied(other)):
                        rest.append(other)
                        continue
                    if dims > set(varied(other)) and self._is_table(other):
                        labels = self._spread(labels, other)
                        dims = set(varied(labels))
                        continue
                    if dims < set(varied(other)) and self._is_table(labels):
                        rest.append(self._spread(other, labels))
                        labels, dims = flat(labels, *dims), set()
                        continue
                    self.atoms.join(*_pair(labels, other), f"{self.where()} combines them with what is not cut")
                    if len(varied(other)) > len(dims):
                        labels, dims = other, set(varied(other))
                found = [*rest, labels] if dims else rest
        kept = []
        for labels in found:
            missing = set[int]()
            for arrays, fixed in spread:
                missing |= fixed.intersection(varied(labels)) - {dim for array in arrays for dim in varied(array)}
            if missing and missing.issuperset(varied(labels)):
                self.freeze(labels, f"{self.where()} combines them with what is not cut")
            elif missing:  # a table for all heads, say: heads can be cut, what they consist of cannot
                self.join_over(labels, sorted(missing))
                labels = flat(labels, *missing)
            kept.append(labels)
        return Value(shape, kept)

    def _is_table(self, labels: Tensor) -> bool:
        """Whether labels are those of a buffer."""
        labels = core(labels)
        keys = [key for key in self.axes if key[0] in self._tables]
        return bool(keys) and bool(torch.isin(labels, torch.cat([self.axes[key] for key in keys])).all())

    def _spread(self, labels: Tensor, table: Tensor) -> Tensor:
        """Labels that meet a table with fewer dimensions, rotary frequencies for instance, which is not cut.

        It is the same for all heads; joined with each of them, it would make all heads one unit.
        """
        self.freeze(table, f"{self.where()} uses it for all of several units")
        dims = varied(table)
        self.join_over(labels, dims)
        return flat(labels, *dims)

    def contract(self, first: Value, second: Value, letters: tuple[str, str, str]) -> Value:
        """A product summed over the letters that the result lacks, as in einsum."""
        one, two, out = letters
        weight = second if second.weight else first if first.weight else None
        if weight is not None:
            axes = two if weight is second else one
            for labels in weight.labels:
                inner = [axes[dim] not in out for dim in varied(labels)]
                self.roles[CONSUMER if all(inner) else PRODUCER].append(core(labels).reshape(-1).unique())
        joint = "".join(dict.fromkeys(one + two))
        sizes = dict(zip(one, first.shape, strict=True))
        for letter, size in zip(two, second.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))

        def placed(value: Value, axes: str) -> Value:
            order = [axes.index(letter) for letter in joint if letter in axes]
            arrays = [labels.permute(order) for labels in value.labels]
            shape = [value.shape[axes.index(letter)] if letter in axes else 1 for letter in joint]
            for dim, letter in enumerate(joint):
                if letter not in axes:
                    arrays = [labels.unsqueeze(dim) for labels in arrays]
            return Value(tuple(shape), arrays)

        product = self.combine([sizes[letter] for letter in joint], [placed(first, one), placed(second, two)])
        summed = [dim for dim, letter in enumerate(joint) if letter not in out]
        kept = []
        for labels in product.labels:
            over, rest = [d for d in varied(labels) if d in summed], [d for d in varied(labels) if d not in summed]
            if over and rest:
                self.join_over(labels, over)
            if rest:
                labels = index0(labels, summed)
                order = [letter for letter in joint if letter in out]
                kept.append(labels.permute([order.index(letter) for letter in out]))
        return Value(tuple(sizes[letter] for letter in out), self.tidy(kept))

    def see(self, where: str, value: Value, *kinds: type[nn.Module]) -> None:
        """Notes that a hook of the current layer sees a tensor."""
        if isinstance(self.modules.get(self.module()), kinds):
            for labels in value.labels:
                self.sightings.append(Sighting(self.module(), where, labels))


Rule = Callable[[Propagation, dict[str, Any], Node], Any]


def is_value(value: Any) -> bool:
    """Where to stop when walking through arguments."""
    return isinstance(value, Value)


def _live(program: ExportedProgram) -> set[Node]:
    """Operators that outputs or memory depend on. Code takes numbers for a log out of the others."""
    live: set[Node] = set()
    for node in reversed(program.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op == "output" or node in live or (schema is not None and schema.is_mutable):
            live.update([node, *node.all_input_nodes])
    return live


def _bind(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the operator's schema gives them."""
    schema = target._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    bound.update(zip((argument.name for argument in schema), args, strict=False))
    bound.update(kwargs)
    return bound


def _numbers(target: torch._ops.OpOverload, bound: Mapping[str, Any]) -> list[Any]:
    """Arguments that enter the arithmetic; sizes, dimensions and positions are integers in the schema."""
    kinds = {argument.name: str(argument.type).lower() for argument in target._schema.arguments}
    return [
        value
        for name, value in bound.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "int" not in kinds.get(name, "")
    ]


def _contents(constant: Any) -> tuple[str, int] | None:
    small = isinstance(constant, Tensor) and constant.numel() <= 64
    return ("contents", hash(repr(constant.tolist()))) if small else None


def _is_another(first: tuple[str, int] | None, second: tuple[str, int] | None) -> bool:
    """Whether two constants are known to differ."""
    return first is not None and second is not None and first[0] == second[0] and first != second


def blank(node: Node) -> Any:
    """The result of an operator, without labels."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [Value(tuple(getattr(item, "shape", ()))) for item in value]
    return Value(tuple(getattr(value, "shape", ())))


def counts_units(attribute: str, surely: bool = False) -> bool:
    """Whether the name of an attribute says that it counts units, or may do so."""
    words = attribute.lower().strip("_").split("_")
    names = _TELLING if surely else _TELLING | _VAGUE
    return bool(names.intersection(words)) and not {"kernel", "stride", "group", "groups"}.intersection(words)


CREATED = {
    "zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "rand", "rand_like", "randn", "randn_like", "scalar_tensor",
}  # fmt: skip
"""Operators whose results are the same number throughout, or as good as that: they have no size of their own."""
_RENAMED = {"detach", "requires_grad", "squeeze", "unsqueeze", "t", "transpose"}  # in place, they write nothing
_OTHER_PROGRAM = "the program's constants or operators depend on the number of units"
_TELLING = {"heads", "nhead", "channels", "chans", "features", "planes", "filters", "units"}
_VAGUE = {"head", "dim", "dims", "size", "width", "hidden", "inner", "c", "ch", "nf"}
