"""Labels that follow the elements of tensors through a program of ATen operators.

Every index of every dimension of a parameter or buffer is an *atom*. A tensor carries *labels*: int64 tensors of its
own shape that say which atom an element belongs to, -1 for none. A weight carries one per dimension, an activation
one for its channels. Operators that move data are run on the labels themselves; where an operator combines elements,
their atoms are joined (union-find): they can only be removed together. Where removing an atom would change what the
kept ones compute, it is frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

AxisKey = tuple[str, int]
"""Qualified name of a parameter or buffer, and one of its dimensions."""

MULTIHEAD = (nn.MultiheadAttention,)
PRODUCER, CONSUMER = "producer", "consumer"


class Mismatch(Exception):
    """The program does not treat the units as the labels say."""

    def __init__(self, units: Tensor, reason: str, module: str = "") -> None:
        super().__init__(reason)
        self.units, self.reason, self.module = units, reason, module


class Atoms:
    """Sets of atoms that can only be removed together.

    Args:
        fixed: whether the sets are given: what would join two of them, or freeze one, raises :class:`Mismatch`.
    """

    def __init__(self, count: int = 0, fixed: bool = False) -> None:
        self._parent = torch.arange(count)
        self._reason = torch.full((count,), -1)
        self.reasons: list[str | None] = [None]
        self.fixed = fixed

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
        self._parent[known.reshape(-1)] = root.reshape(-1)
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
        self._reason[atoms] = len(self.reasons) if reason is not None else 0
        if reason is not None:
            self.reasons.append(reason)

    def are_frozen(self, atoms: Tensor) -> bool:
        """Whether none of the atoms can be removed."""
        atoms = atoms[atoms >= 0]
        return bool((self._reason[self.find(atoms)] >= 0).all())

    def frozen(self) -> dict[int, str | None]:
        """Representative of each frozen set -> the reason."""
        roots = ((self._reason >= 0) & (self._parent == torch.arange(len(self._parent)))).nonzero().reshape(-1)
        return {
            root: self.reasons[reason]
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


class Sighting(NamedTuple):
    """The input or output of a layer."""

    module: str
    where: str
    labels: Tensor


class Size(NamedTuple):
    """An integer attribute of a module that counts indices of labels."""

    module: str
    attribute: str
    labels: Tensor
    dim: int


def varied(labels: Tensor) -> list[int]:
    """The dimensions along which labels differ."""
    labels = _core(labels)
    return [
        dim
        for dim in range(labels.dim())
        if labels.size(dim) > 1 and not torch.equal(labels, labels.narrow(dim, 0, 1).expand_as(labels))
    ]


def _core(labels: Tensor) -> Tensor:
    """Labels without the repetitions of their expanded dimensions."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.size(dim) > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _flat(labels: Tensor, *dims: int) -> Tensor:
    """Index 0 along the dimensions, everywhere."""
    shape = labels.shape
    for dim in dims:
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(shape)


