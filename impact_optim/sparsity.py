"""Which weights a network keeps when it is made sparse for good, and the report of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SparseTensor", "SparsityReport"]


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


def choose(
    scores: Mapping[Tensor, Tensor], sparsity: float | tuple[int, int], scope: str, name: Callable[[Tensor], str]
) -> dict[Tensor, Tensor]:
    """The masks of the weights to be kept.

    Args:
        scores: of each tensor; -inf for what is zero for good already.
        sparsity: the share of weights to be zero, or a pattern as :func:`parse_pattern` gives it.
        scope: ``"global"`` or ``"tensor"``.
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
    elif scope == "tensor":
        masks = {p: keep_largest([score], round((1.0 - sparsity) * score.numel()))[0] for p, score in scores.items()}
    else:
        count = round((1.0 - sparsity) * sum(score.numel() for score in scores.values()))
        masks = dict(zip(scores, keep_largest(list(scores.values()), count), strict=True))
    for p, mask in masks.items():
        revived = mask & (scores[p] == -math.inf)
        if not isinstance(sparsity, tuple) and revived.any():
            raise ValueError(
                f"{name(p)} has more weights that are zero for good already than sparsity={sparsity} leaves out; they "
                "do not come back"
            )
        mask &= ~revived
        if not mask.any():
            raise ValueError(
                f"sparsity={sparsity} would leave nothing of {name(p)}, and the network dead: lower it, choose "
                "scope='tensor', or leave the tensor out of params"
            )
    return masks


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
