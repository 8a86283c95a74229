"""A callback for Hugging Face's Trainer: masks, ramps of the drop rate, zeros for good and cuts in a run of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .plan import MakePruner, MakeSchedule, Plan

__all__ = ["ImpactCallback"]

_FILE = "impact.pt"


class ImpactCallback(TrainerCallback):
    """Runs what makes a network sparse beside the loop of ``transformers.Trainer``, logs it, saves it and resumes it.

    The optimizer is an :class:`~impact_optim.ImpactAdamW` by
    ``Trainer(optimizer_cls_and_kwargs=(ImpactAdamW, {"lr": 5e-5, "drop_rate": 0.1}))``, or one that was made before and
    given by ``optimizers=``. The callback attaches the model where that has not been done. Evaluation and checkpoints
    are dense by themselves.

    Its state is the file ``impact.pt`` in each checkpoint. A run that has cut units resumes by :meth:`resume`; any
    other by ``trainer.train(resume_from_checkpoint=...)`` alone, if the checkpoint lies where it was written.

    Args:
        drop_rate: makes the schedule of an optimizer; stepped after every epoch.
        sparsify: ``state.global_step`` -> share of weights, or pattern, that is made zero for good after it.
        by, floor: as in :meth:`impact_optim.Impact.sparsify`.
        pruner: makes the pruner, out of the model and the optimizers; stepped after every epoch. The model is on its
            device then, where the example inputs have to be: ``words.to(model.device)``.
        log: gets the importances and sparsities after every epoch: ``trainer.log``.

    Raises:
        ValueError: an argument is out of range; when training starts, the optimizer keeps no importances, there is a
            pruner where several processes train, or ``load_best_model_at_end`` would undo zeros or cuts.

    Example:
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(ImpactAdamW, {"lr": 5e-5, "drop_rate": 0.1}))
        >>> trainer.add_callback(ImpactCallback(sparsify={2000: 0.8}, floor=0.1, log=trainer.log))
        >>> trainer.train()
    """

    def __init__(
        self,
        *,
        drop_rate: MakeSchedule | None = None,
        sparsify: Mapping[int, float | str] | None = None,
        by: str = "importance",
        floor: float = 0.0,
        pruner: MakePruner | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self._new_plan = partial(Plan, drop_rate=drop_rate, sparsify=sparsify, by=by, floor=floor, pruner=pruner)
        self.plan = self._new_plan()
        self._log = log
        self._is_resumed = False

    def resume(self, model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
        """Gives a newly built model the shape that the checkpoint's has.

        Call it before ``trainer.train(resume_from_checkpoint=checkpoint)``, which loads the weights first of all.

        Args:
            model: ``trainer.model``.
            checkpoint: the folder.

        Raises:
            FileNotFoundError: the checkpoint was written without this callback.
            ValueError: it is not one of this model.
        """
        self.plan = self._new_plan()
        self.plan.build(model)
        self.plan.load_state_dict(torch.load(Path(checkpoint) / _FILE, map_location="cpu", weights_only=True))
        self._is_resumed = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        assert optimizer is not None
        if self.plan.cuts and max(args.world_size, args.n_gpu) > 1:
            raise ValueError(
                "a cut leaves DistributedDataParallel with buckets of the old shapes, and the Trainer does not build "
                "another: prune in one process, or in a loop of your own"
            )
        if (self.plan.cuts or self.plan.sparsify) and args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end may bring back a network from before its zeros or cuts: leave it out, and load "
                "the checkpoint that you want"
            )
        if state.global_step and not self._is_resumed:
            folder = _folder(args, state)
            if not (folder / _FILE).exists():
                raise ValueError(
                    f"cannot find {folder / _FILE}: call resume(trainer.model, checkpoint) of the callback before "
                    "trainer.train(resume_from_checkpoint=checkpoint)"
                )
            self.resume(model, folder)
        elif not self._is_resumed:
            self.plan = self._new_plan()
            self.plan.build(model)
        self._is_resumed = False
        self.plan.start(model, [optimizer])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.plan.end_step(state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint that was written after a step comes before the end of its epoch.
        self.plan.end_epochs(int(state.epoch or 0))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.plan.end_epochs(int(state.epoch or 0))  # which max_steps may have cut short
        if self._log is not None:
            self._log(self.plan.metrics())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _folder(args, state)
        if args.should_save and folder.exists():
            torch.save(self.plan.state_dict(), folder / _FILE)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
