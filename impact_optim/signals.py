"""Importance signals: what a weight's importance goes down with.

Each is one function ``signal(weight, grad, step) -> h`` of float32 tensors of one shape, with

- ``weight``: the dense weights x, as they were when the gradient was taken;
- ``grad``: g, the gradient at the weights that the forward pass saw, dense also where a weight was dropped;
- ``step``: γd, the last step of the base optimizer, old weights minus new ones, if the signal is in
  :data:`READS_STEP`; of ``"lookahead"`` γg, the step that was tried; else ``None``.

The mirror step lowers the importance where h is positive and raises it where h is negative. Only ratios matter: h is
divided by its running mean absolute value.

A signal of your own is one line, usable at once as ``ImpactSGD(..., importance="mine")``::

    impact_optim.SIGNALS["mine"] = lambda weight, grad, step: -weight.square() * grad.square()

Steps with it take the tensor code: the kernels know those of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Signal = Callable[[Tensor, Tensor, Any], Tensor]


def hypergradient(weight: Tensor, grad: Tensor, step: Tensor) -> Tensor:
    r""":math:`h = -\gamma \, d \odot g`: the step just taken, times the gradient that it led to.

    It is the derivative of L(x - w ⊙ γd) in w. ``"lookahead"`` is the source's own form: d is the gradient, and the
    same batch is evaluated again at x - w ⊙ γd, under the same masks. ``"hypergradient"`` takes the last step of the
    base for γd, and lets the next batch judge it, which costs nothing and is noisier.

    Source: A. V. Rebrikov, sparsification by weight importance, MIPT 2024; as in Baydin et al., Online learning rate
    adaptation with hypergradient descent, ICLR 2018.
    """
    return step.mul(grad).neg_()


def saliency(weight: Tensor, grad: Tensor, step: Tensor | None) -> Tensor:
    r""":math:`h = -|x \odot g|`: the first-order cost of setting the weight to zero.

    Source: Mozer & Smolensky, Skeletonization, NIPS 1988; Molchanov et al., ICLR 2017.
    """
    return weight.mul(grad).abs_().neg_()


def fisher(weight: Tensor, grad: Tensor, step: Tensor | None) -> Tensor:
    r""":math:`h = -g^2`: the empirical Fisher diagonal, and what ``lookahead`` tends to for a small step."""
    return grad.square().neg_()


def magnitude(weight: Tensor, grad: Tensor, step: Tensor | None) -> Tensor:
    r""":math:`h = -|x|`: the ablation that every other signal has to beat."""
    return weight.abs().neg_()


SIGNALS: dict[str, Signal] = {
    "saliency": saliency,
    "lookahead": hypergradient,  # the same formula
    "hypergradient": hypergradient,
    "fisher": fisher,
    "magnitude": magnitude,
}
"""Signals by name. ``"uniform"`` is not among them: it has no signal and keeps no importances."""

READS_STEP = {"hypergradient"}
"""Names of the signals that read the last step, which is kept from one step to the next, 4 bytes a weight; add the name
of your own signal if it reads ``step``."""

ELEMENTWISE: set[Signal] = set(SIGNALS.values())
"""Signals that may be taken of several tensors at once, or of parts of them. One of your own sees whole tensors."""
