"""A slow, obvious version of the optimizers in float64 NumPy, written from the formulas.

It shares no code with the package. One parameter group; gradients and masks come from outside. The importances do not
know the step that they go around: SGD and AdamW are a function each.
"""

from __future__ import annotations

import numpy as np


class SGD:
    """d ← g + weight_decay·x, averaged with momentum; x ← x − lr·d."""

    def __init__(self, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
        self.o = {k: v for k, v in locals().items() if k != "self"}
        self.buffers = {}

    def __call__(self, i, x, g):
        o = self.o
        g = (-g if o["maximize"] else g) + o["weight_decay"] * x
        if o["momentum"] == 0:
            return x - o["lr"] * g
        self.buffers[i] = o["momentum"] * self.buffers[i] + (1 - o["dampening"]) * g if i in self.buffers else g
        return x - o["lr"] * (g + o["momentum"] * self.buffers[i] if o["nesterov"] else self.buffers[i])


class AdamW:
    """Two moments without their bias, and decay that does not enter them."""

    def __init__(self, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, amsgrad=False, maximize=False):
        self.o = {k: v for k, v in locals().items() if k != "self"}
        self.moments = {}

    def __call__(self, i, x, g):
        o, (b1, b2) = self.o, self.o["betas"]
        g = -g if o["maximize"] else g
        t, m, v, largest = self.moments.get(i, (0, 0.0, 0.0, 0.0))
        t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        largest = np.maximum(largest, v)
        self.moments[i] = t, m, v, largest
        second = (largest if o["amsgrad"] else v) / (1 - b2**t)
        return x * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * m / (1 - b1**t) / (np.sqrt(second) + o["eps"])


class ReferenceImpact:
    """The importances of the matrices among some arrays, around a base step.

    Args:
        params: arrays.
        base: its step, a function of the number of an array, the array and its gradient, which gives the new array.
        maximize: whether the base goes up.
        options: those of a group.
    """

    def __init__(
        self,
        params,
        base,
        *,
        maximize=False,
        drop_rate=0.1,
        importance="saliency",
        importance_lr=0.01,
        kl_weight=10.0,
        drop="unimportant",
        rescale="inverse",
        keep_floor=0.01,
        hold_zeros=False,
    ):
        self.o = {k: v for k, v in locals().items() if k not in ("self", "params", "base")}
        self.base = base
        self.x = [np.array(p, dtype=np.float64) for p in params]
        self.last = {}
        self.members = [i for i, p in enumerate(self.x) if sum(size > 1 for size in p.shape) >= 2]
        self.log_w = np.zeros(sum(self.x[i].size for i in self.members))
        self.scale = 0.0

    def flat(self, arrays):
        """The members, one after the other."""
        return np.concatenate([np.asarray(arrays[i], dtype=np.float64).ravel() for i in self.members])

    def split(self, flat):
        ends = np.cumsum([self.x[i].size for i in self.members])[:-1]
        return {i: part.reshape(self.x[i].shape) for i, part in zip(self.members, np.split(flat, ends), strict=True)}

    def alive(self):
        return self.flat(self.x) != 0 if self.o["hold_zeros"] else np.ones(len(self.log_w), dtype=bool)

    def w(self):
        """The importances, flat: mean 1 over what is alive."""
        w = np.exp(self.log_w) * self.alive()
        return w / w.sum() * self.alive().sum()

    def keep(self):
        """π, flat."""
        o, alive, f = self.o, self.alive(), self.o["keep_floor"]
        share = o["drop_rate"] if o["drop"] == "important" else 1 - o["drop_rate"] - f
        target = share / (1 - f)
        if o["importance"] == "uniform" or not 1e-9 < target < 1 - 1e-9:
            return (1 - o["drop_rate"]) * alive
        w = self.w()
        low, high = -200.0, 200.0
        for _ in range(80):  # bisection for the log of the level
            middle = (low + high) / 2
            if np.minimum(1, np.exp(middle) * w)[alive].mean() < target:
                low = middle
            else:
                high = middle
        filled = np.minimum(1, np.exp(low) * w)
        return (f + (1 - f) * filled if o["drop"] == "unimportant" else 1 - (1 - f) * filled) * alive

    def enlargement(self, keep):
        """What a kept weight is multiplied with, flat."""
        if self.o["rescale"] == "none":
            return np.ones(len(keep))
        return 1 / np.maximum(keep, (1 - self.o["drop_rate"]) / 10)

    def arrays(self, factors):
        """Flat factors as arrays, 1 for what is never masked."""
        parts = self.split(factors)
        return [parts.get(i, np.ones(x.shape)) for i, x in enumerate(self.x)]

    def step(self, factors, gradients):
        """One step.

        Args:
            factors: what each array is multiplied with.
            gradients: those of the loss, as a function of the arrays.
        """
        o, old = self.o, [x.copy() for x in self.x]
        grads = gradients([x * factor for x, factor in zip(old, factors, strict=True)])
        sign = -1.0 if o["maximize"] else 1.0
        zero = [(x == 0) & (i in self.members) & o["hold_zeros"] for i, x in enumerate(self.x)]
        if o["importance"] == "lookahead":
            w = self.split(self.w())
            taken = [sign * self.base.o["lr"] * g for g in grads]
            tried = [x - w[i] * taken[i] if i in w else x for i, x in enumerate(old)]
            again = gradients([x * factor for x, factor in zip(tried, factors, strict=True)])
            self.mirror(-self.flat(taken) * sign * self.flat(again))
        elif o["importance"] == "hypergradient" and self.last:
            self.mirror(-self.flat(self.last) * sign * self.flat(grads))
        elif o["importance"] == "saliency":
            self.mirror(-np.abs(self.flat(self.x) * self.flat(grads)))
        elif o["importance"] == "fisher":
            self.mirror(-(self.flat(grads) ** 2))
        elif o["importance"] == "magnitude":
            self.mirror(-np.abs(self.flat(self.x)))
        for i, (g, factor) in enumerate(zip(grads, factors, strict=True)):
            self.x[i] = np.where(zero[i], 0.0, self.base(i, self.x[i], np.where(zero[i], 0.0, g * factor)))
        self.last = {i: x - new for i, (x, new) in enumerate(zip(old, self.x, strict=True))}

    def mirror(self, h):
        alive, eta, lam = self.alive(), self.o["importance_lr"], self.o["kl_weight"]
        h = np.where(alive, h, 0.0)
        mean = np.abs(h)[alive].mean()
        u = np.clip(h / self.scale, -10, 10) if self.scale > 0 else np.zeros_like(h)
        log_w = self.log_w - np.log(np.exp(self.log_w)[alive].mean())
        self.log_w = np.clip((log_w - eta * u) / (1 + eta * lam), -60, 60)
        self.scale = 0.9 * self.scale + 0.1 * min(mean, 10 * self.scale) if self.scale > 0 else mean
