"""Where masked weights are seen: in the forward passes of an attached module, or inside a scope, and nowhere else.

An attached module never holds masked weights. While one of its training forward passes runs, the attribute that the
layers read (``layer.weight``) is shadowed by ``weight * factor``; the parameter itself, which ``parameters()``,
``state_dict()``, ``copy.deepcopy``, gradient clipping and weight averaging use, stays the dense one throughout.
Autograd carries the gradient at the masked weights back to the parameter unchanged, so that ``p.grad`` is dense.

A scope (:meth:`Masking.substitute`) is for weights that no module owns: it changes the parameters and restores them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Factor(NamedTuple):
    """What the weights of one parameter are multiplied with until the next step."""

    value: Tensor
    """0 where a weight is dropped; shape and dtype of the parameter."""
    dense_grad: bool
    """Whether the gradient reaches the parameter dense, to be masked by the step, or already masked."""


class MaskOwner(Protocol):
    """What :class:`Masking` needs from an optimizer."""

    def _owns(self, param: Tensor) -> bool: ...

    def _draw_factors(self) -> dict[Tensor, Factor]: ...


class _StraightThrough(torch.autograd.Function):
    """weight * factor, whose gradient reaches the weight as it is: dense, also where the weight was dropped."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor) -> Tensor:
        return weight * factor

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
        self._shadowed: list[tuple[nn.Module, str]] = []
        self._dense: list[tuple[Tensor, Tensor]] | None = None
        self._factors: dict[Tensor, Factor] | None = None
        self.seen: dict[Tensor, Factor] = {}
        """Parameters that were masked in a forward pass since the last step, with their factors."""

    # -- the life of a mask: drawn at the first forward pass after a step, dropped by the next step --

    def factors(self) -> dict[Tensor, Factor]:
        """The factors of this step, drawn at the first call."""
        if self._factors is None:
            owner = self._owner()
            self._factors = {} if owner is None else owner._draw_factors()
        return self._factors

    def end_step(self) -> None:
        """Forgets the masks: the next forward pass draws new ones."""
        self._close()
        self._factors = None
        self.seen = {}

    # -- attached modules --

    def attached(self) -> Iterator[nn.Module]:
        """The attached root modules."""
        return iter(self._handles)

    def attach(self, module: nn.Module) -> None:
        """Shows masked weights to every training forward pass of the module or of a part of it."""
        self.detach(module)
        for part in module.modules():
            for hook in list(part._forward_pre_hooks.values()):
                if isinstance(hook, _Hook):
                    hook.yield_to(self._owner(), module)
        handles = self._handles[module] = []
        for part in module.modules():
            is_root = part is module
            handles.append(part.register_forward_pre_hook(_Hook(self, module, is_root, Masking._enter), prepend=True))
            handles.append(part.register_forward_hook(_Hook(self, module, is_root, Masking._leave), always_call=True))

    def detach(self, module: nn.Module | None = None) -> None:
        """Takes the hooks off one attached module, or off all of them."""
        self._close()
        for root in list(self._handles) if module is None else [module]:
            for handle in self._handles.pop(root, []):
                handle.remove()

    def _enter(self, module: nn.Module) -> None:
        # The module that is called from outside opens; the calls inside it find the masks in place. So a block
        # that activation checkpointing runs again in the backward pass opens for itself, with the same masks.
        if self._opened_by is module:
            if module.training:
                self._depth += 1
                return
            self._close()  # a KeyboardInterrupt left the pass without its hooks
        if self._opened_by is not None or self._dense is not None:
            return
        if not (module.training and torch.is_grad_enabled()):
            return
        factors = self.factors()
        masked: dict[Tensor, Tensor] = {}
        shadows: list[tuple[nn.Module, str, Tensor]] = []
        for part in module.modules():
            if not part.training:
                continue
            for name, param in part._parameters.items():
                if param is not None and param in factors:
                    if param not in masked:
                        value, dense_grad = factors[param]
                        masked[param] = _StraightThrough.apply(param, value) if dense_grad else param * value
                    shadows.append((part, name, masked[param]))
        self.seen.update((param, factors[param]) for param in masked)
        self._opened_by, self._depth = module, 1
        for part, name, weight in shadows:
            # An instance attribute hides the parameter from `part.name`, and from nothing else.
            part.__dict__[name] = weight
            self._shadowed.append((part, name))

    def _leave(self, module: nn.Module) -> None:
        if self._opened_by is module:
            self._depth -= 1
            if self._depth == 0:
                self._close()

    def _close(self) -> None:
        for part, name in self._shadowed:
            part.__dict__.pop(name, None)
            if isinstance(part, nn.RNNBase):
                part._init_flat_weights()  # it caches its weights in a list
        self._shadowed = []
        self._opened_by, self._depth = None, 0

    # -- scopes --

    @contextmanager
    def substitute(self, factors: dict[Tensor, Tensor]) -> Generator[None, None, None]:
        """Multiplies the parameters in place for the time of the scope."""
        if self._dense is not None:
            raise RuntimeError("masked() and expected() cannot be nested: leave the outer scope first")
        with torch.no_grad():
            self._dense = [(param, param.detach().clone()) for param in factors]
            for param, factor in factors.items():
                param.mul_(factor)
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Ends the scope, if one is open: the parameters hold their dense weights again."""
        with torch.no_grad():
            for param, dense in self._dense or []:
                param.copy_(dense)
        self._dense = None


class _Hook:
    """A forward hook that a copy or a pickle of the module leaves behind: an attachment binds two living objects."""

    def __init__(
        self, masking: Masking, root: nn.Module, is_root: bool, action: Callable[[Masking, nn.Module], None]
    ) -> None:
        self.masking = weakref.ref(masking)
        self.root = weakref.ref(root)
        self.is_root = is_root
        self.action = action

    def __call__(self, module: nn.Module, *args: Any) -> None:
        # Inside a compiled region the attributes were shadowed before it was entered; tracing passes over the hooks
        # of the parts. A root that is itself inside one breaks the graph here, so that masks are not lost.
        if not torch.compiler.is_compiling() or self.is_root:
            self._run(module)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _run(self, module: nn.Module) -> None:
        masking = self.masking()
        if masking is not None:
            self.action(masking, module)

    def yield_to(self, owner: MaskOwner | None, module: nn.Module) -> None:
        """Detaches its root where another optimizer takes over parameters of the module."""
        masking, root = self.masking(), self.root()
        other = None if masking is None else masking._owner()
        if masking is None or other is None or other is owner or owner is None or root is None:
            return
        if any(owner._owns(p) and other._owns(p) for p in module.parameters()):
            masking.detach(root)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _detached_hook, ()


def _detached_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    """What a copied hook does."""
