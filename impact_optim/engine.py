"""What happens around the step of a base optimizer: groups, masks of a step, gradients, importances, zeros."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint
from .importances import Simplex
from .kernels import fused
from .masking import Masking, dynamo_is_active, not_compiled
from .masks import Draw, Mask, times
from .options import DEFAULTS, check
from .signals import READS_STEP
from .weights import is_matrix, stacked_vectors


@dataclass
class _Step:
    """What was found before the step of the base, for after it."""

    grads: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """Parameters whose gradient is another during the step, with the dense gradient and that other: the masked one, or
    none if a kernel has stepped."""
    held: dict[Tensor, Tensor] = field(default_factory=dict)
    """Where weights are zero for good."""
    before: dict[Tensor, Tensor] = field(default_factory=dict)
    """The weights, if a signal reads the step."""
    tried: dict[Simplex, dict[Tensor, Tensor]] = field(default_factory=dict)
    """Of ``"lookahead"``: the steps γg that were tried."""
    found: dict[Tensor, Tensor] = field(default_factory=dict)
    """The gradients to which they led."""


class Engine:
    """The part of :class:`impact_optim.Impact` that works by itself, called by hooks of the optimizers and of autograd.

    A step goes from top to bottom: :meth:`_prepare` takes the signal of the dense gradients, moves the importances and
    masks the gradients; the base steps; :meth:`_after_step` restores the gradients, holds the zeros, counts. Where a
    kernel can, it takes the step of the base in :meth:`_prepare`, and the base finds no gradients. :meth:`_prepare` is
    called by a hook, and in the optimizers that are an engine by their ``step``, after the hooks of others."""

    _steps_by_itself = False
    """Whether step() is the engine's own, which calls :meth:`_prepare`, and not that of another optimizer."""

    def _bind(self, optimizers: list[Optimizer]) -> None:
        """Puts the hooks on the optimizers. Of two engines, an optimizer belongs to the last."""
        self.optimizers = optimizers
        self._masking = Masking(self)
        self._simplexes: dict[Optimizer, list[Simplex]] = {each: [] for each in optimizers}
        self._home: dict[Tensor, Simplex] = {}
        self._vectors: set[Tensor] = set()
        self._normalized: set[Tensor] = set()
        self._silenced: set[Tensor] = set()
        self._is_lazy = False
        """Whether the network did not know its sizes at a pass of this step: then the step is dense."""
        self._left: dict[Tensor, tuple[Tensor, int]] = {}
        """Gradients of the last step that were still there when statistics of batch norm began to be renewed."""
        self._steps: dict[Optimizer, _Step] = {}
        self._loading: dict[Optimizer, dict[str, Any]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for each in optimizers:
            if (other := each.__dict__.get("_impact")) is not None and other is not self:
                other._unbind()
            each.__dict__["_impact"] = self
            # Then a GradScaler unscales the gradients, and skips the step if they overflow, before the signal sees
            # them.
            each.__dict__["_step_supports_amp_scaling"] = False
            self._handles += [
                each.register_step_pre_hook(self._before_step),
                each.register_step_post_hook(self._after_step),
                each.register_load_state_dict_pre_hook(self._before_load),
                each.register_load_state_dict_post_hook(self._after_load),
            ]
        self._refresh()

    def _unbind(self) -> None:
        self._masking.detach()
        for handle in self._handles:
            handle.remove()

    # -- groups --

    def _all(self) -> Iterator[Simplex]:
        return chain.from_iterable(self._simplexes.values())

    def masks(self) -> list[Mask]:
        """The masks of this step, as far as they are drawn."""
        return [simplex.mask for simplex in self._all() if simplex.mask is not None]

    @property
    def in_scope(self) -> bool:
        """Whether the parameters hold masked weights now."""
        return self._masking.in_scope

    def _refresh(self) -> None:
        """Takes note of what has changed in the groups since the last step."""
        groups = [(each, group) for each in self.optimizers for group in each.param_groups]
        for _, group in groups:
            check({**DEFAULTS, **group})
        known = [simplex.group for simplex in self._all()]
        if len(known) != len(groups) or not all(map(operator.is_, known, (group for _, group in groups))):
            for simplex in self._all():
                simplex.end_step()
            self._simplexes = {each: [] for each in self.optimizers}
            for number, (each, group) in enumerate(groups):
                for name in DEFAULTS:
                    group.setdefault(name, each.defaults[name])
                self._simplexes[each].append(Simplex(each, group, number, self._is_weight, self._normalized))
        self._is_lazy |= any(nn.parameter.is_lazy(p) for _, group in groups for p in group["params"])
        for simplex in self._all():
            self._vectors.update(stacked_vectors(simplex.group))
            simplex.refresh()
        self._home = {p: simplex for simplex in self._all() for p in simplex.members}
        self._hold_pruned()

    def _is_weight(self, param: Tensor) -> bool:
        return is_matrix(param) and param not in self._vectors

    def _name(self, param: Tensor) -> str:
        """What to call a parameter in an error or in a table."""
        for root in self._masking.attached():
            for name, p in root.named_parameters():
                if p is param:
                    return name
        for each in self.optimizers:
            for g, group in enumerate(each.param_groups):
                for i, p in enumerate(group["params"]):
                    if p is param:
                        return (
                            group["param_names"][i] if "param_names" in group else f"param_groups[{g}]['params'][{i}]"
                        )
        return f"a tensor of shape {tuple(param.shape)}"

    # -- what masking asks for --

    def begin_pass(self, renews: bool) -> None:
        """Takes note of what has changed since the last pass, and of the gradients that one finds which renews the
        statistics of batch norm."""
        _check_not_capturing()
        self._refresh()
        if not renews:
            self._left.clear()
        elif not self._left:
            params = [p for each in self.optimizers for group in each.param_groups for p in group["params"]]
            self._left = {p: (p.grad, p.grad._version) for p in params if p.grad is not None}

    def owns(self, param: Tensor) -> bool:
        """Whether masks may touch a parameter."""
        return param in self._home and not self._is_lazy

    def current_mask(self, param: Tensor) -> Mask | None:
        """The mask of this step, if it holds a factor for the parameter."""
        simplex = self._home.get(param)
        if simplex is None:
            return None
        is_read = simplex.mask is not None and simplex.mask.is_read
        if simplex.group["drop_rate"] == 0 and not is_read:
            return None
        mask = simplex.current_mask()
        return mask if param in mask.draws else None

    def read_mask(self, param: Tensor) -> Mask | None:
        """The mask of this step, if a pass has read it already and it holds a factor for the parameter."""
        simplex = self._home.get(param)
        mask = None if simplex is None else simplex.mask
        return mask if mask is not None and mask.is_read and param in mask.draws else None

    def sample(self, param: Tensor, number: int, drawn: dict[Any, dict[Tensor, Draw]]) -> Tensor | None:
        """A parameter under a mask that no step trains with, ``number`` of its scope."""
        simplex = self._home.get(param)
        if simplex is None or simplex.group["drop_rate"] == 0:
            return None
        if simplex not in drawn:
            drawn[simplex] = simplex.sample(number)
        draw = drawn[simplex].get(param)
        with torch.no_grad():
            return None if draw is None else draw.masked(param)

    def note_dense_read(self, param: Tensor) -> None:
        """Takes note that the gradient of a parameter has come through a pass in eval mode, and may be dense."""
        simplex = self._home.get(param)
        if simplex is None:
            return
        simplex.dense_reads.add(param)
        # If the gradient begins now, a masked part of an earlier one is gone: zero_grad() was called in between.
        contributed = {} if simplex.mask is None else simplex.mask.contributed
        if param.grad is None and contributed.get(param) not in (None, torch._C._current_graph_task_id()):
            del contributed[param]

    # -- before the step --

    @not_compiled
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _check_not_capturing()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._steps_by_itself:
            return None
        if closure is None:
            self._prepare(optimizer, None)
            return None

        def with_gradients() -> Any:
            loss = closure()
            self._prepare(optimizer, closure)
            return loss

        if len(args) > 1:
            return (args[0], with_gradients, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_gradients}

    @not_compiled
    @torch.no_grad()
    def _prepare(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        """From dense gradients to new importances and masked gradients; or to new weights, where a kernel can."""
        self._masking.restore()
        if self._goes_on(optimizer):
            return
        self._refresh()
        if self._finds_what_was_left(optimizer):
            step = self._steps[optimizer] = _Step()
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if (grad := p.grad) is not None:
                    step.grads.append((p, grad, None))
                    p.grad = None
            return
        simplexes = self._simplexes[optimizer]
        for simplex in simplexes:
            self._check_gradients(simplex, closure)
        through_masks = {simplex: self._find_masked(simplex) for simplex in simplexes}
        step = self._steps[optimizer] = _Step()
        if closure is not None:
            self._look_ahead(step, simplexes, closure)
        may_step = self._steps_by_itself and not dynamo_is_active()
        for simplex in simplexes:
            grads = {p: p.grad for p in simplex.members if p.grad is not None and p.grad.layout is torch.strided}
            fused_step = fused.plan(simplex, grads, through_masks[simplex], may_step)
            takes_base_step = fused_step is not None and fused_step.takes_base_step
            importance = simplex.group["importance"]
            if importance in READS_STEP and not (takes_base_step and importance == "hypergradient"):
                step.before.update((p, p.detach().clone()) for p in grads)
            if simplex.group["hold_zeros"] and not takes_base_step:
                step.held.update((p, p.detach() == 0) for p in simplex.members)
            if fused_step is not None:
                changed = fused_step.run()
            else:
                changed = self._step_by_tensors(simplex, grads, through_masks[simplex], step.held)
            step.grads += [(p, grads[p], new) for p, new in changed.items() if new is not grads[p]]
        for p, _, new in step.grads:
            p.grad = new

    def _look_ahead(self, step: _Step, simplexes: list[Simplex], closure: Callable[[], Any]) -> None:
        """What ``"lookahead"`` needs: the gradients of the same batch, under the same masks, at x - w ⊙ γg.

        g is the dense gradient, whatever the step of the base is: a dropped weight has one as well, and it is the step
        that this batch asks for, not one that momentum has gathered. All groups are tried at once."""
        trial: dict[Tensor, Tensor] = {}
        for simplex in (simplex for simplex in simplexes if simplex.group["importance"] == "lookahead"):
            grads = {p: p.grad for p in simplex.members if p.grad is not None and p.grad.layout is torch.strided}
            step.tried[simplex] = {p: simplex.group["lr"] * grad.float() for p, grad in grads.items()}
            importances, sign = simplex.importances(), -1.0 if simplex.group.get("maximize") else 1.0
            trial.update((p, p.detach() - sign * importances[p] * d) for p, d in step.tried[simplex].items())
        if trial:
            params = [p for each in self.optimizers for group in each.param_groups for p in group["params"]]
            step.found = _gradients_at(trial, closure, params)
            self._masking.restore()

    def _finds_what_was_left(self, optimizer: Optimizer) -> bool:
        """Whether the gradients are those of the step before, as where Lightning's weight averaging ends the pass that
        renews batch norm with a step. It would move the averaged weights, along gradients of other ones."""
        if not self._left or not self._masking.renews:
            return False
        masked = [p for group in optimizer.param_groups if group["drop_rate"] > 0 for p in group["params"]]
        grads = {p: p.grad for p in masked if p.grad is not None}
        old = {p: grad for p, (grad, version) in self._left.items() if grad._version == version}
        return bool(grads) and all(old.get(p) is grad for p, grad in grads.items())

    def _goes_on(self, optimizer: Optimizer) -> bool:
        """Whether this step is the rest of one that was broken off, by Ctrl-C or an error of the base, after it had
        been prepared. If it is another one, ends that."""
        broken = self._steps.pop(optimizer, _Step())
        for p, zero in broken.held.items():
            if p.shape == zero.shape:
                p.masked_fill_(zero, 0.0)
        left = [(p, grad, masked) for p, grad, masked in broken.grads if masked is not None]
        if left and all(p.grad is masked and masked._version == 0 for p, _, masked in left):
            broken.grads = [*left]
            self._steps[optimizer] = broken
            return True
        for p, grad, masked in left:
            if p.grad is masked and masked._version == 0:
                p.grad = grad
        return False

    def _step_by_tensors(
        self, simplex: Simplex, grads: dict[Tensor, Tensor], through_masks: set[Tensor], held: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor | None]:
        """Moves the importances, and returns the masked gradients."""
        group, optimizer = simplex.group, simplex.optimizer
        # Before the importances move: a mask may be computed from them.
        factors = {p: simplex.mask.factor(p) for p in grads if p in through_masks} if simplex.mask is not None else {}
        if group["importance"] not in ("uniform", "lookahead"):
            steps = None
            if group["importance"] in READS_STEP:
                states = {p: optimizer.state.get(p, {}) for p in grads}
                steps = {p: state["last_step"] for p, state in states.items() if "last_step" in state}
            simplex.update({p: g.neg() for p, g in grads.items()} if group.get("maximize") else grads, steps)
        changed: dict[Tensor, Tensor | None] = {}
        with torch.set_grad_enabled(bool(group.get("differentiable"))):
            if simplex.works_at_once and factors:
                products = times([grads[p] for p in factors], list(factors.values()))
                masked = dict(zip(factors, products, strict=True))
            else:
                masked = {p: grads[p] * factor.to(grads[p].dtype) for p, factor in factors.items()}
            for p, g in grads.items():
                new = masked.get(p, g)
                changed[p] = new.masked_fill(held[p], 0.0) if p in held else new
        return changed

    def _check_gradients(self, simplex: Simplex, closure: Callable[[], Any] | None) -> None:
        group = simplex.group
        for p in simplex.members:
            if (
                p.grad is not None
                and p.grad.layout is not torch.strided
                and (group["drop_rate"] or group["hold_zeros"])
            ):
                raise RuntimeError(
                    f"the gradient of {self._name(p)} is sparse, and masks need a dense one: build the layer with "
                    "sparse=False, or put the parameter in a group with drop_rate=0"
                )
        for p in group["params"]:
            if group["drop_rate"] and getattr(p, "_is_flat_param", False):
                raise RuntimeError(
                    "a flat parameter of FullyShardedDataParallel holds many weights in one vector, which masks do not "
                    "reach: set drop_rate=0, or train with DistributedDataParallel"
                )
        if group["importance"] == "lookahead" and closure is None and float(group["lr"]) != 0.0:
            raise RuntimeError(
                "importance='lookahead' evaluates the batch of the step again: call step(closure), with a closure that "
                "zeroes the gradients, computes the loss, calls backward() and returns the loss"
            )

    def _find_masked(self, simplex: Simplex) -> set[Tensor]:
        """The members whose gradient has come through a masked read.

        Raises:
            RuntimeError: the gradient of a member that was to be masked has come by a path that the masks do not reach.
        """
        mask, group = simplex.mask, simplex.group
        if mask is None and (group["drop_rate"] == 0 or self._is_lazy):
            return set()
        masked = set() if mask is None else set(mask.contributed)
        others = [p for p in simplex.members if p.grad is not None and p not in masked and p not in simplex.dense_reads]
        if others and group["drop_rate"] > 0 and float(group["lr"]) != 0.0:
            if _ranks() > 1:  # what only other ranks have used
                entered = {p for part in self._masking.entered for p in part.parameters(recurse=False)}
                entered -= set() if mask is None else mask.changes.keys()  # read under the mask, and thrown away
                masked = masked | {p for p in others if p not in entered}
                others = [p for p in others if p in entered]
                if masked and mask is None:
                    simplex.current_mask()
            for p in others:
                if p.grad is not None and bool(p.grad.any()):
                    raise RuntimeError(_unreached(self._name(p), p, self._masking))
        return masked

    # -- after the step --

    @not_compiled
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        step = self._steps.get(optimizer, _Step())
        for p, grad, masked in step.grads:
            if p.grad is masked:
                p.grad = grad
        for p, old in step.before.items():
            optimizer.state[p]["last_step"] = old - p.detach()
        for simplex, steps in step.tried.items():
            simplex.update(step.found, steps)
        for p, zero in step.held.items():
            if p.dtype in (torch.float16, torch.bfloat16):  # few bits: a weight that lives may come to zero by chance
                p.masked_fill_((p == 0) & ~zero, torch.finfo(p.dtype).tiny)
            p.masked_fill_(zero, 0.0)
        for simplex in self._simplexes[optimizer]:
            simplex.store()
            simplex.group["mask_step"] += 1
            simplex.end_step()
        for p, zero in step.held.items():
            for value in optimizer.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    value.masked_fill_(zero, 0.0)
        self._masking.entered.clear()
        self._left.clear()
        self._is_lazy = False
        self._steps.pop(optimizer, None)

    # -- zeros --

    def _hold_pruned(self) -> None:
        """Lets no gradient reach a weight that is zero for good: clipping and logs of norms do not count it."""
        for simplex in self._all():
            if simplex.group["hold_zeros"]:
                for p in simplex.members:
                    if p not in self._silenced:
                        self._silenced.add(p)
                        p.register_hook(_Silence(self, p))

    # -- loading --

    @not_compiled
    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loading[optimizer] = checkpoint.checked(optimizer, state_dict, self._name)
        self._steps.pop(optimizer, None)
        return self._loading[optimizer]

    @not_compiled
    def _after_load(self, optimizer: Optimizer) -> None:
        checkpoint.restore(optimizer, self._loading.pop(optimizer))
        for simplex in self._simplexes[optimizer]:
            simplex.end_step()
        self._refresh()


def _gradients_at(
    weights: dict[Tensor, Tensor], closure: Callable[[], Any], params: list[Tensor]
) -> dict[Tensor, Tensor]:
    """The gradients that a closure finds at other weights; weights and gradients are what they were afterwards."""
    values, grads = [(p, p.detach().clone()) for p in weights], [(p, p.grad) for p in params]
    try:
        for p in params:
            p.grad = None  # not to be zeroed, nor added to
        for p, value in weights.items():
            p.copy_(value)
        with torch.enable_grad():
            closure()
        return {p: p.grad for p in weights if p.grad is not None}
    finally:
        for p, value in values:
            p.copy_(value)
        for p, grad in grads:
            p.grad = grad


def _unreached(name: str, param: Tensor, masking: Masking) -> str:
    """What to say of a gradient that has come by a path that the masks do not reach."""
    if masking.renews:
        return (
            f"drop_rate > 0, but no pass masks {name} while batch norm has no momentum, which stands for renewing its "
            "statistics: set momentum=None before the module is attached, to train like that"
        )
    if any(p is param for root in masking.attached() for p in root.parameters()):
        return (
            f"drop_rate > 0, but the gradient of {name} has come by a path that its masks do not reach: its module was "
            "not called, or its forward pass read the weight elsewhere than from the module's attribute. Call the "
            "module itself (not module.forward), attach() the part that the loop calls, or run forward and backward "
            "inside `with optimizer.masked():`. To train it without masks (or by a penalty alone, in steps that do not "
            "call its module), put it in a group with drop_rate=0"
        )
    if masking.displaced:
        return (
            f"drop_rate > 0, but no forward pass can see the masks of {name}: another optimizer with masks has since "
            "been attached to its module; go on with that one, or attach() again"
        )
    return (
        f"drop_rate > 0, but no forward pass can see the masks of {name}: pass the module to the optimizer, or call "
        "attach(module). (Without a module: forward and backward inside `with optimizer.masked():`. Without masks: "
        "drop_rate=0)"
    )


class _Silence:
    """The gradient hook of a parameter whose zeros are held."""

    def __init__(self, engine: Engine, param: Tensor) -> None:
        self.engine, self.param = weakref.ref(engine), weakref.ref(param)

    def __call__(self, grad: Tensor) -> Tensor:
        engine, param = self.engine(), self.param()
        simplex = engine._home.get(param) if engine is not None and param is not None else None
        if param is None or simplex is None or not simplex.group["hold_zeros"]:
            return grad
        return grad.masked_fill(param.detach() == 0, 0.0)


def _check_not_capturing() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot capture masks, since every replay would see the same ones: train without a graph, or "
            "without masks"
        )


def _ranks() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
