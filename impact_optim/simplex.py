"""Importances on a scaled simplex: the mirror step, the normaliser, water-filling and read-outs.

A simplex holds ``n`` weights, spread over one or several tensors. Its point is ``w`` with ``w >= 0`` and
``sum(w) = n``; everything here works on ``log_w``, which may be off by a constant that the caller carries
(:func:`log_mean_exp`), so that a step needs one pass over memory and no second one to normalise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import blocks, sample

# exp() of a log-importance, summed over 1e10 weights, stays inside float32, and no importance becomes a
# zero that no step could lift again: exp(-60) is 1e-26.
LOG_BOUND = 60.0

CLIP = 10.0  # |h| counts up to this many means, and one batch raises the mean by no more than it

SAMPLE = 4096  # weights; larger simplexes are looked at through a sample of that size


def mirror_step(
    log_w: Tensor, signal: Tensor, lr: float, kl_weight: float, log_normalizer: Tensor | float = 0.0
) -> Tensor:
    r"""One step of KL-regularised mirror descent on the simplex, in the log domain and before normalisation.

    Solves

    .. math::
        \min_{w} \; \langle h, w \rangle + \lambda \, \mathrm{KL}(w \,\|\, 1)
        + \tfrac{1}{\eta} \, \mathrm{KL}(w \,\|\, w_{old})
        \quad \text{on} \quad w \ge 0, \; \textstyle\sum w = n,

    whose solution is :math:`\log w = (\log w_{old} - \eta h) / (1 + \eta\lambda) + \mathrm{const}`. The constant is
    left to the caller, who gets it from :func:`log_mean_exp` and hands it back as ``log_normalizer``.

    Args:
        log_w: log-importances, any shape, float32.
        signal: h, the derivative of the loss in w; same shape, finite.
        lr: η ≥ 0.
        kl_weight: λ ≥ 0, the temperature: a constant h leads to w ∝ exp(-h/λ).
        log_normalizer: what must be subtracted from ``log_w`` for mean(w) = 1.

    Returns:
        New log-importances, within ±``LOG_BOUND``.

    Source: Beck & Teboulle, Mirror descent and nonlinear projected subgradient methods, 2003.

    Example:
        >>> mirror_step(torch.zeros(2), torch.tensor([1.0, -1.0]), lr=1.0, kl_weight=1.0)
        tensor([-0.5000,  0.5000])
    """
    shrink = 1.0 / (1.0 + lr * kl_weight)
    return (log_w - log_normalizer).mul_(shrink).sub_(signal, alpha=lr * shrink).clamp_(-LOG_BOUND, LOG_BOUND)


def log_mean_exp(log_w: Sequence[Tensor]) -> Tensor:
    r"""The normaliser :math:`\log \frac{1}{n} \sum \exp(\log w)` of a simplex, a scalar on the first tensor's device.

    Subtracting it from every ``log_w`` makes mean(w) = 1. Since ``|log_w| <= LOG_BOUND`` no maximum has to be
    subtracted first.

    Args:
        log_w: the tensors of the simplex, at least one of them not empty.
    """
    return torch.log(total([t.float().exp().sum() for t in log_w]) / _numel(log_w))


def water_level(log_w: Sequence[Tensor], mean: float) -> Tensor:
    r"""The level c at which :math:`\min(1, c \, w)` has a given mean over the simplex.

    Up to 4096 weights are sorted, and the level is exact. With more, four Newton steps begin at the level of a sample:
    the mean is a concave, piecewise linear function of c, so that a step lands at or below the root, and the next ones
    rise to it.

    Args:
        log_w: the tensors of the simplex.
        mean: the target, in (0, 1).

    Returns:
        log c, a float32 scalar on the first tensor's device.

    Example:
        >>> c = water_level([torch.tensor([4.0, 1.0, 1.0]).log()], mean=2 / 3).exp()
        >>> c  # min(1, c·w) = (1, 1/2, 1/2)
        tensor(0.5000)
    """
    level = _exact_level(sample(log_w, SAMPLE), mean)
    return level if _numel(log_w) <= SAMPLE else _newton(log_w, mean, level, steps=4)


def next_water_level(old: Tensor, new: Tensor, log_level: Tensor, error: Tensor | float = 0.0) -> Tensor:
    r"""The level of a simplex that takes a small step, from a sample of it before and after.

    Solves :math:`\overline{\min(1, c' w')} = \overline{\min(1, c \, w)} - e` over the sample, so that what the
    sample says of the change is used and what it says of the level is not: its error is that of the mean *change* of
    4096 weights, which for steps of 1% is about 1e-4, and does not add up when e is measured at every step.

    Args:
        old: log w of the sample, one dimension.
        new: log w of the same weights after the step; may be off by a constant.
        log_level: log c, relative to ``old``.
        error: e, by how much the mean over the whole simplex was too high at that level.

    Returns:
        log c', relative to ``new`` as given.
    """
    mean = (old + log_level).clamp_(max=0.0).exp_().mean() - error
    start = log_level + old.mean() - new.mean()  # most of a step shifts all alike
    return _newton([new], mean, start, steps=3)


def _newton(log_w: Sequence[Tensor], mean: Tensor | float, log_level: Tensor, steps: int) -> Tensor:
    n = _numel(log_w)
    for _ in range(steps):
        full, rest = [], []
        for t in log_w:
            for (part,) in blocks(t):
                filled = (part.float() + log_level.to(t.device)).exp_()
                is_full = filled >= 1.0
                full.append(is_full.sum(dtype=torch.float32))
                rest.append(filled.masked_fill_(is_full, 0.0).sum())
        # Newton on a linear piece: the open part has to carry what the full part does not. The bounds keep a start
        # on the wrong side of a kink (more full than the target, or nothing open) on its way.
        ratio = (mean * n - total(full)) / total(rest).clamp_min(1e-30)
        log_level = log_level + ratio.clamp(1 / 8, 8).log()
    return log_level


def _exact_level(log_w: Tensor, mean: float) -> Tensor:
    """log c by sorting."""
    log_w = log_w.sort(descending=True).values.double()
    # With the k largest full, the others carry the rest: c_k = (mean·n - k) / (their sum). It is right for the first
    # k that leaves the next largest below 1.
    open_share = mean * log_w.numel() - torch.arange(log_w.numel(), dtype=torch.float64, device=log_w.device)
    level = open_share.clamp_min(1e-30).log() - log_w.flip(0).logcumsumexp(0).flip(0)
    k = (level + log_w <= 1e-9).to(torch.uint8).argmax()
    return level.gather(0, k.view(1)).squeeze(0).float()  # to index by a scalar would wait for the device


def keep_probability(
    log_w: Tensor, log_level: Tensor | float, *, drop_rate: float, keep_floor: float = 0.0, drop: str = "unimportant"
) -> Tensor:
    r"""Keep probabilities :math:`\pi` whose mean over the simplex is ``1 - drop_rate``.

    .. math::
        \pi = f + (1 - f) \min(1, c \, w) \quad\text{or, for drop="important",}\quad
        \pi = 1 - (1 - f) \min(1, c \, w)

    with f the floor and c the level of :func:`water_level` for the target :func:`fill_target`. Clipping
    :math:`\min(1, \alpha w)` without solving for the level misses the budget.

    Args:
        log_w: log-importances, any shape.
        log_level: log c, relative to ``log_w`` as given.
        drop_rate: expected share of dropped weights.
        keep_floor: smallest keep probability, at most ``1 - drop_rate``.
        drop: ``"unimportant"`` or ``"important"``.
    """
    target = fill_target(drop_rate, keep_floor, drop)
    if target <= 0.0 or target >= 1.0:  # the floor is the whole budget, or nothing is dropped
        return torch.full_like(log_w, 1.0 - drop_rate, dtype=torch.float32)
    filled = (log_w.float() + log_level).exp_().clamp_(max=1.0).mul_(1.0 - keep_floor)
    return filled.add_(keep_floor) if drop == "unimportant" else filled.neg_().add_(1.0)


def fill_target(drop_rate: float, keep_floor: float, drop: str) -> float:
    """The mean of min(1, c·w) that gives :func:`keep_probability` its budget."""
    share = drop_rate if drop == "important" else 1.0 - drop_rate - keep_floor
    return float(min(max(share / (1.0 - keep_floor), 0.0), 1.0))


def perplexity(log_w: Sequence[Tensor]) -> Tensor:
    r"""The effective number of weights of a simplex, :math:`\exp(-\sum p \log p)` with :math:`p = w / \sum w`.

    It is n for uniform importances and 1 when a single weight holds everything.
    """
    log_p = torch.cat([t.reshape(-1).double().cpu() for t in log_w])
    log_p = log_p - torch.logsumexp(log_p, 0)
    return torch.exp(-(log_p.exp() * log_p).sum())


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of all elements of tensors on any devices, float32, on the first one's."""
    device = parts[0].device
    if len(parts) == 1:
        return parts[0].sum(dtype=torch.float64).float()
    flat = [part.to(device, non_blocking=True).reshape(-1) for part in parts]
    return torch.cat(flat).sum(dtype=torch.float64).float()


def _numel(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
