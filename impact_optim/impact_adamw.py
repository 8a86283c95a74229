"""ImpactAdamW: AdamW that learns an importance for every weight and drops weights by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW
from typing_extensions import Unpack

from .impact import Impact, ImpactOptimizer, face_documentation, module_and_params
from .options import ImpactOptions, completed

__all__ = ["ImpactAdamW"]


class ImpactAdamW(ImpactOptimizer, AdamW):
    _base = AdamW

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[ImpactOptions],
    ) -> None:
        completed(options)
        module, params = module_and_params(params)
        AdamW.__init__(
            self,
            params,  # type: ignore[arg-type]
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        Impact.__init__(self, module, self, **options)


ImpactAdamW.__doc__ = face_documentation(
    "ImpactAdamW",
    "AdamW",
    "lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused",
    "lr=1e-3, weight_decay=0.05",
)
