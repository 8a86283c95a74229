"""ImpactSGD: stochastic gradient descent that learns an importance for every weight and drops weights by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD
from typing_extensions import Unpack

from .impact import Impact, ImpactOptimizer, module_and_params
from .options import ImpactOptions, completed, documentation

__all__ = ["ImpactSGD"]


class ImpactSGD(ImpactOptimizer, SGD):
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


ImpactSGD.__doc__ = rf"""Implements SGD with learnt importances and importance-driven DropConnect.

    It is a :class:`torch.optim.SGD`, with :class:`Impact` built in; see there for the mathematics. With ``drop_rate=0``
    its trajectory is that of SGD, bit for bit.

    Args:
        params (Module or iterable): a module, which is attached at once (:meth:`attach`); or, as everywhere in
        torch.optim,
            an iterable of parameters, of named parameters, or of dicts that define parameter groups. All options can be
            given per group.
        lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused (optional): those of
            :class:`torch.optim.SGD`; the weight decay is that of the dense weights.
{documentation()}

    State per weight, beside SGD's: ``log_importance``, 4 bytes whatever the dtype of the parameter
    (``"hypergradient"`` also keeps the last step).

    Example:
        >>> optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, weight_decay=5e-4, drop_rate=0.1)
        >>> for input, target in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(input), target).backward()
        ...     optimizer.step()
    """
