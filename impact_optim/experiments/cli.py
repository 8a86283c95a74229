"""The command line: options and progress."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..pruning.budget import SPLITS, TARGETS
from ..pruning.criteria import CRITERIA
from .arms import (
    ADAMW,
    ARMS,
    BASELINE,
    BASES,
    DEFAULT_ARMS,
    GRADUAL,
    LEARNING_RATES,
    SETTABLE,
    SGD,
    arm_options,
)
from .data import DATA, Data, batch_count, load_data
from .models import MODELS, build_model
from .pruning import Pruning, build_pruner, parse_schedule
from .report import Curves, write_report
from .results import ACCURACY, BITS, Line, Measure, ResultsFolder
from .sparse import RAMP, CannotBeSparse, ramp_epochs
from .training import DROP_SCHEDULES, PRECISIONS, SCHEDULES, Recipe, train

PROGRAM = "impact-optim"
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


class Study(NamedTuple):
    """Everything that a command line asks for, checked."""

    arms: dict[str, dict[str, Any]]
    """The optimizer's options of each arm."""
    seeds: range
    recipe: Recipe
    data: Data
    results: ResultsFolder
    progress: bool
    tensorboard: bool

    @property
    def measure(self) -> Measure:
        """What the arms are judged by."""
        return BITS if self.data.is_text else ACCURACY


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study and reports it.

    Returns:
        The exit status: 0, 2 after an error that the user can mend, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        study = _prepare(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    status = 0
    with closing(study.results):
        try:
            if not _train_all(study):
                status = 2
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            status = INTERRUPTED
        write_report(study.results, study.arms, study.seeds, study.recipe, study.data.heldout, study.measure)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Trains the arms of the study side by side and reports test accuracy (bits per character\n"
        "for a text), generalisation gap and time, with pictures, as a table and as a page\n"
        "(report.html). The same command resumes where it was stopped; more arms or seeds may join.",
        usage="%(prog)s [OPTION ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"arms:\n{_describe_arms()}\n\noptions for --set: {', '.join(SETTABLE)}",
    )
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--arms", nargs="+", metavar="ARM", default=list(DEFAULT_ARMS), help=f"default: {' '.join(DEFAULT_ARMS)}"
    )
    what.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help="runs per arm, seeded 0 to N-1 (%(default)s)"
    )
    what.add_argument("--data", choices=DATA, default="digits", help="data set (%(default)s)")
    what.add_argument("--model", choices=MODELS, default="mlp", help="network (%(default)s)")
    what.add_argument("--width", type=_positive, metavar="N", help="of the network; its own default if not given")
    what.add_argument("--subset", type=_positive, metavar="N", help="train on so many examples only")
    what.add_argument(
        "--evaluate",
        choices=("test", "validation"),
        default="test",
        help="what to report on (%(default)s); validation examples are held out of the training set, to tune without "
        "the test set",
    )
    what.add_argument(
        "--validation-split", type=float, default=0.2, metavar="SHARE", help="held out for validation (%(default)s)"
    )

    how = parser.add_argument_group("how to train")
    how.add_argument("--optimizer", choices=BASES, default=SGD, help="what takes the steps, in every arm (%(default)s)")
    how.add_argument(
        "--epochs", type=_positive, default=Recipe.epochs, metavar="N", help="passes over the data (%(default)s)"
    )
    how.add_argument(
        "--batch", type=_positive, default=Recipe.batch, metavar="N", help="examples per step (%(default)s)"
    )
    rates = ", ".join(f"{rate} for {base}" for base, rate in LEARNING_RATES.items())
    how.add_argument("--lr", type=float, help=f"learning rate ({rates})")
    how.add_argument("--momentum", type=float, default=0.9, metavar="X", help="of sgd (%(default)s)")
    how.add_argument(
        "--weight-decay",
        type=float,
        default=0.0,
        metavar="X",
        help="of all weights: L2 penalty of sgd, decoupled decay of adamw (%(default)s)",
    )
    how.add_argument(
        "--schedule", choices=SCHEDULES, default=Recipe.schedule, help="of the learning rate (%(default)s)"
    )
    how.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=Recipe.precision,
        help="of the forward and backward pass (%(default)s)",
    )
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[ARM.]OPTION=VALUE",
        help="sets an option of the optimizer, for all arms or for one: --set kl_weight=3 --set saliency.lr=0.2",
    )

    masks = parser.add_argument_group("what to drop while training")
    masks.add_argument(
        "--drop-rate", type=float, default=0.1, metavar="SHARE", help="share of weights dropped per step (%(default)s)"
    )
    masks.add_argument(
        "--drop-schedule",
        choices=DROP_SCHEDULES,
        default=Recipe.drop_schedule,
        help="linear decays to 0, warmup rises from 0 in a quarter of the epochs (%(default)s)",
    )

    zeros = parser.add_argument_group("what to make zero for good, in every arm")
    zeros.add_argument(
        "--final-sparsity",
        type=float,
        metavar="SHARE",
        help="share of weights that are zero in the end: arms that drop by importance ramp their drop rate up to it in "
        f"{100 * RAMP:.0f}%% of the epochs and train on with what is left, {GRADUAL} removes the smallest on the same "
        "ramp, the others keep their largest weights after the last epoch",
    )

    cuts = parser.add_argument_group("what to cut while training, in every arm")
    cuts.add_argument(
        "--prune",
        metavar="EPOCH:SHARE,...",
        help="remove units after these epochs until such shares are gone: --prune 10:0.2,20:0.4",
    )
    cuts.add_argument(
        "--criterion", choices=CRITERIA, default=Pruning.criterion, help="what a unit is worth (%(default)s)"
    )
    cuts.add_argument(
        "--prune-target",
        choices=TARGETS,
        default=Pruning.target,
        help="what the shares are of: multiply-accumulates, parameters or units (%(default)s)",
    )
    cuts.add_argument(
        "--prune-split", choices=SPLITS, help="of the cuts over layers (rademacher, or uniform without activations)"
    )

    where = parser.add_argument_group("where, and what to write")
    where.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto, the default, takes a GPU if there is one"
    )
    where.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; PyTorch's choice if not given")
    where.add_argument(
        "--data-folder", type=Path, default=Path("data"), metavar="DIR", help="of downloaded data sets (%(default)s)"
    )
    where.add_argument("--download", action="store_true", help="download the data set if it is not there")
    where.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (runs/DATA-MODEL)")
    where.add_argument(
        "--tensorboard", action="store_true", help="write curves to OUT/tensorboard as well, a run per arm and seed"
    )
    where.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress bar; by default on a terminal only",
    )
    return parser


