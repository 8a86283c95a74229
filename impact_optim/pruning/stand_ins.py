"""A model whose tensors have no data: the same module, for a while, with stand-ins of the shapes that a cut leaves.

Whatever its forward pass has put away meanwhile, in attributes, containers or the caches of functions, is undone.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .plan import Plan


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every name of every parameter and buffer."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def first_names(model: nn.Module) -> dict[str, str]:
    """Any qualified name of a parameter or buffer -> the first one of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(model).items()}


@contextmanager
def without_data(model: nn.Module, plan: Plan) -> Iterator[FakeTensorMode]:
    """The model with the shapes and the sizes that a plan gives it; yields the mode that its inputs must be of."""
    # Symbols stand for numbers that code takes out of tensors; it may keep them, but not decide by them.
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    first, modules = first_names(model), dict(model.named_modules())
    stand_ins: dict[str, Tensor] = {}
    held = _Held(model)
    try:
        for prefix, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # torch.export cannot trace it, nor is what it holds in dicts
            for store in (module._parameters, module._buffers):
                for key, tensor in store.items():
                    if tensor is not None:
                        name = first[f"{prefix}.{key}" if prefix else key]
                        if name not in stand_ins:
                            stand_ins[name] = _stand_in(tensor, plan.kept.get(name, {}), fake)
                        store[key] = stand_ins[name]
            if isinstance(module, nn.RNNBase):
                module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        for (owner, attribute), size in plan.sizes.items():
            setattr(modules[owner], attribute, size)
        with fake:
            yield fake
    finally:
        held.put_back()
        caches.forget_fakes()


def _stand_in(tensor: Tensor, kept: dict[int, Tensor], fake: FakeTensorMode) -> Tensor:
    shape = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(tensor.shape)]
    with fake:
        stand_in = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(stand_in, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else stand_in


class _Held:
    """What modules hold: their tensors, and where forward passes may cache others, which must not be the fake ones.

    Of modules it is all but the rest of torch's own attributes, of their classes and of the files that these are from
    what is a container; of these, and of objects, what is inside, a few levels down.
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
            if not isinstance(module, torch.jit.ScriptModule):
                stores = (module._parameters, module._buffers, module._modules)
                self._dicts += [(store, dict(store)) for store in stores]
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
                restored = {**{key: now[key] for key in own}, **before}
                now.clear()
                now.update(restored)
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
        self._asked: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        """Of each cache, how often it had been asked when it was looked into."""
        self._imported = 0

    def find(self) -> None:
        self._imported = len(sys.modules)
        kind = functools._lru_cache_wrapper
        for found in gc.get_referrers(kind):  # every object refers to its type
            if type(found) is kind:
                self._asked.setdefault(found, -1)

    def forget_fakes(self) -> None:
        """Empties those that hold tensors without data."""
        if len(sys.modules) != self._imported:
            self.find()
        for cached, asked in list(self._asked.items()):
            if sum(cached.cache_info()[:2]) != asked:  # hits as well: what they return may be a container
                if _holds_fakes(gc.get_referents(cached), 3):
                    cached.cache_clear()
                self._asked[cached] = sum(cached.cache_info()[:2])


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
