"""Runs a model as it would be after a cut, on tensors without data, before anything is touched."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import logging
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@torch.library.custom_op(
    "impact_optim::opaque",
    mutates_args=(),
    schema="(Tensor[] inputs, int[] shape, ScalarType dtype, Device device) -> Tensor",
)
def _opaque(inputs: list[Tensor], shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a module that is not run makes of its inputs."""
    return torch.empty(shape, dtype=dtype, device=device)


_opaque.register_fake(lambda inputs, shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))


@dataclass
class Plan:
    """What a cut changes."""

    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """First qualified name of a parameter or buffer -> dimension -> the indices that are kept."""
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    """Module and integer attribute -> its new value."""
    opaque: dict[str, list[Any]] = field(default_factory=dict)
    """Modules that are not run -> what each of their calls returns, tensors without data."""


def as_inputs(example_inputs: Any) -> Inputs:
    """Positional and keyword arguments of a forward pass."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs), {}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every name of every parameter and buffer."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def first_names(model: nn.Module) -> dict[str, str]:
    """Any qualified name of a parameter or buffer -> the first one of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(model).items()}


@contextmanager
def resized(model: nn.Module, sizes: Mapping[tuple[str, str], int]) -> Iterator[None]:
    """Sets integer attributes of modules for the time of the scope."""
    modules = dict(model.named_modules())
    before = {key: getattr(modules[key[0]], key[1]) for key in sizes}
    try:
        for (module, attribute), size in sizes.items():
            setattr(modules[module], attribute, size)
        yield
    finally:
        for (module, attribute), size in before.items():
            setattr(modules[module], attribute, size)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in one mode, and attention on the path that training takes."""
    # The attribute, not train(): a module that overrides train() is asked for nothing.
    before = [(module, module.training) for module in model.modules()]
    # Shapes that do not fit are an answer here, not an error for the log.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled = log.disabled
    # Layers that Python drops at random are dropped alike in every rehearsal.
    chance = random.getstate()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        log.disabled = True
        random.seed(0)
        for module, _ in before:
            module.training = training
        yield
    finally:
        random.setstate(chance)
        torch.backends.mha.set_fastpath_enabled(fastpath)
        log.disabled = disabled
        for module, mode in before:
            module.training = mode


def outputs(model: nn.Module, inputs: Inputs, parts: Iterable[nn.Module]) -> dict[str, list[Any]]:
    """Runs a model, and notes what each call of some of its modules returns."""
    names = {module: name for name, module in model.named_modules()}
    noted: dict[str, list[Any]] = {names[part]: [] for part in parts}
    args, kwargs = inputs

    def note(part: nn.Module, _: Any, output: Any) -> None:
        noted[names[part]].append(tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (output, _devices(output))))

    handles = [part.register_forward_hook(note) for part in parts]
    try:
        with _mode(model, training=False), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return noted


def _devices(output: Any) -> list[torch.device]:
    return [leaf.device for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def _not_run(model: nn.Module, opaque: Mapping[str, list[Any]]) -> Iterator[None]:
    """Modules return what they are known to return."""
    modules = dict(model.named_modules())

    def stand_in(calls: Iterator[Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            output, devices = next(calls)
            places = iter(devices)
            return tree_map_only(Tensor, lambda t: _opaque(given, list(t.shape), t.dtype, next(places)), output)

        return forward

    try:
        for name, calls in opaque.items():
            if calls:
                modules[name].forward = stand_in(itertools.cycle(calls))
        yield
    finally:
        for name, calls in opaque.items():
            if calls:
                del modules[name].forward


@contextmanager
def _without_data(model: nn.Module, plan: Plan, inputs: Inputs) -> Iterator[Inputs]:
    """The model with the shapes that a plan gives it; yields inputs for it."""
    # Symbols stand for numbers that code takes out of tensors; it may keep them, but not decide by them.
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    first = first_names(model)
    stand_ins: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        if first[name] == name:
            shape = list(tensor.shape)
            for dim, kept in plan.kept.get(name, {}).items():
                shape[dim] = len(kept)
            with fake:
                stand_in = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                stand_in = nn.Parameter(stand_in, tensor.requires_grad)
            stand_ins[name] = stand_in
    places = []
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    name = first[f"{prefix}.{key}" if prefix else key]
                    places.append((store, key, tensor, stand_ins[name]))
    held = _Held(model)
    try:
        for store, key, _, stand_in in places:
            store[key] = stand_in
        with resized(model, plan.sizes), _not_run(model, plan.opaque), fake:
            yield tree_map_only(Tensor, fake.from_tensor, inputs)
    finally:
        for store, key, tensor, _ in places:
            store[key] = tensor
        held.put_back()
        caches.forget_fakes()


class _Held:
    """What attributes hold beside parameters: forward passes cache tensors there, which must not be the fake ones.

    Of modules it is all but torch's own attributes, of their classes and of the files that these are from what is a
    container; of these, and of objects, what is inside, a few levels down.
    """

    def __init__(self, model: nn.Module) -> None:
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._known: set[int] = set()
        modules = list(model.modules())
        for module in modules:
            before = {key: value for key, value in vars(module).items() if key not in _TORCHS_OWN}
            self._dicts.append((vars(module), before))
            for value in before.values():
                self._hold(value, _LEVELS)
        classes = {kind for module in modules for kind in type(module).__mro__ if not _is_torchs(kind)}
        for kind in classes:
            self._classes.append((kind, dict(vars(kind))))
            self._hold({key: value for key, value in vars(kind).items() if isinstance(value, dict | list)}, _LEVELS)
        for name in {kind.__module__ for kind in classes}:
            values = vars(sys.modules[name]).values() if name in sys.modules else ()
            for value in list(values):
                if isinstance(value, dict | list) and len(value) <= _LARGE:
                    self._hold(value, 1)

    def _hold(self, value: Any, levels: int) -> None:
        if not levels or isinstance(value, Tensor | nn.Module | type) or id(value) in self._known:
            return
        self._known.add(id(value))
        inside: Iterable[Any] = ()
        if isinstance(value, dict | list | deque | set):
            if len(value) > _LARGE:
                return
            # Of dicts past what subclasses make of it: some build what is asked for.
            inside = list(dict.values(value) if isinstance(value, dict) else value)
            if isinstance(value, dict):
                self._dicts.append((value, dict(dict.items(value))))
            else:
                self._lists.append((value, list(inside)))
        elif isinstance(value, tuple):
            inside = value
        elif hasattr(value, "__dict__") and not callable(value) and not _is_torchs(type(value)):
            inside = list(vars(value).values())
            self._dicts.append((vars(value), dict(vars(value))))
        for part in inside:
            self._hold(part, levels - 1)

    def put_back(self) -> None:
        """Undoes what has changed."""
        for now, before in self._dicts:
            own = _TORCHS_OWN if "_parameters" in now else ()
            if dict.keys(now) - own != before.keys() or any(
                dict.get(now, key) is not value for key, value in before.items()
            ):
                kept = {key: now[key] for key in own}
                now.clear()
                now.update({**kept, **before})
        for values, content in self._lists:
            if len(values) != len(content) or any(a is not b for a, b in zip(values, content, strict=True)):
                values.clear()
                (values.update if isinstance(values, set) else values.extend)(content)
        for kind, attributes in self._classes:
            for key in vars(kind).keys() - attributes.keys():
                delattr(kind, key)
            for key, value in attributes.items():
                if vars(kind)[key] is not value:
                    setattr(kind, key, value)


_TORCHS_OWN = vars(nn.Module()).keys()
_LEVELS, _LARGE = 4, 10_000


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


class _Caches:
    """The caches of functions in this process: a forward pass may put tensors into them.

    To find them takes a look at every object. So it is done where a model is traced, and again where modules have been
    imported since. What a forward pass makes anew is not in question: :class:`_Held` throws it away.
    """

    def __init__(self) -> None:
        self._calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        """By function, how often it had been called when its cache was last looked at."""
        self._imported = 0

    def find(self) -> None:
        self._imported = len(sys.modules)
        for found in [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper]:
            self._calls.setdefault(found, 0)

    def forget_fakes(self) -> None:
        """Empties those that hold tensors without data."""
        if len(sys.modules) != self._imported:
            self.find()
        for cached, before in list(self._calls.items()):
            info = cached.cache_info()
            if (calls := info.hits + info.misses) == before:
                continue
            if info.currsize and _holds_fakes(gc.get_referents(cached), 3):
                cached.cache_clear()
                calls = 0
            self._calls[cached] = calls


caches = _Caches()


def _holds_fakes(values: Iterable[Any], levels: int) -> bool:
    for value in values:
        if isinstance(value, FakeTensor):
            return True
        if levels and type(value) in (tuple, list) and _holds_fakes(value, levels - 1):
            return True
        if levels and isinstance(value, dict) and _holds_fakes(list(dict.values(value)), levels - 1):
            return True
    return False


def forward(model: nn.Module, inputs: Inputs, plan: Plan, training: bool = False) -> None:
    """A forward pass of the model as it would be after a cut; raises what the model's code raises."""
    with _mode(model, training), _without_data(model, plan, inputs) as (args, kwargs), torch.no_grad():
        model(*args, **kwargs)


