r"""ImpactSGD: stochastic gradient descent that learns an importance for every weight and drops weights by it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache, partial
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, _default_to_fused_or_foreach, _to_scalar, _use_grad_for_differentiable
from torch.optim.sgd import sgd

from .fused import Numbers, Plan, Rows, compiler_works, is_capturing, mask_blocks, mask_pass, step_pass
from .importances import Budget, Simplex
from .layout import blocks, flat_views, flatten, sample, unflatten
from .masking import Factor, Masking
from .sampling import ROUNDING, ROW, bit_blocks, kept_bits, pareto_sample, row_keys, uniform
from .signals import SIGNALS, reads
from .simplex import LOG_BOUND, SAMPLE, fill_target, log_mean_exp, perplexity, water_level
from .sparsity import SparseTensor, SparsityReport, keep_largest, keep_pattern, parse_pattern

__all__ = ["ImpactSGD", "TensorSummary", "impact_sgd"]

_RESCALE_CAP = 10.0  # rescale="inverse" enlarges a kept weight at most ten times as much as uniform masks would
_PAYS_TO_COMPILE = 1_000_000  # weights on simplexes: a step saves 10 ms then, and compiling takes seconds
_FOLLOW = (0.01, 0.3)  # the largest η and the smallest λ with which the water level can follow from step to step

# In float32, or for the first as importance_dtype says, whatever the dtype of the parameter: torch's load_state_dict
# would cast them, and "pruned" too.
_FLOAT32_STATE = ("log_importance", "log_normalizer", "signal_scale", "water_level", "water_error")
_IMPORTANCE_STATE = (*_FLOAT32_STATE, "water_target", "simplex_id")
_KEPT_AS_SAVED = {**dict.fromkeys(_FLOAT32_STATE, torch.float32), "pruned": torch.bool}
_NEEDS_DIRECTION = ("hypergradient", "lookahead")
_SPARSIFY_BY = ("importance", "expected", "magnitude")
_SCALED_AND_SPARSE = (
    "scale_steps and sparsify() exclude each other: importances average to 1 over all weights, so that the steps of "
    "the few that are left would become many times as long. Set group['scale_steps'] = False first"
)
_SPARSIFY_SCOPES = ("global", "tensor")


class TensorSummary(NamedTuple):
    """What :meth:`ImpactSGD.importance_summary` says of one tensor."""

    name: str
    numel: int
    perplexity: float
    """Effective number of weights by importance, from 1 to ``numel``."""
    share_above_1_5: float
    """Share of weights whose importance is above 1.5; the mean over the simplex is 1."""
    max: float
    drop_rate: float
    """Expected share of dropped weights; the simplex as a whole has the group's drop rate."""


