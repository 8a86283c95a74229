"""Carries a cut over to everything that is shaped like a parameter: optimizer state, gradients, averaged copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from ..impact import Impact, attached_impacts, impact_of
from ..masks import Draw, Mask, TensorDraw
from .attributes import integer_attributes, set_integer_attributes
from .plan import PruneRecord
from .stand_ins import named_tensors
from .surgery import select

T = TypeVar("T")
Optimizers = Optimizer | Impact | Iterable[Optimizer | Impact]


class _Cut(NamedTuple):
    """What happened to one parameter or buffer."""

    name: str
    before: list[int]
    """Its shape before the cut."""
    after: torch.Size
    kept: dict[int, Tensor]
    """Dimension -> the kept indices of what it was before."""


@torch.no_grad()
def repair(
    records: Iterable[PruneRecord],
    model: nn.Module,
    *,
    optimizers: Optimizers = (),
    averaged: nn.Module | Iterable[nn.Module] = (),
) -> None:
    """Cuts the state of optimizers and averaged copies of a model as the model itself was cut, all or nothing.

    Of an optimizer's state, a tensor of the parameter's shape is cut like the parameter; one that was reduced over
    some dimensions, as row and column statistics are, is cut along those that it has; scalars stay. Masks that a pass
    of this step has seen are cut as well.

    Args:
        records: what :func:`~impact_optim.pruning.surgery.cut` returned.
        model: after the cut.
        optimizers: one or several, of the model's parameters; those that they wrap are cut as well. An
            :class:`~impact_optim.Impact` stands for the optimizers that it is around.
        averaged: one or several copies of the model, such as :class:`torch.optim.swa_utils.AveragedModel`; their
            parameters have the model's names, with or without ``module.`` before them.

    Raises:
        ValueError: an optimizer or a copy is not one of this model, was cut before, or has state of a shape that does
            not tell how to cut it. Nothing has changed then.
        TypeError: an optimizer keeps state that is not of one parameter, as LBFGS does. Nothing has changed then.
    """
    cuts = _cuts(records, model)
    found = with_state(optimizers)
    new_states = [
        (optimizer, state) for optimizer in found if (state := _cut_state(optimizer, model, cuts)) is not None
    ]
    new_draws = [(mask, _cut_draws(mask, cuts)) for mask in drawn_masks(found, model)]
    copies = [unwrapped(copy, model) for copy in _as_list(averaged, nn.Module)]
    new_tensors = [new for copy in copies for new in _cut_copy(copy, cuts)]
    old_states = [(optimizer, optimizer.state) for optimizer, _ in new_states]
    try:
        for optimizer, state in new_states:
            replace_state(optimizer, state)
    except BaseException:
        for optimizer, state in old_states:
            replace_state(optimizer, state)
        raise
    for mask, draws in new_draws:
        mask.draws = draws
    for tensor, data, grad in new_tensors:
        tensor.grad = None  # one of another shape would be refused
        tensor.data = data
        tensor.grad = grad
    for copy in copies if cuts else ():
        set_integer_attributes(copy, integer_attributes(model))


def _params(optimizer: Optimizer) -> set[Tensor]:
    return {param for group in optimizer.param_groups for param in group["params"]}


def _cut_draws(mask: Mask, cuts: Mapping[Tensor, _Cut]) -> dict[Tensor, Draw]:
    """What the masks of a step hold for the weights that are left."""
    if cuts.keys().isdisjoint(mask.draws):
        return mask.draws
    factors = {p: mask.factor(p) for p in mask.draws}
    draw = TensorDraw({p: select(factor, cuts[p].kept) if p in cuts else factor for p, factor in factors.items()})
    return dict.fromkeys(factors, draw)


def _as_list(one_or_several: T | Iterable[T], *kinds: type) -> list[T]:
    return [one_or_several] if isinstance(one_or_several, kinds) else list(one_or_several)  # type: ignore[list-item, arg-type]


def _cuts(records: Iterable[PruneRecord], model: nn.Module) -> dict[Tensor, _Cut]:
    tensors = named_tensors(model)
    cuts: dict[Tensor, _Cut] = {}
    for name, dim, kept, before in records:
        if name not in tensors:
            raise ValueError(f"a record names {name!r}, which {type(model).__name__} does not have")
        tensor = tensors[name]
        cut = cuts.setdefault(tensor, _Cut(name, list(tensor.shape), tensor.shape, {}))
        if dim in cut.kept:  # a later cut
            cut.kept[dim] = cut.kept[dim][kept]
        else:
            cut.kept[dim], cut.before[dim] = kept, before
    for cut in cuts.values():
        for dim, kept in cut.kept.items():
            if len(kept) != cut.after[dim]:
                raise ValueError(
                    f"{cut.name} has {cut.after[dim]} indices in dimension {dim}, but the records keep {len(kept)}; "
                    "cut the model first, then repair with all the records of this cut and no others"
                )
    return cuts


# ------------------------------------------------------------------------------- optimizers


def with_state(optimizers: Optimizers) -> list[Optimizer]:
    """The optimizers that keep state: of those handed in, and of those that they wrap, each one once.

    A wrapper (of accelerate, a Lookahead, SAM) may show the state of the optimizer inside, or have its own besides. An
    :class:`~impact_optim.Impact` keeps its own in that of the optimizers that it is around.

    Raises:
        TypeError: one is no optimizer, or shows state that is neither its own nor that of one inside.
    """
    found: list[Optimizer] = []
    handed: list[Optimizer | Impact] = _as_list(optimizers, Optimizer, Impact)
    pending = [each for one in handed for each in (one.optimizers if isinstance(one, Impact) else [one])]
    while pending:
        optimizer = pending.pop(0)
        kind = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{kind} is no torch.optim.Optimizer: hand in the optimizers that it steps")
        if any(optimizer is other for other in found):
            continue
        held = tree_leaves(list(vars(optimizer).values()), is_leaf=lambda value: isinstance(value, Optimizer))
        inside = [
            other
            for other in held
            if isinstance(other, Optimizer)
            and other is not optimizer
            and not _params(optimizer).isdisjoint(_params(other))
        ]
        pending += inside
        if any(optimizer.state is other.state for other in (*inside, *found)):
            continue
        if "state" not in vars(optimizer):
            raise TypeError(
                f"{kind} shows the state of optimizers that cannot be found in it: hand in the optimizers inside of it"
            )
        found.append(optimizer)
    return found


def impacts_around(optimizers: Iterable[Optimizer], model: nn.Module) -> list[Impact]:
    """Whatever masks the weights that optimizers train, or that a model reads."""
    found = [*map(impact_of, optimizers), *attached_impacts(model)]
    return [impact for impact in dict.fromkeys(found) if impact is not None]


def drawn_masks(optimizers: Iterable[Optimizer], model: nn.Module) -> list[Mask]:
    """The masks of this step."""
    return [mask for impact in impacts_around(optimizers, model) for mask in impact.masks()]


def _cut_state(optimizer: Optimizer, model: nn.Module, cuts: dict[Tensor, _Cut]) -> dict[Tensor, Any] | None:
    """The state that an optimizer has after the cut; None if nothing of it was cut."""
    kind = type(optimizer).__name__
    params = _params(optimizer)
    if params.isdisjoint(model.parameters()):
        raise ValueError(
            f"{kind} has no parameter of this {type(model).__name__}: hand in the optimizer that trains it"
        )
    if isinstance(optimizer, LBFGS) and optimizer.state:
        raise TypeError("LBFGS keeps one flat history of all parameters, which cannot be cut: start a new one")
    if params.isdisjoint(cuts):
        return None
    # Whoever only asks for the state of a parameter leaves an empty one behind, at which Adam's __setstate__ stumbles.
    state: dict[Tensor, Any] = defaultdict(
        dict, {param: entries for param, entries in optimizer.state.items() if entries}
    )
    for param, cut in cuts.items():
        entries = state.get(param, {})
        for key, value in entries.items():
            if any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in tree_leaves(value)):
                state[param] = {**state[param], key: _cut_entry(value, cut, f"{key!r} of {cut.name} in {kind}")}
    return state


def _cut_entry(value: Any, cut: _Cut, what: str) -> Tensor:
    """Cuts a tensor that has all dimensions of the parameter, some of them of size 1, or only some of them."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{what} is a {type(value).__name__} of tensors; only a tensor per entry can be cut: remove the entry and "
            "let the optimizer start it afresh"
        )
    fits: dict[tuple[tuple[int, tuple[int, ...]], ...], dict[int, Tensor]] = {}
    for dims in combinations(range(len(cut.before)), value.dim()):
        if all(
            size == cut.before[dim] or (size == 1 and value.dim() == len(cut.before))
            for size, dim in zip(value.shape, dims, strict=True)
        ):
            kept = {i: cut.kept[dim] for i, dim in enumerate(dims) if dim in cut.kept and value.shape[i] != 1}
            fits[tuple((i, tuple(indices.tolist())) for i, indices in kept.items())] = kept
    if len(fits) != 1:
        why = "does not fit" if not fits else "does not tell which dimensions it has of"
        raise ValueError(
            f"{what} has the shape {tuple(value.shape)}, which {why} a parameter that was cut from "
            f"{tuple(cut.before)} to {tuple(cut.after)}; remove the entry from optimizer.state to let it start afresh"
        )
    return select(value, next(iter(fits.values())))


