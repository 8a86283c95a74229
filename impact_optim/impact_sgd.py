"""ImpactSGD: stochastic gradient descent that learns an importance for every weight and drops weights by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD
from typing_extensions import Unpack

from .impact import Impact, ImpactOptimizer, face_documentation, module_and_params
from .options import ImpactOptions, completed

__all__ = ["ImpactSGD"]


class ImpactSGD(ImpactOptimizer, SGD):
    _base = SGD

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[ImpactOptions],
    ) -> None:
        completed(options)
        module, params = module_and_params(params)
        SGD.__init__(
            self,
            params,  # type: ignore[arg-type]
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        Impact.__init__(self, module, self, **options)


ImpactSGD.__doc__ = face_documentation(
    "ImpactSGD",
    "SGD",
    "lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused",
    "lr=0.1, momentum=0.9, weight_decay=5e-4",
)
