"""Impact: importances, masks and zeros around the step of any torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from typing_extensions import Unpack

from .engine import Engine
from .importances import Simplex
from .masking import attached_maskings
from .options import OPTIONS, ImpactOptions, check, check_keys, completed, documentation
from .simplex import perplexity
from .sparsity import (
    SparseTensor,
    SparsityReport,
    changed,
    check_choice,
    choose,
    fill_empty_slices,
    own_masks,
    parse_sparsity,
    scores_of,
    sparse_values,
)
from .weights import normalized_weights, vectors_of

__all__ = ["Impact", "TensorSummary"]


class TensorSummary(NamedTuple):
    """What :meth:`Impact.importance_summary` says of one tensor."""

    name: str
    numel: int
    perplexity: float
    """Effective number of weights by importance, from 1 to ``numel``."""
    share_above_1_5: float
    """Share of weights whose importance is above 1.5; the mean over the group is 1."""
    max: float
    drop_rate: float
    """Expected share of dropped weights; the group as a whole has the group's drop rate."""


class Impact(Engine):
    r"""Trains the weights of a model with importance-driven DropConnect, whatever optimizer takes the steps.

    Every weight x has an importance w. The importances of the n weights of a parameter group are non-negative with
    :math:`\sum w = n`, start at 1, and follow

    .. math::
        \min_w \; L(f(x - w \odot \gamma d)) + \lambda \, \mathrm{KL}(w / n \,\|\, \text{uniform})

    by mirror descent. One step, with g the gradient at the weights :math:`x \odot m / \pi` that the forward pass saw:

    .. math::
        \begin{aligned}
             &h \leftarrow \textit{importance}(x, g, \gamma d), \qquad
              u \leftarrow \mathrm{clip}(h / \overline{|h|}, \pm 10)                                      \\
             &\log w \leftarrow (\log w - \eta u) / (1 + \eta \lambda) + \mathrm{const}                   \\
             &x \leftarrow \textit{base step}(x, g \odot m / \pi)                                         \\
             &\pi \leftarrow f + (1 - f) \min(1, c w), \quad c : \mathrm{mean}(\pi) = 1 - \textit{drop\_rate},
              \qquad m \sim \mathrm{Bernoulli}(\pi)
        \end{aligned}

    where :math:`\overline{|h|}` is the running mean over the group, so that η and λ carry over between layers, models
    and learning rates. It is attached to the optimizer by hooks around :meth:`~torch.optim.Optimizer.step`: the loop
    stays as it is, and with ``drop_rate=0`` so does the trajectory, bit for bit. Biases, norms and scales are left
    alone.

    The options become keys of the optimizer's ``param_groups``, and the state (``log_importance``, 4 bytes a weight)
    part of the optimizer's ``state``. So they are scheduled, saved and loaded with it.

    Args:
        model (Module, optional): is attached at once, see :meth:`attach`; ``None`` for :meth:`attach` or :meth:`masked`
            later on.
        optimizer (Optimizer or list): any optimizer of torch but LBFGS and SparseAdam, any other that is written like
            them, or several.
{options}

    Raises:
        TypeError: something is no optimizer, has a step that cannot be seen, or an option is unknown.
        ValueError: an option is out of range, or a parameter is complex, sharded, or not of these optimizers.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> impact = Impact(model, optimizer, drop_rate=0.1)
        >>> for input, target in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(input), target).backward()
        ...     optimizer.step()
        >>> impact.sparsify(0.9)
    """

    def __init__(
        self, model: nn.Module | None, optimizer: Optimizer | Iterable[Optimizer], **options: Unpack[ImpactOptions]
    ) -> None:
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        values = completed(options)
        _check_optimizers(optimizers, values)
        if model is not None:
            _check_module(model, (p for each in optimizers for group in each.param_groups for p in group["params"]))
        for each in optimizers:
            was_bound = "mask_step" in each.defaults
            for group in (each.defaults, *each.param_groups):
                for name, value in values.items():
                    if name not in group or (was_bound and name in options):
                        group[name] = value
        self._bind(optimizers)
        if model is not None:
            self.attach(model)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}  # all there is to know; a copy is attached to nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bind(state["optimizers"])

    # -- where masks are seen --

    def attach(self, module: nn.Module) -> None:
        """Shows masked weights to the training forward passes of a module.

        A read is masked where the module that reads is in train mode and gradients are enabled, while a call of the
        module or of a part of it runs. The masks stay the same until ``step()``. The parameters themselves never
        change: evaluation, ``state_dict()``, copies, weight averages and gradient clipping see the dense weights at any
        time, and ``param.grad`` is the dense gradient at the masked weights. Of two optimizers with masks that share
        parameters, the one attached last masks them. Copies and pickles of an attached module are plain modules.

        Args:
            module: holds parameters of the optimizer. With ``torch.compile`` or ``DistributedDataParallel`` either the
                wrapper or the module inside; under ``fullgraph=True`` the wrapper.

        Raises:
            TypeError: not a module.
            ValueError: none of the module's parameters belongs to the optimizer.

        Warns:
            UserWarning: ``drop_rate > 0`` finds nothing to mask.
        """
        _check_module(module, (p for each in self.optimizers for group in each.param_groups for p in group["params"]))
        self._vectors.update(vectors_of(module))
        self._normalized.update(normalized_weights(module))
        self._refresh()
        self._masking.attach(module)
        wanted = any(simplex.group["drop_rate"] > 0 for simplex in self._all())
        if wanted and not self._is_lazy and not any(s.members for s in self._all() if s.group["drop_rate"] > 0):
            warnings.warn(
                "drop_rate > 0, but there is nothing to mask: masks touch trained tensors with at least two dimensions "
                "longer than 1, not biases, norms, or the flat parameters of FullyShardedDataParallel",
                stacklevel=2,
            )

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
        """A scope in which the parameters hold the masked weights, for code that reads them in any way.

        The forward and the backward pass belong inside. The dense weights are back when the scope ends or ``step()`` is
        called, whichever comes first. Scopes before one step see the same masks.

        Raises:
            RuntimeError: nested.

        Example:
            >>> with optimizer.masked():
            ...     loss_fn(model(input), target).backward()
            >>> optimizer.step()
        """
        self._refresh()
        factors: dict[Tensor, Tensor] = {}
        for simplex in self._all():
            if simplex.members and simplex.group["drop_rate"] > 0:
                mask = simplex.current_mask()
                factors.update((p, mask.factor(p)) for p in mask.draws)
                if torch.is_grad_enabled() and not self._masking.in_scope:
                    mask.is_read = True
                    mask.contributed.update(dict.fromkeys(mask.draws, -1))
        with self._masking.substitute(factors):
            yield

    @contextmanager
    def expected(self) -> Generator[None, None, None]:
        """A scope in which the parameters hold the mean of the masked weights, to evaluate or to save.

        With ``rescale="none"`` that is x ⊙ π. With ``rescale="inverse"`` it is the dense weights, but for those that
        are kept so rarely that their enlargement is capped.

        Raises:
            RuntimeError: nested.
        """
        self._refresh()
        factors = {p: factor for simplex in self._all() for p, factor in simplex.expected_factors().items()}
        with self._masking.substitute(factors):
            yield

    @contextmanager
    def sampled(self) -> Generator[None, None, None]:
        """A scope in which every forward pass of an attached module, in any mode, sees a mask of its own.

        Evaluated so several times, the network gives samples of its predictive distribution (Monte Carlo DropConnect).
        Parameters get no gradient from these passes.

        Raises:
            RuntimeError: nothing is attached, no group drops anything, or nested.

        Source: Gal & Ghahramani, Dropout as a Bayesian approximation, ICML 2016; Mobiny et al., DropConnect is
        effective in modeling uncertainty of Bayesian deep networks, 2021.

        Example:
            >>> model.eval()
            >>> with torch.no_grad(), optimizer.sampled():
            ...     samples = torch.stack([model(input).softmax(-1) for _ in range(20)])
            >>> mean, spread = samples.mean(0), samples.std(0)
        """
        self._refresh()
        if not any(True for _ in self._masking.attached()):
            raise RuntimeError("sampled() needs an attached module: call attach(module) first")
        if not any(simplex.members and simplex.group["drop_rate"] > 0 for simplex in self._all()):
            raise RuntimeError("sampled() draws no masks where drop_rate is 0: set it in param_groups first")
        with self._masking.sampled():
            yield

    # -- zeros for good --

    @torch.no_grad()
    def sparsify(
        self,
        sparsity: float | str | None = None,
        *,
        masks: Mapping[str, Tensor] | Mapping[Tensor, Tensor] | None = None,
        by: str = "importance",
        floor: float = 0.0,
        params: Iterable[Tensor] | None = None,
    ) -> SparsityReport:
        r"""Keeps the weights that matter most and makes the others zero for good.

        The zeros are the mask: the ``hold_zeros`` of the groups is set, and from then on a weight that is exactly zero
        before a step is zero after it, with all its state, whatever the optimizer does. So any checkpoint of the model
        holds the mask, and a network whose zeros come from elsewhere is held by the same flag. Gradients of these
        weights are zero, so that clipping does not count them.

        Nothing is dropped any more: the ``drop_rate`` of the groups is set to 0. With a drop rate set anew, it is a
        share of the weights that are left. The weights of these groups become those of :meth:`expected`. Call it
        between two steps; masks that a forward pass has seen are forgotten. A second call keeps what is zero.

        Args:
            sparsity: the share of weights that are zero afterwards, in [0, 1); or a pattern such as ``"2:4"``, which
                keeps 2 of every 4 neighbours along dimension 1 and leaves tensors dense that it does not divide.
            masks: in place of it, masks of your own: by name, as a report has them, or by parameter; True where a
                weight is kept.
            by: what decides: ``"importance"`` w, ``"expected"`` \|x\|·π, or ``"magnitude"`` \|x\|.
            floor: what each tensor keeps at least, as a fraction of the share that all keep, in [0, 1]. With 0 all
                weights stand in one ranking, with 1 all tensors keep the same share. A pattern has no floor.
            params: the tensors to make sparse; by default all that masks touch.

        Returns:
            What is left of each tensor, with its mask; prints as a table.

        Raises:
            ValueError: an argument is out of range, a tensor has no importances, or nothing would be left of one.
                Nothing has changed then.
            TypeError: something in ``params`` is no tensor.
            RuntimeError: inside a scope of :meth:`masked` or :meth:`expected`.
        """
        if self.in_scope:
            raise RuntimeError("sparsify() changes the dense weights: leave the scope of masked() or expected() first")
        self._refresh()
        check_choice(by, floor)
        if (sparsity is None) == (masks is None):
            raise ValueError("sparsify() takes either a sparsity or masks")
        if masks is not None:
            kept = own_masks(masks, self._home, self._normalized, self._name)
        else:
            goal = parse_sparsity(sparsity)
            selected = None if params is None else list(params)
            for p in selected or ():
                if self._find(p)[1] is None:
                    raise ValueError(
                        f"{self._name(p)} is never masked, and cannot be made sparse: leave it out of params"
                    )
            scores = scores_of(self._all(), by, selected, self._name)
            if not scores:
                raise ValueError(
                    "there is nothing to make sparse: masks touch trained tensors of two or more dimensions"
                )
            kept = choose(scores, goal, floor, self._name)
            # A pattern leaves something of every row, over which norms go by default.
            if not isinstance(goal, tuple):
                fill_empty_slices({p: kept[p] for p in self._normalized & kept.keys()}, scores)
        simplexes = [simplex for simplex in self._all() if any(p in kept for p in simplex.members)]
        for p, mask in kept.items():
            mask &= ~self._home[p].held(p)
        groups = [(s.group, {key: s.group[key] for key in ("drop_rate", "hold_zeros")}) for s in simplexes]
        try:
            with changed(sparse_values(simplexes, kept)):
                for group, _ in groups:
                    group.update(drop_rate=0.0, hold_zeros=True)
                self._hold_pruned()
        except BaseException:
            for group, before in groups:
                group.update(before)
            raise
        for simplex in simplexes:
            simplex.end_step()
        return SparsityReport([SparseTensor(self._name(p), mask, int(mask.sum())) for p, mask in kept.items()])

    # -- read-outs --

    @torch.no_grad()
    def importance(self, param: Tensor) -> Tensor:
        """The importances w of a parameter: its shape, float32, mean 1 over its group.

        They are 1 for what is never masked, such as a bias, 0 for a zero that is held, and as they last were for what
        is frozen.

        Raises:
            TypeError, ValueError: not a parameter of this optimizer.
        """
        _, simplex = self._find(param)
        if simplex is not None:
            return simplex.importances()[param]
        states = (each.state.get(param, {}) for each in self.optimizers)
        frozen = next((state["log_importance"] for state in states if "log_importance" in state), None)
        return torch.ones_like(param, dtype=torch.float32) if frozen is None else frozen.exp()

    @torch.no_grad()
    def keep_probability(self, param: Tensor) -> Tensor:
        """The probability π of each weight of a parameter to be kept by the next mask: its shape, float32.

        Raises:
            TypeError, ValueError: not a parameter of this optimizer.
        """
        group, simplex = self._find(param)
        if simplex is None or group["drop_rate"] == 0:
            return torch.ones_like(param, dtype=torch.float32)
        return simplex.keep_probabilities()[param]

    @torch.no_grad()
    def importance_summary(self) -> list[TensorSummary]:
        """What the importances of each maskable tensor look like, in the order of the parameters."""
        self._refresh()
        rows = []
        for simplex in self._all():
            keep = simplex.keep_probabilities() if simplex.group["drop_rate"] > 0 else {}
            for p, w in simplex.importances().items():
                rows.append(
                    TensorSummary(
                        name=self._name(p),
                        numel=p.numel(),
                        perplexity=perplexity(w).item(),
                        share_above_1_5=(w > 1.5).float().mean().item(),
                        max=w.max().item(),
                        drop_rate=1.0 - keep[p].double().mean().item() if p in keep else 0.0,
                    )
                )
        return rows

    def _find(self, param: Tensor) -> tuple[dict[str, Any], Simplex | None]:
        """The group of a parameter, and its simplex if it is on one."""
        if not isinstance(param, Tensor):
            raise TypeError(f"pass the parameter itself, such as model.fc.weight, not {param!r}")
        self._refresh()
        for each in self.optimizers:
            for group in each.param_groups:
                if any(param is p for p in group["params"]):
                    return group, self._home.get(param)
        raise ValueError(
            f"a tensor of shape {tuple(param.shape)} is no parameter of this optimizer: pass the parameter itself"
        )


