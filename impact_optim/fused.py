"""The step as one pass over memory: pure functions of tensors for ``torch.compile``.

A parameter comes as rows of 4096 elements of its memory. For every row a pass sums what the next step has to know of
the importances, and on its way it updates weights, momentum and importances and writes the masked weights that the
next forward pass will see. On a CPU that becomes one C++ loop, on a GPU one Triton kernel.

Some things are written the way they are for the compiler's sake:

- Rows have a fixed width, so that a sum of one needs no bookkeeping against rounding and the loop no tail; what is left
  of a parameter after its last full row goes through a second compilation of the same function.
- The numbers of a step come once for every row. Everything then depends on the row; what does not, Inductor sees as a
  flat loop, finds that it does not match that of the sums, and makes a pass of its own for it.
- An exponential is a polynomial that stays in registers (:func:`_exp2`); ``torch.exp`` is a call that spills them all.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._inductor.test_operators
from torch import Tensor

from .layout import BLOCK, blocks
from .sampling import ROW, kept_bits, row_bits, stochastic_round
from .simplex import CLIP, LOG_BOUND


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: what Python does now is done once, and not by its replays."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Plan(NamedTuple):
    """What a pass does; each plan is compiled once for full rows and once for what is left after them.

    It holds no numbers: the compiler would make variables of them, and a row of variable width does not fuse.
    """

    is_rest: bool = False
    """Whether the elements are a single row of any length, and not full rows."""
    signal: Callable[..., Any] | None = None
    momentum: bool = False
    nesterov: bool = False
    keeps_direction: bool = False
    is_masked: bool = False
    """Whether the gradient was taken at masked weights."""
    draws: bool = False
    """Whether the masked weights of the next step are written."""
    rounds: bool = False
    """Whether the log-importances are stored in bfloat16, rounded at random."""
    scale_steps: bool = False
    guarded: bool = False
    """Whether the step may turn out to be skipped (``found_inf`` of a GradScaler)."""


class Numbers(NamedTuple):
    """Everything that changes from step to step, floats and scalar tensors; passed as one tensor, in this order."""

    lr: Any = 0.0
    momentum: Any = 0.0
    decay: Any = 0.0  # of the momentum buffer; 0 at its first step
    gradient_share: Any = 1.0  # 1 - dampening
    weight_decay: Any = 0.0
    grad_factor: Any = 1.0  # its sign, over the scale of the loss
    inverse_scale: Any = 0.0
    log_normalizer: Any = 0.0
    shrink: Any = 1.0
    importance_step: Any = 0.0
    minus_level: Any = 0.0  # of the masks that the gradient was taken at
    keep_offset: Any = 1.0
    keep_slope: Any = 0.0
    next_level: Any = 0.0
    next_keep_offset: Any = 1.0
    next_keep_slope: Any = 0.0
    smallest_divisor: Any = 1.0
    next_smallest_divisor: Any = 1.0
    found_inf: Any = 0.0
    # Constants that the compiler must not know: it would leave out what they do.
    clip: Any = CLIP
    minus_clip: Any = -CLIP
    log_bound: Any = LOG_BOUND
    minus_log_bound: Any = -LOG_BOUND
    one: Any = 1.0  # what is multiplied by it depends on the row
    zero: Any = 0.0  # -0.0 plus it is 0.0
    dropped: Any = -0.0  # stands for a dropped weight among the masked ones

    def pack(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One row of a table on the device, without waiting for it."""
        if is_capturing():
            row = torch.empty(1, len(self), dtype=dtype, device=device)
            for k, v in enumerate(self):  # a replay would copy from host memory that is no longer there
                row[0, k].fill_(v.reshape(()) if isinstance(v, Tensor) else v)
            return row
        host = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in self], dtype=dtype)
        if device.type != "cpu":
            host = host.pin_memory().to(device, non_blocking=True)
        for k, v in enumerate(self):
            if isinstance(v, Tensor):
                host[k].copy_(v.reshape(()), non_blocking=True)
        return host.unsqueeze(0)


_LOG2_E = 1.4426950408889634


def _exp2(t: Tensor) -> Tensor:
    """2^t to 2e-7 relative, float32 within ±125."""
    k = torch.round(t)
    r = t - k  # in [-1/2, 1/2]: minimax polynomial of 2^r, 9e-8
    p = 1.3264726298812793e-3 * r + 9.671513009984293e-3
    p = p * r + 5.550733749092777e-2
    p = p * r + 2.4022242079184705e-1
    p = p * r + 6.931469775938073e-1
    p = p * r + 1.0
    return (p.view(torch.int32) + (k.to(torch.int32) << 23)).view(torch.float32)  # the exponent is in the bits from 23


