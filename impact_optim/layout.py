"""Tensors as runs of memory: elementwise work goes over them block by block, or row by row, whatever their shape.

Elements count in the order in which a parameter holds them in memory (a channels_last weight: channels innermost), so
that no index has to be translated. A tensor with gaps or overlaps counts in the order of its indices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements at a time on a CPU: what a chain of operations touches stays in the second-level cache
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_MaybeTensor = TypeVar("_MaybeTensor", Tensor, "Tensor | None")


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from the outermost to the innermost in memory."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


def flat_views(*tensors: Tensor) -> list[Tensor] | None:
    """One-dimensional views of tensors of one shape that are laid out alike and without gaps; otherwise ``None``."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    order = memory_order(tensors[0])
    permuted = [t.permute(order) for t in tensors]
    return [t.view(-1) for t in permuted] if all(t.is_contiguous() for t in permuted) else None


def flatten(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements in the order in which ``like`` holds its own; a view where that is possible."""
    return tensor.permute(memory_order(like)).reshape(-1)


def unflatten(elements: Tensor, like: Tensor) -> Tensor:
    """Undoes :func:`flatten`: a view of the elements with the shape of ``like``."""
    order = memory_order(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return elements.view([like.shape[d] for d in order]).permute(inverse)


def blocks(*tensors: _MaybeTensor) -> Iterator[tuple[_MaybeTensor, ...]]:
    """Tensors of one shape, cut into blocks that fit the cache where that pays: on a CPU, and laid out alike."""
    present = [t for t in tensors if t is not None]
    flat = None
    if present[0].numel() > BLOCK and all(t.device.type == "cpu" for t in present):
        flat = flat_views(*present)
    if flat is None:
        yield tensors
        return
    parts = iter([t.split(BLOCK) for t in flat])
    count = -(-present[0].numel() // BLOCK)
    yield from zip(*[(None,) * count if t is None else next(parts) for t in tensors], strict=True)


@functools.lru_cache(maxsize=1024)
def _places(numel: int, count: int, device: torch.device) -> Tensor:
    # Multiples of the golden ratio modulo 1 spread evenly and keep step with no row length or kernel size.
    spread = torch.arange(count, dtype=torch.float64).mul_(_GOLDEN_RATIO).frac_()
    return (spread * numel).long().to(device)


def sample(tensors: Sequence[Tensor], size: int) -> Tensor:
    """About ``size`` elements spread evenly over several tensors, float32, the same places at every call.

    Args:
        tensors: on any devices.
        size: how many; all elements if there are no more.
    """
    device, n = tensors[0].device, sum(t.numel() for t in tensors)
    parts = []
    for t in tensors:
        count = -(-size * t.numel() // n) if n > size else t.numel()
        flat = t.detach().reshape(-1)
        parts.append(flat if count == t.numel() else torch.take(flat, _places(t.numel(), count, t.device)))
    return torch.cat([part.to(device, torch.float32) for part in parts])
