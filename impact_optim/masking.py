"""Where masked weights are seen: in the training forward passes of an attached module, or inside a scope.

Nothing masked is ever stored. A module looks up ``layer.weight`` in its dict ``layer._parameters``;
:meth:`Masking.attach` puts a dict there whose ``[name]`` gives the masked weight while a training forward pass runs,
and the parameter at all other times. What goes through the dict in another way sees the parameters themselves:
``parameters()``, ``state_dict()``, ``copy.deepcopy``, pickles, gradient clipping, weight averages. The masked weight is
made from the parameter when it is read, and autograd tells by its backward function whether a gradient has come through
it.

Compiled code reads the dict from C, past ``[name]``. So while compiled code may run, masked weights are put into the
dict before the pass and taken out after it (:meth:`Masking._place`).

A scope (:meth:`Masking.substitute`) is for weights that no module call reads: it changes the parameters and restores
them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace
from torch.nn.modules.batchnorm import _NormBase

from .masks import Draw, Mask

# Tracing of torch.fx by itself, not as a part of torch.export; older versions of torch do not tell the two apart.
is_fx_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_OPENS_BEFORE_WARNING = 10  # optimizers that pass twice or more before a step change the weights a few times


class MaskOwner(Protocol):
    """What :class:`Masking` needs from the engine."""

    def begin_pass(self, renews: bool) -> None:
        """Takes note of what has changed since the last pass, and of whether this one renews batch norm."""

    def owns(self, param: Tensor) -> bool: ...

    def current_mask(self, param: Tensor) -> Mask | None:
        """The mask of this step that holds a factor for the parameter."""

    def read_mask(self, param: Tensor) -> Mask | None:
        """The same, if a pass has read it already."""

    def sample(self, param: Tensor, number: int, drawn: dict[Any, dict[Tensor, Draw]]) -> Tensor | None:
        """A parameter under mask ``number`` of a scope of :meth:`Impact.sampled`."""

    def note_dense_read(self, param: Tensor) -> None:
        """Takes note that a gradient has come through a pass in eval mode."""


class _MaskedRead(torch.autograd.Function):
    """The weight times its factor, with the gradient going to the weight as it is: dense, to be masked by the step.

    It saves nothing, so that a part of the graph that is run twice, by activation checkpointing, finds all it needs.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Mask) -> Tensor:
        ctx.mask, ctx.weight = mask, weakref.ref(weight)
        return mask.masked(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.mask.is_over:
            raise RuntimeError(
                "a backward pass has reached a forward pass that was made before the last optimizer step, under masks "
                "that are gone: detach what is carried from one step to the next, such as a hidden state"
            )
        if (weight := ctx.weight()) is not None:
            ctx.mask.contributed[weight] = torch._C._current_graph_task_id()
        return grad, None


class _DenseRead(torch.autograd.Function):
    """The weight itself, as a pass in eval mode reads it: if a gradient comes this way, it may be dense."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.note, ctx.weight = note, weakref.ref(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if (weight := ctx.weight()) is not None:
            ctx.note(weight)
        return grad, None


class MaskedWeight(Tensor):
    """A masked weight as a layer reads it. Attributes, ``.data`` and ``.grad`` are those of the parameter, so that what
    a forward pass notes on its weight is not lost; so are copies and pickles."""

    _is_param = True  # isinstance(layer.weight, nn.Parameter)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(param: Tensor, masked: Tensor) -> MaskedWeight:
        weight = masked.as_subclass(MaskedWeight)
        weight.__dict__["_param"] = param
        return weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_param"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_param"], name, value)

    def _get_data(self) -> Tensor:
        self.__dict__["_is_exposed"] = True  # what is written there is no change of version
        return cast(Tensor, self._param.data)

    data = property(_get_data, lambda self, value: setattr(self._param, "data", value))
    grad = property(lambda self: self._param.grad, lambda self, value: setattr(self._param, "grad", value))

    def register_hook(self, hook: Any) -> Any:
        return self._param.register_hook(hook)

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        return self._param.register_post_accumulate_grad_hook(hook)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return cast(Tensor, copy.deepcopy(self._param, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._param.__reduce_ex__(protocol)


class _Parameters(dict[str, Any]):
    """The parameters of one attached module; see the top of this file."""

    def __init__(self, module: nn.Module, params: Mapping[str, Any]) -> None:
        super().__init__(params)
        self.module = weakref.ref(module)
        self.maskings: list[weakref.ref[Masking]] = []
        self.placed: dict[str, nn.Parameter] = {}
        """The parameters in whose places something else lies, put there for compiled code."""
        self.mode: bool | None = True
        """Whether that is for train mode, or for eval mode; ``None`` for any mode."""

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        module = self.module()
        if param is None or module is None:
            return param
        if name in self.placed:  # unless the module was switched to another mode on the way, or gradients off
            is_seen = self.mode is None or (torch.is_grad_enabled() and module.training == self.mode)
            if is_seen and not torch.compiler.is_compiling():  # the pass may have been left by a KeyboardInterrupt
                is_seen = any((masking := ref()) is not None and masking._is_open() for ref in self.maskings)
            return param if is_seen else self.placed.get(name, super().__getitem__(name))
        if torch.compiler.is_compiling():
            return param
        for ref in self.maskings:
            if (masking := ref()) is not None and (weight := masking.read(module, param)) is not param:
                return weight
        return param

    def items(self) -> Any:
        if self.placed:
            return {**self, **self.placed}.items()
        if torch.compiler.is_compiling():
            return super().items()
        # A forward that hands its own named_parameters() to functions, as meta-learning does, reads them like that.
        if sys._getframe(1).f_code.co_name == "<lambda>" and any(
            (masking := ref()) is not None and masking.is_inside(self.module()) for ref in self.maskings
        ):
            return {name: self[name] for name in self}.items()
        return super().items()

    def values(self) -> Any:
        return dict(self.items()).values()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self.items()),)


class _Read(NamedTuple):
    """A masked weight of the pass that is open, and what it was made of."""

    weight: Tensor
    version: int
    stamp: tuple[int, int, bool, bool]


class _Pass(threading.local):
    """The forward pass that a thread is in."""

    def __init__(self) -> None:
        self.calls: list[nn.Module] = []
        self.frame: FrameType | None = None
        self.reads: dict[Tensor, _Read] = {}
        self.recurrent: set[nn.RNNBase] = set()
        self.samples: dict[Any, dict[Tensor, Draw]] = {}
        self.renews = False
        """Whether it renews the statistics of batch norm, which are to be those of the dense network."""


class Masking:
    """The attached modules of one engine, and the passes and scopes that see its masks.

    Args:
        owner: the engine; held weakly, so that dropping it leaves its modules as they were.
    """

    def __init__(self, owner: MaskOwner) -> None:
        self._owner = weakref.ref(owner)
        self._handles: dict[nn.Module, list[torch.utils.hooks.RemovableHandle]] = {}
        self._norms: dict[nn.Module, list[_NormBase]] = {}
        """The batch norms of each attached module that had a momentum when it was attached."""
        self._here = _Pass()
        self._placed: list[tuple[_Parameters, str, Tensor, int]] = []
        self.placer = ""
        """The key of the module for whose call compiled parts are seen to; empty for none."""
        self._dense: list[tuple[Tensor, Tensor]] | None = None
        self._samples: int | None = None
        self.entered: set[nn.Module] = set()
        """The modules that a training pass has called since the last step."""
        self.displaced = False
        """Whether another engine has taken over an attached module."""

    @property
    def owner(self) -> MaskOwner | None:
        """The engine, if it still lives."""
        return self._owner()

    # -- attached modules --

    def attached(self) -> Iterator[nn.Module]:
        """The attached root modules."""
        return iter(self._handles)

    def attach(self, module: nn.Module) -> None:
        """Shows masked weights to every training forward pass of the module or of a part of it."""
        self.detach(module)
        self.displaced = False
        for other in {masking for masking in attached_maskings(module) if masking is not self}:
            for root in list(other.attached()):
                if other._shares_with(self, module) and other._shares_with(self, root):
                    other.detach(root)
                    other.displaced = True
        handles = self._handles[module] = []
        norms = (part for part in module.modules() if isinstance(part, _NormBase))
        self._norms[module] = [norm for norm in norms if norm.momentum is not None]
        for part in module.modules():
            if isinstance(part, torch.jit.ScriptModule):  # it takes no hooks, and reads its weights from C++
                continue
            params = vars(part)["_parameters"]  # not part._parameters, for which a compiled module asks another one
            if not isinstance(params, _Parameters):
                params = vars(part)["_parameters"] = _Parameters(part, params)
            params.maskings.append(weakref.ref(self))
            handles.append(part.register_forward_pre_hook(_Hook(self, part, Masking._enter), prepend=True))
            handles.append(part.register_forward_hook(_Hook(self, part, Masking._leave), always_call=True))

    def detach(self, module: nn.Module | None = None) -> None:
        """Undoes :meth:`attach` for one module, or for all of them."""
        self._close()
        for root in list(self._handles) if module is None else [module]:
            for handle in self._handles.pop(root, []):
                handle.remove()
            self._norms.pop(root, None)
            kept = {part for other in self._handles for part in other.modules()}
            for part in root.modules():
                params = vars(part)["_parameters"]
                if isinstance(params, _Parameters) and part not in kept:
                    params.maskings = [ref for ref in params.maskings if ref() not in (self, None)]
                    if not params.maskings:
                        vars(part)["_parameters"] = dict(params)

    def _shares_with(self, other: Masking, module: nn.Module) -> bool:
        first, second = self._owner(), other._owner()
        if first is None or second is None:
            return False
        return any(first.owns(p) and second.owns(p) for p in module.parameters())

    # -- passes --

    @property
    def renews(self) -> bool:
        """Whether the statistics of batch norm are being renewed: what does so averages over all batches, which is what
        no momentum stands for."""
        return any(norm.momentum is None for norms in self._norms.values() for norm in norms)

    def is_inside(self, module: nn.Module | None) -> bool:
        """Whether the innermost module call of this thread is that of the module."""
        return self._is_open() and self._here.calls[-1] is module

    def _is_open(self) -> bool:
        """Whether this thread is inside a call of an attached module."""
        here = self._here
        if here.calls and here.frame is not None:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame is not here.frame:
                frame = frame.f_back
            if frame is None:  # the call never came to its end: a KeyboardInterrupt
                self._close()
        return bool(here.calls)

    def _enter(self, module: nn.Module, args: Any, compiled: bool) -> None:
        here = self._here
        is_outermost = not self._is_open()
        if is_outermost:
            here.renews = self.renews
            if (owner := self._owner()) is not None and (torch.is_grad_enabled() or self._samples is not None):
                owner.begin_pass(here.renews)
            here.calls, here.frame = [], _module_call()
        here.calls.append(module)
        is_dense = self._dense is not None or here.renews or not _differentiates()
        if not self.placer and "torch._dynamo" in sys.modules:
            roots = [module] if compiled or _is_optimized(module) else []
            if is_outermost and not roots:
                roots = [part for part in module.modules() if part._compiled_call_impl is not None]
            if roots:
                self.placer = _key(module)
                if not is_dense or (self._samples is not None and self._dense is None):
                    self._place(roots)
        if is_dense or not module.training:
            return
        self.entered.add(module)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None and args:
            # It rescales rows of what it reads, in place. The rows of the parameter have to keep to the norm, too.
            with torch.no_grad():
                weight = dict(module._parameters)["weight"]
                assert weight is not None
                torch.embedding_renorm_(weight.detach(), args[0].contiguous(), module.max_norm, module.norm_type)

    def _leave(self, module: nn.Module, args: Any, compiled: bool) -> None:
        here = self._here
        if module not in here.calls:
            return
        while here.calls.pop() is not module:  # calls inside it that were left by a KeyboardInterrupt
            pass
        written = self._take_out() if self.placer == _key(module) and module not in here.calls else []
        if not here.calls:
            written += [
                param
                for param, read in here.reads.items()
                if read.weight._version != read.version and not any(_rescales(part, param) for part in module.modules())
            ]
            self._close()
        for param in written:
            name = next((name for name, p in module.named_parameters() if p is param), "a weight")
            raise RuntimeError(
                f"the forward pass of {type(module).__name__} has written to {name} in place, which would be lost, "
                "since what it reads is a masked copy: write under torch.no_grad(), or put the parameter in a group "
                "with drop_rate=0"
            )

    def _close(self) -> None:
        """Ends the pass of this thread."""
        here = self._here
        here.calls, here.frame, here.reads, here.samples = [], None, {}, {}
        if self.placer:
            self._take_out()
        for part in here.recurrent:
            part._init_flat_weights()  # it keeps what it has read in a list
        here.recurrent = set()

    def read(self, module: nn.Module, param: Tensor) -> Tensor:
        """What a module gets that looks up one of its parameters."""
        owner, here = self._owner(), self._here
        if owner is None or self._dense is not None or not owner.owns(param) or is_fx_tracing():
            return param
        if not self._is_open():
            # Activation checkpointing runs a function again, which may read a weight without calling a module.
            again = _runs_backward() and torch.is_grad_enabled() and module.training
            mask = owner.read_mask(param) if again else None
            return param if mask is None else MaskedWeight.of(param, _masked(param, mask))
        if self._samples is not None:
            if (made := self._make(module, param)) is None:
                return param
            if isinstance(module, nn.RNNBase):
                here.recurrent.add(module)
            return MaskedWeight.of(param, made)
        stamp = (param.data_ptr(), param._version, torch.is_grad_enabled(), module.training)
        read = here.reads.get(param)
        if read is None or read.stamp != stamp or "_is_exposed" in read.weight.__dict__:
            made = self._make(module, param)
            if made is None:
                return param
            weight = MaskedWeight.of(param, made)
            read = here.reads[param] = _Read(weight, weight._version, stamp)
        if isinstance(module, nn.RNNBase):
            here.recurrent.add(module)
        return read.weight

    def _make(self, module: nn.Module, param: Tensor) -> Tensor | None:
        """What a module that is in a pass sees of a parameter, or ``None`` for the parameter itself."""
        owner, here = self._owner(), self._here
        if owner is not None and self._samples is not None:
            if not here.samples:
                self._samples += 1
            return owner.sample(param, self._samples, here.samples)
        if owner is None or here.renews or not (_differentiates() if module.training else torch.is_grad_enabled()):
            return None
        mask = owner.current_mask(param)
        if mask is None:
            return None
        if not module.training:
            return cast(Tensor, _DenseRead.apply(param, owner.note_dense_read))
        _count_unstepped(mask, param)
        return _masked(param, mask)

    # -- compiled code --

    def _place(self, roots: list[nn.Module]) -> None:
        """Puts what a pass reads into the dicts of some modules and their parts."""
        owner = self._owner()
        if owner is None:
            return
        made: dict[tuple[Tensor, bool], Tensor | None] = {}
        for part in chain.from_iterable(root.modules() for root in roots):
            params = vars(part)["_parameters"]
            if not isinstance(params, _Parameters) or params.placed:
                continue
            for name, param in dict.items(params):
                if param is None or not param.requires_grad or not owner.owns(param):
                    continue
                key = (param, part.training)
                if key not in made:
                    made[key] = self._make(part, param)
                if (weight := made[key]) is not None:
                    params.placed[name], params.mode = param, part.training if self._samples is None else None
                    self._placed.append((params, name, weight, weight._version))
        for params, name, weight, _ in self._placed:
            dict.__setitem__(params, name, weight)

    def _take_out(self) -> list[Tensor]:
        """Puts the parameters back; returns those whose masked weights were written to."""
        self.placer, placed, self._placed = "", self._placed, []
        written: list[Tensor] = []
        for params, name, weight, version in placed:
            param = params.placed.pop(name)
            dict.__setitem__(params, name, param)
            if params.mode and weight._version != version:  # in eval mode it is a view of the parameter
                written.append(param)
        return written

    # -- scopes --

    @contextmanager
    def substitute(self, factors: Mapping[Tensor, Tensor]) -> Generator[None, None, None]:
        """Multiplies the parameters in place for the time of the scope."""
        if self._dense is not None or self._samples is not None:
            raise RuntimeError("masked() and expected() cannot be nested: leave the outer scope first")
        torch.clear_autocast_cache()  # it holds casts of the weights that are about to change
        try:
            with torch.no_grad():
                self._dense = [(param, param.detach().clone()) for param in factors]
                for param, factor in factors.items():
                    param.mul_(factor)
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

    @contextmanager
    def sampled(self) -> Generator[None, None, None]:
        """Lets every forward pass of an attached module, in any mode, see a new mask for the time of the scope."""
        if self._samples is not None or self._dense is not None:
            raise RuntimeError("sampled() cannot be nested in a scope of sampled(), masked() or expected()")
        self._samples = 0
        try:
            yield
        finally:
            self._samples = None


def attached_maskings(module: nn.Module) -> Iterator[Masking]:
    """The maskings that some part of a module is attached to."""
    for part in module.modules():
        if isinstance(params := vars(part)["_parameters"], _Parameters):
            for ref in params.maskings:
                if (masking := ref()) is not None:
                    yield masking


def _masked(param: Tensor, mask: Mask) -> Tensor:
    """The masked weight, as a function of the parameter."""
    mask.is_read = True
    if not torch._C._are_functorch_transforms_active():
        return cast(Tensor, _MaskedRead.apply(param, mask))
    mask.contributed[param] = -1  # a transform has no backward pass that would tell
    masked = param.clone()  # its gradient is the identity
    with torch.no_grad():
        masked.mul_(mask.factor(param).to(param.dtype))
    return masked


def _count_unstepped(mask: Mask, param: Tensor) -> None:
    """Warns where weights go on changing while their mask does not: another optimizer takes the steps."""
    changes = mask.changes.setdefault(param, [param._version, 0])
    if changes[0] != param._version:
        changes[:] = [param._version, changes[1] + 1]
        if changes[1] == _OPENS_BEFORE_WARNING:
            warnings.warn(
                f"the weights have changed {changes[1]} times under one and the same mask, which only step() of the "
                "optimizer that has the masks draws anew: if another optimizer trains them now, call detach()",
                stacklevel=2,
            )


def _rescales(part: nn.Module, param: Tensor) -> bool:
    """Whether a module writes to a parameter in place by itself, and the parameter itself was seen to."""
    return getattr(part, "max_norm", None) is not None and any(p is param for p in part.parameters(recurse=False))


def _differentiates() -> bool:
    """Whether gradients are wanted: they are enabled, or this is the forward function of an autograd.Function, which
    will take them by itself (adjoint solvers, reversible layers, reentrant checkpoints)."""
    if torch.is_grad_enabled():
        return True
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def _runs_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _module_call() -> FrameType | None:
    """The frame of the module call whose hook is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame


def dynamo_is_active() -> bool:
    """Whether frames that are called from here may be compiled."""
    dynamo = sys.modules.get("torch._C._dynamo.eval_frame") if "torch._dynamo" in sys.modules else None
    return dynamo is not None and dynamo.get_eval_frame_callback() not in (None, False)


def not_compiled(function: _Function) -> _Function:
    """Keeps dynamo out of a function, at no price while nothing is compiled."""
    disabled = torch._disable_dynamo(function)  # type: ignore[attr-defined]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or dynamo_is_active():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_Function, call)


def _is_optimized(module: nn.Module) -> bool:
    """Whether a module is what torch.compile has returned."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _key(module: nn.Module) -> str:
    """Names a module in compiled code, where a number might be taken for a size that varies."""
    return hex(id(module))


class _Hook:
    """A forward hook that a copy or a pickle of the module leaves behind: an attachment binds two living objects."""

    def __init__(
        self, masking: Masking, part: nn.Module, action: Callable[[Masking, nn.Module, Any, bool], None]
    ) -> None:
        self.masking = weakref.ref(masking)
        self.part = _key(part)
        self.action = action

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        if torch.compiler._is_exporting_flag:  # is_exporting() is true in all that torch 2.11 compiles
            return
        if torch.compiler.is_compiling():
            masking = self.masking()
            # Masked weights are in place, or the graph breaks here so that they can be put there.
            if masking is not None and masking.placer in ("", self.part):
                self._run_uncompiled(module, args)
        elif not (is_fx_tracing() or torch._C._is_tracing()):
            if dynamo_is_active():
                self._run_uncompiled(module, args)
            elif (masking := self.masking()) is not None:
                self.action(masking, module, args, False)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _run_uncompiled(self, module: nn.Module, args: Any) -> None:
        if (masking := self.masking()) is not None:
            self.action(masking, module, args, True)

    def __reduce__(self) -> Any:
        # A function that does nothing, which every Python can unpickle.
        return getattr, (contextlib.nullcontext(), "__exit__")
