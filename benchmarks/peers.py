"""What the benchmarks compare with that is no arm of the main job."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impact_optim import SIGNALS, ImpactSGD, SparsityReport, erdos_renyi
from impact_optim.engine import _gradients_at
from impact_optim.experiments.arms import BASES, SGD, build_optimizer
from impact_optim.experiments.models import ResNet18, TransformerBlock
from impact_optim.experiments.sparse import FLOOR, CannotBeSparse, ramp_epochs
from impact_optim.impact import ImpactOptimizer
from impact_optim.pruning import CRITERIA, ActivationPruner, UnitGroup
from impact_optim.pruning.criteria import Context
from impact_optim.sparsity import keep_largest


class Rewired(torch.optim.Optimizer):
    """An optimizer on a network that is sparse from the start, and may move its connections: :func:`around` SGD, say.

    Every ``every`` steps, until three quarters of the training are over, a share of each tensor's weights that falls
    from 0.3 to 0 as a half cosine is replaced: the smallest go, and as many come back at zero, also of those. Layers
    are given their densities by their sizes, so that the network as a whole has the sparsity: Erdős–Rényi without the
    kernel, which is the same for linear layers and better here for convolutions.

    Args:
        model: whose tensors of two or more dimensions are sparse.
        sparsity: of all of them together.
        steps: of the training.
        seed: of the connections.
        grow: ``"gradient"`` is RigL, where the dense gradient is largest; ``"random"`` is SET, anywhere, with the
            schedule that RigL's authors give it; ``None`` keeps the random connections that it begins with.
        every: how many steps apart.

    Sources: Evci et al., Rigging the lottery: making all tickets winners, ICML 2020, and their code; Mocanu et al.,
    Scalable training of artificial neural networks with adaptive sparse connectivity, Nature Communications 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        steps: int,
        seed: int,
        grow: str | None = "gradient",
        every: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(model.parameters(), **{"foreach": False, **options})
        self._end, self._grow, self._every, self._taken = 0.75 * steps, grow, every, 0
        weights = weights_of(model)
        self._generator = torch.Generator().manual_seed(seed)
        self._masks: dict[Tensor, Tensor] = {}
        with torch.no_grad():
            for p, density in zip(weights, erdos_renyi([p.shape for p in weights], 1 - sparsity), strict=True):
                kept = self._random(p).argsort()[: max(1, round(density * p.numel()))]
                self._masks[p] = torch.zeros(p.numel(), dtype=torch.bool).index_fill_(0, kept, True).view_as(p)
                p.mul_(self._masks[p])

    def _random(self, p: Tensor) -> Tensor:
        return torch.rand(p.numel(), generator=self._generator)

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_due = self._taken > 0 and self._taken % self._every == 0 and self._taken < self._end
        rewires = self._grow is not None and is_due
        if not (rewires and self._grow == "gradient"):  # RigL's change takes the place of a step, as in the source
            for p, mask in self._masks.items():
                if p.grad is not None:
                    p.grad.mul_(mask)
            super().step()
        if rewires:
            share = 0.15 * (1 + math.cos(math.pi * self._taken / self._end))
            for p, mask in self._masks.items():
                self._rewire(p, mask, share)
        self._taken += 1
        return loss

    @torch.no_grad()
    def _rewire(self, p: Tensor, mask: Tensor, share: float) -> None:
        count = min(int(share * int(mask.sum())), int((~mask).sum()))
        if p.grad is None or count == 0:
            return
        old = mask.clone()
        smallest = p.abs().masked_fill(~mask, math.inf).flatten().topk(count, largest=False).indices
        mask.view(-1)[smallest] = False
        score = p.grad.abs() if self._grow == "gradient" else self._random(p).view_as(p)
        # What has just gone may come back, as it was.
        mask.view(-1)[score.masked_fill(mask, -1.0).flatten().topk(count).indices] = True
        for tensor in (p, *self.state[p].values()):  # momentum starts anew as well
            if tensor is not None and tensor.shape == p.shape:
                tensor.mul_(mask & old)


class OneShot(ImpactOptimizer):
    """An optimizer that is cut to its largest weights once, where the ramps of the others end, and trains on.

    Source: Han et al., Learning both weights and connections for efficient neural networks, NIPS 2015.
    """

    def __init__(self, model: nn.Module, *, sparsity: float, cut: int, **options: Any) -> None:
        super().__init__(model, **options)
        self._final_sparsity, self._until_cut = sparsity, cut

    def step(self, closure: Any = None) -> Any:
        if self._until_cut == 0:
            try:
                self.sparsify(self._final_sparsity, by="magnitude", floor=FLOOR)
            except ValueError as error:
                raise CannotBeSparse(str(error)) from error
        self._until_cut -= 1
        return super().step(closure)


