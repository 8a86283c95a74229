"""What the study compares with that is no arm of the main job: RigL, LAMP, and a control for the learnt signals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from impact_optim import ImpactSGD


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


def shuffled_fisher(weight: Tensor, grad: Tensor, step: Tensor | None) -> Tensor:
    """The Fisher signal, handed to other weights of the tensor, always the same ones: what is left is its
    distribution."""
    return -grad.square().reshape(-1).flip(0).view_as(grad)


class GradualLAMP(ImpactSGD):
    """Takes the sizes of weights by their layers, so that magnitude pruning over all layers empties none of them."""

    def _scores(self, by: str, params: list[Tensor] | None) -> dict[Tensor, Tensor]:
        sizes = super()._scores(by, params)  # -inf for what is pruned already
        return {p: lamp(p.detach()).float().masked_fill(size == -math.inf, -math.inf) for p, size in sizes.items()}


def lamp(weight: Tensor) -> Tensor:
    """The square of each weight over the sum of the squares of all that are not smaller in its tensor.

    Source: Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, ICLR 2021.
    """
    squares = weight.double().square().flatten()
    ordered, order = squares.sort(descending=True)
    scores = torch.empty_like(squares)
    scores[order] = ordered / ordered.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return scores.view_as(weight)
