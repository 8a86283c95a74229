"""What happens to a model while a framework runs its loop: masks, a ramp of the drop rate, zeros for good, cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..drop_rate import DropRateScheduler
from ..impact import Impact, attached_impacts, impact_of
from ..options import is_integer
from ..pruning import ActivationPruner
from ..pruning.repair import repair, with_state
from ..sparsity import check_choice, parse_sparsity

MakeSchedule = Callable[[Optimizer], DropRateScheduler]
MakePruner = Callable[[nn.Module, Sequence[Optimizer | Impact]], ActivationPruner]


class Plan:
    """The part of a callback that does not depend on the framework.

    A callback calls :meth:`build` before the weights of a checkpoint are loaded, :meth:`start` when there are
    optimizers, then :meth:`end_step` and :meth:`end_epochs`. What they count is what the framework counts, so that an
    epoch is neither lost nor done twice where a run is stopped and resumed.

    Args:
        drop_rate: makes the schedule of an optimizer with masks; it is stepped after every epoch.
        sparsify: step -> the share of weights, or the pattern, that :meth:`Impact.sparsify` makes zero after it.
        by, floor: as in :meth:`Impact.sparsify`.
        pruner: makes the pruner of a model and its optimizers, which is stepped after every epoch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        drop_rate: MakeSchedule | None = None,
        sparsify: Mapping[int, float | str] | None = None,
        by: str = "importance",
        floor: float = 0.0,
        pruner: MakePruner | None = None,
    ) -> None:
        for step, sparsity in (sparsify or {}).items():
            if not is_integer(step) or step < 1:
                raise ValueError(f"sparsify has the step {step!r}; it must map steps, counted from 1, to sparsities")
            parse_sparsity(sparsity)
        check_choice(by, floor)
        self.sparsify = dict(sorted((sparsify or {}).items()))
        self.by, self.floor = by, floor
        self._make_schedule, self._make_pruner = drop_rate, pruner
        self.step = self.epoch = 0
        """What has ended."""
        self.is_sparse = False
        """Whether weights are zero for good: then no schedule moves the drop rate any more."""
        self.pruner: ActivationPruner | None = None
        self.impacts: list[Impact] = []
        self._schedules: list[DropRateScheduler] = []
        self._optimizers: list[Optimizer] = []
        self._loaded: Mapping[str, Any] | None = None

    @property
    def cuts(self) -> bool:
        """Whether there is a pruner, or will be."""
        return self._make_pruner is not None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where another plan was; what needs optimizers waits for :meth:`start`.

        Raises:
            ValueError: it is not the state of a plan, or there is no pruner for that of the one which was saved.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError("this is not the state of an ImpactCallback: pass what its state_dict() returned")
        if (state_dict["pruner"] is None) != (self._make_pruner is None):
            raise ValueError("the run was saved with a pruner, or without one: resume it with the same callback")
        if self.pruner is not None and self._loaded is None:
            self.pruner.load_state_dict(state_dict["pruner"])
        self._loaded = state_dict
        self.step, self.epoch, self.is_sparse = (state_dict[key] for key in ("step", "epoch", "is_sparse"))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold, beside those of the model and the optimizers."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "is_sparse": self.is_sparse,
            "schedules": [schedule.state_dict() for schedule in self._schedules],
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
        }

    def build(self, model: nn.Module) -> None:
        """Makes the pruner, so that its state can give a model the shape of the weights that are loaded next."""
        if self._make_pruner is not None and self.pruner is None:
            self.pruner = self._make_pruner(model, attached_impacts(model))

    def start(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Attaches the model to the optimizers, and makes the schedules.

        Raises:
            ValueError: there are no importances to schedule or to be sparse by, or a loaded state does not fit.
        """
        self._optimizers = with_state(optimizers)
        self.impacts = list(dict.fromkeys(i for each in self._optimizers if (i := impact_of(each)) is not None))
        if not self.impacts and (self._make_schedule or self.sparsify or self.pruner is None):
            names = ", ".join(sorted({type(each).__name__ for each in self._optimizers}))
            raise ValueError(
                f"{names or 'no optimizer'} keeps no importances: train with ImpactAdamW or ImpactSGD, or put "
                "Impact(model, optimizer) around the optimizer where it is made"
            )
        for impact in self.impacts:
            if impact not in attached_impacts(model):
                impact.attach(model)
        masked = [each for each in self._optimizers if impact_of(each) is not None]
        if self._make_schedule is not None:
            # A schedule sets the rate at which it starts, but a resumed optimizer has its own.
            rates = [(group, group["drop_rate"]) for each in masked for group in each.param_groups]
            self._schedules = [self._make_schedule(each) for each in masked]
            if self._loaded is not None:
                for schedule, state in zip(self._schedules, self._loaded["schedules"], strict=True):
                    schedule.load_state_dict(state)
                for group, rate in rates:
                    group["drop_rate"] = rate
        if self.pruner is not None:
            repair([], self.pruner.model, optimizers=self._optimizers)  # refuses what is not of this model
            self.pruner.optimizers = self._optimizers

    def end_step(self, step: int) -> None:
        """Makes weights zero if that is due after so many steps."""
        for at, sparsity in self.sparsify.items():
            if self.step < at <= step:
                for impact in self.impacts:
                    impact.sparsify(sparsity, by=self.by, floor=self.floor)
                self.is_sparse = True
        self.step = step

    def end_epochs(self, epochs: int) -> None:
        """Steps the schedules and the pruner until so many epochs have ended."""
        while self.epoch < epochs:
            for schedule in [] if self.is_sparse else self._schedules:
                schedule.step()
            if self.pruner is not None:
                self.pruner.step()
            self.epoch += 1

    def metrics(self) -> dict[str, float]:
        """What to log: expected share of dropped weights, share of zeros, effective share of weights (in all and by
        tensor), and the share of units that are left."""
        rows = [row for impact in self.impacts for row in impact.importance_summary()]
        numel = sum(row.numel for row in rows)
        found = {}
        if numel:
            found["impact/drop_rate"] = sum(row.drop_rate * row.numel for row in rows) / numel
            found["impact/effective_share"] = sum(row.perplexity for row in rows) / numel
            found.update({f"impact/effective_share/{row.name}": row.perplexity / row.numel for row in rows})
        groups = [group for each in self._optimizers for group in each.param_groups]
        weights = [p.detach() for group in groups for p in group["params"] if p.dim() >= 2]
        if weights:
            left = sum(int(p.count_nonzero()) for p in weights)
            found["impact/sparsity"] = 1 - left / sum(p.numel() for p in weights)
        if self.pruner is not None and (units := self.pruner.graph.groups.values()):
            found["impact/units_left"] = sum(u.size for u in units) / sum(u.original_size for u in units)
        return found
