"""The importances of one simplex: the keep probabilities that follow from them, and how a step moves them.

What :mod:`impact_optim.simplex` says in formulas is here put together for the tensors of a simplex, which may lie on
several devices, be walked through block by block, and lack gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import blocks, flatten, sample, unflatten
from .sampling import stochastic_round
from .simplex import (
    CLIP,
    LOG_BOUND,
    SAMPLE,
    fill_target,
    keep_probability,
    log_mean_exp,
    mirror_step,
    next_water_level,
    total,
)

_SCALE_DECAY = 0.9  # of the running mean of |h|


class Budget(NamedTuple):
    """How the keep probabilities of one simplex follow from its importances.

    Without ``log_w`` they are all the same.
    """

    members: list[Tensor]
    drop_rate: float
    keep_floor: float
    drop: str
    log_w: list[Tensor] | None = None
    log_level: Tensor | None = None
    """log c, relative to ``log_w`` as it stands."""
    normalizer: Tensor | float = 0.0
    """What to subtract from ``log_w`` for mean(w) = 1."""
    is_new: bool = False
    """Whether the level was solved for, and is not the one that the step before left."""

    @property
    def target(self) -> float:
        return fill_target(self.drop_rate, self.keep_floor, self.drop)

    @property
    def offset(self) -> float:
        """π = offset + slope · min(1, c·w)."""
        if self.log_level is None:
            return 1.0 - self.drop_rate
        return self.keep_floor if self.drop == "unimportant" else 1.0

    @property
    def slope(self) -> float:
        if self.log_level is None:
            return 0.0
        return (1.0 if self.drop == "unimportant" else -1.0) * (1.0 - self.keep_floor)

    def keep(self, k: int) -> Iterator[Tensor]:
        """π of member k, block by block in the order of its memory."""
        p = self.members[k]
        if self.log_w is None or self.log_level is None:
            yield from repeat(torch.full((), 1.0 - self.drop_rate, dtype=torch.float32, device=p.device))
        else:
            for (log_w,) in blocks(flatten(self.log_w[k], p)):
                yield keep_probability(
                    log_w,
                    self.log_level.to(p.device),
                    drop_rate=self.drop_rate,
                    keep_floor=self.keep_floor,
                    drop=self.drop,
                )

    def keep_probability(self, k: int) -> Tensor:
        """π of member k, of its shape."""
        p = self.members[k]
        if self.log_w is None:
            return torch.full_like(p, 1.0 - self.drop_rate, dtype=torch.float32)
        return unflatten(torch.cat(list(self.keep(k))), p)


@dataclass
class Simplex:
    """The importances of one simplex, while a step changes them.

    Args:
        members: the parameters of the simplex.
        positions: where each of them stands among the parameters of the step; ``None`` for one without a gradient.
        log_importances: log w of each, up to ``log_normalizer``.
        log_normalizer: what to subtract from them for mean(w) = 1.
        signal_scale: the running mean of |h|; 0 before the first signal.
    """

    members: list[Tensor]
    positions: list[int | None]
    log_importances: list[Tensor]
    log_normalizer: Tensor
    signal_scale: Tensor
    water_level: Tensor | None = None
    water_error: Tensor | None = None
    water_target: float = 0.0
    rounding: list[Iterator[Tensor]] | None = None
    """Random bits for each member, block by block, where the log-importances are stored in bfloat16."""

    def __post_init__(self) -> None:
        # No signal is used before its scale is known: the first one only sets it.
        known = self.signal_scale > torch.finfo(torch.float32).tiny
        self.inverse_scale = torch.where(known, self.signal_scale.reciprocal(), 0.0)
        self.next_level: Tensor | None = None  # of the next masks, relative to the log-importances after the step
        self._absolute: list[Tensor] = []
        self._raised: list[Tensor] = []
        self._filled: list[Tensor] = []
        self._counted = 0
        self._descended: set[int] = set()

    @property
    def has_moved(self) -> bool:
        return bool(self._descended)

    @property
    def follows(self) -> bool:
        """Whether the water level of the next masks is known before the step."""
        return self.next_level is not None

    def weights(self, k: int) -> Tensor:
        """w of member k."""
        log_w = self.log_importances[k].float()
        return (log_w - self.log_normalizer.to(log_w.device)).exp_()

    @torch.no_grad()
    def look_ahead(self, h: Tensor | None, importance_lr: float, kl_weight: float) -> None:
        """Finds the water level of the next masks before the step, from the signal of a sample of the weights.

        Then one pass over the weights is all that a step needs: what it sums up corrects the level after.
        """
        if h is not None and self.water_level is not None and self.water_error is not None:
            old = sample(self.log_importances, SAMPLE, self.members) - self.log_normalizer
            u = _finite(h).mul_(self.inverse_scale).clamp_(-CLIP, CLIP)
            new = mirror_step(old, u, importance_lr, kl_weight)
            # The bound keeps the sums of a step inside float32.
            self.next_level = next_water_level(old, new, self.water_level, self.water_error).clamp_(-25.0, 25.0)

    @torch.no_grad()
    def descend(self, k: int, h: Tensor | None, log_w: Tensor, importance_lr: float, kl_weight: float) -> None:
        """The mirror step of member k, or of a block of it."""
        if h is not None:
            u = self._unitless(h)
            normalizer = self.log_normalizer.to(log_w.device)
            self._store(k, log_w, mirror_step(log_w.float(), u, importance_lr, kl_weight, normalizer))
            self._sum_up(log_w.float())
            self._descended.add(k)

    @torch.no_grad()
    def descend_all(self, signals: dict[int, Tensor | None], importance_lr: float, kl_weight: float) -> None:
        """The mirror steps of all members, in fewer kernels."""
        ready = {k: h for k, h in signals.items() if h is not None}
        if self.rounding is not None or len({log_w.device for log_w in self.log_importances}) > 1:
            for k, h in ready.items():
                self.descend(k, h, self.log_importances[k], importance_lr, kl_weight)
        elif ready:
            log_w = [self.log_importances[k] for k in ready]
            u = [self._unitless(h) for h in ready.values()]
            shrink = 1.0 / (1.0 + importance_lr * kl_weight)
            torch._foreach_sub_(log_w, [self.log_normalizer] * len(log_w))  # one tensor for all would be read back
            torch._foreach_mul_(log_w, shrink)
            torch._foreach_sub_(log_w, u, alpha=importance_lr * shrink)
            torch._foreach_clamp_min_(log_w, -LOG_BOUND)
            torch._foreach_clamp_max_(log_w, LOG_BOUND)
            for t in log_w:
                self._sum_up(t)
            self._descended.update(ready)

    def account(self, k: int, sums: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Takes note of a mirror step of member k that a fused pass has made, by the sums of its rows."""
        for absolute, raised, filled in sums:
            self._absolute.append(absolute)
            self._raised.append(raised)
            if self.next_level is not None:
                self._filled.append(filled)
        self._counted += self.members[k].numel()
        self._descended.add(k)

    def _store(self, k: int, log_w: Tensor, new: Tensor) -> None:
        """Keeps new log-importances of member k, or of its next block."""
        if self.rounding is not None:
            bits = [next(self.rounding[k])]
            while sum(t.numel() for t in bits) < log_w.numel():  # not by blocks: the layouts differ
                bits.append(next(self.rounding[k]))
            flat = bits[0] if len(bits) == 1 else torch.cat(bits)
            new = stochastic_round(new, flat if log_w.dim() == 1 else unflatten(flat, self.members[k]))
        log_w.copy_(new)

    def _unitless(self, h: Tensor) -> Tensor:
        h = _finite(h)
        self._absolute.append(h.abs().sum())  # a norm takes four times as long on a CPU
        self._counted += h.numel()
        return h.mul_(self.inverse_scale.to(h.device)).clamp_(-CLIP, CLIP)

    def _sum_up(self, log_w: Tensor) -> None:
        w = log_w.exp() if self.next_level is None else (log_w + self.next_level.to(log_w.device)).exp_()
        self._raised.append(w.sum())
        if self.next_level is not None:
            self._filled.append(w.clamp_(max=1.0).sum())

    @torch.no_grad()
    def finish(self) -> None:
        """The scalars for the next step."""
        if not self._descended:
            return
        idle = {k: log_w for k, log_w in enumerate(self.log_importances) if k not in self._descended}
        n, n_idle = (sum(t.numel() for t in ts) for ts in (self.log_importances, idle.values()))
        n_moved = n - n_idle
        device, scale = self.signal_scale.device, self.signal_scale
        # The importances of a tensor without a signal stay as they are; those of the others keep their total.
        normalizer = (total(self._raised).to(device) / n_moved).log()
        if self.next_level is not None:
            normalizer = normalizer - self.next_level.to(device)
        if idle:
            total_idle = n_idle * (log_mean_exp(list(idle.values())).to(device) - self.log_normalizer).exp()
            normalizer = normalizer - ((n - total_idle).clamp_min(torch.finfo(torch.float32).tiny) / n_moved).log()
            for k, log_w in idle.items():
                self._store(k, log_w, log_w.float() + (normalizer - self.log_normalizer).to(log_w.device))
        self.log_normalizer = normalizer
        if self.next_level is None:
            self.water_target = 0.0  # no level is known any more
        else:
            self.water_level = self.next_level.to(device) + normalizer
            self.water_error = total(self._filled).to(device) / n - self.water_target
        mean = total(self._absolute).to(device) / self._counted
        mean = mean.nan_to_num_(0.0, 0.0, 0.0)  # the sum of finite signals may still overflow
        self.signal_scale = torch.where(scale > 0, scale.lerp(mean.minimum(CLIP * scale), 1 - _SCALE_DECAY), mean)


def _finite(h: Tensor) -> Tensor:
    return h.nan_to_num(0.0, 0.0, 0.0)  # not in place: a signal may be one of its own arguments
