"""Importances on a scaled simplex: the mirror step, water-filling and read-outs, as pure functions.

A simplex holds ``n`` weights, spread over one or several tensors. Its point is ``w`` with ``w >= 0`` and
``sum(w) = n``. The functions that take ``log_w`` allow it to be off by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import blocks, sample

# exp() of a log-importance, summed over 1e10 weights, stays inside float32, and no importance becomes a
# zero that no step could lift again: exp(-60) is 1e-26.
LOG_BOUND = 60.0

CLIP = 10.0  # |h| counts up to this many means, and one batch raises the mean by no more than it

SCALE_DECAY = 0.9  # of the running mean of |h|

SAMPLE = 4096  # weights; the normaliser of a larger simplex is that of a sample of this size

_ROUNDING = 1e-9  # what is left of a budget that the floor takes up

LARGEST_SAMPLE = 65536  # from whose level that of all is solved
_NEAR = 1 / 64  # of a level: how far a Newton step may lead that is the last
_TOLERANCE = 1e-3  # of what is dropped or kept
NEWTON_STEPS = 4  # on a device that must not be waited for
_MOST_STEPS = 200  # on a CPU, which stops when the budget is met


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
    """
    return log_mean([t.float().exp() for t in log_w], sum(t.numel() for t in log_w))


def log_mean(w: Sequence[Tensor], n: int | Tensor) -> Tensor:
    """The log of the mean of w over n weights, a float32 scalar on the first tensor's device."""
    return torch.log(total([part.sum() for t in w for (part,) in blocks(t)]) / n).float()


def water_level(log_w: Sequence[Tensor], mean: float) -> Tensor:
    r"""The level c at which :math:`\min(1, c \, w)` has a given mean over the simplex.

    Args:
        log_w: the log-importances of the simplex, within ±``LOG_BOUND``.
        mean: the target, in (0, 1).

    Returns:
        log c, a float32 scalar on the first tensor's device; see :func:`fill_level`.

    Example:
        >>> c = water_level([torch.tensor([4.0, 1.0, 1.0]).log()], mean=2 / 3).exp()
        >>> c  # min(1, c·w) = (1, 1/2, 1/2)
        tensor(0.5000)
    """
    return fill_level([t.float().exp() for t in log_w], mean).log().float()


def fill_level(w: Sequence[Tensor], mean: float, alive: Tensor | None = None) -> Tensor:
    r"""The level c at which :math:`\min(1, c \, w)` has a given mean over the weights with w > 0.

    The level of a sample, of up to 65536 weights, is exact, and Newton steps lead on to that of all. The mean is a
    concave, piecewise linear function of c: a step is exact but for the weights with c·w near 1, whose number bounds
    what is left. On a CPU, steps go on until that is 1e-3 of what is dropped or kept, mostly one or two; elsewhere
    there are four, since to look would wait for the device.

    Args:
        w: the weights of the simplex, float32, not negative.
        mean: the target, in (0, 1).
        alive: how many weights are above 0, a scalar tensor; by default all.

    Returns:
        c, a float64 scalar on the first tensor's device.
    """
    on_cpu = _may_wait(w)
    n = sum(t.numel() for t in w)
    size = level_sample(n) if on_cpu else LARGEST_SAMPLE
    level = sorted_level(sample(w, size), mean)
    if n <= size:
        return level
    live = torch.full((), n, dtype=torch.float64, device=level.device) if alive is None else alive.double()
    tolerance = _TOLERANCE * min(mean, 1.0 - mean) * float(live) if on_cpu else 0.0
    closest = math.inf
    for _ in range(_MOST_STEPS if on_cpu else NEWTON_STEPS):
        missing, filled, opened, *near = _fill(w, level, alive is not None, on_cpu)
        # Of the two, what is small is accurate.
        error = mean * live - filled if mean < 0.5 else missing - (1.0 - mean) * live
        slope = opened - missing if mean >= 0.5 else filled - (live - opened)
        before, ratio = level, (1.0 + error / slope.clamp_min(1e-30)).clamp(1 / 8, 8)
        if on_cpu:
            if float(error) >= closest and float(error) <= float(slope):
                break  # a step from below comes closer, but for rounding
            closest = float(error) if float(error) > 0.0 else closest
        level = level * ratio
        if on_cpu:
            change = abs(float(ratio) - 1.0)
            if (change <= _NEAR and float(near[0]) * change <= tolerance) or level.float() == before.float():
                break
    return level