class TargetedDropout(torch.optim.Optimizer):
    """An optimizer that drops the smallest weights of every unit at random, and cuts them after the last step.

    A share γ of a unit's weights is dropped with probability α. Over the first third of the training γ rises to 95% of
    the sparsity, over the next third to all of it, while α rises over both: the ramping form, as the source's code has
    it for ResNet-32. Where the share is no whole number of weights, one more is left.

    Source: Gomez et al., Learning sparse networks using targeted dropout, 2019.
    """

    def __init__(
        self, model: nn.Module, *, sparsity: float, steps: int, seed: int, alpha: float = 0.99, **options: Any
    ) -> None:
        super().__init__(model.parameters(), **{"foreach": False, **options})
        self._weights, self._sparsity, self._alpha = weights_of(model), sparsity, alpha
        self._steps, self._taken = steps, 0
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        thirds = 3 * self._taken / self._steps
        share = self._sparsity * (0.95 * min(1.0, thirds) + 0.05 * min(1.0, max(0.0, thirds - 1.0)))
        alpha = self._alpha * min(1.0, thirds / 2)
        dense = [p.clone() for p in self._weights]
        kept = []
        for p in self._weights:
            kept.append(~(smallest_of_units(p, share) & (torch.rand(p.shape, generator=self._generator) < alpha)))
            p.mul_(kept[-1])
        with torch.enable_grad():
            loss = closure()
        for p, was, mask in zip(self._weights, dense, kept, strict=True):
            p.copy_(was)
            p.grad.mul_(mask)
        super().step()
        self._taken += 1
        if self._taken == self._steps:
            for p in self._weights:
                p.masked_fill_(smallest_of_units(p, self._sparsity), 0.0)
        return loss


def smallest_of_units(weight: Tensor, share: float) -> Tensor:
    """Where the smallest weights of each row are, a share of it rounded down."""
    rows = weight.flatten(1).abs()
    return (rows < rows.kthvalue(int(share * rows.size(1) + 1e-6) + 1, 1, keepdim=True).values).view_as(weight)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() >= 2]


def shuffled_saliency(weight: Tensor, grad: Tensor, step: Tensor | None) -> Tensor:
    """The saliency, handed to other weights of the tensor, always the same ones: what is left is its distribution."""
    return weight.mul(grad).abs_().neg_().reshape(-1).flip(0).view_as(grad)


class GradualByDensities(ImpactOptimizer):
    """An optimizer whose tensors keep their largest weights, as many as the densities by size leave them."""

    def sparsify(self, sparsity: Any = None, **options: Any) -> SparsityReport:
        weights = [p for group in self.param_groups for p in group["params"] if p.dim() >= 2]
        densities = erdos_renyi([p.shape for p in weights], 1 - sparsity)
        counts = [max(1, round(density * p.numel())) for p, density in zip(weights, densities, strict=True)]
        masks = [keep_largest([p.detach().abs()], count)[0] for p, count in zip(weights, counts, strict=True)]
        return super().sparsify(masks=dict(zip(weights, masks, strict=True)))


class GradualPerTensor(ImpactOptimizer):
    """An optimizer whose tensors all lose the same share of their smallest weights, as Zhu & Gupta do."""

    def sparsify(self, sparsity: Any = None, **options: Any) -> SparsityReport:
        return super().sparsify(sparsity, **{**options, "floor": 1.0})


class StepLookahead(ImpactSGD):
    """``"lookahead"`` that tries the step that SGD has just taken, with its momentum and under its mask."""

    def _look_ahead(self, step: Any, simplexes: Any, closure: Any) -> None:
        self._closure, self._old = closure, {p: p.detach().clone() for s in simplexes for p in s.members}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            taken = {s: {p: self._old[p] - p for p in s.members} for s in self._simplexes[optimizer]}
            trial = {}
            for simplex, steps in taken.items():
                importances = simplex.importances()
                trial.update((p, self._old[p] - importances[p] * step) for p, step in steps.items())
            params = [p for group in self.param_groups for p in group["params"]]
            step = self._steps[optimizer]
            step.tried, step.found = taken, _gradients_at(trial, self._closure, params)
        super()._after_step(optimizer, args, kwargs)


def around(peer: type, base: type) -> Any:
    """A peer's way to be sparse, around an optimizer's steps."""
    return type(f"{peer.__name__}{base.__name__}", (peer, base), {})


def add_dropout(model: nn.Module, p: float) -> None:
    """Dropout before each shortcut of a transformer's blocks, as in GPT-2."""
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            for branch in (module.out, module.mlp):
                branch.register_forward_hook(lambda module, args, y: F.dropout(y, p, module.training))