def export(model: nn.Module, inputs: Inputs, plan: Plan, training: bool = False) -> ExportedProgram:
    """The program of ATen operators that the model runs after a cut."""
    with _mode(model, training), _without_data(model, plan, inputs) as (args, kwargs), torch.no_grad():
        return torch.export.export(model, args, copy.copy(kwargs), strict=False)


def unknown_output(model: nn.Module, inputs: Inputs, plan: Plan, training: bool) -> str:
    """The type of something in a model's output that is neither a tensor nor a number, if the model runs so far."""
    try:
        with _mode(model, training), _without_data(model, plan, inputs) as (args, kwargs), torch.no_grad():
            leaves = tree_leaves(model(*args, **kwargs))
    except Exception:
        return ""
    plain = (Tensor, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))
    return next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, plain)), "")


def culprit(model: nn.Module, error: BaseException) -> tuple[str, str]:
    """The innermost module whose code raised an error, and the line it stopped at: ``("layer1.0", "file.py:12")``."""
    names = {id(module): name for name, module in model.named_modules()}
    cause: BaseException | None = error
    while cause is not None:
        found, line = "", ""
        trace = cause.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in names:
                found = names[id(owner)]
                line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        if line:
            return found, line
        cause = cause.__cause__
    return "", ""


def kept_indices(units: Tensor, removed: Tensor) -> Tensor:
    """Indices whose unit is not removed; ``removed`` is a mask over units."""
    gone = removed[units.clamp(min=0)] & (units >= 0)
    return (~gone).nonzero().reshape(-1)