def replace_state(optimizer: Optimizer, state: dict[Tensor, Any]) -> None:
    """Gives an optimizer another state."""
    # As load_state_dict does in the end, so that an optimizer that derives something from its state hears of it.
    optimizer.__setstate__({"state": state, "param_groups": optimizer.param_groups})


# ------------------------------------------------------------------------------- copies


def unwrapped(copy: nn.Module, model: nn.Module) -> nn.Module:
    """The module inside, where an averaged copy wraps it."""
    inner = getattr(copy, "module", None)
    copy = inner if isinstance(inner, nn.Module) and type(copy) is not type(model) else copy
    if named_tensors(copy).keys() != named_tensors(model).keys():
        raise ValueError(
            f"{type(copy).__name__} has not the parameters and buffers of {type(model).__name__}: hand in a copy of "
            "this model"
        )
    return copy


def _cut_copy(copy: nn.Module, cuts: dict[Tensor, _Cut]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The tensors of an averaged copy to be changed, with their new data and gradients."""
    tensors = named_tensors(copy)
    new = []
    for cut in cuts.values():
        tensor = tensors[cut.name]
        if list(tensor.shape) != cut.before:
            raise ValueError(
                f"{cut.name} has the shape {tuple(tensor.shape)} in {type(copy).__name__}, which the records do not "
                f"cut to {tuple(cut.after)}: hand in a copy that was made before the cut"
            )
        grad = None if tensor.grad is None else select(tensor.grad, cut.kept)
        new.append((tensor, select(tensor, cut.kept), grad))
    return new
