"""ActivationPruner: cuts the units that tell least out of a network while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..impact import impact_of
from .budget import SPLITS, TARGETS, Budget, Scores
from .criteria import CRITERIA, Context, Criterion
from .plan import UNCUT, Plan
from .repair import Optimizers, drawn_masks, impacts_around, repair, replace_state, with_state
from .report import PruneReport, planned
from .schedule import schedule_of
from .statistics import ActivationStatistics
from .surgery import Snapshot, cut
from .tracing import trace

_T = TypeVar("_T")
Guard = tuple[Callable[[nn.Module], float], float]

_WITHOUT_ACTIVATIONS = ("l1", "importance", "random")
_SMALLER_CUTS = 4  # that are tried where the guard cannot bear one: the largest bearable is found to a sixteenth
_MOST_EPOCHS = 10**9


class ActivationPruner:
    """Removes the units of a network whose activations carry little information, while it trains.

    With ``remove=0.5, by=14`` half of the multiply-accumulates are gone after epoch 14. Some go after each epoch from
    the third on, a seventh of the way, most of them early. ``remove={10: 0.2, 20: 0.4}`` cuts after these epochs.

    Forward hooks gather the statistics of a criterion in the epochs that end with a cut. A cut happens in place: the
    model, its parameters, the optimizers and their parameter groups stay the same objects. Build
    ``DistributedDataParallel`` and CUDA graphs anew after it; ``torch.compile`` compiles again by itself.

    Args:
        model: in training; not wrapped.
        example_inputs: the positional arguments of a forward pass as a tuple (one tensor may stand alone), or the
            keyword arguments as a dict; MACs are counted for them.
        remove: the fraction to be removed, in (0, 1), or a schedule: epoch -> fraction removed by then, as of
            :func:`ramp`.
        by: the epoch after which the fraction is gone. Leave the network about a third of its epochs after it.
        criterion: a name in :data:`~impact_optim.pruning.criteria.CRITERIA`, or a function like those.
        optimizer: of the model's parameters, one or several. One that wraps another, such as accelerate's or a
            Lookahead, stands for that as well, and an :class:`~impact_optim.Impact` for those that it is around.
        averaged: averaged copies of the model, one or several.
        target: what the fractions are of, all there was at first of ``"macs"``, ``"params"`` or ``"units"``.
        split: how the budget is spread over layers, ``"uniform"`` or ``"rademacher"``; by default
            ``"rademacher"`` with the criteria of activations, else ``"uniform"``.
        round_to: layers keep a multiple of so many channels where they are wide enough; 8 suits most GPUs.
        max_ratio: the largest share of its units that a layer may lose, in [0, 1].
        ignore: modules of which nothing is cut.
        guard: a metric, called with the model, of which more is better, and how far below the best that it has been
            before a cut it may be after one, however many there are. A cut that costs more is undone, and the largest
            that does not is found by bisection. What the metric changes in the model, as a renewal of batch norm does,
            is undone. Where processes train together, they compare its mean.
        every: statistics are gathered in one of so many forward passes.
        seed: of random signs, and of ``"random"``.

    Raises:
        TypeError, ValueError: an argument is not of that form, or an optimizer with masks that is attached to the model
            was not handed in.

    Example:
        >>> pruner = ActivationPruner(model, images, remove=0.5, by=14, optimizer=optimizer)
        >>> for epoch in range(20):
        ...     train_one_epoch(model, optimizer)
        ...     print(pruner.step())
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
        remove: float | Mapping[int, float],
        *,
        by: int | None = None,
        criterion: str | Criterion = "rademacher",
        optimizer: Optimizers = (),
        averaged: nn.Module | Iterable[nn.Module] = (),
        target: str = "macs",
        split: str | None = None,
        round_to: int = 1,
        max_ratio: float = 0.9,
        ignore: Iterable[nn.Module] = (),
        guard: Guard | None = None,
        every: int = 8,
        seed: int = 0,
    ) -> None:
        _check_model(model)
        schedule = schedule_of(remove, by)
        if isinstance(criterion, str) and criterion not in CRITERIA:
            raise ValueError(f"criterion is {criterion!r}; choose from {list(CRITERIA)}, or hand in a function")
        if target not in TARGETS:
            raise ValueError(f"target is {target!r}; it must be one of {TARGETS}")
        reads = criterion not in _WITHOUT_ACTIVATIONS
        if split is None:
            split = "rademacher" if reads and isinstance(criterion, str) else "uniform"
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
        if round_to < 1 or not 0 <= max_ratio <= 1:
            raise ValueError(f"round_to={round_to} must be at least 1, and max_ratio={max_ratio} in [0, 1]")
        self.model, self.schedule, self.criterion = model, schedule, criterion
        self.optimizers = with_state(optimizer)
        _check_none_is_forgotten(self.optimizers, model)
        self.averaged = [averaged] if isinstance(averaged, nn.Module) else list(averaged)
        repair([], model, optimizers=self.optimizers, averaged=self.averaged)  # refuses what is not of this model
        self.guard, self.seed = guard, seed
        self.epoch = 0
        """Epochs that have ended."""
        self.graph = trace(model, example_inputs, ignore=ignore)
        reads |= split == "rademacher"
        self.budget = Budget(model, self.graph, target, split, round_to, max_ratio, reads)
        self.statistics = ActivationStatistics(model, self.graph, every=every, seed=seed)
        self._best_metric = -math.inf
        self._attach_if_due()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.statistics.detach()  # the hooks of a copied model do nothing
        self._attach_if_due()

    # ------------------------------------------------------------------------------- once an epoch

    def step(self) -> PruneReport:
        """Ends an epoch: cuts if the schedule says so. The first call ends epoch 1.

        Returns:
            What has been cut; on an epoch off the schedule, nothing.

        Raises:
            ValueError: the criterion cannot score a group, or an optimizer has state that cannot be cut.
            RuntimeError: the network would not run after the cut, or this is inside a scope of :meth:`Impact.masked` or
                :meth:`Impact.expected`. Nothing has changed, whatever is raised.
        """
        epoch = self.epoch + 1
        with self._all_or_nothing() as before:
            if epoch in self.schedule:
                report = self._cut_to(self.schedule[epoch], epoch, before)
            else:
                report = planned(self.graph, self.graph.plan({}), self.budget.size, self.budget.size, epoch)
            self.epoch = epoch
            self.statistics.reset()
            self._attach_if_due()
        return report

    def dry_run(self, fraction: float) -> PruneReport:
        """What a cut to this fraction would do now. Nothing changes, and the guard is not asked.

        A criterion of activations needs some: let the model train with ``pruner.statistics.attach()``, if the schedule
        does not do so in this epoch.

        Args:
            fraction: removed in total, in (0, 1).

        Raises:
            ValueError, RuntimeError: as :meth:`step`.
        """
        schedule_of({1: fraction})
        scores = self._scores()
        plan = self.budget.plan(fraction, scores)
        before, after = self.budget.size, self.budget.size_with(plan)
        return replace(planned(self.graph, plan, before, after, self.epoch, scores.values), note="dry run")

    def _attach_if_due(self) -> None:
        if self.epoch + 1 in self.schedule and self.budget.reads_activations:
            self.statistics.attach()
            if self.epoch > 0:
                torch.compiler.reset()  # what is compiled already does not look for new hooks

    # ------------------------------------------------------------------------------- a cut

    def _cut_to(self, fraction: float, epoch: int, before: _Snapshot) -> PruneReport:
        """Cuts until a fraction of what there was is gone, or as much of it as the guard bears."""
        budget, scores = self.budget, self._scores()
        plan, metric, note = budget.plan(fraction, scores), None, ""
        if fraction <= (gone := budget.gone()):
            note = f"{gone:.3g} of the {budget.target} are gone already"
        elif self.guard is not None:
            borne, plan, metric = self._bearable(fraction, scores, self.guard, before)
            if borne < fraction:
                note = f"the guard bears {borne:.3g} of the {budget.target}, not {fraction:.3g}"
        size = budget.size_with(plan)
        note = note or budget.shortfall(fraction, plan, scores, size)
        report = planned(self.graph, plan, budget.size, size, epoch, scores.values)
        self._carry_out(plan)
        budget.size = size
        if metric is not None:
            self._best_metric = max(self._best_metric, metric[0])
        return replace(report, metric=metric, note=note, left_out=scores.left_out)

    def _bearable(
        self, fraction: float, scores: Scores, guard: Guard, before: _Snapshot
    ) -> tuple[float, Plan, tuple[float, float]]:
        """The largest fraction that the guard bears, the plan of it, and the metric before and after."""
        metric, tolerance = guard

        def measure() -> float:
            values = _of_all_processes(float(metric(self.model)))
            return sum(values) / len(values)

        start = measure()
        least = max(start, self._best_metric) - tolerance  # nan if it starts so
        best = (self.budget.gone(), self.graph.plan({}), (start, start))
        asked, too_much = fraction, fraction
        for _ in range(1 + _SMALLER_CUTS):
            before.restore()
            plan = self.budget.plan(asked, scores)
            self._carry_out(plan)
            end = measure()
            if end >= least:  # not so for nan
                best = (asked, plan, (start, end))
                if asked == fraction:
                    break
            else:
                too_much = asked
            asked = (best[0] + too_much) / 2
        before.restore()
        return best

    def _scores(self) -> Scores:
        context = Context(
            parameters=dict(self.model.named_parameters()),
            statistics=self.statistics.all_reduce() if self.budget.reads_activations else {},
            importances=self._importances(),
            seed=self.seed,
        )
        criterion = CRITERIA[self.criterion] if isinstance(self.criterion, str) else self.criterion
        values, left_out = {}, dict.fromkeys(self.graph.groups, "no module shows the activations of its units")
        groups = self.budget.groups()
        for name, group in groups.items():
            try:
                values[name] = criterion(group, context).detach().cpu()
                del left_out[name]
            except ValueError as error:  # of a layer that was skipped in what was observed, or is not trained
                left_out[name] = str(error)
        if groups and not values:
            raise ValueError(next(left_out[name] for name in groups))
        for name, value in values.items():
            if value.shape != (size := self.graph.groups[name].size,):
                raise ValueError(
                    f"the criterion gives scores of shape {tuple(value.shape)} to {name}, which has {size} units; it "
                    "must give one to each"
                )
        values, left_out = _of_all_processes((values, left_out))[0]
        return Scores(values, context.statistics, left_out)

    def _importances(self) -> dict[str, Tensor]:
        """Of the weights of optimizers that keep importances."""
        names = {param: name for name, param in self.model.named_parameters()}
        return {
            names[param]: impact.importance(param)
            for optimizer in self.optimizers
            if self.criterion == "importance" and (impact := impact_of(optimizer)) is not None
            for group in optimizer.param_groups
            for param in group["params"]
            if param in names
        }

    def _carry_out(self, plan: Plan) -> None:
        """Cuts everything that knows of the units. Where it raises, part of it may have been cut."""
        records = cut(self.model, self.graph, plan)
        repair(records, self.model, optimizers=self.optimizers, averaged=self.averaged)
        self.statistics.keep(plan)

    @contextmanager
    def _all_or_nothing(self) -> Generator[_Snapshot, None, None]:
        """Without hooks inside: what a guard evaluates is not the training that is observed."""
        if any(impact.in_scope for impact in impacts_around(self.optimizers, self.model)):
            raise RuntimeError("a cut changes the dense weights: leave the scope of masked() or expected() first")
        before = _Snapshot(self)
        self.statistics.detach()
        try:
            yield before
        except BaseException:
            before.restore()
            self.statistics.detach()
            self._attach_if_due()
            raise

    # ------------------------------------------------------------------------------- state dict

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the units that are left, and the statistics; arguments and weights are not in it."""
        units = {name: group.original for name, group in self.graph.groups.items()}
        return {
            "epoch": self.epoch,
            "units": units,
            "best_metric": self._best_metric,
            "statistics": self.statistics.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resumes: gives a newly built model the shape that the saved one had.

        The order is: build the model, the optimizers and the pruner; load the pruner; then load the model, the
        optimizers and the rest, whose tensors have the sizes that they fit now.

        Raises:
            ValueError: it is not of this model, or the model has been cut otherwise, or an optimizer or an averaged
                copy was loaded first. Nothing has changed then.
        """
        (epoch, units), groups = _checked(state_dict), self.graph.groups
        if units.keys() != groups.keys():
            differing = sorted(units.keys() ^ groups.keys())
            raise ValueError(
                f"the state is of another model, or of one traced otherwise: see the groups {differing[:5]}"
            )
        for name, left in units.items():
            if not torch.isin(left, groups[name].original).all():
                raise ValueError(
                    f"{name} has lost units that the state has, or never had them: load into a newly built model"
                )
        chosen = {name: (~torch.isin(groups[name].original, left)).nonzero().flatten() for name, left in units.items()}
        with self._all_or_nothing():
            try:
                self._carry_out(self.graph.plan(chosen))
            except ValueError as error:
                raise ValueError(
                    f"the pruner is loaded before the optimizers and averaged copies are, into new ones: {error}"
                ) from error
            self.statistics.load_state_dict(state_dict["statistics"])
            self.budget.size = self.budget.size_with(UNCUT)
            self.epoch, self._best_metric = epoch, float(state_dict["best_metric"])
            self._attach_if_due()


