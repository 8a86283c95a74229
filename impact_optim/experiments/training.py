"""One run of the study: an arm and a seed, trained, evaluated after every epoch, resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import update_bn

from ..drop_rate import DropRateScheduler
from ..plots import layer_statistics
from ..pruning.architecture import load_pruned, save_pruned
from .arms import Masked, build_optimizer
from .data import Data, batch_count, batches
from .models import build_model
from .pruning import Pruning, build_pruner, pruned_network
from .results import Line, ResultsFolder
from .sparse import SparseFinish, density, layer_densities

SCHEDULES = ("constant", "cosine", "onecycle")
DROP_SCHEDULES = ("constant", "linear", "warmup")
PRECISIONS = ("float32", "bfloat16")

_EVALUATION_BATCH = 1000
_EVALUATION_TARGETS = 16_384  # of texts, so that their logits need no more memory than a training batch's
_TRAIN_EVALUATED = 10_000  # training examples that the training accuracy is measured on
_CHARACTERS_EVALUATED = 100_000  # of a text, on either side; its standard error is then about 0.01 bits
_BATCH_NORM_BATCHES = 20
_WARMUP = 0.25  # of the epochs
_NOT_MEASURED = (math.nan, math.nan), (math.nan, math.nan)


@dataclass(frozen=True)
class Recipe:
    """How every run of a study trains, whatever its arm and seed.

    Args:
        model: one of :data:`~impact_optim.experiments.models.MODELS`.
        width: of the model; its own default if ``None``.
        epochs, batch: at least 1.
        schedule: of the learning rate over all steps, one of :data:`SCHEDULES`.
        drop_schedule: of the drop rate over the epochs; ``"linear"`` decays to 0, ``"warmup"`` rises from 0 in the
            first quarter.
        precision: ``"bfloat16"`` computes in it under autocast; the weights stay float32.
        prune: what is cut out of the network while it trains.
        final_sparsity: the share of weights that are zero in the end; see
            :class:`~impact_optim.experiments.sparse.SparseFinish`. It takes the place of the drop rate and its schedule
            where an arm ramps up to it.
        evaluate_every: after how many epochs a run is evaluated; NaN in the other lines. The last epoch always is.
    """

    model: str = "mlp"
    width: int | None = None
    epochs: int = 40
    batch: int = 64
    schedule: str = "cosine"
    drop_schedule: str = "constant"
    precision: str = "float32"
    prune: Pruning | None = None
    final_sparsity: float | None = None
    evaluate_every: int = 1


def train(
    arm: str,
    seed: int,
    options: Mapping[str, Any],
    recipe: Recipe,
    data: Data,
    results: ResultsFolder,
    on_batch: Callable[[Tensor], None] = lambda loss: None,
    on_epoch: Callable[[Line], None] = lambda line: None,
    build: Callable[[str, nn.Module, Mapping[str, Any], int], Optimizer] = build_optimizer,
) -> None:
    """Trains one arm with one seed to the end, from its checkpoint if it has one.

    Where a network is cut, that is after the epoch; its accuracy is then measured before the cut, too.

    The initial weights and the order of the batches depend on the seed alone, so that arms can be compared in pairs.
    An interrupted run that goes on ends with the same numbers, bit for bit, as one that was left alone.

    Args:
        arm: names the run.
        seed: of the initial weights, the batches and the masks.
        options: the arm's optimizer options, from :func:`~impact_optim.experiments.arms.arm_options`.
        recipe: the rest of what the run depends on.
        data: on the device to train on.
        results: gets a line and a checkpoint per epoch.
        on_batch: called with the loss of every step.
        on_epoch: called with the line of every epoch, after the checkpoint.
        build: makes the optimizer out of the arm, its model, its options and the seed.
    """
    device = data.x.device
    model = _initial_model(recipe, data, seed)
    channels_last = recipe.precision == "bfloat16" and any(isinstance(m, nn.Conv2d) for m in model.modules())
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    model.to(memory_format=memory_format)
    optimizer = build(arm, model, options, seed)
    steps = batch_count(data, recipe.batch)
    scheduler = _lr_scheduler(recipe.schedule, optimizer, recipe.epochs * steps)
    drop_scheduler = sparse = None
    if recipe.final_sparsity is not None and isinstance(optimizer, Masked):
        sparse = SparseFinish(optimizer, arm, recipe.final_sparsity, recipe.epochs)
    elif isinstance(optimizer, Masked):
        drop_scheduler = _drop_scheduler(recipe, optimizer)
    pruner = None if recipe.prune is None else build_pruner(recipe.prune, model, data, steps, optimizer, seed)
    compute = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")

    seen = data.x[:_TRAIN_EVALUATED], data.y[:_TRAIN_EVALUATED]
    heldout = data.heldout_x, data.heldout_y
    if data.is_text:
        seen, heldout = _spread(data.x, data.y), _spread(data.heldout_x, data.heldout_y)

    done = 0
    if (checkpoint := results.checkpoint(arm, seed, device)) is not None:
        if pruner is not None:
            pruner.load_state_dict(checkpoint["pruner"])  # first: it gives the model its shape
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        if drop_scheduler is not None:
            drop_scheduler.load_state_dict(checkpoint["drop_scheduler"])
        if sparse is not None:
            sparse.load_state_dict(checkpoint["sparse"])
        done = checkpoint["epoch"]

    for epoch in range(done, recipe.epochs):
        if sparse is not None:
            sparse.before(epoch)
        lr = optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for x, y in batches(data, recipe.batch, seed, epoch):
            x = x.to(memory_format=memory_format)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                with compute:
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            loss: Tensor = optimizer.step(closure)  # type: ignore[arg-type, assignment]  # torch says float
            scheduler.step()
            total += loss.detach()
            on_batch(loss.detach())
        batch_loss = total.item() / steps
        seconds = time.perf_counter() - started

        def measured(epoch: int = epoch) -> tuple[tuple[float, float], tuple[float, float]]:
            with _expected(optimizer), compute:
                if any(isinstance(module, _BatchNorm) for module in model.modules()):
                    # The running statistics were gathered under masks, whose activations are noisier than those of the
                    # dense network: measure the latter (without gradients, a pass in train mode is dense). All arms get
                    # it, so that none is favoured. Training normalises by each batch and does not see the change.
                    inputs = (x for x, _ in islice(batches(data, recipe.batch, seed, epoch), _BATCH_NORM_BATCHES))
                    update_bn((x.to(memory_format=memory_format) for x in inputs), model)
                return evaluate(model, *seen), evaluate(model, *heldout)

        is_evaluated = (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs
        (train_loss, train_accuracy), (heldout_loss, accuracy) = measured() if is_evaluated else _NOT_MEASURED
        dropped = expected_drop(optimizer)
        around_cut = {}
        if pruner is not None and pruner.step().records and is_evaluated:
            around_cut = {"accuracy_before_cut": accuracy, "loss_before_cut": heldout_loss}
            (train_loss, train_accuracy), (heldout_loss, accuracy) = measured()
        if sparse is not None and sparse.is_due(epoch):
            around_cut = around_cut or {"accuracy_before_cut": accuracy, "loss_before_cut": heldout_loss}
            sparse.cut()
            (train_loss, train_accuracy), (heldout_loss, accuracy) = measured()
        line = {
            "arm": arm,
            "seed": seed,
            "epoch": epoch + 1,
            "heldout": data.heldout,
            "accuracy": accuracy,
            "loss": heldout_loss,
            "train_accuracy": train_accuracy,
            "train_loss": train_loss,
            "batch_loss": batch_loss,
            "lr": lr,
            "dropped": dropped,
            "seconds": round(seconds, 4),
            **around_cut,
        }
        if data.is_text:
            line["bits_per_character"] = heldout_loss / math.log(2)
        if sparse is not None:
            line["sparsity"] = 1 - density(model)
            sparse.after(epoch)
        if drop_scheduler is not None:
            drop_scheduler.step()
        # The line first: an epoch that has no checkpoint is repeated, and its second line replaces the first.
        results.append(line)
        checkpoint = {
            "epoch": epoch + 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        if pruner is not None:
            checkpoint["pruner"] = pruner.state_dict()
        if drop_scheduler is not None:
            checkpoint["drop_scheduler"] = drop_scheduler.state_dict()
        if sparse is not None:
            checkpoint["sparse"] = sparse.state_dict()
        results.save_checkpoint(arm, seed, checkpoint)
        on_epoch(line)
    if pruner is not None:
        folder = results.pruned(arm, seed)
        save_pruned(model, folder)
        # Read back, the network has none of the hooks that this one trains with.
        original, left = (_initial_model(recipe, data, seed) for _ in range(2))
        cut = pruned_network(pruner, original, load_pruned(left, folder), data.x[:1])
        (folder / "cut.json").write_text(json.dumps(cut.to_json()) + "\n")
    if sparse is not None:
        results.save_densities(arm, seed, layer_densities(model))
    results.finish(arm, seed, layer_statistics(optimizer, model) if isinstance(optimizer, Masked) else [])


def _initial_model(recipe: Recipe, data: Data, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # on the CPU, so that every device starts from the same weights
        torch.manual_seed(seed)
        model = build_model(recipe.model, data.x.shape[1:], data.classes, recipe.width)
    return model.to(data.x.device)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a model in evaluation mode, over all targets; it is left in train mode."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    size = max(1, min(_EVALUATION_BATCH, _EVALUATION_TARGETS * len(y) // y.numel()))
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        logits = model(xs).float()
        loss += F.cross_entropy(logits, ys, reduction="sum")
        correct += (logits.argmax(1) == ys).sum()
    model.train()
    return loss.item() / y.numel(), correct.item() / y.numel()


def _spread(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the windows of a text, from all over it: neighbours would be of one play."""
    every = math.ceil(y.numel() / _CHARACTERS_EVALUATED)
    return x[::every], y[::every]


