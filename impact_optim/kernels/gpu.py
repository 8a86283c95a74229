# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108, SIM300
"""The kernels for GPUs, in Triton: one launch for all tensors of a group, and nothing that the host waits for.

The arithmetic is that of ``cpu.cpp``; read it beside it. A launch works on the places of a group in blocks of 1024. A
table on the device tells it where the tensors lie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import flatten, sample
from ..simplex import LARGEST_SAMPLE, NEWTON_STEPS, SAMPLE, log_mean_exp, next_scale, sorted_level

BLOCK = 1024  # places of a group that one program works on; a divisor of a row of random bits
_COLUMNS = (
    *("size", "start", "weight", "grad", "out", "first_moment", "second_moment", "largest_moment", "last_step"),
    *("log_importance", "steps", "is_masked", "is_first"),
)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}


# ------------------------------------------------------------------------------ what a program does


@triton.jit
def _philox(counter, group, step, stream, seed_low, seed_high):
    c0, c1, c2, c3 = counter, group, step, stream
    k0, k1 = seed_low, seed_high
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2


@triton.jit
def _factors(log_w, place, row, level, keep_floor, divisor, words, IMPORTANT: tl.constexpr, CONSTANT: tl.constexpr):
    """What the weights of a block are multiplied with: 0, or 1/π up to the cap."""
    if CONSTANT:
        keep = level + tl.zeros_like(log_w)
    else:
        filled = tl.minimum(level * tl.exp(log_w), 1.0)
        keep = 1.0 - (1.0 - keep_floor) * filled if IMPORTANT else keep_floor + (1.0 - keep_floor) * filled
    group, step = tl.load(words).to(tl.uint32), tl.load(words + 1).to(tl.uint32)
    stream, low = tl.load(words + 2).to(tl.uint32), tl.load(words + 3).to(tl.uint32)
    high = tl.load(words + 4).to(tl.uint32)
    k0, k1, k2 = _philox(row.to(tl.uint32), group, step, stream, low, high)
    h = (place % 4096).to(tl.uint32) ^ k0
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= k1
    h ^= h >> 15
    h *= 0x846CA68B
    h ^= k2
    bits = h.to(tl.int32, bitcast=True) >> 1
    bound = (keep * 2147483648.0 - 1073741824.0).to(tl.int32)
    return tl.where(bits < bound, 1.0 / tl.maximum(keep, divisor), 0.0)


@triton.jit
def _block(table, count, blocks, BLOCK: tl.constexpr):
    """Where the table has a program's tensor, the offsets in that, which of them exist, and their places."""
    program = tl.program_id(0)
    entry = table + tl.load(blocks + 2 * program)
    size, start = tl.load(entry), tl.load(entry + count)
    place = tl.load(blocks + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    offset = place - start
    return entry, offset, (offset >= 0) & (offset < size), place


@triton.jit
def _pointer(entry, count, column: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(entry + column * count).to(tl.pointer_type(DTYPE))


@triton.jit
def _mask_kernel(
    table, count, blocks, words, levels, keep_floor, divisor,
    DTYPE: tl.constexpr, IMPORTANT: tl.constexpr, CONSTANT: tl.constexpr, FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    entry, offset, inside, place = _block(table, count, blocks, BLOCK)
    log_w = tl.zeros([BLOCK], tl.float32)
    if not CONSTANT:
        log_w = tl.load(_pointer(entry, count, 9, tl.float32) + offset, mask=inside, other=0.0)
    row = (tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK) // 4096
    level = tl.load(levels).to(tl.float32)
    factor = _factors(log_w, place, row, level, keep_floor, divisor, words, IMPORTANT, CONSTANT)
    if FACTORS:
        tl.store(_pointer(entry, count, 4, tl.float32) + offset, factor, mask=inside)
    else:
        x = tl.load(_pointer(entry, count, 2, DTYPE) + offset, mask=inside, other=0.0)
        factor = factor.to(DTYPE)
        if DTYPE == tl.bfloat16:
            masked = (x.to(tl.float32) * factor.to(tl.float32)).to(DTYPE)
        else:
            masked = x * factor
        tl.store(_pointer(entry, count, 4, DTYPE) + offset, masked, mask=inside)


@triton.jit
def _step_kernel(
    table, count, blocks, words, levels, keep_floor, divisor,
    scalars, sums, rate, shrink, lr, weight_decay, momentum, dampening, log_beta1, log_beta2, rest1, rest2, eps,
    DTYPE: tl.constexpr, REAL: tl.constexpr, IMPORTANT: tl.constexpr, CONSTANT: tl.constexpr,
    SIGNAL: tl.constexpr, RULE: tl.constexpr, HOLDS: tl.constexpr, MASKED: tl.constexpr, MAXIMIZE: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, AMSGRAD: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    entry, offset, inside, place = _block(table, count, blocks, BLOCK)
    weight = _pointer(entry, count, 2, DTYPE) + offset
    x = tl.load(weight, mask=inside, other=0.0).to(REAL)
    g = tl.load(_pointer(entry, count, 3, DTYPE) + offset, mask=inside, other=0.0).to(REAL)
    is_dead = (x == 0) & HOLDS
    signed = -g if MAXIMIZE else g
    log_w = tl.zeros([BLOCK], tl.float32)
    if SIGNAL != 0 or (MASKED and not CONSTANT):
        log_w = tl.load(_pointer(entry, count, 9, tl.float32) + offset, mask=inside, other=0.0)

    factor = tl.full([BLOCK], 1.0, tl.float32)
    if MASKED:  # by the importances that the mask was drawn from
        row = (tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK) // 4096
        level = tl.load(levels).to(tl.float32)
        factor = _factors(log_w, place, row, level, keep_floor, divisor, words, IMPORTANT, CONSTANT)
        factor = tl.where(tl.load(entry + 11 * count) != 0, factor, 1.0)

    if SIGNAL != 0:
        w32, g32 = x.to(tl.float32), signed.to(tl.float32)
        if SIGNAL == 1:
            h = -tl.abs(w32 * g32)
        elif SIGNAL == 2:
            h = -g32 * g32
        elif SIGNAL == 3:
            h = -tl.abs(w32)
        else:
            h = -tl.load(_pointer(entry, count, 8, DTYPE) + offset, mask=inside, other=0.0).to(tl.float32) * g32
        h = tl.where((tl.abs(h) <= 3.402823466e38) & inside & (is_dead == 0), h, 0.0)  # neither nan nor inf
        tl.store(sums + 2 * tl.program_id(0), tl.sum(tl.abs(h), 0))
        tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum((inside & (is_dead == 0)).to(tl.float32), 0))
        u = tl.minimum(tl.maximum(h * tl.load(scalars), -10.0), 10.0)
        moved = (log_w - tl.load(scalars + 1)) * shrink - rate * u
        moved = tl.where(is_dead, 0.0, tl.minimum(tl.maximum(moved, -60.0), 60.0))
        tl.store(_pointer(entry, count, 9, tl.float32) + offset, moved, mask=inside)

    if RULE == 1:
        d = tl.where(is_dead, 0.0, g * factor.to(DTYPE).to(REAL))
        tl.store(_pointer(entry, count, 4, DTYPE) + offset, d.to(DTYPE), mask=inside)
    if RULE >= 2:
        d = signed * factor.to(DTYPE).to(REAL)
        moment = _pointer(entry, count, 5, DTYPE) + offset
        if RULE == 2:
            d += weight_decay * x
            if MOMENTUM:
                m = tl.load(moment, mask=inside, other=0.0).to(REAL)
                m = tl.where(tl.load(entry + 12 * count) != 0, d, momentum * m + (1.0 - dampening) * d)
                tl.store(moment, tl.where(is_dead, 0.0, m).to(DTYPE), mask=inside)
                d = d + momentum * m if NESTEROV else m
            now = x - lr * d
        else:
            second = _pointer(entry, count, 6, DTYPE) + offset
            m = tl.load(moment, mask=inside, other=0.0).to(REAL)
            v = tl.load(second, mask=inside, other=0.0).to(REAL)
            m = tl.where(is_dead, 0.0, m + rest1 * (d - m))
            v = tl.where(is_dead, 0.0, v * (1.0 - rest2) + rest2 * d * d)
            tl.store(moment, m.to(DTYPE), mask=inside)
            tl.store(second, v.to(DTYPE), mask=inside)
            if AMSGRAD:
                largest = _pointer(entry, count, 7, DTYPE) + offset
                v = tl.maximum(v, tl.load(largest, mask=inside, other=0.0).to(REAL))
                tl.store(largest, v.to(DTYPE), mask=inside)
            steps = (tl.load(_pointer(entry, count, 10, tl.float32)) + 1.0).to(tl.float64)
            size = (lr / (1.0 - tl.exp(steps * log_beta1))).to(REAL)
            root = (1.0 / tl.sqrt(1.0 - tl.exp(steps * log_beta2))).to(REAL)
            now = x * (1.0 - lr * weight_decay) - size * (m / (tl.sqrt(v) * root + eps))
        if HOLDS:
            if DTYPE == tl.bfloat16:  # with few bits, a weight that lives may come to zero by chance
                now = tl.where(now.to(DTYPE).to(REAL) == 0.0, 1.17549435e-38, now)
            now = tl.where(is_dead, 0.0, now)
        now = now.to(DTYPE)
        tl.store(weight, now, mask=inside)
        if LAST:
            tl.store(_pointer(entry, count, 8, DTYPE) + offset, (x - now.to(REAL)).to(DTYPE), mask=inside)


@triton.jit
def _fill_kernel(
    table, count, blocks, levels, sums,
    DTYPE: tl.constexpr, HOLDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of what lives: the sums of max(0, 1 - cw) and of cw below 1; how many are full, and how many there are."""
    entry, offset, alive, _ = _block(table, count, blocks, BLOCK)
    log_w = tl.load(_pointer(entry, count, 9, tl.float32) + offset, mask=alive, other=0.0)
    if HOLDS:
        alive = alive & (tl.load(_pointer(entry, count, 2, DTYPE) + offset, mask=alive, other=0.0) != 0)
    filled = tl.exp(log_w) * tl.load(levels).to(tl.float32)
    is_open = alive & (filled < 1.0)
    to = sums + 4 * tl.program_id(0)
    tl.store(to, tl.sum(tl.where(is_open, 1.0 - filled, 0.0), 0))
    tl.store(to + 1, tl.sum(tl.where(is_open, filled, 0.0), 0))
    tl.store(to + 2, tl.sum((alive & (filled >= 1.0)).to(tl.float32), 0))
    tl.store(to + 3, tl.sum(alive.to(tl.float32), 0))


@triton.jit
def _newton_kernel(sums, programs, levels, mean, rest, IS_LOW: tl.constexpr, BLOCK: tl.constexpr):
    """A Newton step of the level, by a single program."""
    missing, slope = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    full, alive = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for begin in range(0, programs, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        inside = i < programs
        missing += tl.load(sums + 4 * i, mask=inside, other=0.0).to(tl.float64)
        slope += tl.load(sums + 4 * i + 1, mask=inside, other=0.0).to(tl.float64)
        full += tl.load(sums + 4 * i + 2, mask=inside, other=0.0).to(tl.float64)
        alive += tl.load(sums + 4 * i + 3, mask=inside, other=0.0).to(tl.float64)
    sum_missing, sum_slope, sum_full, sum_alive = (
        tl.sum(missing, 0), tl.sum(slope, 0), tl.sum(full, 0), tl.sum(alive, 0)
    )  # fmt: skip
    share, left = tl.load(mean), tl.load(rest)
    error = share * sum_alive - sum_full - sum_slope if IS_LOW else sum_missing - left * sum_alive
    ratio = 1.0 + error / tl.maximum(sum_slope, 1e-30)
    tl.store(levels, tl.load(levels) * tl.minimum(tl.maximum(ratio, 0.125), 8.0))


# --------------------------------------------------------------------------- lists of tensors


class Group:
    """What holds for all tensors of a group; as ``cpu.Group``, but that ``level`` lies on the device."""

    signal = rule = 0
    holds_zeros = maximize = drops_important = is_constant = False
    rate = shrink = keep_floor = divisor = 0.0
    level: Tensor | float = 1.0
    seed = step = group = stream = 0
    lr = weight_decay = momentum = dampening = nesterov = beta1 = beta2 = eps = 0.0

    def __init__(self, **fields: Any) -> None:
        self.made: dict[Tensor, tuple[int, Tensor]] = {}
        """Masked weights that wait to be read, with the version of the weights that they were made of."""
        vars(self).update(fields)

    @property
    def words(self) -> list[int]:
        """What is hashed for the random bits, beside the row."""
        return [self.group, self.step, self.stream, self.seed & 0xFFFFFFFF, self.seed >> 32]


class Weights:
    """The weights of one parameter group, as the kernels take them; see :class:`impact_optim.kernels.cpu.Weights`."""

    def __init__(self, members: Sequence[Tensor], starts: Sequence[int]) -> None:
        self.members, self._starts = list(members), list(starts)
        self._layouts = [(p.shape, p.stride()) for p in members]
        self._fixed = {"size": [p.numel() for p in members], "start": list(starts)}
        """Columns of the table that stay."""
        self.flat: Tensor | None = None
        self.dtype, self._device = members[0].dtype, members[0].device
        blocks = [
            torch.stack([torch.full((stop - first,), i), torch.arange(first, stop)], dim=1)
            for i, (p, start) in enumerate(zip(members, starts, strict=True))
            for first, stop in [(start // BLOCK, -(-(start + p.numel()) // BLOCK))]
        ]
        self._blocks = torch.cat(blocks).to(torch.int32).to(self._device)
        """The tensor and the block of places that each program works on."""
        self._programs = len(self._blocks)
        ends = list(itertools.accumulate(map(len, blocks), initial=0))
        self._ranges = list(itertools.pairwise(ends))
        """Which of these programs are of each tensor."""

    @property
    def _numel(self) -> int:
        return self._starts[-1] + self.members[-1].numel()

    def set_importances(self, flat: Tensor) -> None:
        self.flat = flat
        self._fixed["log_importance"] = [flat.data_ptr() + 4 * start for start in self._starts]

    def group(self, **fields: Any) -> Group:
        return Group(**fields)

    def copy(self, group: Group) -> Group:
        return Group(**{name: value for name, value in vars(group).items() if name != "made"})

    def set_level(self, group: Group, mean: float) -> None:
        """The level of the weights that live: Newton steps from that of a sample."""
        assert self.flat is not None
        runs = [self.flat]
        if group.holds_zeros:  # the sample is to tell what lives, tensor by tensor
            runs = [self.flat[s : s + p.numel()] for s, p in zip(self._starts, self.members, strict=True)]
        w = sample(runs, LARGEST_SAMPLE).exp()
        if group.holds_zeros:
            w.mul_(sample([flatten(p.detach(), p) for p in self.members], LARGEST_SAMPLE) != 0)
        level = sorted_level(w, mean)
        if self._numel > LARGEST_SAMPLE:
            table = self._table({}, [])
            sums = torch.empty(4 * self._programs, dtype=torch.float32, device=self._device)
            shares = [torch.full((), value, dtype=torch.float64, device=self._device) for value in (mean, 1.0 - mean)]
            for _ in range(NEWTON_STEPS):
                self._launch(
                    _fill_kernel, self._blocks, table, level, sums, DTYPE=_DTYPES[self.dtype], HOLDS=group.holds_zeros
                )
                with self._on_device():
                    _newton_kernel[(1,)](sums, self._programs, level, *shares, IS_LOW=mean < 0.5, BLOCK=BLOCK)
        group.level = level

    def factor(self, group: Group, param: Tensor) -> Tensor:
        i = next(i for i, p in enumerate(self.members) if p is param)
        outs: list[Tensor | None] = [None] * len(self.members)
        with torch._C._DisableFuncTorch():
            outs[i] = out = torch.empty_strided(*self._layouts[i], dtype=torch.float32, device=self._device)
            self._mask(group, outs, True, self._blocks[slice(*self._ranges[i])])
        return out

    def masked(self, group: Group, param: Tensor) -> Tensor:
        """The masked weight; those of all members are made at once, and handed out one by one."""
        if param.dtype is not self.dtype:  # it had another when the masks were drawn
            return param * self.factor(group, param).to(param.dtype)
        version, weight = group.made.pop(param, (-1, None))
        if weight is None or version != param._version:
            with torch._C._DisableFuncTorch():
                flat = torch.empty(self._numel, dtype=param.dtype, device=self._device)
                outs = [
                    torch.as_strided(flat, *layout, start)
                    for layout, start in zip(self._layouts, self._starts, strict=True)
                ]
                self._mask(group, outs, False, self._blocks)
                group.made = {p: (p._version, out) for p, out in zip(self.members, outs, strict=True)}
            _, weight = group.made.pop(param)
        return weight

    def _mask(self, group: Group, outs: Sequence[Tensor | None], wants_factors: bool, blocks: Tensor) -> None:
        table = self._table({"out": outs}, group.words)
        self._launch(
            _mask_kernel,
            blocks,
            table,
            table[len(self.members) * len(_COLUMNS) :],
            self._on(group.level),
            group.keep_floor,
            group.divisor,
            DTYPE=_DTYPES[self.dtype],
            IMPORTANT=bool(group.drops_important),
            CONSTANT=bool(group.is_constant),
            FACTORS=wants_factors,
        )

    def step(
        self,
        group: Group,
        tensors: Mapping[str, Sequence[Tensor | None]],
        masked: Sequence[bool],
        first: Sequence[bool],
        scale: Tensor | float,
    ) -> Tensor | float:
        columns = {**tensors, "is_masked": masked, "is_first": first}
        table = self._table(columns, group.words)
        given = scale
        if isinstance(scale, Tensor):
            scale = scale.to(self._device, non_blocking=True)  # a checkpoint may have it elsewhere
        else:
            scale = torch.full((), scale, dtype=torch.float32, device=self._device)
        inverse = scale.reciprocal().masked_fill_(scale <= torch.finfo(torch.float32).tiny, 0.0)
        normalizer = torch.zeros_like(scale)
        if group.signal:
            assert self.flat is not None
            normalizer = log_mean_exp([sample([self.flat], SAMPLE)]).to(torch.float32)
        sums = torch.empty(self._programs, 2, dtype=torch.float32, device=self._device)
        self._launch(
            _step_kernel,
            self._blocks,
            table,
            table[len(self.members) * len(_COLUMNS) :],
            self._on(group.level),
            group.keep_floor,
            group.divisor,
            torch.stack([inverse, normalizer]),
            sums,
            group.rate,
            group.shrink,
            group.lr,
            group.weight_decay,
            group.momentum,
            group.dampening,
            math.log(group.beta1) if group.beta1 > 0 else -1e30,
            math.log(group.beta2) if group.beta2 > 0 else -1e30,
            1.0 - group.beta1,
            1.0 - group.beta2,
            group.eps,
            DTYPE=_DTYPES[self.dtype],
            REAL=tl.float64 if self.dtype is torch.float64 else tl.float32,
            IMPORTANT=bool(group.drops_important),
            CONSTANT=bool(group.is_constant),
            SIGNAL=group.signal,
            RULE=group.rule,
            HOLDS=bool(group.holds_zeros),
            MASKED=any(masked),
            MAXIMIZE=bool(group.maximize),
            MOMENTUM=group.momentum != 0,
            NESTEROV=bool(group.nesterov),
            AMSGRAD=bool(tensors.get("largest_moment")),
            LAST=group.rule >= 2 and any(t is not None for t in tensors.get("last_step", ())),
        )
        if steps := tensors.get("steps"):
            torch._foreach_add_(list(steps), 1.0)  # type: ignore[arg-type]
        if not group.signal:
            return given
        size, alive = sums.sum(0, dtype=torch.float64).unbind()
        return next_scale(scale, size / alive.clamp_min(1.0))

    # -- launches --

    def _table(self, columns: Mapping[str, Sequence[Any]], words: Sequence[int]) -> Tensor:
        """Where the tensors lie, a column after the other, and some words behind them."""
        values: list[int] = []
        for name in _COLUMNS:
            if name == "weight":
                values += [p.data_ptr() for p in self.members]
            elif name in self._fixed:
                values += self._fixed[name]
            else:
                column = columns.get(name) or [0] * len(self.members)
                values += [t.data_ptr() if isinstance(t, Tensor) else int(t or 0) for t in column]
        return self._upload([*values, *words])

    def _upload(self, values: Sequence[int]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def _on(self, level: Tensor | float) -> Tensor:
        if isinstance(level, Tensor):
            return level
        return torch.full((), level, dtype=torch.float64, device=self._device)

    def _launch(self, kernel: Any, blocks: Tensor, table: Tensor, *arguments: Any, **constants: Any) -> None:
        with self._on_device():
            kernel[(len(blocks),)](table, len(self.members), blocks, *arguments, BLOCK=BLOCK, **constants)

    def _on_device(self) -> Any:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