def _index0(labels: Tensor, dims: Iterable[int], keepdim: bool = False) -> Tensor:
    for dim in sorted(dims, reverse=True):
        labels = labels.narrow(dim, 0, 1) if keepdim else labels.select(dim, 0)
    return labels


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
        constants: numbers in the programs, which a later propagation compares with those it meets.
    """

    def __init__(
        self,
        model: nn.Module,
        atoms: Atoms,
        axes: dict[AxisKey, Tensor],
        names: dict[str, str],
        constants: list[tuple[str, Any]] | None = None,
    ) -> None:
        self.modules = dict(model.named_modules())
        self.atoms, self.axes, self.names = atoms, axes, names
        self.roles: dict[str, list[Tensor]] = {PRODUCER: [], CONSUMER: []}
        self.sightings: list[Sighting] = []
        self.sizes: list[Size] = []
        self.grids: list[Tensor] = []
        self.constants: list[tuple[str, Any]] = []
        self.used: set[str] = set()
        self._expected = constants
        self._node: Node | None = None

    # -- the walk --

    def run(self, program: ExportedProgram) -> None:
        """Carries labels through one program."""
        specs = iter(program.graph_signature.input_specs)
        values: dict[Node, Any] = {}
        for node in program.graph.nodes:
            self._node = node
            if node.op == "placeholder":
                spec = next(specs)
                values[node] = self._placeholder(node, spec.kind, spec.target)
            elif node.op == "output":
                for value in tree_leaves(tree_map_only(Node, values.get, node.args), is_leaf=_is_value):
                    self._freeze(value, "it is an output of the model")
            elif node.op == "call_function":
                try:
                    values[node] = self._call(node, tree_map_only(Node, values.get, (node.args, node.kwargs)))
                except Mismatch as mismatch:
                    raise Mismatch(mismatch.units, f"{mismatch} ({self.where()})", self.module()) from None
            else:
                values[node] = Value(tuple(getattr(node.meta.get("val"), "shape", ())))

    def settle(self) -> None:
        """Joins atoms until all labels can be cut by cutting single dimensions."""
        changed = True
        while changed:
            changed = False
            for labels in self.grids:
                labels = self.atoms.find(_core(labels))
                dims = varied(labels)
                if len(dims) < 2 or self.atoms.are_frozen(labels):
                    continue
                keep = max(dims, key=lambda dim: labels.size(dim))
                self._join_over(labels, [dim for dim in dims if dim != keep])
                changed = True

    def module(self) -> str:
        """Qualified name of the module that the current operator runs in."""
        stack = list((self._node.meta.get("nn_module_stack") or {}).values()) if self._node else []
        return stack[-1][0].split("@")[0] if stack else ""

    def where(self) -> str:
        """The current operator and its module, for people."""
        return f"{self._name()} in {self.module() or 'the model'}"

    def _name(self) -> str:
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
        return Value(shape, self._tidy(labels))

    def _call(self, node: Node, inputs: tuple[Any, Any]) -> Any:
        args, kwargs = inputs
        if node.target is operator.getitem:
            return args[0][args[1]]
        given = [value for value in tree_leaves(inputs, is_leaf=_is_value) if _is_value(value)]
        result: Any
        if not isinstance(node.target, torch._ops.OpOverload):
            result = self._unknown(given, node)
        else:
            name = node.target._schema.name.removeprefix("aten::")
            in_place = name.endswith("_") and not name.endswith("__")
            name = name.rstrip("_") if in_place else name
            bound = _bind(node.target, args, kwargs)
            if self._in_multihead(node):
                # Its forward computes the width of a head from embed_dim, which is the width of the input as well.
                for value in given:
                    self._freeze(
                        value if not value.weight else None, "nn.MultiheadAttention derives its sizes from embed_dim"
                    )
            self._note_constants(name, bound)
            rule = RULES.get(name)
            result = rule(self, bound, node) if rule else self._unknown(given, node)
            if in_place and isinstance(result, Value) and _is_value(bound.get("self")):
                self._written(bound["self"], result)
        weight = all(value.weight for value in given)
        for value in result if isinstance(result, list) else [result]:
            if isinstance(value, Value):
                value.weight = weight
                if not weight:
                    self._note_sizes(value)
        return result

    def _unknown(self, given: list[Value], node: Node) -> Any:
        for value in given:
            self._freeze(value, f"{self.where()} has no rule")
        return _blank(node)

    def _in_multihead(self, node: Node) -> bool:
        stack = (node.meta.get("nn_module_stack") or {}).values()
        return any(isinstance(self.modules.get(name.split("@")[0]), MULTIHEAD) for name, _ in stack)

    def _written(self, target: Value, result: Value) -> None:
        # Other names of the same memory are not told what has been written into it.
        covered = {dim for labels in target.labels for dim in varied(labels)}
        for labels in result.labels:
            if not covered.issuperset(varied(labels)):
                self.atoms.freeze(_core(labels).reshape(-1), f"{self.where()} writes them into another tensor")

    def _note_constants(self, name: str, bound: dict[str, Any]) -> None:
        kinds = (int, float) if name in ELEMENTWISE else float
        numbers = [value for value in bound.values() if isinstance(value, kinds) and not isinstance(value, bool)]
        position = len(self.constants)
        self.constants.append((name, numbers))
        if self._expected is None:
            return
        expected = self._expected[position] if position < len(self._expected) else ("", [])
        if expected != (name, numbers):
            units = [
                _core(labels).reshape(-1) for value in bound.values() if _is_value(value) for labels in value.labels
            ]
            kept = torch.cat(units).unique() if units else torch.empty(0, dtype=torch.int64)
            raise Mismatch(kept[kept >= 0], "the program's constants or operators depend on the number of units")

    def _note_sizes(self, value: Value) -> None:
        stack = list((self._node.meta.get("nn_module_stack") or {}).values()) if self._node else []
        for name, _ in stack[-2:]:
            name = name.split("@")[0]
            module = self.modules.get(name)
            if module is None or type(module).__module__.startswith("torch.nn."):
                continue
            for attribute, size in vars(module).items():
                if type(size) is not int or size < 2 or not _counts_units(attribute):
                    continue
                for labels in value.labels:
                    for dim in range(labels.dim()):
                        if labels.size(dim) == size and labels.stride(dim) != 0:
                            self.sizes.append(Size(name, attribute, labels, dim))

    def size_follows(self, attribute: str, labels: Tensor, dim: int) -> None:
        """Notes that an attribute of the current layer counts the indices of a dimension."""
        module = self.modules.get(self.module())
        if getattr(module, attribute, None) == labels.size(dim):
            self.sizes.append(Size(self.module(), attribute, labels, dim))

    # -- what the rules are made of --

    def _freeze(self, value: Any, reason: str | None) -> None:
        for labels in value.labels if _is_value(value) else []:
            self.atoms.freeze(_core(labels).reshape(-1).unique(), reason)

    def _tidy(self, labels: Iterable[Tensor]) -> list[Tensor]:
        """Labels with their constant dimensions expanded, those that say nothing left out."""
        kept = []
        for array in labels:
            dims = varied(array)
            array = _flat(array, *(dim for dim in range(array.dim()) if dim not in dims))
            if not dims:
                if array.numel() and not self.atoms.fixed:
                    self.atoms.freeze(array.reshape(-1)[:1], f"{self.where()} picks out a single index")
            elif len(dims) == 1:
                kept.append(array)
            elif not self.atoms.are_frozen(_core(array)):
                kept.append(array)
                self._grid(array)
        return kept

    def _grid(self, labels: Tensor) -> None:
        """Notes that labels must stay a product of index sets, one for each dimension."""
        if not self.atoms.fixed:
            self.grids.append(labels)
        elif len(dims := varied(labels)) > 1 and (_core(labels) >= 0).any():
            kept = _core(labels).unique()
            raise Mismatch(kept[kept >= 0], f"units differ along dimensions {dims}")

    def _join_over(self, labels: Tensor, dims: Sequence[int]) -> None:
        self.atoms.join(*_pair(labels, _flat(labels, *dims)), f"{self.where()} ties them to what is not cut")

    def _mix(self, value: Value, dims: Iterable[int], reason: str) -> Value:
        """Labels along dimensions whose elements an operator mixes: only what is the same along them can be cut."""
        mixed = {dim % max(len(value.shape), 1) for dim in dims}
        kept = []
        for labels in value.labels:
            over = [dim for dim in varied(labels) if dim in mixed]
            rest = [dim for dim in varied(labels) if dim not in mixed]
            if not over:
                kept.append(labels)
            elif rest:
                self._join_over(labels, over)
                kept.append(_flat(labels, *over))
            else:
                self.atoms.freeze(_core(labels).reshape(-1).unique(), reason)
        return Value(value.shape, kept, value.weight)

    def _combine(self, shape: Sequence[int], values: Iterable[Value]) -> Value:
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
                    self.atoms.join(*_pair(labels, other), f"{self.where()} combines them with what is not cut")
                    if len(varied(other)) > len(dims):
                        labels, dims = other, set(varied(other))
                found = [*rest, labels]
        for labels in found:
            for arrays, fixed in spread:
                missing = fixed.intersection(varied(labels)) - {dim for array in arrays for dim in varied(array)}
                if missing:
                    self.atoms.freeze(
                        _core(labels).reshape(-1).unique(), f"{self.where()} combines them with what is not cut"
                    )
        return Value(shape, found)

    def _contract(self, first: Value, second: Value, letters: tuple[str, str, str]) -> Value:
        """A product summed over the letters that the result lacks, as in einsum."""
        one, two, out = letters
        weight = second if second.weight else first if first.weight else None
        if weight is not None:
            axes = two if weight is second else one
            for labels in weight.labels:
                inner = [axes[dim] not in out for dim in varied(labels)]
                self.roles[CONSUMER if all(inner) else PRODUCER].append(_core(labels).reshape(-1).unique())
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

        product = self._combine([sizes[letter] for letter in joint], [placed(first, one), placed(second, two)])
        summed = [dim for dim, letter in enumerate(joint) if letter not in out]
        kept = []
        for labels in product.labels:
            over, rest = [d for d in varied(labels) if d in summed], [d for d in varied(labels) if d not in summed]
            if over and rest:
                self._join_over(labels, over)
            if rest:
                labels = _index0(labels, summed)
                order = [letter for letter in joint if letter in out]
                kept.append(labels.permute([order.index(letter) for letter in out]))
        return Value(tuple(sizes[letter] for letter in out), self._tidy(kept))

    def _see(self, where: str, value: Value, *kinds: type[nn.Module]) -> None:
        if isinstance(self.modules.get(self.module()), kinds):
            for labels in value.labels:
                self.sightings.append(Sighting(self.module(), where, labels))


Rule = Callable[[Propagation, dict[str, Any], Node], Any]


def _is_value(value: Any) -> bool:
    return isinstance(value, Value)


def _bind(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the operator's schema gives them."""
    schema = target._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    bound.update(zip((argument.name for argument in schema), args, strict=False))
    bound.update(kwargs)
    return bound


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _blank(node: Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [Value(tuple(getattr(item, "shape", ()))) for item in value]
    return Value(tuple(getattr(value, "shape", ())))


def _counts_units(attribute: str) -> bool:
    words = attribute.lower().strip("_").split("_")
    return bool(COUNTED.intersection(words)) and not {"kernel", "stride", "group", "groups"}.intersection(words)


COUNTED = {
    "heads", "head", "nhead", "channels", "chans", "features", "dim", "dims", "size", "width", "hidden", "inner",
    "planes", "c", "ch", "filters", "units",
}  # fmt: skip


# -- the rules --


def _elementwise(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    values = [value for value in tree_leaves(list(bound.values()), is_leaf=_is_value) if _is_value(value)]
    result = run._combine(_shape(node), values)
    result.uniform = all(value.uniform or not value.shape for value in values)
    return result


def _created(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    return Value(_shape(node), uniform=True)


def _plain(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
    return _blank(node)


def _moved(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
    """Runs an operator that only moves data on the labels."""
    value = bound["self"]
    rest = {name: argument for name, argument in bound.items() if name != "self"}
    results = [node.target(self=labels, **rest) for labels in value.labels]  # type: ignore[operator]
    if isinstance(node.meta["val"], (tuple, list)):
        blank = _blank(node)
        return [
            Value(part.shape, run._tidy(result[i] for result in results), uniform=value.uniform)
            for i, part in enumerate(blank)
        ]
    return Value(_shape(node), run._tidy(results), uniform=value.uniform)


def _reshaped(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, shape = bound["self"], _shape(node)
    return Value(shape, run._tidy(labels.reshape(shape) for labels in value.labels), uniform=value.uniform)


def _expanded(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, shape = bound["self"], _shape(node)
    return Value(shape, run._tidy(labels.broadcast_to(shape) for labels in value.labels), uniform=value.uniform)


def _divided(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
    """Equal parts: the code that divides a dimension by a number keeps dividing it evenly."""
    value, dim = bound["self"], bound.get("dim", 0)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if len(set(sizes)) == 1 and len(sizes) > 1:
        for labels in value.labels:
            run._grid(labels.unflatten(dim, (len(sizes), sizes[0])))
    return _moved(run, bound, node)


def _joined(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    shape, dim = _shape(node), bound.get("dim", 0)
    values = [value for value in bound["tensors"] if value.shape != (0,)]
    dim %= len(shape)
    if len(values[0].shape) < len(shape):  # stack
        values = [
            Value((*v.shape[:dim], 1, *v.shape[dim:]), [a.unsqueeze(dim) for a in v.labels], uniform=v.uniform)
            for v in values
        ]
    across, along = [], []
    for value in values:
        ours = [labels for labels in value.labels if dim in varied(labels)]
        for labels in ours[1:]:
            run.atoms.freeze(_core(labels).reshape(-1).unique(), f"{run.where()} joins a doubly labelled tensor")
        along.append(ours[0] if ours else torch.tensor(-1).expand(value.shape))
        rest = [_index0(labels, [dim], keepdim=True) for labels in value.labels if dim not in varied(labels)]
        ours = [_index0(labels, [dim], keepdim=True) for labels in ours]
        covered = Value(value.shape[:dim] + (1,) + value.shape[dim + 1 :], rest, uniform=value.uniform)
        across.append((covered, {d for labels in ours for d in varied(labels)}))
    common = run._combine(shape[:dim] + (1,) + shape[dim + 1 :], [value for value, _ in across])
    return Value(shape, run._tidy([torch.cat(along, dim), *(labels.expand(shape) for labels in common.labels)]))


def _padded(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, shape = bound["self"], _shape(node)
    rank, amounts = len(value.shape), bound.get("pad", bound.get("padding"))
    kept = []
    for labels in value.labels:
        padding: list[int] = []
        for dim in range(rank - 1, rank - 1 - len(amounts) // 2, -1):
            before, after = amounts[2 * (rank - 1 - dim) : 2 * (rank - dim)]
            if dim in varied(labels) and (before or after):
                if bound.get("mode", "constant") != "constant" or run._name() not in (
                    "aten::pad",
                    "aten::constant_pad_nd",
                ):
                    run.atoms.freeze(_core(labels).reshape(-1).unique(), f"{run.where()} repeats them")
                padding += [before, after]
            else:
                labels = (
                    labels.narrow(dim, 0, 1).expand(*shape_with(labels, dim, shape[dim]))
                    if dim not in varied(labels)
                    else labels
                )
                padding += [0, 0]
        kept.append(F.pad(labels, padding, value=-1))
    return Value(shape, run._tidy(kept))


def shape_with(labels: Tensor, dim: int, size: int) -> list[int]:
    """The shape of labels with one size replaced."""
    shape = list(labels.shape)
    shape[dim] = size
    return shape


def _indexed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    """Indexing by tensors: the indexed dimensions cannot be cut, the others are carried along."""
    value, shape = bound["self"], _shape(node)
    name = run._name()
    if name == "aten::index":
        indices = bound["indices"]
        dims = [dim for dim, index in enumerate(indices) if index is not None]
    else:
        indices, dims = [bound["index"]], [bound["dim"]]
    for index in indices:
        run._freeze(index, f"{run.where()} uses them as an index")
    value = run._mix(value, dims, f"{run.where()} picks them by number")
    if name == "aten::index":
        probe = [None if i is None else torch.zeros(i.shape, dtype=torch.int64) for i in indices]
        kept = [torch.ops.aten.index.Tensor(labels, probe) for labels in value.labels]
    elif name == "aten::index_select":
        probe = torch.zeros(indices[0].shape, dtype=torch.int64)
        kept = [labels.index_select(dims[0], probe) for labels in value.labels]
    else:  # gather and its like: one index for each element
        kept = []
        for labels in value.labels:
            if any(labels.size(dim) != shape[dim] for dim in varied(labels)):
                run.atoms.freeze(_core(labels).reshape(-1).unique(), f"{run.where()} picks them by number")
            else:
                kept.append(
                    _flat(labels, *dims)[
                        tuple(slice(0, 1) if d not in varied(labels) else slice(None) for d in range(labels.dim()))
                    ].expand(shape)
                )
        return run._combine(shape, [Value(shape, kept), indices[0]])
    return Value(shape, run._tidy(kept))


def _reduced(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
    value = bound["self"]
    dims = bound.get("dim")
    rank = len(value.shape)
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted({dim % max(rank, 1) for dim in dims})
    result = run._mix(value, dims, f"{run.where()} mixes the units")
    blank = _blank(node)
    keepdim = len((blank[0] if isinstance(blank, list) else blank).shape) == rank
    kept = run._tidy(_index0(labels, dims, keepdim) for labels in result.labels)
    if isinstance(blank, list):
        return [Value(part.shape, list(kept)) for part in blank]
    return Value(blank.shape, kept)


def _mixed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    dims = bound.get("dim", -1)
    return run._mix(bound["self"], [dims] if isinstance(dims, int) else dims, f"{run.where()} mixes the units")


def _chosen(run: Propagation, bound: dict[str, Any], node: Node) -> list[Value]:
    """topk, sort: the order along a dimension depends on all of it."""
    dim = bound.get("dim", -1)
    result = run._mix(bound["self"], [dim], f"{run.where()} compares the units")
    return [
        Value(part.shape, run._tidy(labels.narrow(dim, 0, 1).expand(part.shape) for labels in result.labels))
        for part in _blank(node)
    ]


def _local(spatial: int) -> Rule:
    """Pooling and interpolation: the last dimensions are mixed and change their size."""

    def rule(run: Propagation, bound: dict[str, Any], node: Node) -> Any:
        value = bound.get("self", bound.get("input"))
        dims = range(len(value.shape) - spatial, len(value.shape))
        result = run._mix(value, dims, f"{run.where()} mixes the units")
        parts = _blank(node)
        outputs = [
            Value(part.shape, [_index0(labels, dims, keepdim=True).expand(part.shape) for labels in result.labels])
            for part in (parts if isinstance(parts, list) else [parts])
        ]
        return outputs if isinstance(parts, list) else outputs[0]

    return rule


def _channels(value: Value | None, rank: int, dim: int = 1) -> list[Value]:
    """A per-channel vector, placed to be broadcast against a tensor of ``rank`` dimensions."""
    if value is None:
        return []
    after = [1] * (rank - 1 - dim)
    return [Value((*value.shape, *after), [labels.reshape(-1, *after) for labels in value.labels])]


def _normed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value = bound["input"]
    rank = len(value.shape)
    value = run._mix(value, [dim for dim in range(rank) if dim != 1], f"{run.where()} mixes the units")
    vectors = [bound[name] for name in ("weight", "bias", "running_mean", "running_var")]
    result = run._combine(value.shape, [value, *(v for vector in vectors for v in _channels(vector, rank))])
    for labels in result.labels:
        run.size_follows("num_features", labels, 1)
    run._see("output", result, nn.Module)
    return result


def _group_normed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, groups = bound["input"], bound["num_groups"]
    rank = len(value.shape)
    value = run._mix(value, range(2, rank), f"{run.where()} mixes the units")
    result = run._combine(value.shape, [value, *_channels(bound["weight"], rank), *_channels(bound["bias"], rank)])
    for labels in result.labels:
        grouped = _index0(labels, range(2, rank)).unflatten(1, (groups, -1))
        if groups == 1 and 1 in varied(labels):
            run.atoms.freeze(_core(labels).reshape(-1).unique(), f"{run.where()} mixes the units")
        run._join_over(grouped, [2])
        run.size_follows("num_channels", labels, 1)
        run.size_follows("num_groups", grouped.select(2, 0), 1)
    return result


def _layer_normed(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value = bound["input"]
    rank = len(value.shape)
    dims = range(rank - len(bound["normalized_shape"]), rank)
    value = run._mix(value, dims, f"{run.where()} mixes the units")
    affine = [bound[name] for name in ("weight", "bias") if bound.get(name) is not None]
    for vector in affine:
        run._freeze(vector, None)
    return value


def _prelu(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, weight = bound["self"], bound["weight"]
    rank = len(value.shape)
    if weight.shape == (1,) or rank < 2:
        return run._combine(value.shape, [value, weight])
    result = run._combine(value.shape, [value, *_channels(weight, rank)])
    for labels in result.labels:
        run.size_follows("num_parameters", labels, 1)
    return result


def _linear(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, weight, bias = bound["input"], bound["weight"], bound["bias"]
    run._see("input", value, nn.Linear)
    for labels in value.labels:
        run.size_follows("in_features", labels, labels.dim() - 1)
    free = "abcdefgh"[: len(value.shape) - 1]
    result = run._contract(
        value, weight, (free + "k", "ok"[2 - len(weight.shape) :], free + "o"[2 - len(weight.shape) :])
    )
    if bias is not None:
        result = run._combine(result.shape, [result, bias])
    for labels in result.labels:
        run.size_follows("out_features", labels, labels.dim() - 1)
    run._see("output", result, nn.Linear)
    return result


def _convolution(transposed: bool) -> Rule:
    def rule(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
        value, weight, bias, groups = bound["input"], bound["weight"], bound["bias"], bound["groups"]
        shape, spatial = _shape(node), len(weight.shape) - 2
        unbatched = len(value.shape) == spatial + 1
        run._see("input", value, nn.modules.conv._ConvNd)
        inputs = run._mix(value, range(len(value.shape) - spatial, len(value.shape)), f"{run.where()} mixes the units")
        arrays = [labels[(..., *[0] * spatial)] for labels in inputs.labels]
        arrays = [labels.unsqueeze(0) for labels in arrays] if unbatched else arrays
        inputs = Value(
            tuple(arrays[0].shape) if arrays else (1 if unbatched else value.shape[0], value.shape[-spatial - 1]),
            arrays,
        )
        for labels in weight.labels:
            if any(dim >= 2 for dim in varied(labels)):
                run.atoms.freeze(_core(labels).reshape(-1).unique(), None)
        taps = [labels[(..., *[0] * spatial)] for labels in weight.labels if not any(d >= 2 for d in varied(labels))]
        kernel = Value(weight.shape[:2], taps, weight.weight)
        for labels in inputs.labels:
            run.size_follows("in_channels", labels, 1)
        if groups == 1:
            inputs.weight = value.weight
            result = run._contract(inputs, kernel, ("nk", "ko" if transposed else "ok", "no"))
        else:
            result = _grouped(run, inputs, kernel, groups, transposed)
        if bias is not None:
            result = run._combine(result.shape, [result, bias])
        for labels in result.labels:
            run.size_follows("out_channels", labels, 1)
        arrays = [labels.reshape(*labels.shape, *[1] * spatial) for labels in result.labels]
        result = Value(shape, [(labels[0] if unbatched else labels).expand(shape) for labels in arrays])
        run._see("output", result, nn.modules.conv._ConvNd)
        return result

    return rule


def _grouped(run: Propagation, inputs: Value, kernel: Value, groups: int, transposed: bool) -> Value:
    """A group of the convolution, its input and its output channels, is one unit: each reads nothing but its own."""
    batch, channels = inputs.shape
    width = kernel.shape[1] if transposed else kernel.shape[0] // groups
    for labels in kernel.labels:
        if 1 in varied(labels):
            run.atoms.freeze(_core(labels).reshape(-1).unique(), None)
    outer = [labels[:, 0] for labels in kernel.labels if 0 in varied(labels)]
    for labels in outer:
        run.roles[CONSUMER if transposed else PRODUCER].append(labels.unique())
    outer = [labels.unflatten(0, (groups, -1)) for labels in outer]
    arrays = [labels for labels in inputs.labels if 1 in varied(labels)]
    if not arrays or not outer:
        for labels in [*arrays, *outer]:
            run.atoms.freeze(
                _core(labels).reshape(-1).unique(),
                f"{run.where()} combines them with what is not cut" if labels in arrays else None,
            )
        return Value(
            (batch, groups * width),
            [labels[:, :1].expand(batch, groups * width) for labels in inputs.labels if 1 not in varied(labels)],
        )
    lead = outer[0][:, :1]
    run._join_over(outer[0], [1])
    for labels in arrays:
        run._join_over(labels, [0])
        grouped = labels[0].unflatten(0, (groups, -1))
        run._join_over(grouped, [1])
        run.atoms.join(grouped, lead.expand_as(grouped), f"{run.where()} combines them with what is not cut")
    run.size_follows("groups", lead[:, 0], 0)
    out = outer[0] if not transposed else lead.expand(groups, width)
    return Value((batch, groups * width), [out.reshape(1, -1).expand(batch, -1)])


def _embedding(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    weight, shape = bound["weight"], _shape(node)
    run._freeze(bound["indices"], f"{run.where()} uses them as an index")
    kept = []
    for labels in weight.labels:
        if 0 in varied(labels):
            run.atoms.freeze(_core(labels).reshape(-1).unique(), None)
        else:
            run.roles[PRODUCER].append(_core(labels).reshape(-1).unique())
            run.size_follows("embedding_dim", labels, 1)
            kept.append(labels[0].expand(shape))
    return Value(shape, kept)


def _matmul(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    first = bound.get("self", bound.get("input"))
    second = next(bound[name] for name in ("mat2", "other", "vec", "tensor") if name in bound)
    return _product(run, first, second)


def _product(run: Propagation, first: Value, second: Value) -> Value:
    one, two = len(first.shape), len(second.shape)
    batch = "abcdefgh"[: max(one, two, 2) - 2]
    left = ("n" if one > 1 else "") + "k"
    right = "k" + ("m" if two > 1 else "")
    letters = (
        (batch[len(batch) - max(one - 2, 0) :] if one > 2 else "") + left,
        (batch[len(batch) - max(two - 2, 0) :] if two > 2 else "") + right,
        batch + left[:-1] + right[1:],
    )
    return run._contract(first, second, letters)


def _added_matmul(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    names = ("mat1", "mat2") if "mat1" in bound else ("batch1", "batch2") if "batch1" in bound else ("mat", "vec")
    product = _product(run, bound[names[0]], bound[names[1]])
    return run._combine(product.shape, [product, bound["self"]])


def _einsum(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    values = list(bound["tensors"])
    terms, _, out = bound["equation"].replace(" ", "").partition("->")
    inputs = terms.split(",")
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in terms]
    if "->" not in bound["equation"] or any(
        len(set(t.replace("...", ""))) != len(t.replace("...", "")) for t in inputs
    ):
        return run._unknown(values, node)  # type: ignore[no-any-return]
    longest = max((len(v.shape) - len(t) + 3 for t, v in zip(inputs, values, strict=True) if "..." in t), default=0)
    extra = "".join(spare[:longest])
    inputs = [
        term.replace("...", extra[len(extra) - (len(value.shape) - len(term) + 3) :] if "..." in term else "")
        for term, value in zip(inputs, values, strict=True)
    ]
    out = out.replace("...", extra)
    total, letters = values[0], inputs[0]
    for position, (value, term) in enumerate(zip(values[1:], inputs[1:], strict=True), start=1):
        later = out + "".join(inputs[position + 1 :])
        kept = "".join(dict.fromkeys(letter for letter in letters + term if letter in later))
        total, letters = run._contract(total, value, (letters, term, kept)), kept
    summed = [dim for dim, letter in enumerate(letters) if letter not in out]
    total = run._mix(total, summed, f"{run.where()} mixes the units") if summed else total
    order = [letter for letter in letters if letter in out]
    kept_labels = [_index0(a, summed).permute([order.index(letter) for letter in out]) for a in total.labels]
    return Value(_shape(node), run._tidy(kept_labels))


def _attention(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    query, key, value = bound["query"], bound["key"], bound["value"]
    last = len(query.shape) - 1
    if bound.get("scale") is None:
        for operand in (query, key):
            for labels in operand.labels:
                if varied(labels) == [last]:
                    run.atoms.freeze(
                        _core(labels).reshape(-1).unique(), f"{run.where()} is scaled by the width of a head"
                    )
    if bound.get("enable_gqa") and query.shape[-3] != key.shape[-3]:
        key, value = (
            Value(
                (*v.shape[:-3], query.shape[-3], *v.shape[-2:]),
                run._tidy(labels.repeat_interleave(query.shape[-3] // v.shape[-3], dim=-3) for labels in v.labels),
            )
            for v in (key, value)
        )
    batch = "abcdefgh"[: last - 1]
    scores = run._contract(query, key, (batch + "nd", batch + "md", batch + "nm"))
    if bound.get("attn_mask") is not None:
        scores = run._combine(scores.shape, [scores, bound["attn_mask"]])
    scores = run._mix(scores, [last], f"{run.where()} mixes the units")
    return run._contract(scores, value, (batch + "nm", batch + "me", batch + "ne"))


def _glu(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    value, dim = bound["self"], bound["dim"]
    for labels in value.labels:
        run._grid(labels.unflatten(dim, (2, -1)))
    halves = [[labels.chunk(2, dim)[i] for labels in value.labels] for i in (0, 1)]
    shape = _shape(node)
    return run._combine(shape, [Value(shape, run._tidy(half)) for half in halves])


def _unfolded(run: Propagation, bound: dict[str, Any], node: Node) -> Value:
    """im2col: every channel becomes one row for each tap of the kernel."""
    value, shape = run._mix(bound["self"], (-1, -2), f"{run.where()} mixes the units"), _shape(node)
    taps = bound["kernel_size"][0] * bound["kernel_size"][1]
    kept = [labels[..., 0, 0].repeat_interleave(taps, -1).unsqueeze(-1).expand(shape) for labels in value.labels]
    return Value(shape, run._tidy(kept))


ELEMENTWISE = set(
    """
    abs absolute neg negative positive exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sign sgn sin cos tan
    asin acos atan atan2 sinh cosh tanh asinh acosh atanh erf erfc erfinv sigmoid log_sigmoid logit relu relu6 leaky_relu elu
    selu celu gelu silu mish hardtanh hardsigmoid hardswish hardshrink softshrink tanhshrink softplus softsign threshold
    clamp clamp_min clamp_max clip round floor ceil trunc frac fix nan_to_num isnan isinf isfinite rrelu
    add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow maximum minimum fmax fmin addcmul addcdiv lerp
    eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor
    where masked_fill fill copy zero dropout feature_dropout alpha_dropout feature_alpha_dropout bernoulli native_dropout
    clone contiguous detach alias to _to_copy type_as float double half bfloat16 int long bool lift_fresh_copy lift_fresh
    detach_copy alias_copy heaviside hypot xlogy logaddexp data requires_grad
    __and__ __or__ __xor__ __iand__ __ior__
    """.split()
)
CREATED = """zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
    rand rand_like randn randn_like scalar_tensor""".split()
PLAIN = "arange linspace eye tril_indices triu_indices tensor randint randperm sym_size".split()
RESHAPED = """view reshape flatten unflatten squeeze unsqueeze view_as reshape_as _unsafe_view ravel atleast_1d
    atleast_2d atleast_3d""".split()
EXPANDED = "expand expand_as broadcast_to".split()
MOVED = """permute transpose swapaxes swapdims movedim moveaxis t numpy_T mT adjoint slice select narrow split_with_sizes
    unbind roll flip fliplr flipud rot90 repeat tile repeat_interleave unfold pixel_shuffle pixel_unshuffle channel_shuffle
    tensor_split""".split()
REDUCED = """sum mean amax amin max min prod any all var std var_mean std_mean norm linalg_vector_norm logsumexp argmax argmin
    median mode count_nonzero nansum nanmean aminmax""".split()
MIXED = "softmax log_softmax _softmax _log_softmax cumsum cumprod logcumsumexp".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(CREATED, _created),
    **dict.fromkeys(PLAIN, _plain),
    **dict.fromkeys(RESHAPED, _reshaped),
    **dict.fromkeys(EXPANDED, _expanded),
    **dict.fromkeys(MOVED, _moved),
    **dict.fromkeys(["chunk", "split"], _divided),
    **dict.fromkeys(["cat", "concat", "concatenate", "stack"], _joined),
    **dict.fromkeys(["pad", "constant_pad_nd"], _padded),
    **dict.fromkeys([f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)], _padded),
    **dict.fromkeys(["index", "index_select", "gather", "take_along_dim"], _indexed),
    **dict.fromkeys(REDUCED, _reduced),
    **dict.fromkeys(MIXED, _mixed),
    **dict.fromkeys(["topk", "sort"], _chosen),
    **{f"{a}{kind}_pool{n}d": _local(n) for a in ("", "adaptive_") for kind in ("avg", "max") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _local(n) for n in (2, 3)},
    **{f"upsample_nearest{n}d": _local(n) for n in (1, 2, 3)},
    **{"upsample_linear1d": _local(1), "upsample_bilinear2d": _local(2), "upsample_trilinear3d": _local(3)},
    **{"_upsample_bilinear2d_aa": _local(2), "upsample_bicubic2d": _local(2), "_upsample_bicubic2d_aa": _local(2)},
    **dict.fromkeys(["batch_norm", "instance_norm"], _normed),
    "group_norm": _group_normed,
    **dict.fromkeys(["layer_norm", "rms_norm"], _layer_normed),
    "prelu": _prelu,
    "linear": _linear,
    **{f"conv{n}d": _convolution(False) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(True) for n in (1, 2, 3)},
    "embedding": _embedding,
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm", "addmv", "addbmm"], _added_matmul),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "glu": _glu,
    "im2col": _unfolded,
}
