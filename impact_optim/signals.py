"""Importance signals: what a weight's importance goes down with.

Each is one function ``signal(weight, grad, direction, lr) -> h`` of one tensor, with

- ``weight``: the dense weights x, as they were when the gradient was taken;
- ``grad``: g, the gradient at the weights that the forward pass saw, dense also where a weight was dropped;
- ``direction``: d, the momentum buffer whose step led to these weights, or ``None`` before there is one;
- ``lr``: the learning rate γ, a float or a scalar tensor;

all in float32. The mirror step lowers the importance where h is positive and raises it where h is negative. Only
ratios matter: the optimizer divides h by its running mean absolute value. ``None`` stands for "no signal yet".

A signal of your own is one line, usable at once as ``ImpactSGD(..., importance="mine")``::

    impact_optim.SIGNALS["mine"] = lambda weight, grad, direction, lr: -weight.square() * grad.square()
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Signal = Callable[[Tensor, Tensor, "Tensor | None", "float | Tensor"], "Tensor | None"]


def hypergradient(weight: Tensor, grad: Tensor, direction: Tensor | None, lr: float | Tensor) -> Tensor | None:
    r""":math:`h = -\gamma \, d \odot g`: the step just taken, times the gradient it led to.

    It is the derivative of L(x - w ⊙ γd) in w, judged by the next batch.

    Source: A. V. Rebrikov, sparsification by weight importance, MIPT 2024; as in Baydin et al., Online learning rate
    adaptation with hypergradient descent, ICLR 2018.
    """
    return None if direction is None else direction.mul(grad).mul_(-lr)


def saliency(weight: Tensor, grad: Tensor, direction: Tensor | None, lr: float | Tensor) -> Tensor:
    r""":math:`h = -|x \odot g|`: the first-order cost of setting the weight to zero.

    Source: Mozer & Smolensky, Skeletonization, NIPS 1988; Molchanov et al., ICLR 2017.
    """
    return weight.mul(grad).abs_().neg_()


def fisher(weight: Tensor, grad: Tensor, direction: Tensor | None, lr: float | Tensor) -> Tensor:
    r""":math:`h = -g^2`: the empirical Fisher diagonal, and what ``lookahead`` tends to for a small step."""
    return grad.square().neg_()


def magnitude(weight: Tensor, grad: Tensor, direction: Tensor | None, lr: float | Tensor) -> Tensor:
    r""":math:`h = -|x|`: the ablation that every other signal has to beat."""
    return weight.abs().neg_()


SIGNALS: dict[str, Signal] = {
    "hypergradient": hypergradient,
    "lookahead": hypergradient,  # the same formula; ImpactSGD.step evaluates it on the batch of the step itself
    "saliency": saliency,
    "fisher": fisher,
    "magnitude": magnitude,
}
"""Signals by name. ``"uniform"`` is not among them: it has no signal and keeps no importances."""

_READS: dict[Signal, tuple[bool, bool, bool]] = {
    hypergradient: (False, True, True),
    saliency: (True, True, False),
    fisher: (False, True, False),
    magnitude: (True, False, False),
}


def reads(name: str) -> tuple[bool, bool, bool]:
    """Whether a signal reads the weight, the gradient and the direction. One of your own may read them all."""
    return _READS.get(SIGNALS[name], (True, True, True))