def expected_drop(optimizer: Optimizer) -> float:
    """Expected share of dropped weights among those that can be dropped, measured from the keep probabilities."""
    if not isinstance(optimizer, Masked):
        return 0.0
    rows = optimizer.importance_summary()
    return sum(row.drop_rate * row.numel for row in rows) / sum(row.numel for row in rows)


def _expected(optimizer: Optimizer) -> AbstractContextManager[None]:
    # With rescale="none" the dense weights are larger than any network that was trained: x ⊙ π is what to evaluate.
    return optimizer.expected() if isinstance(optimizer, Masked) else nullcontext()


def _drop_scheduler(recipe: Recipe, optimizer: Masked) -> DropRateScheduler | None:
    """Of the drop rate, to be stepped after every epoch."""
    if recipe.drop_schedule == "linear":
        return DropRateScheduler(optimizer, 0.0, recipe.epochs)
    if recipe.drop_schedule == "warmup":
        rates = [group["drop_rate"] for group in optimizer.param_groups]
        return DropRateScheduler(optimizer, rates, max(1, round(_WARMUP * recipe.epochs)), start=0.0)
    return None


def _lr_scheduler(name: str, optimizer: Optimizer, steps: int) -> LRScheduler:
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if name == "onecycle":
        return OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=steps, cycle_momentum=False)
    return ConstantLR(optimizer, factor=1.0)
