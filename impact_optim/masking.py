"""Where masked weights are seen: in the forward passes of an attached module, or inside a scope, and nowhere else.

An attached module never holds masked weights. While one of its training forward passes runs, the attribute that the
layers read (``layer.weight``) is shadowed by ``weight * factor``; the parameter itself, which ``parameters()``,
``state_dict()``, ``copy.deepcopy``, gradient clipping and weight averaging use, stays the dense one throughout.
Autograd carries the gradient at the masked weights back to the parameter unchanged, so that ``p.grad`` is dense.

A scope (:meth:`Masking.substitute`) is for weights that no module owns: it changes the parameters and restores them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef


class Factor(NamedTuple):
    """What the weights of one parameter are multiplied with until the next step."""

    value: Tensor | None
    """0 where a weight is dropped; shape and dtype of the parameter."""
    dense_grad: bool
    """Whether the gradient reaches the parameter dense, to be masked by the step, or already masked."""
    weights: Tensor | None = None
    """In place of ``value``: the masked weights, in a buffer that the next step overwrites."""


class _Shadow(NamedTuple):
    part: nn.Module
    name: str
    weight: Tensor


_Place = tuple["weakref.ref[nn.Module]", str, TensorWeakRef]  # a shadow that keeps nothing alive


class MaskOwner(Protocol):
    """What :class:`Masking` needs from an optimizer."""

    def _index(self) -> dict[Tensor, int]: ...

    def _draw_factors(self, factors: dict[Tensor, Factor]) -> None: ...


def _mask(weight: Tensor, factor: Factor) -> Tensor:
    """The masked weights; their gradient reaches the weights as it is, or masked as well."""
    if factor.dense_grad and not torch._C._are_functorch_transforms_active():
        weights = factor.weights
        if factor.value is not None:
            weights = weight.detach() * factor.value
        return cast(Tensor, _InPlaceOf.apply(weight, weights))
    # The gradient of a clone is the identity, also for torch.func.
    masked = weight.clone()
    with torch.no_grad():
        _apply(masked, factor)
    if factor.value is not None and not factor.dense_grad:
        masked.register_hook(factor.value.mul)
    return masked


def _apply(weight: Tensor, factor: Factor) -> None:
    """Masks weights in place."""
    if factor.weights is not None:
        weight.copy_(factor.weights)
    if factor.value is not None:
        weight.mul_(factor.value)


class _InPlaceOf(torch.autograd.Function):
    """Another tensor in place of the weights, with the gradient going to the weights as it is.

    It saves nothing: a part of the graph that is run through twice, by activation checkpointing, finds all it needs.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, masked: Tensor) -> Tensor:
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Masking:
    """The masks of one optimizer between two of its steps, and the modules that see them.

    Args:
        owner: the optimizer; held weakly, so that dropping it leaves its modules as they were.
    """

    def __init__(self, owner: MaskOwner) -> None:
        self._owner = weakref.ref(owner)
        self._handles: dict[nn.Module, list[torch.utils.hooks.RemovableHandle]] = {}
        self._opened_by: nn.Module | None = None
        self._depth = 0
        self._in_backward = False
        self._shadows: list[_Shadow] = []
        self.step = 0
        """Grows with every step: the host's own count, since that of the optimizer may be on a device."""
        self.is_captured = False
        """Whether the masks have been drawn in the capture of a CUDA graph."""
        self.displaced = False
        """Whether another optimizer has taken over an attached module."""
        self._dense: list[tuple[Tensor, Tensor]] | None = None
        self._opener_frame: FrameType | None = None
        self._factors: dict[Tensor, Factor] = {}
        self.seen: dict[Tensor, Factor] = {}
        """Parameters that were masked in a forward pass since the last step, with their factors."""

    # -- the life of a mask: drawn at the first forward pass after a step, dropped by the next step --

    def factors(self) -> dict[Tensor, Factor]:
        """The factors of this step. A parameter gets its own at the first call that finds it trained."""
        owner = self._owner()
        if owner is not None:
            owner._draw_factors(self._factors)
        return self._factors

    def end_step(self) -> None:
        """Forgets the masks: the next forward pass draws new ones."""
        self._close()
        self._factors = {}
        self.seen = {}
        self.step += 1

    # -- attached modules --

    def attached(self) -> Iterator[nn.Module]:
        """The attached root modules."""
        return iter(self._handles)

    def attach(self, module: nn.Module) -> None:
        """Shows masked weights to every training forward pass of the module or of a part of it."""
        self.detach(module)
        self.displaced = False
        owner = self._owner()
        hooks = [hook for part in module.modules() for hook in part._forward_pre_hooks.values()]
        for other in {masking for hook in hooks if isinstance(hook, _Hook) and (masking := hook.masking())} - {self}:
            other_owner = other._owner()
            shared = owner and other_owner and owner._index().keys() & other_owner._index().keys()
            if shared and any(param in shared for param in module.parameters()):
                for root in [root for root in other.attached() if shared & set(root.parameters())]:
                    other.detach(root)
                    other.displaced = True
        handles = self._handles[module] = []
        for part in module.modules():
            is_root = part is module
            handles.append(part.register_forward_pre_hook(_Hook(self, is_root, Masking._enter), prepend=True))
            handles.append(part.register_forward_hook(_Hook(self, is_root, Masking._leave), always_call=True))

    def detach(self, module: nn.Module | None = None) -> None:
        """Takes the hooks off one attached module, or off all of them."""
        self._close()
        for root in list(self._handles) if module is None else [module]:
            for handle in self._handles.pop(root, []):
                handle.remove()

    def _enter(self, module: nn.Module, *_: Any) -> None:
        # The module that is called from outside opens; the calls inside it find the masks in place.
        if self._opened_by is not None and self._is_stale():
            self._close()
        if self._opened_by is module:
            self._depth += 1
        if self._opened_by is not None or self._dense is not None:
            return
        if not (module.training and torch.is_grad_enabled()):
            return
        factors = self.factors()
        if _runs_backward():
            # Activation checkpointing runs a part again; it must see what it saw the first time.
            factors = {param: factor for param, factor in factors.items() if param in self.seen}
        masked: dict[Tensor, Tensor] = {}
        shadows: list[_Shadow] = []
        for part in module.modules():
            if not part.training:
                continue
            for name, param in part._parameters.items():
                if param is not None and param in factors and param.requires_grad:
                    if param not in masked:
                        masked[param] = _mask(param, factors[param])
                    shadows.append(_Shadow(part, name, masked[param]))
        self.seen.update((param, factors[param]) for param in masked)
        self._open(module, shadows)
        self._opener_frame = _module_call()

    def _leave(self, module: nn.Module, *args: Any) -> None:
        if self._opened_by is not module:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        # A function that activation checkpointing runs again may read a weight without calling its module: the
        # masked weights are back in place while the backward pass of this output runs. Whoever keeps the output keeps
        # the hook, and the hook keeps nothing.
        places = [(weakref.ref(part), name, TensorWeakRef(weight)) for part, name, weight in self._shadows]
        hook = partial(_reopen, weakref.ref(self), weakref.ref(module), places, self.step)
        self._close()
        for output in tree_leaves(args[-1]) if places else ():
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(hook)

    def _reopen(self, module: nn.Module, places: list[_Place]) -> None:
        if self._opened_by is not None or self._dense is not None or not _runs_backward():
            return
        masked: dict[Tensor, Tensor] = {}
        shadows = []
        for part_ref, name, weight_ref in places:
            part = part_ref()
            param = None if part is None else part._parameters.get(name)
            if part is not None and param in self.seen:
                if param not in masked:
                    weight = weight_ref()
                    with torch.enable_grad():
                        masked[param] = _mask(param, self.seen[param]) if weight is None else weight
                shadows.append(_Shadow(part, name, masked[param]))
        self._open(module, shadows)
        self._in_backward = True
        Variable._execution_engine.queue_callback(_AtEndOfBackward(self._close))

    def _open(self, module: nn.Module, shadows: list[_Shadow]) -> None:
        self._opened_by, self._depth, self._shadows = module, 1, shadows
        for part, name, weight in shadows:
            # An instance attribute hides the parameter from `part.name`, and from nothing else.
            part.__dict__[name] = weight

    def _is_stale(self) -> bool:
        """Whether the pass that opened never came to its end: a KeyboardInterrupt, or an error in a backward pass."""
        if self._in_backward:
            return not _runs_backward()
        if self._opener_frame is None:
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._opener_frame:
            frame = frame.f_back
        return frame is None

    def _close(self) -> None:
        for part, name, _ in self._shadows:
            part.__dict__.pop(name, None)
        for part in {part for part, _, _ in self._shadows if isinstance(part, nn.RNNBase)}:
            part._init_flat_weights()  # it caches its weights in a list
        self._shadows, self._in_backward = [], False
        self._opened_by, self._depth, self._opener_frame = None, 0, None

    # -- scopes --

    @contextmanager
    def substitute(self, factors: Mapping[Tensor, Factor]) -> Generator[None, None, None]:
        """Masks the parameters in place for the time of the scope."""
        if self._dense is not None:
            raise RuntimeError("masked() and expected() cannot be nested: leave the outer scope first")
        torch.clear_autocast_cache()  # it holds casts of the weights that are about to change
        try:
            with torch.no_grad():
                self._dense = [(param, param.detach().clone()) for param in factors]
                for param, factor in factors.items():
                    _apply(param, factor)
            yield
        finally:
            self.restore()

    @property
    def in_scope(self) -> bool:
        """Whether the parameters hold masked weights now."""
        return self._dense is not None

    def restore(self) -> None:
        """Ends the scope, if one is open: the parameters hold their dense weights again."""
        if self._dense is None:
            return
        torch.clear_autocast_cache()
        with torch.no_grad():
            for param, dense in self._dense:
                param.copy_(dense)
        self._dense = None


