"""A slow, obvious ImpactSGD in float64 NumPy, written from the formulas and sharing no code with the package.

One parameter group; the uniform draws and the gradients come from outside.
"""

from __future__ import annotations

import numpy as np


class ReferenceImpactSGD:
    def __init__(
        self,
        params,
        *,
        lr,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        maximize=False,
        drop_rate=0.1,
        importance="saliency",
        importance_lr=0.01,
        kl_weight=1.0,
        simplex="group",
        drop="unimportant",
        rescale="inverse",
        keep_floor=0.01,
        scale_steps=False,
    ):
        self.o = {k: v for k, v in locals().items() if k not in ("self", "params")}
        self.x = [np.array(p, dtype=np.float64) for p in params]
        self.d = [None] * len(params)
        self.w = [np.ones_like(p) for p in self.x]
        members = [i for i, p in enumerate(self.x) if p.ndim >= 2 and p.size]
        self.simplexes = [members] if simplex == "group" else [[i] for i in members]
        self.scale = [0.0] * len(self.simplexes)

    def keep(self):
        """π for every parameter; None where it is never masked."""
        o = self.o
        keep = [None] * len(self.x)
        for members in self.simplexes:
            w = np.concatenate([self.w[i].ravel() for i in members])
            share = o["drop_rate"] if o["drop"] == "important" else 1 - o["drop_rate"] - o["keep_floor"]
            target = share / (1 - o["keep_floor"])
            if o["importance"] == "uniform" or not 0 < target < 1:
                pi = np.full_like(w, 1 - o["drop_rate"])
            else:
                low, high = -200.0, 200.0
                for _ in range(60):  # bisection for the log of the level
                    middle = (low + high) / 2
                    if np.minimum(1, np.exp(middle) * w).mean() < target:
                        low = middle
                    else:
                        high = middle
                filled = np.minimum(1, np.exp(low) * w)
                f = o["keep_floor"]
                pi = f + (1 - f) * filled if o["drop"] == "unimportant" else 1 - (1 - f) * filled
            for i, part in zip(members, np.split(pi, np.cumsum([self.w[i].size for i in members])[:-1]), strict=True):
                keep[i] = part.reshape(self.w[i].shape)
        return keep

    def factors(self, uniforms):
        keep = self.keep()
        out = []
        for p, u in zip(keep, uniforms, strict=True):
            if p is None:
                out.append(1.0)
            else:
                mask = (u < p).astype(np.float64)
                floored = np.maximum(p, (1 - self.o["drop_rate"]) / 10)
                out.append(mask / floored if self.o["rescale"] == "inverse" else mask)
        return out

    def step(self, grads, factors):
        o = self.o
        grads = [-g if o["maximize"] else g for g in grads]
        w_old = [w.copy() for w in self.w]
        for s, members in enumerate(self.simplexes):
            self._mirror(s, members, grads)
        member = {i for m in self.simplexes for i in m}
        for i, (g, factor) in enumerate(zip(grads, factors, strict=True)):
            step = g * factor + o["weight_decay"] * self.x[i]
            first = self.d[i] is None
            self.d[i] = step if first else o["momentum"] * self.d[i] + (1 - o["dampening"]) * step
            if o["momentum"] == 0:
                self.d[i] = step
            direction = step + o["momentum"] * self.d[i] if o["nesterov"] else self.d[i]
            if o["scale_steps"] and i in member and o["importance"] != "uniform":
                direction = direction * w_old[i]
            self.x[i] = self.x[i] - o["lr"] * direction

    def _mirror(self, s, members, grads):
        o = self.o
        signal = {
            "hypergradient": lambda i: None if self.d[i] is None else -o["lr"] * self.d[i] * grads[i],
            "saliency": lambda i: -np.abs(self.x[i] * grads[i]),
            "fisher": lambda i: -(grads[i] ** 2),
            "magnitude": lambda i: -np.abs(self.x[i]),
            "uniform": lambda i: None,
        }[o["importance"]]
        h = [signal(i) for i in members]
        if any(part is None for part in h):
            return
        mean = np.mean(np.abs(np.concatenate([part.ravel() for part in h])))
        scale = self.scale[s]
        for i, part in zip(members, h, strict=True):
            u = np.clip(part / scale, -10, 10) if scale > 0 else np.zeros_like(part)
            eta, lam = o["importance_lr"], o["kl_weight"]
            self.w[i] = np.exp((np.log(self.w[i]) - eta * u) / (1 + eta * lam))
        total = np.mean(np.concatenate([self.w[i].ravel() for i in members]))
        for i in members:
            self.w[i] = self.w[i] / total
        self.scale[s] = 0.9 * scale + 0.1 * min(mean, 10 * scale) if scale > 0 else mean