Impact.__doc__ = (Impact.__doc__ or "").replace("{options}", documentation())


class ImpactOptimizer(Impact):
    """What :class:`Impact` needs to be a torch optimizer itself: ``class ImpactSGD(ImpactOptimizer, SGD)``."""

    _base: type[Optimizer]
    """The optimizer of torch that this one is, too."""
    _steps_by_itself = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step: moves the importances, and updates the weights with the masked gradients.

        Args:
            closure (optional): evaluates the model again and returns the loss; ``importance="lookahead"`` needs one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if impact_of(self) is self:  # type: ignore[arg-type] # and not another that was put around it
            self._prepare(self, closure)  # type: ignore[arg-type]
        step = self._base.step
        # torch runs the hooks of a step around the method of each class that has been made; here they run already.
        (step.__wrapped__ if hasattr(step, "hooked") else step)(self)  # type: ignore[attr-defined, call-overload]
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return super(Engine, self).__getstate__()  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super(Engine, self).__setstate__(state)  # type: ignore[misc] # that of the torch optimizer
        if "_masking" not in self.__dict__:  # a copy or an unpickled optimizer; it is attached to nothing
            self._bind([self])  # type: ignore[list-item]

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: an option is out of range, or a parameter is complex or sharded.
        """
        if isinstance(param_group, dict) and "_masking" in self.__dict__:
            param_group = {**param_group, "params": _listed(param_group["params"])}
            _check_group(self, param_group, self.defaults)  # type: ignore[attr-defined, arg-type]
        super().add_param_group(param_group)  # type: ignore[misc]
        if "_masking" in self.__dict__:
            for root in list(self._masking.attached()):  # it may have parts that are new
                self.attach(root)


def face_documentation(name: str, base: str, arguments: str, example: str) -> str:
    """The docstring of an optimizer of torch with :class:`Impact` built in."""
    return f"""Implements {base} with learnt importances and importance-driven DropConnect.

    It is a :class:`torch.optim.{base}`, with :class:`Impact` built in; see there for the mathematics. With
    ``drop_rate=0`` its trajectory is that of {base}, bit for bit.

    Args:
        params (Module or iterable): a module, which is attached at once (:meth:`attach`); or, as everywhere in
            torch.optim, an iterable of parameters, of named parameters, or of dicts that define parameter groups. All
            options can be given per group.
        {arguments} (optional):
            those of :class:`torch.optim.{base}`; the weight decay is that of the dense weights. With ``fused=None`` a
            kernel takes the step where one can (float32, bfloat16 or float64, on a CPU with a C++ compiler or a GPU
            with Triton); ``True`` insists on it, and ``False`` or ``foreach=True`` keep to tensor code.
{documentation()}

    State per weight, beside {base}'s: ``log_importance``, 4 bytes whatever the dtype of the parameter
    (``"hypergradient"`` also keeps the last step).

    Example:
        >>> optimizer = {name}(model, {example}, drop_rate=0.1)
        >>> for input, target in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(input), target).backward()
        ...     optimizer.step()
    """


def impact_of(optimizer: Optimizer) -> Impact | None:
    """The :class:`Impact` around an optimizer, or built into it; ``None`` if there is none."""
    return vars(optimizer).get("_impact")


def attached_impacts(module: nn.Module) -> list[Impact]:
    """Those that are attached to some part of a module."""
    owners = {masking.owner: None for masking in attached_maskings(module)}
    return [owner for owner in owners if isinstance(owner, Impact)]


def module_and_params(params: Any) -> tuple[nn.Module | None, Any]:
    """What the first argument of an optimizer stands for: a module, or what any torch optimizer takes."""
    return (params, params.parameters()) if isinstance(params, nn.Module) else (None, params)


def _listed(params: Any) -> Any:
    return [params] if isinstance(params, Tensor) else list(params)


def _check_optimizers(optimizers: list[Optimizer], values: Mapping[str, Any]) -> None:
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(f"Impact takes torch optimizers, but got {torch.typename(each)}")
        name = type(each).__name__
        if isinstance(each, LBFGS | SparseAdam):
            raise TypeError(f"Impact does not support {name}, whose step is not one of dense gradients: choose another")
        if not hasattr(each, "_optimizer_step_pre_hooks") or not hasattr(type(each).step, "hooked"):
            raise TypeError(f"the step of {name} cannot be seen: pass the optimizer that it wraps")
        for group in each.param_groups:
            _check_group(each, group, {**each.defaults, **values})
    if len(set(optimizers)) < len(optimizers) or not optimizers:
        raise ValueError("Impact takes one optimizer, or several different ones")


def _check_group(optimizer: Optimizer, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises for an option of a group that is unknown or out of range, and for a parameter that cannot be masked."""
    check_keys(group, {**OPTIONS, **defaults})
    options = {**defaults, **group}
    check(options)
    for i, p in enumerate(group["params"]):
        p = p[1] if isinstance(p, tuple) else p
        if not isinstance(p, Tensor):
            continue  # the base says it better
        if p.is_complex():
            raise ValueError(
                f"{type(optimizer).__name__} does not support complex parameters with masks: number {i} of its group "
                f"is {p.dtype}. Optimize the real tensor torch.view_as_real(param) instead"
            )
        if type(p).__name__ == "DTensor" or hasattr(p, "_local_tensor"):
            raise ValueError(
                "parameters that fully_shard (FSDP2) or tensor parallelism has split, DTensors, cannot be masked: "
                "train with DistributedDataParallel, or with the optimizer of torch.optim"
            )


def _check_module(module: Any, params: Iterable[Tensor]) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"attach() takes a torch.nn.Module, but got {torch.typename(module)}")
    if set(params).isdisjoint(module.parameters()):
        raise ValueError(
            f"attach() got a {type(module).__name__} none of whose parameters belongs to this optimizer; attach the "
            "module whose parameters it was built with, or add them with add_param_group()"
        )