class GroupNorm:
    """Torch-Pruning's importance of a group as a criterion: the norm of all weights that would go with a unit."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model, self._example = model, example
        self._context: Context | None = None

    def _read(self) -> None:
        import torch_pruning

        model = deepcopy(self._model)  # that package leaves models in evaluation mode, and thaws parameters
        self._dependencies = torch_pruning.DependencyGraph().build_dependency(model, self._example)
        self._importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        self._cut = torch_pruning.prune_conv_out_channels
        self._layers = dict(model.named_modules())

    def __call__(self, group: UnitGroup, context: Context) -> Tensor:
        if context is not self._context:  # of another cut: the model has changed
            self._read()
            self._context = context
        axis = next(axis for axis in group.producers if context.parameters[axis.name].dim() > 1)
        assert torch.equal(axis.units, torch.arange(group.size)), f"{group.name}: a unit is not a channel"
        layer = self._layers[axis.name.removesuffix(".weight")]
        coupled = self._dependencies.get_pruning_group(layer, self._cut, idxs=list(range(group.size)))
        return self._importance(coupled).double()


def make_narrow(model: nn.Module, example: Tensor, seed: int, remove: float, target: str = "macs") -> None:
    """Makes all layers narrower, and initialises them as layers of that width are."""
    ActivationPruner(model, example, {1: remove}, criterion="random", target=target, seed=seed).step()
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
        if isinstance(model, ResNet18) and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# ------------------------------------------------------------------------------- by name

SIGNALS["saliency-shuffled"] = shuffled_saliency
_PLAIN = ("lr", "momentum", "weight_decay")
Options = dict[str, Any]


class Peer(NamedTuple):
    """How a peer is built."""

    arm: str
    """Of the main job, whose options and schedules it has."""
    build: Callable[[nn.Module, Options, Mapping[str, Any], int, int], torch.optim.Optimizer]
    """Takes the model, the options, the settings of the run, the number of steps and the seed."""


def _plain(peer: type, model: nn.Module, options: Options, *own: str, **given: Any) -> torch.optim.Optimizer:
    plain, _ = BASES[options.get("base", SGD)]
    return around(peer, plain)(model, **{k: v for k, v in options.items() if k in (*_PLAIN, *own)}, **given)


def _masked(peer: type, model: nn.Module, options: Options, **given: Any) -> torch.optim.Optimizer:
    _, masked = BASES[options.pop("base", SGD)]
    return around(peer, masked)(model, **options, **given)


def _rewired(grow: str | None) -> Peer:
    def build(
        model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
    ) -> torch.optim.Optimizer:
        given = {"sparsity": settings["sparsity"], "steps": steps, "seed": seed, "grow": grow}
        return _plain(Rewired, model, options, "every", **given)

    return Peer("baseline", build)


def _one_shot(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    epochs = settings["epochs"]
    cut = ramp_epochs(epochs) * steps // epochs
    return _masked(OneShot, model, options, sparsity=settings["sparsity"], cut=cut, seed=seed)


def _targeted(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    given = {"sparsity": settings["sparsity"], "steps": steps, "seed": seed}
    return _plain(TargetedDropout, model, options, "alpha", **given)


def _lookahead_step(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    options = {**options, "importance": "lookahead"}
    per_tensor = options.pop("simplex", "group") == "tensor"
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = StepLookahead(groups if per_tensor else model, seed=seed, **options)
    if per_tensor:
        optimizer.attach(model)
    return optimizer


def _dropout(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    options = dict(options)
    add_dropout(model, options.pop("dropout"))
    return build_optimizer("adamw", model, options, seed)


def _example(model: nn.Module) -> Tensor:
    """An image of Fashion-MNIST."""
    return torch.zeros(1, 1, 28, 28, device=next(model.parameters()).device)


def _torch_pruning(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    CRITERIA["torch-pruning"] = GroupNorm(model, _example(model))  # of the run that begins
    return build_optimizer("baseline", model, options, seed)


def _narrow(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    options = dict(options)
    make_narrow(model, _example(model), seed, **options.pop("narrow"))
    return build_optimizer("baseline", model, options, seed)


PEERS = {
    "rigl": _rewired("gradient"),
    "set": _rewired("random"),
    "static": _rewired(None),
    "one-shot-magnitude": Peer("baseline", _one_shot),
    "targeted-dropout": Peer("baseline", _targeted),
    "gradual-by-densities": Peer(
        "gradual-magnitude", lambda model, o, _, __, seed: _masked(GradualByDensities, model, o, seed=seed)
    ),
    "gradual-per-tensor": Peer(
        "gradual-magnitude", lambda model, o, _, __, seed: _masked(GradualPerTensor, model, o, seed=seed)
    ),
    "lookahead-step": Peer("lookahead", _lookahead_step),
    "adamw-dropout": Peer("adamw", _dropout),
    "torch-pruning": Peer("baseline", _torch_pruning),
    "narrow": Peer("baseline", _narrow),
}
"""Peers by name."""
