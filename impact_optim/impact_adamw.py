"""ImpactAdamW: AdamW that learns an importance for every weight and drops weights by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW
from typing_extensions import Unpack

from .impact import Impact, ImpactOptimizer, module_and_params
from .options import ImpactOptions, completed, documentation

__all__ = ["ImpactAdamW"]


class ImpactAdamW(ImpactOptimizer, AdamW):
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


ImpactAdamW.__doc__ = rf"""Implements AdamW with learnt importances and importance-driven DropConnect.

    It is a :class:`torch.optim.AdamW`, with :class:`Impact` built in; see there for the mathematics. With
    ``drop_rate=0`` its trajectory is that of AdamW, bit for bit.

    Args:
        params (Module or iterable): a module, which is attached at once (:meth:`attach`); or, as everywhere in
        torch.optim,
            an iterable of parameters, of named parameters, or of dicts that define parameter groups. All options can be
            given per group.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused (optional): those of
            :class:`torch.optim.AdamW`; the decoupled weight decay is that of the dense weights.
{documentation()}

    State per weight, beside AdamW's: ``log_importance``, 4 bytes whatever the dtype of the parameter
    (``"hypergradient"`` also keeps the last step).

    Example:
        >>> optimizer = ImpactAdamW(model, lr=1e-3, weight_decay=0.05, drop_rate=0.1)
        >>> for input, target in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(input), target).backward()
        ...     optimizer.step()
    """
