"""Tensors as runs of memory: elementwise work goes over them block by block, or row by row, whatever their shape.

Elements count in the order in which a parameter holds them in memory (a channels_last weight: channels innermost), so
that no index has to be translated. A tensor with gaps or overlaps counts in the order of its indices.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class Places:
    """Where the elements of tensors lie in flat buffers, one for each device.

    Args:
        params: in this order, one after the other.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.sizes: dict[torch.device, int] = {}
        """How many elements the buffer of each device has."""
        self._runs: dict[Tensor, tuple[torch.device, int, int]] = {}
        self._strides: dict[Tensor, tuple[int, ...]] = {}
        for p in params:
            start = self.sizes.get(p.device, 0)
            self.sizes[p.device] = start + p.numel()
            self._runs[p] = (p.device, start, start + p.numel())
            self._strides[p] = p.stride()

    def __contains__(self, param: Tensor) -> bool:
        return param in self._runs

    def __getitem__(self, param: Tensor) -> tuple[torch.device, int, int]:
        """The device of a parameter, and where its elements begin and end in the buffer there."""
        return self._runs[param]

    def fits(self, param: Tensor) -> bool:
        """Whether a parameter still has the size, the device and the strides that its place was made for."""
        device, start, stop = self._runs[param]
        return stop - start == param.numel() and device == param.device and self._strides[param] == param.stride()

    def split(self, flat: Mapping[torch.device, Tensor]) -> dict[Tensor, Tensor]:
        """Views of the buffers, of the shape of each parameter."""
        return {p: unflatten(flat[device][start:stop], p) for p, (device, start, stop) in self._runs.items()}

    def pieces(
        self, params: Iterable[Tensor]
    ) -> Iterator[tuple[torch.device, int, int, list[tuple[Tensor, int, int]]]]:
        """Runs of the buffers that cover some parameters, each with the parts of them that lie in it.

        On a CPU a run fits the cache; elsewhere it is as long as can be.
        """
        device, start, stop = torch.device("cpu"), 0, 0
        parts: list[tuple[Tensor, int, int]] = []
        for p in params:
            here, first, end = self._runs[p]
            longest = BLOCK if here.type == "cpu" else sys.maxsize
            position = first
            while position < end:
                if parts and (here != device or position != stop or stop - start >= longest):
                    yield device, start, stop, parts
                    parts = []
                if not parts:
                    device, start, stop = here, position, position
                size = min(longest - (stop - start), end - position)
                parts.append((p, position - first, position - first + size))
                position = stop = position + size
        if parts:
            yield device, start, stop, parts


@functools.lru_cache(maxsize=1024)
def _sampled(numel: int, count: int, device: torch.device) -> Tensor:
    # One in every stretch of numel/count elements, which multiples of the golden ratio keep out of step with rows and
    # kernels.
    step = torch.arange(count, dtype=torch.float64)
    return ((step + (step * _GOLDEN_RATIO).frac_()) * (numel / count)).long().to(device)


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
        parts.append(flat if count == t.numel() else torch.take(flat, _sampled(t.numel(), count, t.device)))
    return torch.cat([part.to(device, torch.float32) for part in parts])
