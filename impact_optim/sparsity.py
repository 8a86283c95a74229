"""Which weights a network keeps when it is made sparse for good, and the report of it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .importances import Simplex
from .options import is_number
from .weights import empty_slices

__all__ = ["SparseTensor", "SparsityReport", "erdos_renyi"]

_BY = ("importance", "expected", "magnitude")


class SparseTensor(NamedTuple):
    """What :meth:`Impact.sparsify` has left of one tensor."""

    name: str
    mask: Tensor
    """bool, the shape of the parameter: True where a weight is kept. :func:`torch.nn.utils.prune.custom_from_mask`
    takes it."""
    kept: int
    """How many weights that is."""

    @property
    def sparsity(self) -> float:
        """The share of its weights that are zero for good."""
        return 1.0 - self.kept / self.mask.numel()


@dataclass(frozen=True)
class SparsityReport:
    """What :meth:`Impact.sparsify` did; prints as a table."""

    tensors: list[SparseTensor]

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of each tensor by its name, True where a weight is kept."""
        return {tensor.name: tensor.mask for tensor in self.tensors}

    @property
    def sparsity(self) -> float:
        """The share of the weights of all tensors that are zero for good."""
        return 1.0 - sum(t.kept for t in self.tensors) / sum(t.mask.numel() for t in self.tensors)

    def __str__(self) -> str:
        rows = [("tensor", "weights", "kept", "sparsity")]
        rows += [(t.name, f"{t.mask.numel():,}", f"{t.kept:,}", f"{100 * t.sparsity:.1f}%") for t in self.tensors]
        numel, kept = sum(t.mask.numel() for t in self.tensors), sum(t.kept for t in self.tensors)
        rows.append(("total", f"{numel:,}", f"{kept:,}", f"{100 * self.sparsity:.1f}%"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
        return "\n".join("  ".join(row) for row in cells)


def erdos_renyi(shapes: Sequence[Sequence[int]], density: float, most: Sequence[int] | None = None) -> list[float]:
    """Densities of layers that go with (inputs + outputs) / (inputs · outputs): small layers keep a larger share.

    A kernel is one connection, of as many weights. In the form that counts its sizes as well (ERK), small convolutions
    at the input lose too much.

    Args:
        shapes: of the tensors.
        density: of all weights together.
        most: how many weights each can keep; by default all.

    Source: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018.

    Example:
        >>> [round(d, 2) for d in erdos_renyi([(100, 100), (10, 100)], 0.1)]
        [0.07, 0.38]
    """
    sizes = [math.prod(shape) for shape in shapes]
    most = sizes if most is None else most
    raw = [(shape[0] + shape[1]) / (shape[0] * shape[1]) for shape in shapes]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in full]
        left = density * sum(sizes) - sum(most[i] for i in full)
        scale = left / sum(raw[i] * sizes[i] for i in rest) if rest else 0.0
        over = {i for i in rest if scale * raw[i] * sizes[i] > most[i]}
        if not over:
            return [max(0.0, scale * raw[i]) if i in rest else most[i] / sizes[i] for i in range(len(sizes))]
        full |= over


def choose(
    scores: Mapping[Tensor, Tensor], sparsity: float | tuple[int, int], floor: float, name: Callable[[Tensor], str]
) -> dict[Tensor, Tensor]:
    """The masks of the weights to be kept.

    Args:
        scores: of each tensor; -inf for what is zero for good already.
        sparsity: the share of weights to be zero, or a pattern as :func:`parse_pattern` gives it.
        floor: what each tensor keeps at least, as a fraction of the share that all keep.
        name: what to call a tensor in an error.

    Raises:
        ValueError: no tensor fits the pattern, weights that are zero for good would come back, or nothing would be left
            of a tensor.
    """
    if isinstance(sparsity, tuple):
        found = {p: keep_pattern(score, *sparsity) for p, score in scores.items()}
        masks = {p: mask for p, mask in found.items() if mask is not None}
        if not masks:
            raise ValueError(
                f"dimension 1 of none of the tensors can be divided by {sparsity[1]}: sparsify by a share instead"
            )
    else:
        ranked = list(scores.values())
        count = round((1.0 - sparsity) * sum(score.numel() for score in ranked))
        if floor > 0:
            least = _at_least([score.numel() for score in ranked], floor * (1.0 - sparsity), count)
            for i, number in enumerate(least):
                first = keep_largest([ranked[i]], number)[0] & (ranked[i] > -math.inf)
                ranked[i] = ranked[i].masked_fill(first, math.inf)
        masks = dict(zip(scores, keep_largest(ranked, count), strict=True))
    for p, mask in masks.items():
        revived = mask & (scores[p] == -math.inf)
        if not isinstance(sparsity, tuple) and revived.any():
            raise ValueError(
                f"{name(p)} has more weights that are zero for good already than sparsity={sparsity} leaves out; they "
                "do not come back"
            )
        mask &= ~revived
        if not mask.any():
            remedy = "" if floor > 0 else "set a floor such as floor=0.1, "
            raise ValueError(
                f"sparsity={sparsity} would leave nothing of {name(p)}, and the network dead: lower it, {remedy}or "
                "leave the tensor out of params"
            )
    return masks


def _at_least(sizes: Sequence[int], share: float, count: int) -> list[int]:
    """How many elements of each tensor a share of them is: one at least, and no more than ``count`` together.

    Raises:
        ValueError: there are more tensors than that.
    """
    if len(sizes) > count:
        raise ValueError(f"{len(sizes)} tensors cannot keep a weight each where {count} are left: lower the sparsity")
    # Of sums, so that what is rounded does not add up; a tenth of 100 is to be 10, not 9.999.
    ends = [int(share * size + 1e-6) for size in itertools.accumulate(sizes)]
    least = [max(1, end - start) for start, end in itertools.pairwise([0, *ends])]
    while sum(least) > count:
        least[least.index(max(least))] -= 1
    return least


def scores_of(
    simplexes: Iterable[Simplex], by: str, params: Sequence[Tensor] | None, name: Callable[[Tensor], str]
) -> dict[Tensor, Tensor]:
    """What decides whether weights are kept: ``"importance"``, ``"expected"`` or ``"magnitude"``; -inf where one is
    zero for good.

    Raises:
        ValueError: there are no importances.
    """
    chosen = None if params is None else set(params)
    scores: dict[Tensor, Tensor] = {}
    for simplex in simplexes:
        members = [p for p in simplex.members if chosen is None or p in chosen]
        if not members:
            continue
        if by == "importance" and not simplex.is_learnt:
            importance = simplex.group["importance"]
            why = "yet, with" if simplex.group["mask_step"] else "before the first step, with"
            raise ValueError(
                f"{name(members[0])} has no importances {'with' if importance == 'uniform' else why} "
                f"importance={importance!r}; choose by='magnitude'"
                + ("" if importance == "uniform" else ", or train first (the first step only finds the signal's size)")
            )
        w = simplex.importances() if by == "importance" else {}
        keep = simplex.keep_probabilities() if by == "expected" and simplex.group["drop_rate"] > 0 else {}
        for p in members:
            size = p.detach().float().abs()
            score = w[p] if by == "importance" else size * keep[p] if p in keep else size
            scores[p] = score.masked_fill(simplex.held(p), -math.inf)
    return scores


def own_masks(
    masks: Any, homes: Mapping[Tensor, Simplex], normalized: set[Tensor], name: Callable[[Tensor], str]
) -> dict[Tensor, Tensor]:
    """Masks of the user's own, by parameter.

    Args:
        masks: by name or by parameter.
        homes: the simplex of each weight.
        normalized: weights that a module divides by their norm.
        name: what to call a tensor.

    Raises:
        TypeError, ValueError: they are none, or would leave nothing of a tensor.
    """
    if not isinstance(masks, Mapping) or not all(isinstance(mask, Tensor) for mask in masks.values()):
        raise TypeError("masks must be a dict of tensors, by the name of the parameter or by the parameter itself")
    if not masks:
        raise ValueError("masks is empty: there is nothing to make sparse")
    names = {name(p): p for p in homes}
    kept = {}
    for key, mask in masks.items():
        p = names.get(key) if isinstance(key, str) else key
        if p is None or p not in homes:
            raise ValueError(f"masks has a mask for {key!r}, which is no weight of this optimizer")
        if mask.shape != p.shape:
            raise ValueError(f"the mask of {name(p)} has shape {tuple(mask.shape)}, not {tuple(p.shape)}")
        kept[p] = mask.to(p.device, torch.bool, copy=True)
        if not (kept[p] & ~homes[p].held(p)).any():
            raise ValueError(f"the mask of {name(p)} would leave nothing of it, and the network dead")
        if p in normalized and any(empty.any() for empty in empty_slices(kept[p])):
            raise ValueError(
                f"the mask of {name(p)} would leave nothing of a row or a column, whose norm the layer divides by: "
                "keep a weight in each"
            )
    return kept


def fill_empty_slices(masks: Mapping[Tensor, Tensor], scores: Mapping[Tensor, Tensor]) -> None:
    """Lets the largest weight of each slice stay of which a mask would leave nothing."""
    for p, mask in masks.items():
        for empty in empty_slices(mask):
            others = [d for d in range(p.dim()) if empty.shape[d] == 1]
            mask |= empty & (scores[p] == scores[p].amax(others, keepdim=True))


def sparse_values(simplexes: Iterable[Simplex], kept: Mapping[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The weights, their states and their gradients, each with what it becomes when masks are for good."""
    values: list[tuple[Tensor, Tensor]] = []
    for simplex in simplexes:
        factors = simplex.expected_factors()
        for p in simplex.members:
            value = p.detach() * factors[p].to(p.dtype) if p in factors else p.detach()
            gone = ~kept[p] if p in kept else simplex.held(p)
            # What is left lives, also where it is zero now: a layer that begins at zero, or an underflow.
            value = value.masked_fill((value == 0) & ~gone, torch.finfo(p.dtype).tiny).masked_fill_(gone, 0.0)
            values.append((p.detach(), value))
            if p in kept:
                own = [*simplex.optimizer.state.get(p, {}).values(), p.grad if p.is_leaf else None]
                tensors = [t.detach() for t in own if isinstance(t, Tensor) and t.shape == p.shape]
                values += [(t, t.masked_fill(gone, 0.0)) for t in tensors]
    return values


@contextmanager
def changed(values: Sequence[tuple[Tensor, Tensor]]) -> Generator[None, None, None]:
    """Copies new values into tensors, for good if the scope ends well. Otherwise the old ones are back."""
    old = [(tensor, tensor.clone()) for tensor, _ in values]
    try:
        for tensor, value in values:
            tensor.copy_(value)
        yield
    except BaseException:
        for tensor, value in old:
            tensor.copy_(value)
        raise


def keep_largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest scores among all tensors together; of equal ones the first are kept.

    Args:
        scores: tensors of any shapes on any devices; -inf for what may not be kept before all else is.
        count: from 0 to the number of elements.

    Returns:
        bool tensors, True where a score is among the largest.

    Example:
        >>> keep_largest([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 2)
        [tensor([ True, False]), tensor([True])]
    """
    flat = torch.cat([score.reshape(-1).to(scores[0].device) for score in scores])
    order = flat.argsort(descending=True, stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order[:count], True)
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]


def keep_pattern(score: Tensor, n: int, m: int) -> Tensor | None:
    """The mask that keeps the n largest scores of every m neighbours along dimension 1, the inputs of a layer.

    That is the axis along which hardware multiplies such matrices, of a convolution at each place of its kernel.

    Returns:
        A bool tensor, or ``None`` where m does not divide the dimension.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021.

    Example:
        >>> keep_pattern(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 2, 4)
        tensor([[ True, False, False,  True]])
    """
    if score.size(1) % m:
        return None
    blocks = score.movedim(1, -1).unflatten(-1, (-1, m))
    kept = blocks.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, kept, True)
    return mask.flatten(-2).movedim(-1, 1).contiguous()


def check_choice(by: str, floor: float) -> None:
    """Raises a ValueError where :meth:`Impact.sparsify` does not know how to choose."""
    if by not in _BY:
        raise ValueError(f"Invalid by: {by!r}; choose from {list(_BY)}")
    if not (is_number(floor) and 0.0 <= floor <= 1.0):
        raise ValueError(f"Invalid floor: {floor!r}; it must lie in [0, 1]")


def parse_sparsity(sparsity: Any) -> float | tuple[int, int]:
    """The share of weights to be zero, or a pattern.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(sparsity, str):
        return parse_pattern(sparsity)
    if not (is_number(sparsity) and 0.0 <= sparsity < 1.0):
        raise ValueError(f"Invalid sparsity: {sparsity}; it must lie in [0, 1), or be a pattern such as '2:4'")
    return sparsity


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``"2:4"`` as (2, 4): of every 4 neighbours 2 are kept.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = map(int, match.groups()) if match else (0, 0)
    if not 0 < n < m:
        raise ValueError(
            f"Invalid sparsity: {pattern!r}; a pattern such as '2:4' keeps 2 of every 4 weights that are neighbours"
        )
    return n, m
