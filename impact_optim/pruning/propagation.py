"""Carries labels through programs of ATen operators.

Operators that move data are run on the labels themselves; where an operator combines elements, their labels are joined.
What each operator does is in :mod:`.operators`; what those rules are made of is here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .attributes import may_count_units, surely_counts_units
from .coupling import PRODUCER, Coupling
from .labels import Atoms, AxisKey, Mismatch, Value, core, is_value, varied
from .stand_ins import first_names
from .transcript import Transcript, recipe_of


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


class Propagation(Coupling):
    """Carries labels through exported programs of one model.

    Args:
        model: the module that was exported.
        atoms: the sets that the labels refer to.
        axes: labels of parameters' and buffers' dimensions; what is missing gets fresh atoms.
        rules: name of an ATen operator -> what it does to labels.
        transcript: of the programs.
    """

    def __init__(
        self,
        model: nn.Module,
        atoms: Atoms,
        axes: dict[AxisKey, Tensor],
        rules: Mapping[str, Rule],
        transcript: Transcript,
    ) -> None:
        self.modules = dict(model.named_modules())
        super().__init__(atoms, axes, (name for name, _ in model.named_buffers()), transcript)
        self._names = first_names(model)
        self.sightings: list[Sighting] = []
        self.sizes: list[Size] = []
        self.used: set[str] = set()
        """Parameters and buffers that the programs read."""
        self._rules = rules
        self._node: Node | None = None
        self._memory: dict[int, list[tuple[Value, Tensor]]] = {}

    # -- the walk --

    def run(self, program: ExportedProgram) -> None:
        """Carries labels through one program."""
        values: dict[Node, Any] = {}
        self._memory = {}
        inputs = (node for node in program.graph.nodes if node.op == "placeholder")
        for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True):
            values[node] = self._placeholder(node, spec.kind, spec.target)
            if spec.kind == InputKind.CONSTANT_TENSOR:
                values[node].constant = True
                values[node].recipe = recipe_of(program.constants.get(spec.target or ""))
            self._remember(node, values[node])
        try:
            outputs = self._walk(program.graph, values)
        except Mismatch as mismatch:
            raise Mismatch(mismatch.units, f"{mismatch} ({self.where()})") from None
        for value in tree_leaves(outputs, is_leaf=is_value):
            self.freeze(value, "it is an output of the model")

    def _walk(self, graph: Graph, values: dict[Node, Any]) -> Any:
        """Carries labels from the inputs of a graph, which are known, to its outputs."""
        live = _live(graph)
        for node in graph.nodes:
            self._node = node
            if node.op == "output":
                return tree_map_only(Node, values.get, node.args[0])
            if node in values or node not in live:
                continue
            if node.op == "call_function":
                values[node] = self._call(node, tree_map_only(Node, values.get, (node.args, node.kwargs)))
            else:
                values[node] = blank(node)
            self._remember(node, values[node])

    def _remember(self, node: Node, value: Any) -> None:
        """Notes which memory a tensor has."""
        val = node.meta.get("val")
        if isinstance(val, Tensor) and val.layout is torch.strided:
            self._memory.setdefault(val.untyped_storage()._cdata, []).append((value, val))

    def module(self) -> str:
        """Qualified name of the module that the current operator runs in."""
        stack = list((self._node.meta.get("nn_module_stack") or {}).values()) if self._node else []
        return stack[-1][0].split("@")[0] if stack else ""

    def where(self) -> str:
        """The current operator and its module, for people."""
        whole = self._node.meta.get("part_of") if self._node else None
        return f"{self.operator()}{f' of {whole}' if whole else ''} in {self.module() or 'the model'}"

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
        name = self._names[target]
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
            constant = self.transcript.begin(self.operator(), given, [])
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
                        self.freeze(value, "nn.MultiheadAttention derives its sizes from embed_dim: see open_heads()")
            rule = self._rules.get(name)
            if rule is None and not self._in_counting_layer() and (parts := _parts(node)) is not None:
                inputs_of = (inner for inner in parts.nodes if inner.op == "placeholder")
                return self._walk(parts, dict(zip(inputs_of, given, strict=True)))
            constant = self.transcript.begin(name, given, _numbers(node.target, bound))
            result = rule(self, bound, node) if rule else self.unknown(given, node)
            if in_place and name not in _RENAMED and isinstance(result, Value) and is_value(bound.get("self")):
                self._written(bound["self"], result, node)
        weight = constant or all(value.weight for value in given)
        for position, value in enumerate(result if isinstance(result, list) else [result]):
            if isinstance(value, Value):
                value.weight = weight
                value.constant = constant
                if constant:
                    value.recipe = self.transcript.recipe(given, position)
                elif not weight:
                    self._note_sizes(value)
                    self.transcript.result(value, given, self.where())
        return result

    def unknown(self, given: list[Value], node: Node) -> Any:
        """Freezes what reaches an operator that nothing is known about."""
        for value in given:
            self.freeze(value, f"{self.where()} has no rule")
            if value.weight:  # nothing that follows tells that a layer has them
                self.roles[PRODUCER] += [core(labels).reshape(-1).unique() for labels in value.labels]
        return blank(node)

    def _in_counting_layer(self) -> bool:
        """Whether the current module is a layer of torch's own: of its sizes only the rules of operators know."""
        module = self.modules.get(self.module())
        return type(module).__module__.startswith("torch.nn.") and bool(module and module._parameters)

    def _in_multihead(self, node: Node) -> bool:
        stack = (node.meta.get("nn_module_stack") or {}).values()
        modules = [self.modules.get(name.split("@")[0]) for name, _ in stack]
        return any(getattr(type(module), "forward", None) is nn.MultiheadAttention.forward for module in modules)

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

    def _note_sizes(self, value: Value) -> None:
        stack = list((self._node.meta.get("nn_module_stack") or {}).values()) if self._node else []
        for name, _ in stack[-2:]:
            name = name.split("@")[0]
            module = self.modules.get(name)
            if module is None or type(module).__module__.startswith("torch.nn."):
                continue
            for attribute, size in vars(module).items():
                if type(size) is not int or size < 2 or not may_count_units(attribute):
                    continue
                for labels in value.labels:
                    for dim in range(labels.dim()):
                        counted = _once(labels, dim, size) if labels.stride(dim) != 0 else None
                        if counted is not None and (counted is labels or surely_counts_units(attribute)):
                            self.sizes.append(Size(name, attribute, counted, dim, False))

    def size_follows(self, attribute: str, labels: Tensor, dim: int) -> None:
        """Notes that an attribute of the current layer counts the indices of a dimension."""
        module = self.modules.get(self.module())
        # A property follows by itself.
        if module is not None and vars(module).get(attribute) == labels.size(dim):
            self.sizes.append(Size(self.module(), attribute, labels, dim, True))

    def see(self, where: str, value: Value, *kinds: type[nn.Module]) -> None:
        """Notes that a hook of the current layer sees a tensor."""
        if isinstance(self.modules.get(self.module()), kinds):
            for labels in value.labels:
                self.sightings.append(Sighting(self.module(), where, labels))


