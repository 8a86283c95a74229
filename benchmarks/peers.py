"""What the benchmarks compare with that is no arm of the main job."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impact_optim import SIGNALS, ImpactAdamW, ImpactSGD, SparsityReport
from impact_optim.engine import _gradients_at
from impact_optim.experiments.arms import build_optimizer
from impact_optim.experiments.models import TransformerBlock
from impact_optim.sparsity import keep_largest


class RigL(torch.optim.SGD):
    """SGD on a network that is sparse from the start, and moves its connections to where the gradient is large.

    Every ``every`` steps, until three quarters of the training are over, a share of each tensor's weights that falls
    from 0.3 to 0 as a half cosine is replaced: the smallest go, and as many come back at zero where the dense gradient
    is largest. Layers are given their densities by their sizes (ERK), so that the network as a whole has the sparsity.

    Source: Evci et al., Rigging the lottery: making all tickets winners, ICML 2020.
    """

    def __init__(self, model: nn.Module, *, sparsity: float, steps: int, seed: int, every: int = 50, **options: Any):
        super().__init__(model.parameters(), foreach=False, **options)
        self._end, self._every, self._taken = 0.75 * steps, every, 0
        weights = [p for p in model.parameters() if p.dim() >= 2]
        generator = torch.Generator().manual_seed(seed)
        self._masks: dict[Tensor, Tensor] = {}
        with torch.no_grad():
            for p, density in zip(weights, erk_densities(weights, 1 - sparsity), strict=True):
                kept = torch.rand(p.numel(), generator=generator).argsort()[: max(1, round(density * p.numel()))]
                self._masks[p] = torch.zeros(p.numel(), dtype=torch.bool).index_fill_(0, kept, True).view_as(p)
                p.mul_(self._masks[p])

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._taken > 0 and self._taken % self._every == 0 and self._taken < self._end:
            share = 0.15 * (1 + math.cos(math.pi * self._taken / self._end))
            for p, mask in self._masks.items():
                self._rewire(p, mask, share)
        else:
            for p, mask in self._masks.items():
                if p.grad is not None:
                    p.grad.mul_(mask)
            super().step()
        self._taken += 1
        return loss

    @torch.no_grad()
    def _rewire(self, p: Tensor, mask: Tensor, share: float) -> None:
        """Takes the place of a step, as in the source."""
        count = min(int(share * int(mask.sum())), int((~mask).sum()))
        if p.grad is None or count == 0:
            return
        old = mask.clone()
        smallest = p.abs().masked_fill(~mask, math.inf).flatten().topk(count, largest=False).indices
        mask.view(-1)[smallest] = False
        # What has just gone may come back, as it was.
        largest = p.grad.abs().masked_fill(mask, -1.0).flatten().topk(count).indices
        mask.view(-1)[largest] = True
        p.mul_(mask & old)
        if (buffer := self.state.get(p, {}).get("momentum_buffer")) is not None:
            buffer.mul_(mask & old)


def erk_densities(weights: list[Tensor], density: float) -> list[float]:
    """Densities in proportion to (sum of a tensor's sizes) / (their product), at most 1, whose mean is ``density``."""
    raw = [sum(p.shape) / math.prod(p.shape) for p in weights]
    full: set[int] = set()
    while True:
        left = density * sum(p.numel() for p in weights) - sum(weights[i].numel() for i in full)
        scale = left / sum(raw[i] * p.numel() for i, p in enumerate(weights) if i not in full)
        over = {i for i in range(len(weights)) if i not in full and scale * raw[i] > 1}
        if not over:
            return [1.0 if i in full else scale * raw[i] for i in range(len(weights))]
        full |= over


def shuffled_saliency(weight: Tensor, grad: Tensor, step: Tensor | None) -> Tensor:
    """The saliency, handed to other weights of the tensor, always the same ones: what is left is its distribution."""
    return weight.mul(grad).abs_().neg_().reshape(-1).flip(0).view_as(grad)


class GradualLAMP(ImpactSGD):
    """Takes the sizes of weights by their layers, so that magnitude pruning over all layers empties none of them."""

    def sparsify(self, sparsity: Any = None, **options: Any) -> SparsityReport:
        weights = {p: lamp(p.detach()) for group in self.param_groups for p in group["params"] if p.dim() >= 2}
        count = round((1.0 - sparsity) * sum(p.numel() for p in weights))
        return super().sparsify(masks=dict(zip(weights, keep_largest(list(weights.values()), count), strict=True)))


class GradualPerTensor(ImpactAdamW):
    """AdamW whose tensors all lose the same share of their smallest weights, as Zhu & Gupta do."""

    def __init__(self, model: nn.Module, base: str, **options: Any) -> None:
        super().__init__(model, **options)

    def sparsify(self, sparsity: Any = None, **options: Any) -> SparsityReport:
        return super().sparsify(sparsity, scope="tensor", **options)


def lamp(weight: Tensor) -> Tensor:
    """The square of each weight over the sum of the squares of all that are not smaller in its tensor.

    Source: Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, ICLR 2021.
    """
    squares = weight.double().square().flatten()
    ordered, order = squares.sort(descending=True)
    scores = torch.empty_like(squares)
    scores[order] = ordered / ordered.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return scores.view_as(weight)


class GradientLookahead(ImpactSGD):
    """``"lookahead"`` that tries the step of plain SGD, whatever momentum is: x - w ⊙ γg, as the source writes it."""

    def _look_back(self, optimizer: torch.optim.Optimizer, step: Any) -> None:
        trial, judged = {}, {}
        for simplex in self._simplexes[optimizer]:
            importances = simplex.importances()
            judged[simplex] = {
                p: simplex.group["lr"] * p.grad for p in simplex.members if p in step.before and p.grad is not None
            }
            trial.update((p, step.before[p] - importances[p] * d) for p, d in judged[simplex].items())
        params = [p for group in self.param_groups for p in group["params"]]
        found = _gradients_at(trial, step.closure, params)
        for simplex, steps in judged.items():
            simplex.update(found, steps)


def add_dropout(model: nn.Module, p: float) -> None:
    """Dropout before each shortcut of a transformer's blocks, as in GPT-2."""
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            for branch in (module.out, module.mlp):
                branch.register_forward_hook(lambda module, args, y: F.dropout(y, p, module.training))


# ------------------------------------------------------------------------------- by name

SIGNALS["saliency-shuffled"] = shuffled_saliency
_SGD = ("lr", "momentum", "weight_decay")
Options = dict[str, Any]


class Peer(NamedTuple):
    """How a peer is built."""

    arm: str
    """Of the main job, whose options and schedules it has."""
    build: Callable[[nn.Module, Options, Mapping[str, Any], int, int], torch.optim.Optimizer]
    """Takes the model, the options, the settings of the run, the number of steps and the seed."""


def _rigl(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    options = {name: value for name, value in options.items() if name in (*_SGD, "every")}
    return RigL(model, sparsity=settings["sparsity"], steps=steps, seed=seed, **options)


def _lookahead(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    options = {**options, "importance": "lookahead"}
    per_tensor = options.pop("simplex", "group") == "tensor"
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = GradientLookahead(groups if per_tensor else model, seed=seed, **options)
    if per_tensor:
        optimizer.attach(model)
    return optimizer


def _dropout(
    model: nn.Module, options: Options, settings: Mapping[str, Any], steps: int, seed: int
) -> torch.optim.Optimizer:
    options = dict(options)
    add_dropout(model, options.pop("dropout"))
    return build_optimizer("adamw", model, options, seed)


PEERS = {
    "rigl": Peer("baseline", _rigl),
    "gradual-lamp": Peer(
        "gradual-magnitude", lambda model, o, settings, steps, seed: GradualLAMP(model, seed=seed, **o)
    ),
    "gradual-per-tensor": Peer(
        "gradual-magnitude", lambda model, o, _, __, seed: GradualPerTensor(model, seed=seed, **o)
    ),
    "lookahead-gradient": Peer("lookahead", _lookahead),
    "adamw-dropout": Peer("adamw", _dropout),
}
"""Peers by name."""
