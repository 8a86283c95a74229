"""The importances of one parameter group: what they are, how a step moves them, and the masks that follow from them.

What :mod:`impact_optim.simplex` says in formulas is put together here for the tensors of a group. Their log-importances
lie in one flat buffer per device. Where a kernel fits, it does the work (:mod:`impact_optim.kernels`). Else the tensor
code of this file does, over the buffers in blocks: on a CPU of a size that stays in the cache, elsewhere all at once,
so that the number of operations does not depend on the number of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .kernels import fused
from .layout import BLOCK, Places, flatten, sample
from .masks import Draw, Mask, TensorDraw
from .options import OPTIONS
from .sampling import ROW, SAMPLED, TRAINING, as_uniform, bit_blocks, bits, kept_bits, pareto_sample
from .signals import ELEMENTWISE, SIGNALS, Signal
from .simplex import (
    CLIP,
    LOG_BOUND,
    SAMPLE,
    fill_level,
    fill_target,
    keep_probability,
    log_mean,
    log_mean_exp,
    mirror_step,
    next_scale,
    total,
)
from .weights import empty_slices

_RESCALE_CAP = 10.0  # rescale="inverse" enlarges a kept weight at most ten times as much as uniform masks would


class Simplex:
    """The importances of the weights of one parameter group.

    Args:
        optimizer: the base; its state keeps ``log_importance`` of every weight.
        group: the parameter group; its options are read at every use.
        number: of the group, its place in the mask stream.
        is_masked: tells of a parameter whether it is a weight.
        normalized: weights that a module divides by their norm, such as weight norm's direction.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        number: int,
        is_masked: Callable[[Tensor], bool],
        normalized: set[Tensor],
    ) -> None:
        self.optimizer, self.group, self.number = optimizer, group, number
        self._is_masked, self.normalized = is_masked, normalized
        self.members: list[Tensor] = []
        self.mask: Mask | None = None
        self.dense_reads: set[Tensor] = set()
        """The weights whose gradient has come through a pass in eval mode since the last step, and may be dense."""
        self._places = Places([])
        self.flat: dict[torch.device, Tensor] | None = None
        self._views: dict[Tensor, Tensor] = {}
        self._pending: set[Tensor] = set()
        self._weights: fused.Weights | None = None

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return sum(self._places.sizes.values())

    @property
    def works_at_once(self) -> bool:
        """Whether the tensor code takes all members in one launch, and not block by block."""
        return bool(self.group.get("foreach")) or any(device.type != "cpu" for device in self._places.sizes)

    # -- members --

    def refresh(self) -> None:
        """Takes note of what was frozen, thawed, replaced, loaded or edited since the last step."""
        members = [p for p in self.group["params"] if p.requires_grad and self._is_masked(p)]
        is_same = len(members) == len(self.members) and all(map(operator.is_, members, self.members))
        if not (is_same and all(self._is_current(p) for p in members)):
            self._lay_out(members)

    def _stored(self, param: Tensor) -> Tensor | None:
        return self.optimizer.state.get(param, {}).get("log_importance")

    def _is_current(self, param: Tensor) -> bool:
        """Whether the flat buffer has room for a member, and the state holds the view of it or is still to get it."""
        view = None if param in self._pending else self._views.get(param)
        return self._places.fits(param) and self._stored(param) is view

    def _lay_out(self, members: list[Tensor]) -> None:
        """Puts the members, and the log-importances that the state has of them, into flat buffers."""
        self.members, self._places = members, Places(members)
        self.flat, self._views, self._pending, self._weights = None, {}, set(), None
        if self.mask is not None and not self.mask.is_read:
            self.mask = None
        if any(self._stored(p) is not None for p in members):
            self.start()

    @torch.no_grad()
    def start(self) -> dict[torch.device, Tensor]:
        """The flat buffers; makes them if there are none, all importances equal but for what the state holds."""
        if self.flat is not None:
            return self.flat
        flat = {d: torch.zeros(size, dtype=torch.float32, device=d) for d, size in self._places.sizes.items()}
        known = {p: stored for p in self.members if (stored := self._stored(p)) is not None}
        for p, stored in known.items():
            device, start, stop = self._places[p]
            flat[device][start:stop] = flatten(stored, p)
        self.flat = flat
        if self._weights is not None:
            self._weights.set_importances(flat[self.members[0].device])
        self._views = self._places.split(flat)
        self._pending = set(self.members) - known.keys()
        for p in known:
            self.optimizer.state[p]["log_importance"] = self._views[p]
        return flat

    def store(self) -> None:
        """Puts the log-importances of what has a gradient into the state.

        Not before the base optimizer has made its own: adaptive ones take a state that is not empty for theirs. Until
        then a member has had no gradient, and its importance is 1. Vectors get zeros: distributed checkpoints want the
        same state for every parameter.
        """
        if self.flat is None and self.group["importance"] == "uniform":
            return
        self.start()
        if self.members:
            home = self.members[0].device
            self.group["signal_scale"] = torch.as_tensor(self.group["signal_scale"], dtype=torch.float32, device=home)
        state = self.optimizer.state
        for p in self.group["params"]:
            if p.grad is not None and (p in self._pending or "log_importance" not in state[p]):
                state[p]["log_importance"] = (
                    self._views[p] if p in self._places else torch.zeros_like(p, dtype=torch.float32)
                )
                self._pending.discard(p)
        for p in self._pending:
            self._views[p].zero_()

    # -- importances --

    @property
    def is_learnt(self) -> bool:
        """Whether steps have moved the importances apart."""
        return self.flat is not None and any(bool((flat != flat[0]).any()) for flat in self.flat.values())

    def _importances(self) -> tuple[dict[torch.device, Tensor], Tensor | None]:
        """w up to a constant, 0 where a zero is held, flat; and how many are not held, if any may be."""
        if self.flat is None:
            w = {d: torch.ones(size, dtype=torch.float32, device=d) for d, size in self._places.sizes.items()}
        else:
            w = {device: flat.exp() for device, flat in self.flat.items()}
        if not self.group["hold_zeros"]:
            return w, None
        alive = []
        for device, start, stop, parts in self._places.pieces(self.members):
            is_alive = _gather([(flatten(p.detach(), p), a, b) for p, a, b in parts]) != 0
            w[device][start:stop].mul_(is_alive)
            alive.append(is_alive.sum())
        return w, total(alive)

    def _normalize(self, w: dict[torch.device, Tensor], alive: Tensor | None) -> Tensor:
        """log of the mean of w, which is what to subtract from the log-importances for a mean of 1."""
        n = sum(t.numel() for t in w.values()) if alive is None else alive
        return log_mean(list(w.values()), n).nan_to_num(0.0, 0.0, 0.0)  # of a group that is zero for good

    @torch.no_grad()
    def importances(self) -> dict[Tensor, Tensor]:
        """w of every member, of its shape, float32: mean 1, and 0 for a zero that is held."""
        if not self.members:
            return {}
        w, alive = self._importances()
        scale = self._normalize(w, alive).exp()
        return self._places.split({device: t.div_(scale.to(device)) for device, t in w.items()})

    @torch.no_grad()
    def update(self, grads: Mapping[Tensor, Tensor], steps: Mapping[Tensor, Tensor] | None = None) -> None:
        """The mirror step.

        Args:
            grads: the dense gradient of each member that has one. The importances of the others stay as they are, and
                those of these keep their total.
            steps: the last step of the base optimizer, old weights minus new ones, if the signal reads it; members
                without one have no signal yet.
        """
        group = self.group
        moving = [p for p in self.members if p in grads and (steps is None or p in steps)]
        if not moving:
            return
        if fused.update(self, grads, steps):
            return
        flat = self.start()
        is_partial = len(moving) < len(self.members)
        before = self._mass(moving) if is_partial else None
        normalizer = log_mean_exp([sample(list(flat.values()), SAMPLE)])
        lr, kl_weight, signal = group["importance_lr"], group["kl_weight"], SIGNALS[group["importance"]]
        home = self.members[0].device
        scale = torch.as_tensor(group["signal_scale"], dtype=torch.float32, device=home)
        # No signal is used before its scale is known: the first one only sets it.
        inverse = scale.reciprocal().masked_fill_(scale <= torch.finfo(torch.float32).tiny, 0.0)
        sizes, counts, held = [], [], []
        for device, start, stop, x, h in self._signals(signal, moving, grads, steps):
            h, log_w = h.nan_to_num(0.0, 0.0, 0.0), flat[device][start:stop]
            if group["hold_zeros"]:
                h.masked_fill_(is_zero := x == 0, 0.0)
                counts.append(is_zero.logical_not().sum())
                held.append((log_w, is_zero))
            sizes.append(h.abs().sum())
            u = h.mul_(inverse.to(device)).clamp_(-CLIP, CLIP)
            log_w.copy_(mirror_step(log_w, u, lr, kl_weight, normalizer.to(device)))
        if before is not None:
            shift = (before / self._mass(moving).clamp_min(1e-300)).log()
            for device, start, stop in map(self._places.__getitem__, moving):
                flat[device][start:stop].add_(shift.to(device, torch.float32)).clamp_(-LOG_BOUND, LOG_BOUND)
        for log_w, is_zero in held:
            log_w.masked_fill_(is_zero, 0.0)
        n = total(counts).clamp_min(1.0) if counts else sum(p.numel() for p in moving)
        group["signal_scale"] = next_scale(scale, total(sizes) / n)

    def _mass(self, params: list[Tensor]) -> Tensor:
        """The sum of w over some members, up to a constant."""
        w, _ = self._importances()
        return total([w[device][start:stop].sum() for device, start, stop in map(self._places.__getitem__, params)])

    def _signals(
        self,
        signal: Signal,
        moving: list[Tensor],
        grads: Mapping[Tensor, Tensor],
        steps: Mapping[Tensor, Tensor] | None,
    ) -> Iterator[tuple[torch.device, int, int, Tensor, Tensor]]:
        """Runs of the flat buffers with the weights and the signal of each; one of the user's own sees whole
        tensors."""
        if signal in ELEMENTWISE:
            for device, start, stop, parts in self._places.pieces(moving):
                x, g = (
                    _gather([(flatten(of(p).detach(), p), a, b) for p, a, b in parts])
                    for of in (lambda p: p, grads.__getitem__)
                )
                step = None if steps is None else _gather([(flatten(steps[p], p), a, b) for p, a, b in parts])
                yield device, start, stop, x, signal(x, g, step)
        else:
            for p in moving:
                x, step = p.detach().float(), None if steps is None else steps[p].float()
                h = signal(x, grads[p].detach().float(), step)
                yield *self._places[p], flatten(x, p), flatten(h, p)

    # -- kernels --

    def weights(self) -> fused.Weights | None:
        """The members as a kernel takes them, if there is one that can."""
        group = self.group
        if group.get("fused") is False or group.get("foreach") or group.get("differentiable"):
            return None
        kernels = fused.kernels_for(self.members, is_wanted=bool(group.get("fused")))
        if kernels is not None and (self._weights is None or self._weights.dtype is not self.members[0].dtype):
            self._weights = kernels.Weights(self.members, [self._places[p][1] for p in self.members])
            if self.flat is not None:
                self._weights.set_importances(self.flat[self.members[0].device])
        return None if kernels is None else self._weights

    # -- masks --

    def end_step(self) -> None:
        """Forgets the mask: the next pass draws a new one."""
        if self.mask is not None:
            self.mask.is_over = True
            self.mask.draws = {}  # a loss that is kept holds the mask
        self.mask = None
        self.dense_reads.clear()

    @torch.no_grad()
    def _keep(self) -> tuple[dict[torch.device, Tensor], Tensor | None]:
        """π, flat, and how many weights share the budget, if some are held at zero."""
        group = self.group
        w, alive = self._importances()
        drop_rate = group["drop_rate"]
        if group["sampling"] == "exact":  # what such a mask can drop: whole weights
            n = max(sum(t.numel() for t in w.values()) if alive is None else int(alive), 1)
            drop_rate = round(drop_rate * n) / n
        target = fill_target(drop_rate, group["keep_floor"], group["drop"])
        if self.flat is None or group["importance"] == "uniform" or not 0.0 < target < 1.0:
            return {d: t.sign_().mul_(1.0 - drop_rate) for d, t in w.items()}, alive
        level = fill_level(list(w.values()), target, alive)
        for device, t in w.items():
            c = level.to(device, torch.float32)
            for part in t.split(BLOCK) if device.type == "cpu" else (t,):
                held = None if alive is None else part == 0
                keep_probability(part.mul_(c), group["keep_floor"], group["drop"])
                if held is not None:
                    part.masked_fill_(held, 0.0)
        return w, alive

    @torch.no_grad()
    def keep_probabilities(self) -> dict[Tensor, Tensor]:
        """π of every member, of its shape, float32."""
        return self._places.split(self._keep()[0]) if self.members else {}

    def expected_factors(self) -> dict[Tensor, Tensor]:
        """What each weight is multiplied with in the mean of its masked versions: π, or 1 but where the cap bites."""
        if self.group["drop_rate"] == 0:
            return {}
        divisor = self.smallest_divisor()
        return {p: keep.div_(divisor).clamp_(max=1.0) for p, keep in self.keep_probabilities().items()}

    def held(self, param: Tensor) -> Tensor:
        """Where a member is zero for good."""
        is_zero = param.detach() == 0
        return is_zero if self.group["hold_zeros"] else torch.zeros_like(is_zero)

    def smallest_divisor(self) -> float:
        """What a kept weight is divided by where π is smaller; with ``rescale="none"`` always 1."""
        return (1.0 - self.group["drop_rate"]) / _RESCALE_CAP if self.group["rescale"] == "inverse" else 1.0

    def current_mask(self) -> Mask:
        """The mask of this step; draws it if there is none, or if options have changed before it was used."""
        group = self.group
        if self.mask is None or not self.mask.is_read:
            stamp = (*(group[name] for name in OPTIONS), group["mask_step"])
            if self.mask is None or self.mask.stamp != stamp:
                self.mask = Mask(self.draw(group["mask_step"]), stamp)
        if len(self.mask.draws) < len(self.members):  # thawed between two passes of a step
            self.mask.draws = {**self.draw(group["mask_step"]), **self.mask.draws}
        return self.mask

    @torch.no_grad()
    def draw(self, step: int, stream: int = TRAINING) -> dict[Tensor, Draw]:
        """The masks of a step, by weight."""
        draw: Draw = fused.draw(self, step, stream) or TensorDraw(self._draw(step, stream), self.works_at_once)
        return dict.fromkeys(self.members, draw)

    def _draw(self, step: int, stream: int) -> dict[Tensor, Tensor]:
        """What each weight is multiplied with: 0, or 1/π up to the cap."""
        group = self.group
        factors, alive = self._keep()
        words = {"seed": group["seed"], "step": step, "group": self.number, "stream": stream}
        divisor, row = self.smallest_divisor(), 0
        chosen = self._choose(factors, alive, words) if group["sampling"] == "exact" else {}
        for device, keep in factors.items():
            size = BLOCK if device.type == "cpu" else len(keep)
            rows = range(row, row + -(-len(keep) // ROW))
            row = rows.stop
            if device in chosen:
                masks = (part.to(torch.int32).neg_() for part in chosen[device].split(size))
            else:
                random = bit_blocks(rows, -(-size // ROW), device=device, **words)
                masks = (kept_bits(b[: len(part)], part) for b, part in zip(random, keep.split(size), strict=True))
            for part, kept in zip(keep.split(size), masks, strict=True):
                part.clamp_(min=divisor).reciprocal_().view(torch.int32).bitwise_and_(kept)
        split = self._places.split(factors)
        for p in self.normalized & split.keys():
            for empty in empty_slices(split[p] != 0):
                split[p].masked_fill_(empty, 1.0)
        return split

    def _choose(
        self, keep: dict[torch.device, Tensor], alive: Tensor | None, words: dict[str, int]
    ) -> dict[torch.device, Tensor]:
        """Which weights an exact mask keeps, flat."""
        home = self.members[0].device
        sizes = [len(t) for t in keep.values()]
        n = sum(sizes) if alive is None else int(alive)
        uniforms, row = [], 0
        for size in sizes:
            rows = range(row, row + -(-size // ROW))
            row = rows.stop
            uniforms.append(as_uniform(bits(rows, device=home, **words)[:size]))
        mask = pareto_sample(
            torch.cat([t.to(home) for t in keep.values()]), torch.cat(uniforms), n - round(self.group["drop_rate"] * n)
        )
        return {device: part.to(device) for device, part in zip(keep, mask.split(sizes), strict=True)}

    def sample(self, number: int) -> dict[Tensor, Draw]:
        """Mask ``number`` of :meth:`Impact.sampled`, from a stream that no training step draws from."""
        return self.draw(number, SAMPLED)


def _gather(parts: list[tuple[Tensor, int, int]]) -> Tensor:
    """Runs of flat tensors as one tensor, float32; a view where that is possible."""
    runs = [flat[a:b] for flat, a, b in parts]
    return (runs[0] if len(runs) == 1 else torch.cat(runs)).float()