def _clip(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """t between bounds, also where it is infinite; fewer instructions than ``clamp``, which looks out for NaN."""
    return torch.where(t > high, high, torch.where(t < low, low, t))


def _computed_once(t: Tensor) -> Tensor:
    """t, which the compiler computes before all that uses it, instead of once for each use."""
    return torch.ops._inductor_test.realize(t) if torch.compiler.is_compiling() else t


def _masked_weights(x: Tensor, filled: Tensor | None, keys: Tensor, position: Tensor, c: Numbers) -> Tensor:
    """The weights over their keep probability where the draw keeps them, ``dropped`` where it does not."""
    keep = c.next_keep_offset
    if filled is not None:
        keep = c.next_keep_offset + c.next_keep_slope * filled.to(x.dtype)
    value = x / (torch.relu(keep - c.next_smallest_divisor) + c.next_smallest_divisor)
    value = value + c.zero  # a kept -0.0 becomes 0.0; it is no dropped weight
    kept = kept_bits(row_bits(keys.unsqueeze(1), position), keep)
    if value.dtype != torch.float32:
        return torch.where(kept != 0, value, c.dropped) * c.one
    return ((value.view(torch.int32) & kept) | (c.dropped.view(torch.int32) & (kept ^ -1))).view(torch.float32) * c.one


def step_pass(
    x: Tensor,
    grad: Tensor,
    direction: Tensor | None,
    log_w: Tensor | None,
    masked: Tensor | None,
    keys: Tensor | None,
    position: Tensor,
    numbers: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """One step of a parameter, in place, row by row.

    Args:
        x, grad, direction, log_w: the parameter, its gradient, its momentum buffer and its log-importances, flat and in
            one order.
        masked: the masked weights that the gradient was taken at; overwritten by the next ones.
        keys: where the plan draws the next masks, [rows, 3], or rounds, [rows, 3]; first the former where it does both.
        position: 0, 1, ... in a row.
        numbers: :class:`Numbers`, [rows, len(Numbers)].
        plan: what to do.

    Returns:
        For each row the sums of abs(h), of exp(log w + level) and of min(1, exp(log w + level)), if there is a signal.
    """
    c = Numbers(*numbers.split(1, dim=1))
    if not plan.is_rest:
        assert x.shape[1] == ROW  # a row of variable width does not fuse
    exact = torch.promote_types(x.dtype, torch.float32)
    old_x = x.to(exact)
    g = grad.to(exact) * c.grad_factor
    old_d = None if direction is None else direction.to(exact)
    skipped = c.found_inf > 0.0

    h = old_log_w = new_log_w = w = filled = None
    if log_w is not None:
        old_log_w = log_w.float()
        if plan.signal is not None:
            d = None if old_d is None else old_d.float()
            h = plan.signal(old_x.float(), g.float(), d, c.lr.float())
            h = _computed_once(torch.where(h.abs() <= torch.finfo(torch.float32).max, h, 0.0) * c.one.float())
            u = _clip(h * c.inverse_scale.float(), c.minus_clip.float(), c.clip.float())
            new_log_w = (old_log_w - c.log_normalizer.float()) * c.shrink.float() - u * c.importance_step.float()
            new_log_w = _clip(new_log_w, c.minus_log_bound.float(), c.log_bound.float())
            if plan.rounds and keys is not None:
                new_log_w = stochastic_round(new_log_w, row_bits(keys[:, -3:].unsqueeze(1), position))
            if plan.guarded:
                new_log_w = torch.where(skipped, old_log_w, new_log_w)
            new_log_w = _computed_once(new_log_w)
            w = _exp2((new_log_w + c.next_level.float()) * _LOG2_E)  # the bounds of the two add up to 85
            filled = 1.0 - torch.relu(1.0 - w)  # min(1, w)

    inverse = keep = None
    if plan.is_masked:
        keep = c.keep_offset
        if old_log_w is not None:
            # Without KL the importances may be as far apart as their bounds: kept inside the range of _exp2.
            shortage = torch.clamp(torch.relu(c.minus_level.float() - old_log_w), max=85.0)
            keep = c.keep_offset + c.keep_slope * _exp2(shortage * -_LOG2_E).to(exact)
        inverse = 1.0 / (torch.relu(keep - c.smallest_divisor) + c.smallest_divisor)

    step = g
    if inverse is not None and masked is not None:
        dropped = masked.float().view(torch.int32) == c.dropped.float().view(torch.int32)
        step = step * torch.where(dropped, 0.0, inverse)
    step = step + c.weight_decay * old_x
    new_d = None
    if plan.momentum and old_d is not None:
        new_d = old_d * c.decay + c.gradient_share * step
        step = step + c.momentum * new_d if plan.nesterov else new_d
    elif plan.keeps_direction:
        new_d = step
    if plan.scale_steps and old_log_w is not None:
        step = step * torch.exp(old_log_w - c.log_normalizer.float()).to(exact)  # may be out of the range of _exp2
    new_x = old_x - c.lr * step
    if plan.guarded:
        new_x = torch.where(skipped, old_x, new_x)
        new_d = None if new_d is None or old_d is None else torch.where(skipped, old_d, new_d)

    stored = new_x.to(x.dtype).to(exact)
    sums = None
    if h is not None and new_log_w is not None and w is not None and filled is not None:
        absolute = h.abs() + new_log_w * c.zero.float()  # reads what the others read: three sums, one loop
        sums = absolute.sum(1), w.sum(1), filled.sum(1)
    if plan.draws and masked is not None and keys is not None:
        masked.copy_(_masked_weights(stored, filled, keys[:, :3], position, c))
    x.copy_(stored * c.one)
    if direction is not None and new_d is not None:
        direction.copy_(new_d * c.one)
    if log_w is not None and new_log_w is not None:
        log_w.copy_(new_log_w * c.one.float())
    return sums


def mask_pass(
    x: Tensor,
    log_w: Tensor | None,
    masked: Tensor,
    keys: Tensor,
    position: Tensor,
    numbers: Tensor,
    plan: Plan,
) -> None:
    """Writes masked weights where no step has left them: before the first one, and after a change of options.

    The arguments are those of :func:`step_pass`; the level is ``next_level``.
    """
    c = Numbers(*numbers.split(1, dim=1))
    if not plan.is_rest:
        assert x.shape[1] == ROW
    filled = None
    if log_w is not None:
        height = torch.clamp(log_w.float() + c.next_level.float(), -85.0, 85.0)  # as step_pass has it by its bounds
        filled = 1.0 - torch.relu(1.0 - _exp2(height * _LOG2_E))
    exact = torch.promote_types(x.dtype, torch.float32)
    masked.copy_(_masked_weights(x.to(exact), filled, keys, position, c))


@functools.cache
def compiled(function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """The function for one plan, compiled when it is first called, for tensors of any length.

    The limit on recompilations counts by code object; a copy of it for every plan keeps plans apart.
    """
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    options: dict[str, Any] = {
        "cpp.enable_floating_point_contract_flag": "fast",  # multiply and add as one instruction
        "cpp.min_chunk_size": ROW,  # a single row is too little for a second thread
        # Only what `_computed_once` names has a buffer of its own: one too many ends in a loop of its own.
        "realize_opcount_threshold": 100_000,
        "realize_reads_threshold": 100_000,
        "realize_acc_reads_threshold": 100_000,
    }
    return functools.partial(torch.compile(copy, dynamic=True, fullgraph=True, options=options), plan=plan)


class Rows:
    """A parameter and what is shaped like it, as rows for the passes: full ones first, then what is left.

    To make a tensor takes a tenth of the time of a small pass, so what stays where it is is made once.
    """

    def __init__(self, param: Tensor) -> None:
        self._numel = n = param.numel()
        # A single row has a shape of its own to the compiler, so it goes the way of what is left.
        self._cuts = [(0, n // ROW, ROW)] if n >= ROW else []
        self._cuts += [(n - n % ROW, 1, n % ROW)] if n % ROW else []
        exact, width = torch.promote_types(param.dtype, torch.float32), len(Numbers._fields)
        self._numbers = torch.empty(-(-n // ROW), width, dtype=exact, device=param.device)
        self._numbers_rows = [_bare(self._numbers, start // ROW * width, rows, width) for start, rows, _ in self._cuts]
        self._positions = [
            _bare(_positions(param.device), 0, 1, columns, is_rest=rows == 1) for _, rows, columns in self._cuts
        ]
        self._made: dict[str, tuple[int, list[Tensor]]] = {}

    def fit(self, param: Tensor) -> bool:
        """Whether these are rows for the parameter as it is now."""
        exact = torch.promote_types(param.dtype, torch.float32)
        return param.numel() == self._numel and self._numbers.device == param.device and self._numbers.dtype == exact

    def _rows(self, name: str, t: Tensor | None) -> list[Tensor] | list[None]:
        if t is None:
            return [None] * len(self._cuts)
        made = self._made.get(name)
        if made is None or made[0] != t.data_ptr():
            self._made[name] = made = (t.data_ptr(), [_bare(t, *cut, is_rest=cut[1] == 1) for cut in self._cuts])
        return made[1]

    def run(
        self,
        function: Callable[..., Any],
        plan: Plan,
        numbers: Tensor,
        keys: Tensor | None,
        *,
        grad: Tensor | None = None,
        **elements: Tensor | None,
    ) -> list[Any]:
        """Runs a pass; returns what its calls return.

        Args:
            function: :func:`step_pass` or :func:`mask_pass`.
            plan: its plan, for full rows.
            numbers: what :meth:`Numbers.pack` returned.
            keys: see there.
            grad: laid out in memory like the parameter.
            elements: what else is shaped like it, by the names of the arguments. All are kept until they move.
        """
        self._numbers.copy_(numbers)
        kept = {name: self._rows(name, t) for name, t in elements.items()}
        results = []
        for i, (start, rows, columns) in enumerate(self._cuts):
            arguments: dict[str, Tensor | None] = {name: made[i] for name, made in kept.items()}
            if grad is not None:
                arguments["grad"] = _bare(grad, start, rows, columns, is_rest=rows == 1)
            arguments["keys"] = None if keys is None else _bare(keys, start // ROW * keys.shape[1], rows, keys.shape[1])
            plan = plan._replace(is_rest=rows == 1)
            # A row of one element has a shape of its own, too, and nothing to be fast at.
            call = compiled(function, plan) if columns > 1 else functools.partial(function, plan=plan)
            results.append(call(**arguments, position=self._positions[i], numbers=self._numbers_rows[i]))
        return results


def _bare(t: Tensor, start: int, rows: int, columns: int, is_rest: bool = False) -> Tensor:
    """Rows of a tensor that are no view: the compiler would look at what it is a view of, and compile for its shape.

    Writing to them does not count as a change of ``t``; see ``torch.autograd.graph.increment_version``.
    """
    bare = torch.empty(0, dtype=t.dtype, device=t.device)
    bare.set_(t.untyped_storage(), t.storage_offset() + start, (rows, columns), (columns, 1))
    if not is_rest:
        torch._dynamo.mark_static(bare, 1)  # or else as many rows as columns would be a case of their own
    return bare


@functools.cache
def _positions(device: torch.device) -> Tensor:
    return torch.arange(ROW, dtype=torch.int32, device=device)


def mask_blocks(x: Tensor, log_w: Tensor | None, masked: Tensor, keys: Tensor, numbers: Tensor) -> None:
    """:func:`mask_pass` without compilation, on flat tensors, block by block: for what is needed once or twice."""
    for first, (part, part_log_w, out) in enumerate(blocks(x, log_w, masked)):
        assert part is not None
        assert out is not None
        full = part.numel() // ROW * ROW
        start = first * BLOCK // ROW
        for low, high, columns in ((0, full, ROW), (full, part.numel(), part.numel() - full)):
            if high > low:
                mask_pass(
                    part[low:high].view(-1, columns),
                    None if part_log_w is None else part_log_w[low:high].view(-1, columns),
                    out[low:high].view(-1, columns),
                    keys[start + low // ROW : start + -(-high // ROW)],
                    _positions(x.device)[:columns],
                    numbers,
                    Plan(is_rest=True),
                )


_warned: set[str] = set()


def compiler_works(device_type: str, warn: bool = False) -> bool:
    """Whether ``torch.compile`` works for a kind of device; says once where it does not, if that is to be said."""
    problem = _problem(device_type)
    if problem and warn and device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"fused=True needs torch.compile, which does not work here for {device_type} ({problem}); ImpactSGD takes "
            "the for-loop or foreach instead",
            stacklevel=4,
        )
    return problem is None


@functools.cache
def _problem(device_type: str) -> str | None:
    try:
        probe = torch.compile(lambda t: t + 1.0, dynamic=True, fullgraph=True)  # what no step can do without
        probe(torch.zeros(3, device=device_type))
    except Exception as error:  # a compiler has many ways not to be there
        return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    return None