class _AtEndOfBackward:
    """Calls a function when the backward pass ends, by an error too: then the engine lets go of its callbacks."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._finish = weakref.finalize(self, function)

    def __call__(self) -> None:
        self._finish()


def _reopen(
    masking: weakref.ref[Masking], module: weakref.ref[nn.Module], places: list[_Place], step: int, grad: Tensor
) -> None:
    """The gradient hook of an output; see :meth:`Masking._leave`."""
    alive, root = masking(), module()
    if alive is not None and root is not None and alive.step == step:
        alive._reopen(root, places)


def _module_call() -> FrameType | None:
    """The frame of the module call whose hook is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame


def _runs_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _Hook:
    """A forward hook that a copy or a pickle of the module leaves behind: an attachment binds two living objects."""

    def __init__(self, masking: Masking, is_root: bool, action: Callable[..., None]) -> None:
        self.masking = weakref.ref(masking)
        self.is_root = is_root
        self.action = action

    def __call__(self, module: nn.Module, *args: Any) -> None:
        # Inside a compiled region the attributes were shadowed before it was entered; tracing passes over the hooks
        # of the parts. A root that is itself inside one breaks the graph here, so that masks are not lost.
        if not torch.compiler.is_compiling() or (self.is_root and not torch.compiler.is_exporting()):
            self._run(module, *args)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _run(self, module: nn.Module, *args: Any) -> None:
        masking = self.masking()
        if masking is not None:
            self.action(masking, module, *args)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _detached_hook, ()


def _detached_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    """What a copied hook does."""