class _Snapshot(Snapshot):
    """All that a cut and an evaluation after it may change, to go back to."""

    def __init__(self, pruner: ActivationPruner) -> None:
        super().__init__([pruner.model, *pruner.averaged], pruner.graph)
        self._pruner = pruner
        self._states = [(optimizer, optimizer.state) for optimizer in pruner.optimizers]
        self._masks = [(mask, mask.draws) for mask in drawn_masks(pruner.optimizers, pruner.model)]
        statistics = pruner.statistics
        self._statistics = deepcopy((statistics.groups, statistics.batches))
        self._own = {name: vars(pruner)[name] for name in ("_best_metric", "epoch")}
        self._size = pruner.budget.size

    def restore(self) -> None:
        """Can be called again."""
        super().restore()
        for optimizer, state in self._states:
            if optimizer.state is not state:
                replace_state(optimizer, state)
        for mask, draws in self._masks:
            if not mask.is_over:
                mask.draws = draws
        statistics = self._pruner.statistics
        statistics.groups, statistics.batches = deepcopy(self._statistics)
        vars(self._pruner).update(self._own)
        self._pruner.budget.size = self._size


def _checked(state: Mapping[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """The epoch and the units of a state dict, on the CPU, like those of the graph, wherever it was loaded to."""
    if missing := {"epoch", "units", "best_metric", "statistics"} - state.keys():
        raise ValueError(f"the state has no {sorted(missing)}: hand in what ActivationPruner.state_dict() gave")
    epoch, units = state["epoch"], state["units"]
    if type(epoch) is not int or not 0 <= epoch < _MOST_EPOCHS:
        raise ValueError(f"the state is damaged: its epoch is {epoch!r}, which is no number of epochs")
    for name, left in units.items():
        if not isinstance(left, Tensor) or left.dtype != torch.int64 or left.dim() != 1 or (left.diff() <= 0).any():
            raise ValueError(f"the state is damaged: the units of {name!r} are no ascending numbers")
    return epoch, {name: left.cpu() for name, left in units.items()}


def _of_all_processes(value: _T) -> list[_T]:
    """What each of the processes has that train together: they must cut alike, to the last bit of a score."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"ActivationPruner takes a torch.nn.Module, but got {torch.typename(model)}")
    kind = type(model).__name__
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TypeError(
            f"ActivationPruner takes the module inside {kind}: hand in model.module, and wrap it anew after each cut "
            "(where report.records is not empty)"
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError("ActivationPruner takes the module that torch.compile got, not what it returned")


def _check_none_is_forgotten(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Raises for an optimizer whose state a cut would not reach, though it shows itself: by its masks."""
    params = set(model.parameters())
    for impact in impacts_around(optimizers, model):
        for other in with_state(impact.optimizers):
            is_known = any(other is optimizer for optimizer in optimizers)
            if not is_known and any(param in params for group in other.param_groups for param in group["params"]):
                raise ValueError(
                    f"{type(other).__name__} trains this {type(model).__name__} with masks, and its state has to be "
                    "cut as well: hand it in, as optimizer=. If it trains no more, detach() it before"
                )