Rule = Callable[[Propagation, dict[str, Any], Node], Any]


def _parts(node: Node) -> Graph | None:
    """The operators that torch makes an operator of, if it is made of others.

    The inputs of the graph are the tensors among the arguments, in their order.
    """
    target, (leaves, form) = node.target, tree_flatten((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, Node))
    assert isinstance(target, torch._ops.OpOverload)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]
    given = [leaves[i].meta.get("val") for i in places]
    if target._schema.is_mutable or not all(isinstance(value, Tensor) for value in given):
        return None

    def operator(*tensors: Tensor) -> Any:
        filled = dict(zip(places, tensors, strict=True))
        args, kwargs = tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], form)
        return target(*args, **kwargs)

    known = _decompositions()
    # In the mode of the program: without it, what the operator creates would be real, and other memory in each node.
    fake = next((leaf.fake_mode for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, FakeTensor)), None)
    if fake is None:
        return None
    try:
        with fake, torch.no_grad():
            graph = make_fx(operator, {target: known[target]} if target in known else {})(*given).graph
    except Exception:  # it runs whole, but not in parts without data
        return None
    for inner in graph.nodes:
        if inner.target is target or inner.op == "get_attr":
            return None
        inner.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        inner.meta["part_of"] = node.meta.get("part_of", target._schema.name)
    return graph


_decompositions = functools.cache(default_decompositions)  # to look into it anew takes 30 ms


def _live(graph: Graph) -> set[Node]:
    """Operators that outputs or memory depend on. Code takes numbers for a log out of the others."""
    live: set[Node] = set()
    for node in reversed(graph.nodes):
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


def _once(labels: Tensor, dim: int, size: int) -> Tensor | None:
    """Labels of so many indices, of which a dimension may be several rounds: of heads, once for each sample."""
    rounds, rest = divmod(labels.size(dim), size)
    if rest or not rounds:
        return None
    first = labels.narrow(dim, 0, size)
    return labels if rounds == 1 else first if torch.equal(labels, torch.cat([first] * rounds, dim)) else None


def blank(node: Node) -> Any:
    """The result of an operator, without labels."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [Value(tuple(getattr(item, "shape", ()))) for item in value]
    return Value(tuple(getattr(value, "shape", ())))


_RENAMED = {"detach", "requires_grad", "squeeze", "unsqueeze", "t", "transpose"}  # in place, they write nothing