def level_sample(n: int) -> int:
    """The size of the sample from whose level that of n weights is solved."""
    return max(SAMPLE, min(n // 64, LARGEST_SAMPLE))


def _fill(w: Sequence[Tensor], level: Tensor, some_are_dead: bool, counts_near: bool) -> list[Tensor]:
    """Of the weights above 0: the sums of max(0, 1 - cw) and min(1, cw), how many are below 1, and how many near it."""
    sums: list[list[Tensor]] = [[], [], [], *([[]] if counts_near else [])]
    for t in w:
        c = level.to(t.device, torch.float32)
        for (part,) in blocks(t):
            filled = part * c
            gap = 1.0 - filled
            if counts_near:
                sums[3].append((gap.abs() <= _NEAR).sum())
            gap.clamp_(min=0.0)
            if some_are_dead:
                gap.mul_(part > 0)
            sums[0].append(gap.sum())
            sums[1].append(filled.clamp_(max=1.0).sum())
            sums[2].append(gap.sign_().sum())  # faster than to count what is not zero
    return [total(parts) for parts in sums]


def _may_wait(tensors: Sequence[Tensor]) -> bool:
    """Whether the host may look at numbers: it does not wait for a device then."""
    return all(t.device.type == "cpu" for t in tensors)


def sorted_level(w: Tensor, mean: float) -> Tensor:
    """The level of one dimension of weights, by sorting."""
    w = w.double().sort(descending=True).values
    # With the k largest full, the others carry the rest: c_k = (mean·n - k) / (their sum). It is right for the first
    # k that leaves the next largest below 1.
    n = (w > 0).sum(dtype=torch.float64)
    open_share = mean * n - torch.arange(len(w), dtype=torch.float64, device=w.device)
    tail = w.flip(0).cumsum(0).flip(0)
    level = open_share.clamp_min(1e-300) / tail.clamp_min(1e-300)
    k = (level * w <= 1.0 + 1e-9).to(torch.uint8).argmax()
    return level.gather(0, k.view(1)).squeeze(0)  # to index by a scalar would wait for the device


def keep_probability(filled: Tensor, keep_floor: float = 0.0, drop: str = "unimportant") -> Tensor:
    r"""Keep probabilities whose mean over the simplex is ``1 - drop_rate``, in place of ``filled``.

    .. math::
        \pi = f + (1 - f) \min(1, c \, w) \quad\text{or, for drop="important",}\quad
        \pi = 1 - (1 - f) \min(1, c \, w)

    with c the level of :func:`fill_level` for the target :func:`fill_target`. Clipping :math:`\min(1, \alpha w)`
    without solving for the level misses the budget.

    Args:
        filled: c·w, any shape; is overwritten.
        keep_floor: f, the smallest keep probability, at most ``1 - drop_rate``.
        drop: ``"unimportant"`` or ``"important"``.
    """
    filled.clamp_(max=1.0).mul_(1.0 - keep_floor)
    return filled.add_(keep_floor) if drop == "unimportant" else filled.neg_().add_(1.0)


def fill_target(drop_rate: float, keep_floor: float, drop: str) -> float:
    """The mean of min(1, c·w) that gives :func:`keep_probability` its budget."""
    share = drop_rate if drop == "important" else 1.0 - drop_rate - keep_floor
    target = share / (1.0 - keep_floor)
    return 0.0 if target < _ROUNDING else 1.0 if target > 1.0 - _ROUNDING else target


def next_scale(scale: Tensor, mean: Tensor) -> Tensor:
    """The running mean of |h| after a step whose mean is this, float32; 0 stands for none yet."""
    mean = mean.float().nan_to_num(0.0, 0.0, 0.0)  # a sum of finite signals may still overflow
    return torch.where(scale > 0, scale.lerp(mean.minimum(CLIP * scale), 1 - SCALE_DECAY), mean)


def perplexity(w: Tensor) -> Tensor:
    r"""The effective number of weights, :math:`\exp(-\sum p \log p)` with :math:`p = w / \sum w`.

    It is n for uniform importances and 1 when a single weight holds everything.
    """
    p = w.double() / w.double().sum()
    return torch.special.entr(p).sum().exp()


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of scalars on any devices, float64, on the first one's."""
    if len(parts) == 1:
        return parts[0].double()
    return torch.stack([part.to(parts[0].device, non_blocking=True) for part in parts]).sum(dtype=torch.float64)
