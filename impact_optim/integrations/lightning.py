"""A Lightning callback: masks, ramps of the drop rate, zeros for good and cuts in a run of ``Trainer.fit``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .plan import MakePruner, MakeSchedule, Plan

__all__ = ["ImpactCallback"]


class ImpactCallback(Callback):
    """Runs what makes a network sparse beside Lightning's loop, logs it, saves it and resumes it.

    ``configure_optimizers`` returns an :class:`~impact_optim.ImpactSGD`, an :class:`~impact_optim.ImpactAdamW`, or any
    optimizer that :class:`~impact_optim.Impact` is around. The callback attaches the module where that has not been
    done. Validation, test and checkpoints are dense by themselves.

    Args:
        drop_rate: makes the schedule of an optimizer; stepped after every training epoch.
        sparsify: ``trainer.global_step`` -> share of weights, or pattern, that is made zero for good after it.
        by, floor: as in :meth:`impact_optim.Impact.sparsify`.
        pruner: makes the pruner, out of the module and the optimizers; stepped after every training epoch. The
            module is on its device then, where the example inputs have to be: ``images.to(module.device)``.

    Raises:
        ValueError: an argument is out of range; when training starts, the optimizers keep no importances, or there is a
            pruner where several processes train.

    Example:
        >>> callback = ImpactCallback(
        ...     drop_rate=lambda optimizer: DropRateScheduler(optimizer, 0.9, 30, start=0.0, shape="cubic"),
        ...     sparsify={3000: 0.9},
        ...     pruner=lambda module, optimizer: ActivationPruner(
        ...         module.net, images, remove=0.3, by=20, optimizer=optimizer
        ...     ),
        ... )
        >>> Trainer(max_epochs=40, callbacks=[callback]).fit(module, loader)
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
        self._new_plan = partial(Plan, drop_rate=drop_rate, sparsify=sparsify, by=by, floor=floor, pruner=pruner)
        self.plan = self._new_plan()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.plan.cuts and trainer.world_size > 1:
            raise ValueError(
                "a cut leaves DistributedDataParallel with buckets of the old shapes, and Lightning does not build "
                "another: prune in one process, or in a loop of your own"
            )
        if self.plan.cuts:
            pl_module.to(trainer.strategy.root_device)  # where Lightning puts it next, and where the pruner traces it
        if trainer.current_epoch == 0:
            self.plan = self._new_plan()
        self.plan.build(pl_module)
        if self.plan.pruner is None:
            return
        # Lightning loads the weights of a checkpoint before it hands callbacks their state, but weights that were cut
        # fit a network that was cut. Only this hook of the module comes before both.
        load = pl_module.on_load_checkpoint

        def cut_first(checkpoint: dict[str, Any]) -> None:
            if (state := checkpoint.get("callbacks", {}).get(self.state_key)) is not None:
                self.load_state_dict(state)
            load(checkpoint)

        vars(pl_module)["on_load_checkpoint"] = cut_first

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        vars(pl_module).pop("on_load_checkpoint", None)
        self.plan.start(pl_module, trainer.optimizers)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.plan.end_step(trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A checkpoint that was written after a validation comes before the end of its epoch.
        self.plan.end_epochs(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.plan.end_epochs(trainer.current_epoch + 1)
        pl_module.log_dict(self.plan.metrics(), rank_zero_only=True)  # all ranks have the same

    def state_dict(self) -> dict[str, Any]:
        return self.plan.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.plan.load_state_dict(state_dict)
