"""What is a weight, and what masks leave alone: biases, norms, scales, whatever their shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def is_matrix(param: Tensor) -> bool:
    """Whether a parameter can be masked at all: a vector cannot, however many dimensions of length 1 it has."""
    return not is_lazy(param) and param.dim() > 1 and sum(size > 1 for size in param.shape) > 1


def vectors_of(module: nn.Module) -> Iterator[Tensor]:
    """Biases and the parameters of norms, also those that have the shape of a matrix."""
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            if isinstance(part, _NORMS) or name.endswith("bias"):
                yield param


def stacked_vectors(group: dict[str, Any]) -> Iterator[Tensor]:
    """The biases in a parameter group of an ensemble whose members lie in one tensor.

    :func:`torch.func.stack_module_state` makes such tensors. They are no ``nn.Parameter``, and a bias has the shape of
    a weight less its last dimensions."""
    bare = [p for p in group["params"] if not isinstance(p, nn.Parameter)]
    for p in bare:
        if any(q.dim() > p.dim() > 1 and q.shape[: p.dim()] == p.shape for q in bare):
            yield p
    for p, name in zip(group["params"], group.get("param_names", ()), strict=False):
        if name.endswith("bias"):
            yield p


def normalized_weights(module: nn.Module) -> Iterator[Tensor]:
    """Weights that a module divides by their norm, which has to stay above 0: weight norm's direction, and the like."""
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        for name, param in own.items():
            if isinstance(part, ParametrizationList) or (name.endswith("_v") and name[:-1] + "g" in own):
                yield param


def empty_slices(kept: Tensor) -> Iterator[Tensor]:
    """Where nothing is left of a slice along some dimension, whose norm would be 0; broadcasts to the mask."""
    for d in range(kept.dim()):
        yield ~kept.movedim(d, 0).flatten(1).any(1).view([-1 if i == d else 1 for i in range(kept.dim())])