def _describe_arms() -> str:
    lines = []
    for arm, options in ARMS.items():
        what = ", ".join(f"{name}={value!r}" for name, value in options.items())
        what = {BASELINE: "the optimizer of torch.optim", ADAMW: "torch.optim.AdamW"}.get(arm, what)
        lines.append(f"  {arm:24}{what}")
    return "\n".join(lines)


def _prepare(args: argparse.Namespace) -> Study:
    """Checks all that can be checked before hours of training.

    Raises:
        ValueError, OSError, ImportError: something that the user can mend.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    prune = None
    if args.prune is not None:
        prune = Pruning(parse_schedule(args.prune), args.criterion, args.prune_target, args.prune_split)
    recipe = Recipe(
        args.model,
        args.width,
        args.epochs,
        args.batch,
        args.schedule,
        args.drop_schedule,
        args.precision,
        prune,
        args.final_sparsity,
    )
    if recipe.final_sparsity is not None:
        if not 0.0 < recipe.final_sparsity < 1.0:
            raise ValueError(f"--final-sparsity must lie in (0, 1), but is {recipe.final_sparsity}")
        if recipe.epochs < 2:
            raise ValueError("--final-sparsity needs two epochs or more: to become sparse, and to train on")
    common = {name: getattr(args, name) for name in ("momentum", "weight_decay", "drop_rate")}
    common |= {"lr": LEARNING_RATES[args.optimizer] if args.lr is None else args.lr, "base": args.optimizer}
    to_be_sparse = recipe.final_sparsity is not None
    arms = arm_options(list(dict.fromkeys(args.arms)), common, args.set, to_be_sparse=to_be_sparse)
    if args.tensorboard and not _has("tensorboard"):
        raise ImportError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard")
    progress = sys.stderr.isatty() if args.progress is None else args.progress
    if args.progress and not _has("tqdm"):
        raise ImportError("--progress needs tqdm, which is not installed: pip install tqdm")

    data = load_data(args.data, args.data_folder, args.download)
    if args.evaluate == "validation":
        data = data.validation_split(args.validation_split)
    if args.subset:
        data = data.subset(args.subset)
    with torch.device("meta"):
        model = build_model(args.model, data.x.shape[1:], data.classes, args.width)
    if prune is not None:
        _check_pruning(prune, model, data, recipe, arms)

    settings = {
        "data": args.data,
        "subset": args.subset,
        "evaluate": args.evaluate,
        "validation_split": args.validation_split if args.evaluate == "validation" else None,
        **asdict(recipe),
        "device": device.type,
    }
    results = ResultsFolder(args.out or Path("runs") / f"{args.data}-{args.model}", settings, arms)
    return Study(arms, range(args.seeds), recipe, data.to(device), results, progress and _has("tqdm"), args.tensorboard)


def _check_pruning(
    prune: Pruning, model: nn.Module, data: Data, recipe: Recipe, arms: Mapping[str, Mapping[str, Any]]
) -> None:
    if max(prune.schedule) > recipe.epochs:
        raise ValueError(f"--prune cuts after epoch {max(prune.schedule)}, but there are {recipe.epochs} epochs")
    if recipe.final_sparsity is not None and max(prune.schedule) > (ramp := ramp_epochs(recipe.epochs)):
        raise ValueError(
            f"--prune cuts after epoch {max(prune.schedule)}, when the weights have come to their --final-sparsity, "
            f"which would change: let it cut after epoch {ramp} at the latest"
        )
    without = [arm for arm, options in arms.items() if options.get("importance", "uniform") == "uniform"]
    if prune.criterion == "importance" and without:
        raise ValueError(
            f"--criterion importance reads learnt importances, and the arm {without[0]} has none: choose "
            "other --arms or another --criterion"
        )
    build_pruner(prune, model, data.to("meta"), batch_count(data, recipe.batch), [], seed=0)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # PyTorch built without CUDA asserts
        raise ValueError(f"cannot use the device {name!r}: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


# ------------------------------------------------------------------------------- training


def _train_all(study: Study) -> bool:
    """Trains what is not finished, seed by seed, so that all arms can be compared early; says whether all could be."""
    succeeded = True
    with _Progress(study) as progress, Curves(study.results.path / "tensorboard") as curves:

        def on_epoch(line: Line) -> None:
            if study.tensorboard:
                curves.add(line)
            progress.on_epoch(line)

        for seed in study.seeds:
            for arm, options in study.arms.items():
                if not study.results.finished(arm, seed):
                    progress.start(arm, seed)
                    try:
                        train(
                            arm,
                            seed,
                            options,
                            study.recipe,
                            study.data,
                            study.results,
                            on_batch=progress.on_batch,
                            on_epoch=on_epoch,
                        )
                    except CannotBeSparse as error:
                        print(f"{PROGRAM}: error: arm {arm}, seed {seed}: {error}", file=sys.stderr)
                        succeeded = False
                        continue
                    progress.finish(arm, seed)
    return succeeded


class _Progress:
    """One bar over all steps of the study, with the run, its loss and its accuracy."""

    def __init__(self, study: Study) -> None:
        self._steps, self._epochs = batch_count(study.data, study.recipe.batch), study.recipe.epochs
        self._heldout, self._measure = study.data.heldout, study.measure
        self._bar: Any = None
        self._batch, self._loss, self._score = 0, "", ""
        if study.progress:
            from tqdm import tqdm

            done = sum(line["arm"] in study.arms and line["seed"] in study.seeds for line in study.results.lines())
            total = len(study.arms) * len(study.seeds) * self._epochs * self._steps
            self._bar = tqdm(total=total, initial=done * self._steps, unit="step", dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, arm: str, seed: int) -> None:
        if self._bar is not None:
            self._bar.set_description(f"{arm}, seed {seed}", refresh=False)
        self._show(loss="", score="")

    def on_batch(self, loss: Tensor) -> None:
        if self._bar is not None:
            self._batch += 1
            if self._batch % 20 == 0:  # reading a loss waits for the device
                shown = self._measure
                self._show(loss=f"{shown.loss_name} {shown.loss_scale * loss.item():.3f}")
            self._bar.update()

    def on_epoch(self, line: Line) -> None:
        measure = self._measure
        score = f"{measure.scale * line[measure.key]:.{measure.digits - 1}f}{measure.unit}"
        self._show(score=f", epoch {line['epoch']}/{self._epochs}: {self._heldout} {score}")

    def finish(self, arm: str, seed: int) -> None:
        if self._bar is None:  # a log, at least
            print(f"{arm}, seed {seed}{self._score}", file=sys.stderr, flush=True)

    def _show(self, loss: str | None = None, score: str | None = None) -> None:
        self._loss = self._loss if loss is None else loss
        self._score = self._score if score is None else score
        if self._bar is not None:
            self._bar.set_postfix_str(self._loss + self._score, refresh=False)


def _has(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True