class ImpactSGD(Optimizer):
    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        drop_rate: float = 0.1,
        importance: str = "saliency",
        importance_lr: float = 0.01,
        kl_weight: float = 10.0,
        importance_dtype: torch.dtype = torch.float32,
        simplex: str = "group",
        drop: str = "unimportant",
        rescale: str = "inverse",
        keep_floor: float = 0.01,
        sampling: str = "bernoulli",
        scale_steps: bool = False,
        seed: int = 0,
        per_rank_masks: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "drop_rate": drop_rate,
            "importance": importance,
            "importance_lr": importance_lr,
            "kl_weight": kl_weight,
            "importance_dtype": importance_dtype,
            "simplex": simplex,
            "drop": drop,
            "rescale": rescale,
            "keep_floor": keep_floor,
            "sampling": sampling,
            "scale_steps": scale_steps,
            "seed": seed,
            "per_rank_masks": per_rank_masks,
            "step": 0,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        _check_options(defaults)
        module = params if isinstance(params, nn.Module) else None
        self._masking = Masking(self)
        self._new_levels: list[tuple[int, Tensor, float]] = []
        self._prepared: dict[Tensor, Prepared] = {}
        self._rows: dict[Tensor, Rows] = {}
        super().__init__(params if module is None else module.parameters(), defaults)  # type: ignore[arg-type]
        if fused:
            device_types = {p.device.type for p in self._index()}
            if all(compiler_works(device_type, warn=True) for device_type in device_types):
                self._step_supports_amp_scaling = True
            else:
                for options in (self.defaults, *self.param_groups):
                    options["fused"] = False
        if module is not None:
            self.attach(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.setdefault("importance_dtype", torch.float32)  # options that came after the checkpoint
        self.defaults.setdefault("capturable", False)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        if "_masking" not in self.__dict__:  # a copy or an unpickled optimizer is attached to nothing
            self._masking = Masking(self)
        self._masking.end_step()
        self._new_levels = []
        self._prepared = {}
        self._rows = {}

    # ---------------------------------------------------------------- groups

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: an option is out of range, or a parameter is complex.
        """
        if isinstance(param_group, dict):
            for key in param_group.keys() - self.defaults.keys():
                # Other keys are the user's own, as everywhere in torch.optim; one letter off is a slip.
                if close := get_close_matches(key, self.defaults, n=1, cutoff=0.85):
                    raise ValueError(f"{key!r} is no option of a parameter group; did you mean {close[0]!r}?")
            _check_options({**self.defaults, **{k: v for k, v in param_group.items() if k != "params"}})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_complex():
                name = self._name(param)
                self.param_groups.pop()
                raise ValueError(
                    f"ImpactSGD does not support complex parameters: {name} is {param.dtype}. Optimize the real tensor "
                    "torch.view_as_real(param) instead"
                )

    def _index(self) -> dict[Tensor, int]:
        """The parameters, numbered through all groups."""
        return {p: i for i, p in enumerate(chain.from_iterable(group["params"] for group in self.param_groups))}

    def _name(self, param: Tensor) -> str:
        """What to call a parameter in an error or in a table."""
        for group in self.param_groups:
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False):
                if p is param:
                    return name
        for root in self._masking.attached():
            for name, p in root.named_parameters():
                if p is param:
                    return name
        places = ((g, i, p) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"]))
        g, i = next((g, i) for g, i, p in places if p is param)
        return f"param_groups[{g}]['params'][{i}]"

    @staticmethod
    def _simplexes(group: dict[str, Any]) -> list[list[Tensor]]:
        """The members of each simplex of a group: the trained tensors of two or more dimensions."""
        members = [p for p in group["params"] if p.dim() >= 2 and p.numel() > 0 and p.requires_grad]
        if group["simplex"] == "tensor":
            return [[p] for p in members]
        return [members] if members else []

    # ---------------------------------------------------------------- masks

    def attach(self, module: nn.Module) -> None:
        """Shows masked weights to the training forward passes of a module.

        A pass is masked where the module is in train mode and gradients are enabled. The masks stay the same until
        :meth:`step`. The parameters themselves never change: evaluation, ``state_dict()``, copies, weight averages and
        gradient clipping see the dense weights at any time, and ``param.grad`` is the dense gradient at the masked
        weights; what reaches it by another path (a penalty on ``model.parameters()``) is masked by the step as well. A
        weight that is read through an alias made earlier stays dense. Of two ``ImpactSGD`` that share parameters, the
        one attached last masks them. Copies and pickles of an attached module are plain modules.

        Args:
            module: holds parameters of this optimizer. With ``torch.compile`` or ``DistributedDataParallel`` either
                the wrapper or the module inside; under ``fullgraph=True`` the wrapper.

        Raises:
            TypeError: not a module.
            ValueError: none of the module's parameters belongs to this optimizer.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"attach() takes a torch.nn.Module, but got {torch.typename(module)}")
        if self._index().keys().isdisjoint(module.parameters()):
            raise ValueError(
                f"attach() got a {type(module).__name__} none of whose parameters belongs to this optimizer; attach "
                "the module whose parameters it was built with, or add them with add_param_group()"
            )
        self._masking.attach(module)

    def detach(self, module: nn.Module | None = None) -> None:
        """Undoes :meth:`attach` for one module, or for all of them.

        Raises:
            ValueError: the module is not attached.
        """
        if module is not None and module not in self._masking.attached():
            raise ValueError(f"detach() got a {type(module).__name__} that is not attached to this optimizer")
        self._masking.detach(module)

    @contextmanager
    def masked(self) -> Generator[None, None, None]:
        """A scope in which the parameters hold the masked weights, for code that calls no attached module.

        The forward and the backward pass belong inside. The dense weights are back when the scope ends or :meth:`step`
        is called, whichever comes first. Scopes before one step see the same masks.

        Raises:
            RuntimeError: nested, or with ``per_rank_masks``, which needs :meth:`attach`.

        Example:
            >>> with optimizer.masked():
            ...     loss_fn(model(input), target).backward()
            >>> optimizer.step()
        """
        factors = self._masking.factors()
        for param, factor in factors.items():
            if not factor.dense_grad:
                raise RuntimeError(
                    "per_rank_masks needs attach(): in a masked() scope the ranks would average the gradient of "
                    f"{self._name(param)} before it is masked"
                )
        with self._masking.substitute(factors):
            self._masking.seen.update(factors)
            yield

    @contextmanager
    def expected(self) -> Generator[None, None, None]:
        """A scope in which the parameters hold the mean of the masked weights, to evaluate or to save.

        With ``rescale="none"`` that is x ⊙ π. With ``rescale="inverse"`` it is the dense weights, but for those that
        are kept so rarely that their enlargement is capped.

        Raises:
            RuntimeError: nested.
        """
        shares = self._expected_shares(self.param_groups)
        with self._masking.substitute({p: Factor(share, dense_grad=True) for p, share in shares.items()}):
            yield

    @torch.no_grad()
    def _expected_shares(self, groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
        """What the weights of some groups are multiplied with in the mean of their masked versions."""
        shares = {}
        index = self._index()
        for group in groups:
            for members in self._simplexes(group) if group["drop_rate"] > 0 else []:
                budget = self._budget(members, group, index)
                for k, p in enumerate(members):
                    keep = budget.keep_probability(k)
                    if group["rescale"] == "inverse":  # 1, but where the enlargement is capped
                        keep = (keep / _smallest_divisor(group)).clamp_(max=1.0)
                    shares[p] = keep.to(p.dtype)
        return shares

    @torch.no_grad()
    def _draw_factors(self, factors: dict[Tensor, Factor]) -> None:
        """Adds the masks of this step for the parameters that have none yet."""
        index = self._index()
        if (capturing := self._is_captured()) != self._masking.is_captured:
            # A replay has to draw its own masks, and what a capture has drawn is no mask before the first replay.
            factors.clear()
            self._masking.seen.clear()
            self._masking.is_captured = capturing
            self._new_levels = []  # what a capture has solved for is no number yet
        for group in self.param_groups:
            _check_options(group)
            _settle_counter(group)
            if group["drop_rate"] == 0:
                continue
            drawn = [factors[p] for p in group["params"] if p in factors]  # one implementation until the step
            is_fused = drawn[0].weights is not None if drawn else self._is_fused(group)
            place = {"seed": group["seed"], "step": group["step"], "rank": _rank() if group["per_rank_masks"] else 0}
            for members in self._simplexes(group):
                if all(p in factors and self._is_current(p, factors[p]) for p in members):
                    continue
                budget = self._budget(members, group, index)
                if budget.is_new:
                    # Only the step itself changes the state: a save in between resumes with the same masks.
                    level = cast(Tensor, budget.log_level) + budget.normalizer
                    self._new_levels.append((_simplex_id(members, index), level, budget.target))
                if is_fused:
                    for k, p in enumerate(members):
                        if p not in factors or not self._is_current(p, factors[p]):
                            factors[p] = Factor(None, True, self._masked_weights(k, budget, group, index))
                    continue
                exact = []
                if group["sampling"] == "exact":
                    u = [uniform(p.numel(), tensor=index[p], device=p.device, **place) for p in members]
                    exact = _exact_masks(budget, u, members, group["drop_rate"])
                for k, p in enumerate(members):
                    if p in factors:
                        continue
                    draws = bit_blocks(p.numel(), tensor=index[p], device=p.device, **place)
                    value = torch.empty(p.numel(), dtype=p.dtype, device=p.device)
                    for (out,), keep, draw in zip(
                        blocks(value), budget.keep(k), exact[k] if exact else draws, strict=False
                    ):
                        inverse = keep.clamp_min(_smallest_divisor(group)).reciprocal_()
                        kept = draw.to(torch.int32).neg_() if exact else kept_bits(draw, keep)
                        out.copy_(kept.bitwise_and_(inverse.view(torch.int32)).view(torch.float32))
                    factors[p] = Factor(unflatten(value, p), dense_grad=not group["per_rank_masks"])

    def _masked_weights(self, k: int, budget: Budget, group: dict[str, Any], index: dict[Tensor, int]) -> Tensor:
        """The masked weights of a parameter: those that the last fused step has left, or new ones."""
        p = budget.members[k]
        log_w = None if budget.log_w is None else budget.log_w[k]
        stamp = _stamp(p, log_w, budget, group, self._count(group))
        left = self._prepared.get(p)
        if left is not None and left.stamp == stamp and not budget.is_new:
            return left.weights
        if not budget.is_new and "pruned" not in self.state.get(p, {}):  # those change after every pass
            _needs_eager(f"the last step has left no masked weights of {self._name(p)} that are good for this one")
        _check_dense(p, self._name(p))
        if left is not None and left.weights.shape == p.shape and left.weights.dtype == p.dtype:
            weights = left.weights
        else:
            weights = torch.empty_like(p, requires_grad=False)
        divisor = _smallest_divisor(group)
        numbers = Numbers(
            next_level=0.0 if budget.log_level is None else budget.log_level,
            next_keep_offset=budget.offset,
            next_keep_slope=budget.slope,
            next_smallest_divisor=divisor,
        ).pack(torch.promote_types(p.dtype, torch.float32), p.device)
        keys = _keys([p], index, group, group["step"])[0]
        # Every run comes here at its start, and most never again: not worth a compilation, but for a capture to come.
        if not group["capturable"] and group["step"] == 0:
            flat_log_w = None if log_w is None else flatten(log_w, p)
            mask_blocks(flatten(p.detach(), p), flat_log_w, flatten(weights, p), keys, numbers)
        else:
            self._rows_of(p).run(mask_pass, Plan(), numbers, keys, x=p.detach(), log_w=log_w, masked=weights)
            increment_version(weights)
        if group["capturable"] and left is not None and self._is_joined(budget.members, index):
            budget = budget._replace(log_level=_in_place(left.budget.log_level, budget.log_level))
        self._prepared[p] = Prepared(weights, budget, divisor, stamp)
        return weights

    def _is_current(self, param: Tensor, factor: Factor) -> bool:
        """Whether masked weights are still those of the weights, which may have been loaded or changed since."""
        return factor.weights is None or self._prepared[param].stamp[0] == (param.data_ptr(), param._version)

    @staticmethod
    def _is_fused(group: dict[str, Any]) -> bool:
        """Whether a group takes the compiled pass: as it says, or where that pays and works."""
        if group["fused"] is not None:
            return bool(group["fused"])
        if group["foreach"] is not None or any(group[name] == value for name, value in _NOT_FUSED.items()):
            return False
        members = [p for p in group["params"] if p.dim() >= 2 and p.requires_grad]
        return (
            sum(p.numel() for p in members) >= _PAYS_TO_COMPILE
            and not (group["importance"] == "uniform" and group["drop_rate"] == 0)
            and all(flat_views(p.detach()) is not None for p in members)
            # On a GPU the pass is there to be asked for, until it has been measured there.
            and all(p.device.type == "cpu" for p in members)
            and compiler_works("cpu")
        )

    def _rows_of(self, param: Tensor) -> Rows:
        rows = self._rows.get(param)
        if rows is None or not rows.fit(param):
            rows = self._rows[param] = Rows(param)
        return rows

    def _budget(self, members: list[Tensor], group: dict[str, Any], index: dict[Tensor, int]) -> Budget:
        """How the keep probabilities of a simplex follow from its importances. Changes nothing."""
        drop_rate = group["drop_rate"]
        if group["sampling"] == "exact":  # what can be met exactly
            n = sum(p.numel() for p in members)
            drop_rate = round(drop_rate * n) / n
        budget = Budget(members, drop_rate, group["keep_floor"], group["drop"])
        if group["importance"] == "uniform" or not 0.0 < budget.target < 1.0:
            return budget
        log_w, normalizer = self._log_importances(members, index)
        state = self.state.get(members[0], {})
        if state.get("water_target") == budget.target and self._is_joined(members, index):
            return budget._replace(log_w=log_w, log_level=state["water_level"] - normalizer, normalizer=normalizer)
        level = water_level([flatten(t, p) for t, p in zip(log_w, members, strict=True)], budget.target)
        return budget._replace(log_w=log_w, log_level=level, normalizer=normalizer, is_new=True)

    def _log_importances(self, members: list[Tensor], index: dict[Tensor, int]) -> tuple[list[Tensor], Tensor]:
        """log w of the members and the normaliser to subtract, on the simplex that they are or would be joined on."""
        if self._is_joined(members, index):
            return [self.state[p]["log_importance"] for p in members], self.state[members[0]]["log_normalizer"]
        log_w = []
        for p in members:
            state = self.state.get(p, {})
            if "log_importance" in state:
                log_w.append(state["log_importance"].float() - state["log_normalizer"].to(p.device))
            else:
                log_w.append(torch.zeros_like(p, dtype=torch.float32, requires_grad=False))
        return log_w, log_mean_exp(log_w)

    def _is_joined(self, members: list[Tensor], index: dict[Tensor, int]) -> bool:
        simplex_id = _simplex_id(members, index)
        return all(self.state.get(p, {}).get("simplex_id") == simplex_id for p in members)

    def _join(self, members: list[Tensor], index: dict[Tensor, int], dtype: torch.dtype) -> None:
        """Puts the members on one simplex. Its scalars are one tensor each in the state of all members.

        Most often they are on it already. A new simplex starts at importance 1; one that a parameter joins (unfrozen),
        leaves (frozen) or shrinks in (pruned) keeps the ratios of what it knows and is normalised anew.
        """
        if self._is_joined(members, index):
            for p in members:
                if self.state[p]["log_importance"].dtype != dtype:  # the option has changed
                    _needs_eager(f"the log-importances of {self._name(p)} are not stored in {dtype} yet")
                    self.state[p]["log_importance"] = self.state[p]["log_importance"].to(dtype)
            return
        _needs_eager(f"the simplex of {self._name(members[0])} is a new one")
        log_w, normalizer = self._log_importances(members, index)
        scalar = torch.zeros((), dtype=torch.float32, device=members[0].device)
        scale = next((s["signal_scale"] for p in members if "signal_scale" in (s := self.state.get(p, {}))), scalar)
        scale, level, error = scale.clone(), scalar.clone(), scalar  # each may be written in place
        for p, t in zip(members, log_w, strict=True):
            self.state[p].update(
                log_importance=t.to(dtype),
                log_normalizer=normalizer,
                signal_scale=scale,
                water_level=level,
                water_error=error,
                water_target=0.0,  # no level is known
                simplex_id=_simplex_id(members, index),
            )

    # ---------------------------------------------------------------- step

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs a single optimization step.

        A gradient that is not finite does to the weights what it does under :class:`torch.optim.SGD`; to the
        importances it is no signal.

        Args:
            closure: computes fresh gradients and returns the loss. Required by ``importance="lookahead"``, which
                calls it once more after the weights have moved.

        Raises:
            RuntimeError: masks are wanted and no forward pass has seen them, a gradient is sparse, ``lookahead`` has no
                closure, or a CUDA graph is being captured that would not replay what an eager step does. Nothing has
                changed then.
            ValueError: an option of a group is out of range.
        """
        for group in self.param_groups:
            _check_options(group)
            if group["importance"] == "lookahead" and closure is None:
                raise RuntimeError('importance="lookahead" evaluates the loss a second time: call step(closure)')
        capturing = self._is_captured()
        for group in self.param_groups:
            _settle_counter(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        if self._masking.seen and capturing != self._masking.is_captured:
            which = "step()" if capturing else "the forward pass that has seen the masks"
            raise RuntimeError(
                f"ImpactSGD: {which} has been captured in a CUDA graph without the other, and would replay one mask "
                "for ever: capture forward, backward and step() in one graph"
            )
        self._masking.restore()

        judged: list[tuple[dict[str, Any], list[Tensor], list[Tensor | None], list[Simplex]]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            direction = "momentum_buffer" if group["momentum"] != 0 else "direction"
            directions = [self.state.get(p, {}).get(direction) for p in params]
            seen = [self._masking.seen.get(p) for p in params]
            # What the forward pass has shown decides: options and what is frozen may have changed since.
            shown = [factor for factor in seen if factor is not None]
            is_fused = shown[0].weights is not None if shown else self._is_fused(group)
            if is_fused:
                self._lay_out(params)
                directions = [self.state.get(p, {}).get(direction) for p in params]
            simplexes = self._load_simplexes(group, params)
            options = {name: group[name] for name in _STEP_OPTIONS}
            if is_fused:
                masks = [None if factor is None else self._prepared[p] for p, factor in zip(params, seen, strict=True)]
                drawn = _fused_impactsgd(
                    params,
                    [p.grad for p in params],
                    directions,
                    masks,
                    simplexes,
                    rows=[self._rows_of(p) for p in params],
                    next_masks=partial(_next_masks, group=group, index=self._index()),
                    rounding_keys=partial(_keys, index=self._index(), group=group, step=group["step"], rank=ROUNDING),
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=getattr(self, "found_inf", None),
                    **options,
                )
                for i, (budget, log_w) in drawn.items():
                    stamp = _stamp(params[i], log_w, budget, group, self._count(group) + 1)
                    mask = cast(Prepared, masks[i])
                    self._prepared[params[i]] = mask._replace(
                        budget=budget, smallest_divisor=_smallest_divisor(group), stamp=stamp
                    )
            else:
                impact_sgd(
                    params,
                    [p.grad for p in params],
                    directions,
                    [factor.value if factor is not None and factor.dense_grad else None for factor in seen],
                    simplexes,
                    foreach=group["foreach"],
                    differentiable=group["differentiable"],
                    **options,
                )
            for p, d in zip(params, directions, strict=True):
                if d is not None:
                    if self.state[p].get(direction) is not d:
                        _needs_eager(f"{self._name(p)} has no {direction} yet")
                    self.state[p][direction] = d
            if group["importance"] == "lookahead":
                judged.append((group, params, directions, simplexes))
            else:
                self._store_simplexes(simplexes, group)

        if judged:
            self._hold_pruned()  # the network that is judged is the sparse one
            with torch.enable_grad():
                closure()  # type: ignore[misc]
            self._check_gradients()
            self._masking.restore()
            for group, params, directions, simplexes in judged:
                for simplex in simplexes:
                    for k, at in enumerate(simplex.positions):
                        if at is not None and (grad := params[at].grad) is not None:
                            grad = -grad if group["maximize"] else grad
                            h = _signal(group["importance"], params[at], grad, directions[at], _to_scalar(group["lr"]))
                            simplex.descend(
                                k, h, simplex.log_importances[k], group["importance_lr"], group["kl_weight"]
                            )
                    simplex.finish()
                self._store_simplexes(simplexes, group)

        self._hold_pruned()
        self._new_levels = []
        for group in self.param_groups:
            group["step"] += 1
            if group["drop_rate"] == 0:  # the importances move on without the level
                for p in group["params"]:
                    if "water_target" in self.state.get(p, {}):
                        self.state[p]["water_target"] = 0.0
        self._masking.end_step()
        return loss

    def _count(self, group: dict[str, Any]) -> int:
        """The steps of a group, or where they are counted on a device, those that the host has seen."""
        return group["step"] if type(group["step"]) is int else self._masking.step

    def _is_captured(self) -> bool:
        """Whether a CUDA graph is being captured; raises where the options do not allow that."""
        capturing = is_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "ImpactSGD is being captured in a CUDA graph, which would replay one mask for ever: build it with "
                "capturable=True, or set group['capturable'] = True in all its groups, and take some steps before"
            )
        return capturing

    def _lay_out(self, params: list[Tensor]) -> None:
        """Gives the state of each parameter its layout in memory: one that was loaded may have another."""
        for p in params:
            state = self.state.get(p, {})
            for name in ("momentum_buffer", "direction", "log_importance"):
                if name in state and state[name].stride() != p.stride():
                    _needs_eager(f"{name} of {self._name(p)} is laid out otherwise")
                    state[name] = torch.empty_like(p, dtype=state[name].dtype, requires_grad=False).copy_(state[name])

    def _check_gradients(self) -> None:
        unseen = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"ImpactSGD does not support sparse gradients: that of {self._name(p)} is sparse. Build the "
                        "embedding with sparse=False, or give it to torch.optim.SGD or SparseAdam"
                    )
                if group["scale_steps"] and "pruned" in self.state.get(p, {}):
                    raise RuntimeError(_SCALED_AND_SPARSE)
                if group["fused"] and not p.is_contiguous():
                    _check_dense(p, self._name(p))
                is_masked = group["drop_rate"] > 0 and p.dim() >= 2 and p.numel() > 0 and p.requires_grad
                if is_masked and p not in self._masking.seen:
                    unseen.append(p)
        if not unseen:
            return
        attached = {p for module in self._masking.attached() for p in module.parameters()}
        for p in unseen:
            if p not in attached:
                remedy = (
                    "another ImpactSGD has since been attached to its module; go on with that one, or attach() again"
                    if self._masking.displaced
                    else "write ImpactSGD(model, ...) or call optimizer.attach(model). (Without a module: forward and "
                    "backward inside `with optimizer.masked():`. Without masks: drop_rate=0)"
                )
                raise RuntimeError(f"drop_rate > 0, but no forward pass can see the masks of {self._name(p)}: {remedy}")
        if not self._masking.seen:
            raise RuntimeError(
                f"drop_rate > 0, but no forward pass has seen the masks of {self._name(unseen[0])} since the last "
                "step: put the attached module in train mode, enable gradients, and call it or a part of it; for "
                "steps without masks set drop_rate=0"
            )

    def _load_simplexes(self, group: dict[str, Any], params: list[Tensor]) -> list[Simplex]:
        if group["importance"] == "uniform":
            return []
        position = {p: i for i, p in enumerate(params)}
        index = self._index()
        simplexes = []
        for members in self._simplexes(group):
            if not any(p in position for p in members):
                continue
            self._join(members, index, group["importance_dtype"])
            state = self.state[members[0]]
            positions = [position.get(p) for p in members]
            simplex = Simplex(
                members,
                positions,
                [self.state[p]["log_importance"] for p in members],
                state["log_normalizer"],
                state["signal_scale"],
            )
            if group["importance_dtype"] == torch.bfloat16:
                # On every rank the same: the importances are.
                place = {"seed": group["seed"], "step": group["step"], "rank": ROUNDING}
                simplex.rounding = [bit_blocks(p.numel(), tensor=index[p], device=p.device, **place) for p in members]
            target = fill_target(group["drop_rate"], group["keep_floor"], group["drop"])
            new = {simplex_id: (level, solved_for) for simplex_id, level, solved_for in self._new_levels}
            level, solved_for = new.get(_simplex_id(members, index), (None, state["water_target"]))
            follows = solved_for == target and None not in positions and _can_follow(simplex, group)
            if (target if follows else 0.0) != state["water_target"]:
                _needs_eager(f"the water level of the simplex of {self._name(members[0])} is not followed as before")
            if level is not None:
                error = torch.zeros_like(level)
                self._share(members, group, water_level=level, water_error=error, water_target=solved_for)
            if follows:
                simplex.water_level, simplex.water_error = state["water_level"], state["water_error"]
                simplex.water_target = target
            simplexes.append(simplex)
        return simplexes

    def _store_simplexes(self, simplexes: list[Simplex], group: dict[str, Any]) -> None:
        for simplex in simplexes:
            values: dict[str, Any] = {"log_normalizer": simplex.log_normalizer, "signal_scale": simplex.signal_scale}
            if simplex.has_moved:
                values["water_target"] = simplex.water_target
            if simplex.water_target:
                values.update(water_level=simplex.water_level, water_error=simplex.water_error)
            self._share(simplex.members, group, **values)

    def _share(self, members: list[Tensor], group: dict[str, Any], **values: Any) -> None:
        """Puts numbers of a simplex into the state of its members."""
        if group["capturable"]:  # where a graph will look for them
            own = self.state[members[0]]
            values = {name: _in_place(own[name], v) if isinstance(v, Tensor) else v for name, v in values.items()}
        for p in members:
            self.state[p].update(values)

    # ---------------------------------------------------------------- sparse for good

    @torch.no_grad()
    def sparsify(
        self,
        sparsity: float | str,
        *,
        by: str = "importance",
        scope: str = "global",
        params: Iterable[Tensor] | None = None,
    ) -> SparsityReport:
        r"""Keeps the weights that matter most and makes the others zero for good.

        They stay zero under momentum and weight decay, in a checkpoint made from here on, and in cuts of an
        ``ActivationPruner``; every step sees to it. Nothing is dropped any more: the ``drop_rate`` of the groups is set
        to 0, so that training can go on with what is left, and dense is what one evaluates. (With a drop rate set anew,
        what is pruned counts as dropped and goes first.) The weights of these groups become those of :meth:`expected`,
        with ``rescale="none"`` x ⊙ π. Call it between two steps; masks that a forward pass has seen are forgotten. A
        second call keeps what is pruned.

        Args:
            sparsity: the share of weights that are zero afterwards, in [0, 1); or a pattern such as ``"2:4"``, which
                keeps 2 of every 4 neighbours along dimension 1 and leaves tensors dense that it does not divide.
            by: what decides: ``"importance"`` w, ``"expected"`` \|x\|·π, or ``"magnitude"`` \|x\|.
            scope: ``"global"``, the share is of all tensors together, or ``"tensor"``, of each.
            params: the tensors to make sparse; by default all that masks touch.

        Returns:
            What is left of each tensor, with its mask; prints as a table.

        Raises:
            ValueError: an argument is out of range, a tensor has no importances, nothing would be left of one, or steps
                are scaled by importances, which would grow where few weights are left. Nothing has changed then.
            TypeError: something in ``params`` is no tensor.
            RuntimeError: inside a scope of :meth:`masked` or :meth:`expected`.
        """
        if self._masking.in_scope:
            raise RuntimeError("sparsify() changes the dense weights: leave the scope of masked() or expected() first")
        for name, value, choices in (("by", by, _SPARSIFY_BY), ("scope", scope, _SPARSIFY_SCOPES)):
            if value not in choices:
                raise ValueError(f"Invalid {name}: {value!r}; choose from {list(choices)}")
        if not isinstance(sparsity, str) and not (_is_number(sparsity) and 0.0 <= sparsity < 1.0):
            raise ValueError(f"Invalid sparsity: {sparsity}; it must lie in [0, 1), or be a pattern such as '2:4'")
        pattern = parse_pattern(sparsity) if isinstance(sparsity, str) else None
        chosen = None if params is None else set(params)
        for p in chosen or ():
            if not self._find(p)[1]:
                raise ValueError(f"{self._name(p)} is never masked, and cannot be made sparse: leave it out of params")

        index = self._index()
        scores: dict[Tensor, Tensor] = {}
        groups = []
        learnt = []
        for group in self.param_groups:
            simplexes = [m for m in self._simplexes(group) if chosen is None or not chosen.isdisjoint(m)]
            if not simplexes:
                continue
            if group["scale_steps"]:
                raise ValueError(_SCALED_AND_SPARSE)
            groups.append(group)
            for members in simplexes:
                if any("log_importance" in self.state.get(p, {}) for p in members):
                    learnt.append((members, group["importance_dtype"]))
                elif by == "importance":
                    why = "with" if group["importance"] == "uniform" else "before the first step, with"
                    raise ValueError(
                        f"{self._name(members[0])} has no importances {why} importance={group['importance']!r}; choose "
                        "by='magnitude'"
                    )
                for p, score in zip(members, self._scores(members, group, by, index), strict=True):
                    if chosen is None or p in chosen:
                        pruned = self.state.get(p, {}).get("pruned")
                        scores[p] = score if pruned is None else score.masked_fill(pruned, -math.inf)
        masks = self._kept(scores, sparsity if pattern is None else pattern, scope)

        for members, dtype in learnt:
            self._join(members, index, dtype)  # they may have been cut, frozen or added since the last step
        # Of what is not chosen, too: nothing of these groups is dropped any more.
        for p, share in self._expected_shares(groups).items():
            p.mul_(share)
        for p, mask in masks.items():
            self.state[p]["pruned"] = ~mask
        self._hold_pruned()
        for members, _ in learnt:
            normalizer = log_mean_exp([self.state[p]["log_importance"] for p in members])
            for p in members:
                self.state[p].update(log_normalizer=normalizer, water_target=0.0)
        for group in groups:
            group["drop_rate"] = 0.0
        self._new_levels = []
        self._masking.end_step()
        return SparsityReport([SparseTensor(self._name(p), mask, int(mask.sum())) for p, mask in masks.items()])

    def _scores(self, members: list[Tensor], group: dict[str, Any], by: str, index: dict[Tensor, int]) -> list[Tensor]:
        """What decides whether the weights of a simplex are kept."""
        if by == "importance":
            return self._importances(members, index)
        sizes = [p.detach().float().abs() for p in members]
        if by == "magnitude" or group["drop_rate"] == 0:
            return sizes
        budget = self._budget(members, group, index)
        return [size.mul_(budget.keep_probability(k)) for k, size in enumerate(sizes)]

    def _kept(
        self, scores: dict[Tensor, Tensor], sparsity: float | str | tuple[int, int], scope: str
    ) -> dict[Tensor, Tensor]:
        """The masks of the weights to be kept; checks that they fit what is pruned already."""
        if not scores:
            raise ValueError("there is nothing to make sparse: masks touch trained tensors of two or more dimensions")
        if isinstance(sparsity, tuple):
            found = {p: keep_pattern(score, *sparsity) for p, score in scores.items()}
            masks = {p: mask for p, mask in found.items() if mask is not None}
            if not masks:
                raise ValueError(
                    f"dimension 1 of none of the tensors can be divided by {sparsity[1]}: sparsify by a share instead"
                )
        else:
            share = 1.0 - float(sparsity)
            if scope == "tensor":
                masks = {p: keep_largest([score], round(share * score.numel()))[0] for p, score in scores.items()}
            else:
                count = round(share * sum(score.numel() for score in scores.values()))
                masks = dict(zip(scores, keep_largest(list(scores.values()), count), strict=True))
        for p, mask in masks.items():
            revived = mask & scores[p].isneginf()
            if not isinstance(sparsity, tuple) and revived.any():
                raise ValueError(
                    f"{self._name(p)} has more weights that are pruned already than sparsity={sparsity} leaves out; "
                    "pruned weights do not come back"
                )
            mask &= ~revived
            if not mask.any():
                raise ValueError(
                    f"sparsity={sparsity} would leave nothing of {self._name(p)}, and the network dead: lower it, "
                    "choose scope='tensor', or leave the tensor out of params"
                )
        return masks

    def _hold_pruned(self) -> None:
        """Pruned weights and their momentum are zero, and their importances next to nothing."""
        for p, state in self.state.items():
            if "pruned" in state:
                p.masked_fill_(state["pruned"], 0.0)
                for name, value in (("momentum_buffer", 0.0), ("direction", 0.0), ("log_importance", -LOG_BOUND)):
                    if name in state:
                        state[name].masked_fill_(state["pruned"], value)

    # ---------------------------------------------------------------- read-outs

    @torch.no_grad()
    def importance(self, param: Tensor) -> Tensor:
        """The importances w of a parameter: its shape, float32, mean 1 over the simplex it belongs to.

        They are 1 for what is never masked, such as a bias.

        Raises:
            TypeError, ValueError: not a parameter of this optimizer.
        """
        _, members = self._find(param)
        for p, w in zip(members, self._importances(members, self._index()), strict=True):
            if p is param:
                return w
        if "log_importance" not in (state := self.state.get(param, {})):  # a bias, or never trained
            return torch.ones_like(param, dtype=torch.float32)
        return (state["log_importance"].float() - state["log_normalizer"].to(param.device)).exp_()  # frozen

    @torch.no_grad()
    def keep_probability(self, param: Tensor) -> Tensor:
        """The probability π of each weight of a parameter to be kept by the next mask: its shape, float32.

        Raises:
            TypeError, ValueError: not a parameter of this optimizer.
        """
        group, members = self._find(param)
        if members and group["drop_rate"] > 0:
            budget = self._budget(members, group, self._index())
            return budget.keep_probability(next(k for k, p in enumerate(members) if p is param))
        return torch.ones_like(param, dtype=torch.float32)

    @torch.no_grad()
    def importance_summary(self) -> list[TensorSummary]:
        """What the importances of each maskable tensor look like, in the order of the parameters."""
        rows = []
        index = self._index()
        for group in self.param_groups:
            for members in self._simplexes(group):
                budget = self._budget(members, group, index) if group["drop_rate"] > 0 else None
                for k, (p, w) in enumerate(zip(members, self._importances(members, index), strict=True)):
                    keep = torch.ones(()) if budget is None else budget.keep_probability(k)
                    rows.append(
                        TensorSummary(
                            name=self._name(p),
                            numel=p.numel(),
                            perplexity=perplexity([w.log()]).item(),
                            share_above_1_5=(w > 1.5).float().mean().item(),
                            max=w.max().item(),
                            drop_rate=1.0 - keep.double().mean().item(),
                        )
                    )
        return rows

    def _importances(self, members: list[Tensor], index: dict[Tensor, int]) -> list[Tensor]:
        if not members:
            return []
        log_w, normalizer = self._log_importances(members, index)
        return [(t.float() - normalizer.to(t.device)).exp_() for t in log_w]

    def _find(self, param: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
        """The group of a parameter, and the members of its simplex if it is on one."""
        if not isinstance(param, Tensor):
            raise TypeError(f"pass the parameter itself, such as model.fc.weight, not {param!r}")
        for group in self.param_groups:
            if any(param is p for p in group["params"]):
                simplexes = self._simplexes(group)
                return group, next((members for members in simplexes if any(param is p for p in members)), [])
        raise ValueError(
            f"a tensor of shape {tuple(param.shape)} is no parameter of this optimizer: pass the parameter itself"
        )

    # ---------------------------------------------------------------- state dict

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state, as :meth:`torch.optim.Optimizer.load_state_dict`.

        A state dict of :class:`torch.optim.SGD`, or of an older version, loads too: what it lacks starts afresh.

        Raises:
            TypeError, ValueError: it does not fit. Nothing has changed then.
        """
        loaded: dict[str, Any] = {}

        def check(optimizer: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            self._check_state_dict(final)
            loaded.update(final, param_groups=self._completed(final["param_groups"]))
            return loaded

        handle = self.register_load_state_dict_pre_hook(check)  # the last one: it sees what the user's hooks made of it
        restore = self.register_load_state_dict_post_hook(
            lambda optimizer: self._restore_dtypes(loaded),
            prepend=True,  # before the user's hooks look
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            restore.remove()

    def _restore_dtypes(self, loaded: dict[str, Any]) -> None:
        for group, own in zip(loaded["param_groups"], self.param_groups, strict=True):
            dtypes = {**_KEPT_AS_SAVED, "log_importance": own["importance_dtype"]}
            for key, param in zip(group["params"], own["params"], strict=True):
                for name, dtype in dtypes.items():
                    if name in loaded["state"].get(key, {}):
                        value = loaded["state"][key][name]
                        self.state[param][name] = value.to(param.device, dtype, copy=True)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key, kind in (("state", dict), ("param_groups", list)):
            if not isinstance(state_dict.get(key), kind):
                raise TypeError(
                    f"state_dict[{key!r}] must be a {kind.__name__}, but is {type(state_dict.get(key)).__name__}; "
                    "pass what ImpactSGD.state_dict() returned"
                )
        groups = state_dict["param_groups"]
        ours = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) if isinstance(group, dict) and "params" in group else None for group in groups]
        if ours != theirs:
            raise ValueError(
                f"the state dict has parameter groups of sizes {theirs}, the optimizer of sizes {ours}; build the "
                "optimizer with the groups it was saved with"
            )
        for own, group in zip(self.param_groups, self._completed(groups), strict=True):
            _check_options(group)
            for param, key in zip(own["params"], group["params"], strict=True):
                self._check_param_state(self._name(param), param, state_dict["state"].get(key, {}))

    def _completed(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Loaded groups, where an option that one lacks is that of the group it is loaded into."""
        kept = [{name: own[name] for name in self.defaults} for own in self.param_groups]
        return [{**own, "step": 0, **group} for own, group in zip(kept, groups, strict=True)]

    def _check_param_state(self, name: str, param: Tensor, state: Any) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"the state of {name} must be a dict, but is {type(state).__name__}")
        missing = [key for key in _IMPORTANCE_STATE if key not in state]
        if "log_importance" in state and missing:
            raise ValueError(f"the state of {name} lacks {missing}: it was not saved by ImpactSGD.state_dict()")
        shapes = dict.fromkeys(("momentum_buffer", "direction", "log_importance"), param.shape)
        shapes.update((key, torch.Size()) for key in _FLOAT32_STATE[1:])
        for key, shape in shapes.items():
            value = state.get(key)
            if value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"{key} of {name} must be a floating point tensor, but is {_describe(value)}")
            if value.shape != shape:
                raise ValueError(
                    f"{key} of {name} has shape {tuple(value.shape)}, but the optimizer needs {tuple(shape)}; load the "
                    "state of the same model"
                )
            if key in _FLOAT32_STATE and not torch.isfinite(value).all():
                raise ValueError(f"{key} of {name} is not finite; the state dict is damaged")
        if (pruned := state.get("pruned")) is not None:
            if not isinstance(pruned, Tensor) or pruned.dtype != torch.bool:
                raise TypeError(f"pruned of {name} must be a bool tensor, but is {_describe(pruned)}")
            if pruned.shape != param.shape:
                raise ValueError(
                    f"pruned of {name} has shape {tuple(pruned.shape)}, but the optimizer needs {tuple(param.shape)}; "
                    "load the state of the same model"
                )
        for key, kind in (("water_target", float), ("simplex_id", int)):
            if key in state and not isinstance(state[key], kind):
                raise TypeError(f"{key} of {name} must be of type {kind.__name__}, but is {_describe(state[key])}")


ImpactSGD.__doc__ = r"""Implements SGD with learnt importances and importance-driven DropConnect.

    Every weight x of the tensors of two or more dimensions has an importance w. The importances of a simplex of n
    weights are non-negative with :math:`\sum w = n`, start at 1, and follow the problem

    .. math::
        \min_w \; L(f(x - w \odot \gamma d)) + \lambda \, \mathrm{KL}(w / n \,\|\, \text{uniform})

    by mirror descent. One step, with g the gradient at the weights :math:`x \odot m / \pi` that the forward pass saw:

    .. math::
        \begin{aligned}
             &h \leftarrow \textit{importance}(x, g, d, \gamma), \qquad
              u \leftarrow \mathrm{clip}(h / \overline{|h|}, \pm 10)                                      \\
             &d \leftarrow \mu d + (1 - \tau) (g \odot m / \pi + \beta x), \qquad
              x \leftarrow x - \gamma d \quad (\gamma w \odot d \text{ with } \textit{scale\_steps})      \\
             &\log w \leftarrow (\log w - \eta u) / (1 + \eta \lambda) + \mathrm{const}                   \\
             &\pi \leftarrow f + (1 - f) \min(1, c w), \quad c : \mathrm{mean}(\pi) = 1 - \textit{drop\_rate},
              \qquad m \sim \mathrm{Bernoulli}(\pi)
        \end{aligned}

    where :math:`\overline{|h|}` is the running mean over the simplex, so that η and λ carry over between layers, models
    and learning rates. With ``drop_rate=0`` and ``scale_steps=False`` the trajectory is that of
    :class:`torch.optim.SGD`, bit for bit. Tensors of fewer dimensions take the plain SGD step.

    Args:
        params (Module or iterable): a module, which is attached at once (:meth:`attach`); or, as everywhere in
            torch.optim, an iterable of parameters, of named parameters, or of dicts that define parameter groups. All
            options can be given per group.
        lr (float, Tensor, optional): learning rate γ (default: 1e-3)
        momentum (float, optional): momentum factor μ (default: 0)
        dampening (float, optional): dampening τ for momentum (default: 0)
        weight_decay (float, optional): weight decay β (L2 penalty), of the dense weights (default: 0)
        nesterov (bool, optional): enables Nesterov momentum (default: False)
        drop_rate (float, optional): expected share of the weights of a simplex that a mask drops, in [0, 1); with one
            simplex for the group, some tensors lose more than others (default: 0.1)
        importance (str, optional): the signal h, a name in :data:`impact_optim.SIGNALS`, or ``"uniform"`` for classic
            DropConnect, which keeps no importances (default: ``"saliency"``)
        importance_lr (float, optional): η, step size of the mirror descent (default: 0.01)
        kl_weight (float, optional): λ, the temperature: a constant u leads to w ∝ exp(-u/λ); 0 lets one weight take
            everything (default: 10)
        importance_dtype (torch.dtype, optional): in which the log-importances are stored. ``torch.bfloat16`` takes 2
            bytes a weight instead of 4, and is rounded up or down at random so that the mean is right: at every step by
            up to 0.4% (of log w), which the KL term forgets at the rate ηλ. Without it, and where a tensor has no
            gradient, it adds up as a random walk (default: torch.float32)
        simplex (str, optional): ``"group"``, one simplex over a parameter group, or ``"tensor"``, one per tensor
            (default: ``"group"``)
        drop (str, optional): what is dropped first, ``"unimportant"`` or ``"important"`` (default: ``"unimportant"``)
        rescale (str, optional): ``"inverse"`` divides kept weights by π, so that the dense weights are what one
            evaluates (by ``(1 - drop_rate) / 10`` where π is smaller still); ``"none"`` leaves them, and
            :meth:`expected` gives what to evaluate (default: ``"inverse"``)
        keep_floor (float, optional): f, the smallest keep probability, at most ``1 - drop_rate`` (default: 0.01)
        sampling (str, optional): ``"bernoulli"``, or ``"exact"`` for masks that drop exactly ``round(drop_rate * n)``
            weights (default: ``"bernoulli"``)
        scale_steps (bool, optional): scales each weight's step by its importance (default: False)
        seed (int, optional): of the masks. Every data-parallel rank needs the same; the members of an ensemble want
            different ones (default: 0)
        per_rank_masks (bool, optional): draws other masks on every rank of ``torch.distributed``. The gradients are
            then masked before the ranks average them, and the importances see no gradient of a dropped weight. By
            default the ranks share their masks (default: False)
        foreach (bool, optional): whether the foreach implementation is used; by default on CUDA (default: None)
        maximize (bool, optional): maximizes the objective (default: False)
        capturable (bool, optional): whether a CUDA graph may capture a training step: forward pass, backward pass and
            :meth:`step` in one graph (:func:`torch.cuda.graph`), after a few eager steps of the same kind. Every replay
            then draws masks of its own and moves all state as an eager step would; the step counter of a group is a
            tensor on its device. Options are those of the capture for good, drop and learning rates included, whatever
            a scheduler sets; but a tensor ``lr`` on the device may change in place. Capture anew after
            ``load_state_dict`` and ``sparsify``, and when groups or what is trained change. A ``GradScaler`` needs
            ``fused`` in a capture, and with ``fused`` the first replay after weights were changed by hand still sees
            those of before. Passing True can impair ungraphed performance, so leave it False if no graph is to capture
            this instance (default: False)
        differentiable (bool, optional): whether autograd occurs through the step in training (default: False)
        fused (bool, optional): whether the step is one compiled pass over memory. It needs :func:`torch.compile` and
            some seconds at the first step. By default it is where that pays and can be had: a group of a million
            weights and more on a CPU, with options that it supports and without ``foreach`` (default: None)

    State per maskable parameter, besides SGD's ``momentum_buffer``: ``log_importance``, 4 bytes a weight (2 in
    bfloat16) whatever the dtype of the parameter, and scalars of its simplex (``"hypergradient"`` and ``"lookahead"``
    keep the last direction where momentum is 0). While a step is under way, masks take the size of the parameters, and
    the masked weights the same again until the backward pass has used them. The fused step keeps one buffer of masked
    weights, the size of the parameters, and allocates nothing else of that size.

    Example:
        >>> optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, weight_decay=5e-4, drop_rate=0.1)
        >>> for input, target in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(input), target).backward()
        ...     optimizer.step()
    """


class Prepared(NamedTuple):
    """Masked weights that a fused pass has written, and what they were made of."""

    weights: Tensor
    budget: Budget
    smallest_divisor: float
    stamp: tuple[Any, ...]


_NOT_FUSED = {
    "foreach": True,
    "differentiable": True,
    "per_rank_masks": True,
    "sampling": "exact",
    "importance": "lookahead",
}
_STEP_OPTIONS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "importance",
    "importance_lr",
    "kl_weight",
    "scale_steps",
    "maximize",
    "capturable",
)


def impact_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    directions: list[Tensor | None],
    factors: list[Tensor | None],
    simplexes: list[Simplex],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    importance: str,
    importance_lr: float,
    kl_weight: float,
    scale_steps: bool,
    maximize: bool,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
) -> None:
    r"""Functional API that performs the ImpactSGD computation of one parameter group.

    ``directions`` (the momentum buffers) and ``simplexes`` are updated in place; ``factors`` holds for each parameter
    what its dense gradient is multiplied with, or ``None``. See :class:`ImpactSGD` for the rest.
    """
    if foreach is None:
        _, foreach = _default_to_fused_or_foreach(params, differentiable, use_fused=False)
    implementation = _multi_tensor_impactsgd if foreach else _single_tensor_impactsgd
    implementation(
        params,
        grads,
        directions,
        factors,
        simplexes,
        lr=_to_scalar(lr),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        importance=importance,
        importance_lr=importance_lr,
        kl_weight=kl_weight,
        scale_steps=scale_steps,
        maximize=maximize,
        capturable=capturable,
    )


def _signal(
    importance: str, param: Tensor, grad: Tensor, direction: Tensor | None, lr: float | Tensor
) -> Tensor | None:
    with torch.no_grad():
        h = SIGNALS[importance](
            param.detach().float(), grad.detach().float(), None if direction is None else direction.detach().float(), lr
        )
        return None if h is None else h.float()


def _look_ahead(
    simplexes: list[Simplex],
    params: list[Tensor],
    grads: list[Tensor],
    directions: list[Tensor | None],
    importance: str,
    lr: float | Tensor,
    grad_factor: float | Tensor,
    importance_lr: float,
    kl_weight: float,
) -> None:
    """Lets each simplex that follows its water level see the signal of a sample of its weights."""
    for simplex in simplexes:
        if not simplex.water_target:
            continue
        at = [cast(int, i) for i in simplex.positions]
        found: list[Tensor] = [d for i in at if (d := directions[i]) is not None]
        reads_weight, reads_grad, reads_direction = reads(importance)
        unread = torch.zeros(())
        x = sample([params[i] for i in at], SAMPLE, simplex.members) if reads_weight else unread
        grad = sample([grads[i] for i in at], SAMPLE, simplex.members) * grad_factor if reads_grad else unread
        direction = None
        if reads_direction and len(found) == len(at):
            direction = sample(found, SAMPLE, simplex.members)
        simplex.look_ahead(_signal(importance, x, grad, direction, lr), importance_lr, kl_weight)


def _can_follow(simplex: Simplex, group: dict[str, Any]) -> bool:
    """Whether the change of a sample says enough of the change of the simplex."""
    is_large = sum(p.numel() for p in simplex.members) > SAMPLE  # else each level is solved for, exactly
    eta, lam = _FOLLOW
    return (
        is_large
        and group["importance_lr"] <= eta
        and group["kl_weight"] >= lam
        and group["importance"] != "lookahead"
        and group["drop_rate"] > 0
    )


def _single_tensor_impactsgd(
    params: list[Tensor],
    grads: list[Tensor],
    directions: list[Tensor | None],
    factors: list[Tensor | None],
    simplexes: list[Simplex],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    importance: str,
    importance_lr: float,
    kl_weight: float,
    scale_steps: bool,
    maximize: bool,
    capturable: bool,
) -> None:
    place = {i: (simplex, k) for simplex in simplexes for k, i in enumerate(simplex.positions) if i is not None}
    if importance != "lookahead":
        _look_ahead(
            simplexes, params, grads, directions, importance, lr, -1.0 if maximize else 1.0, importance_lr, kl_weight
        )
    for i, param in enumerate(params):
        simplex, k = place.get(i, (None, 0))
        keeps_direction = momentum != 0 or (simplex is not None and importance in _NEEDS_DIRECTION)
        is_first = keeps_direction and directions[i] is None
        if is_first:
            directions[i] = torch.empty_like(grads[i], requires_grad=False)
        tensors = (
            param,
            grads[i],
            directions[i] if keeps_direction else None,
            factors[i],
            None if simplex is None else simplex.log_importances[k],
        )
        # Block by block, each goes through the cache once. Autograd wants whole tensors.
        for x, grad, buf, factor, log_w in [tensors] if torch.is_grad_enabled() else blocks(*tensors):
            assert x is not None
            assert grad is not None
            if maximize:
                grad = -grad

            # Of the weights as they were, and of the direction that led to them: before anything moves.
            h = None
            if simplex is not None and importance != "lookahead":
                h = _signal(importance, x, grad, None if is_first else buf, lr)

            if factor is not None:
                grad = grad * factor
            if weight_decay != 0:
                grad = grad.add(x, alpha=weight_decay)
            if buf is not None and (is_first or momentum == 0):
                buf.copy_(grad.detach())
            elif buf is not None:
                buf.mul_(momentum).add_(grad, alpha=1 - dampening)
            if buf is not None and momentum != 0:
                grad = grad.add(buf, alpha=momentum) if nesterov else buf

            if scale_steps and simplex is not None and log_w is not None:
                grad = grad * (log_w.float() - simplex.log_normalizer.to(log_w.device)).exp_().to(grad.dtype)
            if isinstance(lr, Tensor) and (lr.requires_grad or capturable):
                x.addcmul_(grad, lr, value=-1)
            else:
                x.add_(grad, alpha=-lr)  # type: ignore[arg-type]

            if simplex is not None and log_w is not None:
                simplex.descend(k, h, log_w, importance_lr, kl_weight)
    for simplex in simplexes:
        simplex.finish()


def _multi_tensor_impactsgd(
    params: list[Tensor],
    grads: list[Tensor],
    directions: list[Tensor | None],
    factors: list[Tensor | None],
    simplexes: list[Simplex],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    importance: str,
    importance_lr: float,
    kl_weight: float,
    scale_steps: bool,
    maximize: bool,
    capturable: bool,
) -> None:
    if not params:
        return
    place = {i: (simplex, k) for simplex in simplexes for k, i in enumerate(simplex.positions) if i is not None}
    if importance != "lookahead":
        _look_ahead(
            simplexes, params, grads, directions, importance, lr, -1.0 if maximize else 1.0, importance_lr, kl_weight
        )
    signals: dict[int, Tensor | None] = {}

    grouped = Optimizer._group_tensors_by_device_and_dtype([params, grads], with_indices=True)  # type: ignore[list-item]
    for (group_params, group_grads), at in grouped.values():
        xs, gs = cast(list[Tensor], group_params), cast(list[Tensor], group_grads)

        if maximize:
            gs = list(torch._foreach_neg(gs))
        if importance != "lookahead":
            for i, x, g in zip(at, xs, gs, strict=True):
                if i in place:
                    signals[i] = _signal(importance, x, g, directions[i], lr)

        gs = _foreach_times(gs, [factors[i] for i in at])
        if weight_decay != 0:
            gs = list(torch._foreach_add(gs, xs, alpha=weight_decay))
        if momentum != 0:
            old = [(buf, g) for i, g in zip(at, gs, strict=True) if (buf := directions[i]) is not None]
            if old:
                torch._foreach_mul_([buf for buf, _ in old], momentum)
                torch._foreach_add_([buf for buf, _ in old], [g for _, g in old], alpha=1 - dampening)
            bufs = [_buffer(directions, i, g) for i, g in zip(at, gs, strict=True)]
            gs = list(torch._foreach_add(gs, bufs, alpha=momentum)) if nesterov else bufs
        elif importance in _NEEDS_DIRECTION:
            for i, g in zip(at, gs, strict=True):
                if i in place:
                    _buffer(directions, i, g).copy_(g)

        if scale_steps:
            places = [place.get(i) for i in at]
            ws = [None if p is None else p[0].weights(p[1]).to(x.dtype) for p, x in zip(places, xs, strict=True)]
            gs = _foreach_times(gs, ws)
        if isinstance(lr, Tensor) and capturable:
            torch._foreach_addcmul_(xs, gs, [lr] * len(xs), value=-1)
        else:
            torch._foreach_add_(xs, gs, alpha=-lr)  # type: ignore[arg-type]

    for simplex in simplexes:
        steps = {k: signals.get(i) for k, i in enumerate(simplex.positions) if i is not None}
        simplex.descend_all(steps, importance_lr, kl_weight)
        simplex.finish()


def _fused_impactsgd(
    params: list[Tensor],
    grads: list[Tensor],
    directions: list[Tensor | None],
    masks: list[Prepared | None],
    simplexes: list[Simplex],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    importance: str,
    importance_lr: float,
    kl_weight: float,
    scale_steps: bool,
    maximize: bool,
    capturable: bool,
    rows: list[Rows],
    next_masks: Callable[[list[Tensor]], tuple[Budget, float, list[Tensor]]],
    rounding_keys: Callable[[list[Tensor]], list[Tensor]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> dict[int, tuple[Budget, Tensor | None]]:
    """One pass over each parameter; returns whose next masks it has drawn, with what they were made of."""
    place = {i: (simplex, k) for simplex in simplexes for k, i in enumerate(simplex.positions) if i is not None}
    sign = -1.0 if maximize else 1.0
    grad_factor = sign if grad_scale is None else sign / grad_scale.float()
    _look_ahead(simplexes, params, grads, directions, importance, lr, grad_factor, importance_lr, kl_weight)

    drawn: dict[int, tuple[Budget, Tensor | None]] = {}
    # What has neither importances nor a mask takes torch's own fused step.
    plain = [i for i in range(len(params)) if i not in place and masks[i] is None]
    new = [i for i in plain if directions[i] is None]
    for some in (new, [i for i in plain if i not in new]):
        if some:
            buffers = [directions[i] for i in some]
            sgd(
                [params[i] for i in some],
                [grads[i] for i in some],
                buffers,
                fused=True,
                grad_scale=grad_scale,
                found_inf=found_inf,
                weight_decay=weight_decay,
                momentum=momentum,
                lr=lr,
                dampening=dampening,
                nesterov=nesterov,
                maximize=maximize,
            )
            for i, buffer in zip(some, buffers, strict=True):
                directions[i] = buffer

    shrink = 1.0 / (1.0 + importance_lr * kl_weight)
    ours = [i for i in range(len(params)) if i not in plain]
    draws = [i for i in ours if masks[i] is not None and (i not in place or place[i][0].follows)]
    mask_keys: dict[int, Tensor] = {}
    if draws:
        budget, divisor, new_keys = next_masks([params[i] for i in draws])
        mask_keys = dict(zip(draws, new_keys, strict=True))
    keys = mask_keys.copy()
    if rounds := [i for i in ours if i in place and place[i][0].rounding is not None]:
        for i, own in zip(rounds, rounding_keys([params[i] for i in rounds]), strict=True):
            keys[i] = torch.cat([keys[i], own], 1) if i in keys else own
    next_budgets: dict[int, Budget] = {}
    packed: dict[Any, Tensor] = {}
    written: list[Tensor] = []
    for i in ours:
        param, mask = params[i], masks[i]
        simplex, k = place.get(i, (None, 0))
        keeps_direction = momentum != 0 or (simplex is not None and importance in _NEEDS_DIRECTION)
        is_first = keeps_direction and directions[i] is None
        if is_first:
            directions[i] = torch.zeros_like(param, requires_grad=False)
        log_w = None if simplex is None else simplex.log_importances[k]
        dtype = torch.promote_types(param.dtype, torch.float32)
        key = (id(simplex), is_first, None if mask is None else id(mask.budget), i in mask_keys, dtype, param.device)
        if key not in packed:
            packed[key] = Numbers(
                lr=lr,
                momentum=momentum,
                decay=0.0 if is_first else momentum,
                gradient_share=1.0 if is_first else 1.0 - dampening,
                weight_decay=weight_decay,
                grad_factor=grad_factor,
                inverse_scale=0.0 if simplex is None else simplex.inverse_scale,
                log_normalizer=0.0 if simplex is None else simplex.log_normalizer,
                shrink=shrink,
                importance_step=importance_lr * shrink,
                minus_level=0.0 if mask is None or mask.budget.log_level is None else -mask.budget.log_level,
                keep_offset=1.0 if mask is None else mask.budget.offset,
                keep_slope=0.0 if mask is None else mask.budget.slope,
                next_level=0.0 if simplex is None or simplex.next_level is None else simplex.next_level,
                next_keep_offset=budget.offset if i in mask_keys else 1.0,
                next_keep_slope=budget.slope if i in mask_keys else 0.0,
                smallest_divisor=1.0 if mask is None else mask.smallest_divisor,
                next_smallest_divisor=divisor if i in mask_keys else 1.0,
                found_inf=0.0 if found_inf is None else found_inf,
            ).pack(dtype, param.device)
        plan = Plan(
            signal=None if simplex is None else SIGNALS[importance],
            momentum=momentum != 0,
            nesterov=nesterov,
            keeps_direction=keeps_direction,
            is_masked=mask is not None,
            draws=i in mask_keys,
            rounds=simplex is not None and simplex.rounding is not None,
            scale_steps=scale_steps and simplex is not None,
            guarded=found_inf is not None,
        )
        weights = None if mask is None else mask.weights
        grad = grads[i] if grads[i].stride() == param.stride() else torch.empty_like(param).copy_(grads[i])
        sums = rows[i].run(
            step_pass,
            plan,
            packed[key],
            keys.get(i),
            grad=grad.detach(),
            x=param.detach(),
            direction=directions[i],
            log_w=log_w,
            masked=weights,
        )
        written += [t for t in (param, directions[i], log_w, weights) if t is not None]
        if simplex is not None and plan.signal is not None:
            simplex.account(k, sums)
    increment_version(written)
    for i in mask_keys:  # not before the last pass has read the level of its masks
        simplex, k = place.get(i, (None, 0))
        if id(simplex) not in next_budgets:
            level = None if simplex is None else simplex.next_level
            if capturable:
                level = _in_place(cast(Prepared, masks[i]).budget.log_level, level)
            next_budgets[id(simplex)] = budget._replace(log_level=level)
        drawn[i] = (next_budgets[id(simplex)], None if simplex is None else simplex.log_importances[k])
    for simplex in simplexes:
        scale = simplex.signal_scale
        simplex.finish()
        if found_inf is not None:
            simplex.signal_scale = torch.where(found_inf.to(scale.device) > 0, scale, simplex.signal_scale)
    return drawn


def _foreach_times(tensors: list[Tensor], factors: list[Tensor | None]) -> list[Tensor]:
    """Each tensor times its factor, where it has one."""
    both = zip(tensors, factors, strict=True)
    pairs = {i: (tensor, factor) for i, (tensor, factor) in enumerate(both) if factor is not None}
    if not pairs:
        return tensors
    products = torch._foreach_mul([t for t, _ in pairs.values()], [f for _, f in pairs.values()])
    replaced = dict(zip(pairs, products, strict=True))
    return [replaced.get(i, tensor) for i, tensor in enumerate(tensors)]


def _buffer(directions: list[Tensor | None], i: int, grad: Tensor) -> Tensor:
    """The momentum buffer or last direction of parameter i; its first value is the gradient."""
    buf = directions[i]
    if buf is None:
        buf = directions[i] = grad.detach().clone()
    return buf


def _stamp(param: Tensor, log_w: Tensor | None, budget: Budget, group: dict[str, Any], step: int) -> tuple[Any, ...]:
    """What masked weights depend on: they are good for a forward pass as long as it has not changed."""
    memory = [(t.data_ptr(), t._version) for t in (param, log_w) if t is not None]
    options = (group["seed"], step, budget.drop_rate, budget.keep_floor, budget.drop, _smallest_divisor(group))
    return (*memory, *options)


def _in_place(place: Tensor | None, value: Tensor | None) -> Tensor | None:
    """A value where a graph will look for it."""
    return value if place is None or value is None else place.copy_(value)


def _settle_counter(group: dict[str, Any]) -> None:
    """Gives the step counter of a group its kind: a number, or a tensor on the device that every replay counts up."""
    step = group["step"]
    if not group["capturable"]:
        group["step"] = int(step)
    elif group["params"]:
        device = group["params"][0].device
        if not isinstance(step, Tensor) or step.device != device:
            _needs_eager("its step counter is not on the device yet")
            group["step"] = torch.as_tensor(step, dtype=torch.int64).to(device)


def _needs_eager(why: str) -> None:
    """Raises in a capture, where a replay would do again what is done once."""
    if is_capturing():
        raise RuntimeError(
            f"ImpactSGD cannot be captured in a CUDA graph here, since {why}: take some eager steps of the same kind "
            "before the capture"
        )


def _keys(
    params: list[Tensor], index: dict[Tensor, int], group: dict[str, Any], step: int | Tensor, rank: int = 0
) -> list[Tensor]:
    """The keys of the rows of each parameter, for its draws at a step."""
    keys: dict[Tensor, Tensor] = {}
    for device in {p.device for p in params}:
        here = [p for p in params if p.device == device]
        sizes = tuple(-(-p.numel() // ROW) for p in here)
        row, tensor = _row_index(sizes, tuple(index[p] for p in here), device)
        words = row_keys(row, seed=group["seed"], step=step, tensor=tensor, rank=rank)
        keys.update(zip(here, words.split(sizes), strict=True))
    return [keys[p] for p in params]


@lru_cache(maxsize=256)
def _row_index(sizes: tuple[int, ...], tensors: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    row = torch.cat([torch.arange(size) for size in sizes])
    tensor = torch.repeat_interleave(torch.tensor(tensors), torch.tensor(sizes))
    return row.to(device), tensor.to(device)


def _next_masks(
    params: list[Tensor], *, group: dict[str, Any], index: dict[Tensor, int]
) -> tuple[Budget, float, list[Tensor]]:
    """What the masks of the next step are made of, but for the importances."""
    budget = Budget(params, group["drop_rate"], group["keep_floor"], group["drop"])
    if group["importance"] != "uniform":
        budget = budget._replace(log_level=torch.zeros(()))
    return budget, _smallest_divisor(group), _keys(params, index, group, group["step"] + 1)


def _check_dense(param: Tensor, name: str) -> None:
    if flat_views(param.detach()) is None:
        raise RuntimeError(
            f"fused=True needs parameters that fill their memory without gaps or overlaps, but {name} has shape "
            f"{tuple(param.shape)} and strides {param.stride()}: make it .contiguous(), or leave fused out"
        )


def _simplex_id(members: list[Tensor], index: dict[Tensor, int]) -> int:
    """Tells whether a simplex still has the members that its state is of."""
    return zlib.crc32(repr([(index[p], p.numel()) for p in members]).encode())


def _smallest_divisor(group: dict[str, Any]) -> float:
    """What a kept weight is divided by where π is smaller; ``rescale="none"`` never divides by less than 1."""
    return (1.0 - group["drop_rate"]) / _RESCALE_CAP if group["rescale"] == "inverse" else 1.0


def _exact_masks(budget: Budget, u: list[Tensor], members: list[Tensor], drop_rate: float) -> list[Iterator[Tensor]]:
    """Masks of one simplex that drop exactly ``round(drop_rate * n)`` weights together, block by block."""
    device, sizes = u[0].device, [t.numel() for t in u]
    size = sum(sizes) - round(drop_rate * sum(sizes))
    keep = [flatten(budget.keep_probability(k), p).to(device) for k, p in enumerate(members)]
    masks = pareto_sample(torch.cat(keep), torch.cat([t.to(device) for t in u]), size).split(sizes)
    return [(block for (block,) in blocks(mask.to(p.device))) for mask, p in zip(masks, members, strict=True)]


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


# ------------------------------------------------------------------------------- options

_CHOICES = {
    "simplex": ("group", "tensor"),
    "drop": ("unimportant", "important"),
    "rescale": ("inverse", "none"),
    "sampling": ("bernoulli", "exact"),
}


def _check_options(options: dict[str, Any]) -> None:
    """Raises for an option out of range; names it, its value and what it may be."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    # To look at it would wait for the device; and a replay does not look.
    on_device = isinstance(lr, Tensor) and (lr.device.type != "cpu" or is_capturing())
    if not on_device and not (_is_number(lr) and lr >= 0.0):
        raise ValueError(f"Invalid learning rate: {lr}; it must be finite and not negative")
    if not (_is_number(options["momentum"]) and options["momentum"] >= 0.0):
        raise ValueError(f"Invalid momentum value: {options['momentum']}; it must be finite and not negative")
    if not _is_number(options["dampening"]):
        raise ValueError(f"Invalid dampening value: {options['dampening']}; it must be finite")
    if not (_is_number(options["weight_decay"]) and options["weight_decay"] >= 0.0):
        raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}; it must be finite and not negative")
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    drop_rate, keep_floor = options["drop_rate"], options["keep_floor"]
    if not (_is_number(drop_rate) and 0.0 <= drop_rate < 1.0):
        raise ValueError(f"Invalid drop_rate: {drop_rate}; it must lie in [0, 1)")
    if not (_is_number(keep_floor) and 0.0 <= keep_floor < 1.0):
        raise ValueError(f"Invalid keep_floor: {keep_floor}; it must lie in [0, 1)")
    if drop_rate > 0.0 and keep_floor > 1.0 - drop_rate + 1e-9:
        raise ValueError(
            f"keep_floor={keep_floor} is above the budget: drop_rate={drop_rate} keeps {1 - drop_rate:.6g} of the "
            "weights on average; lower one of the two"
        )
    for name in ("importance_lr", "kl_weight"):
        if not (_is_number(options[name]) and options[name] >= 0.0):
            raise ValueError(f"Invalid {name}: {options[name]}; it must be finite and not negative")
    if options["importance"] != "uniform" and options["importance"] not in SIGNALS:
        raise ValueError(
            f"Invalid importance: {options['importance']!r}; choose from {['uniform', *SIGNALS]}, "
            "or add your own to impact_optim.SIGNALS"
        )
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            raise ValueError(f"Invalid {name}: {options[name]!r}; choose from {list(choices)}")
    if options["importance_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"Invalid importance_dtype: {options['importance_dtype']}; choose torch.float32 or torch.bfloat16"
        )
    step = options["step"]
    is_scalar = isinstance(step, Tensor) and step.dim() == 0 and step.dtype == torch.int64
    if not is_scalar and not (type(step) is int and step >= 0):
        raise ValueError(f"Invalid step: {step!r}; it counts the steps taken")
    if options["fused"]:
        for name, value in _NOT_FUSED.items():
            if options[name] == value:
                raise RuntimeError(f"`fused` does not support {name}={value!r}; leave one of the two out")
    if options["foreach"] and options["differentiable"]:
        raise RuntimeError("`foreach` does not support `differentiable`; leave one of the two out")
    if type(options["seed"]) is not int or not 0 <= options["seed"] < 2**63:
        raise ValueError(f"Invalid seed: {options['seed']!r}; it must be an integer in [0, 2**63)")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return isinstance(value, Real) and math.isfinite(value)


def _describe(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
