"""Trains what a plan declares, on all cores, and goes on where it was stopped.

A *cell* is an arm on a task. It is tuned on a validation split, by its own grid, and then trained with fresh seeds on
the whole training set and tested once. Cells are compared by what they depend on, not by their names: what two
questions share is trained once. A line of ``results.jsonl`` is one run: all it depends on, what it measured, and the
versions it was made with. A run that is added to a plan costs its own time only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from peers import PEERS

from impact_optim.experiments.arms import Masked, arm_options, build_optimizer
from impact_optim.experiments.data import Data, batch_count, load_data
from impact_optim.experiments.pruning import Pruning
from impact_optim.experiments.sparse import CannotBeSparse, layer_densities
from impact_optim.experiments.training import Recipe, train
from impact_optim.pruning.report import model_size
from impact_optim.pruning.schedule import schedule_of

Settings = dict[str, Any]
Run = dict[str, Any]

TUNING_SEEDS = (0,)
TEST_SEEDS = (100, 101, 102, 103, 104)


@dataclass(frozen=True)
class Task:
    """A data set and a network, and how long it trains."""

    name: str
    data: str
    model: str
    epochs: int
    batch: int
    width: int | None = None
    subset: int | None = None
    precision: str = "float32"
    evaluate_every: int | None = None
    """After how many epochs; after each if ``None``."""
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    """What takes the steps, alone and with importances: ``"sgd"`` with momentum 0.9, or ``"adamw"``."""
    measure: str = "accuracy"
    """What arms are tuned and compared by: ``"accuracy"`` in %, or ``"bits"``, the loss in bits per target."""
    lrs: tuple[float, ...] = (0.05, 0.1, 0.2)
    drop_rates: tuple[float, ...] = (0.05, 0.1, 0.3)
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    test_seeds: tuple[int, ...] = TEST_SEEDS
    tuned_on: str | None = None
    """The task whose best settings are taken, where tuning would take too long."""


@dataclass(frozen=True)
class Arm:
    """An arm: the optimizer, its fixed options, and what is tuned."""

    name: str
    base: str
    """An arm of the main job, or one of ``peers.PEERS``."""
    options: dict[str, Any] = field(default_factory=dict)
    drop_rates: tuple[float, ...] | None = (0.0,)
    """What is tuned; ``None`` takes the task's."""
    drop_schedule: str = "constant"
    sparsity: float | None = None
    prune: dict[str, Any] | None = None
    """What is cut while it trains: ``remove`` and ``by``, and options of ``experiments.pruning.Pruning``."""
    lrs: tuple[float, ...] | None = None
    tune: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Options that are tuned as well."""
    tuning_seeds: tuple[int, ...] | None = None
    """What it is tuned with; ``None`` takes the task's."""
    tuned_as: tuple[str, str] | None = None
    """Question and arm whose best settings it takes."""


@dataclass(frozen=True)
class Question:
    """What is asked, and the cells that answer it."""

    name: str
    arms: list[Arm]
    tasks: tuple[str, ...]
    tested: bool = True
    """Whether the arms are tested; where not, it is answered on the validation split."""


_OF_TUNING = ("name", "measure", "lrs", "drop_rates", "tuning_seeds", "test_seeds", "tuned_on", "tune", "tuned_as")


def settings_of(task: Task, arm: Arm, point: Mapping[str, Any], heldout: str, seed: int) -> Settings:
    """All that a run depends on.

    Args:
        task, arm: the cell.
        point: of the cell's grid.
        heldout: ``"validation"`` or ``"test"``.
        seed: of weights, batches and masks.
    """
    of_task = {k: v for k, v in asdict(task).items() if k not in _OF_TUNING}
    of_arm = {k: v for k, v in asdict(arm).items() if k not in _OF_TUNING}
    for settings, name in ((of_task, "evaluate_every"), (of_arm, "prune")):
        if settings[name] is None:  # as runs were stored before there was a choice
            del settings[name]
    tuned = {"lr": point["lr"], "drop_rate": point["drop_rate"], "options": {**arm.options, **point["options"]}}
    return json.loads(json.dumps({**of_task, **of_arm, **tuned, "heldout": heldout, "seed": seed}))


def key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def load(path: Path) -> dict[str, Run]:
    """The runs that are there, by what they depend on."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(line["settings"]): line for line in map(json.loads, lines)}


def grid(task: Task, arm: Arm) -> list[dict[str, Any]]:
    """The settings among which an arm is tuned on a task."""
    rates = task.drop_rates if arm.drop_rates is None else arm.drop_rates
    return [
        {"lr": lr, "drop_rate": rate, "options": dict(zip(arm.tune, values, strict=True))}
        for lr, rate, *values in itertools.product(arm.lrs or task.lrs, rates, *arm.tune.values())
    ]


def measured(task: Task, run: Run) -> float:
    """What a run has reached, in % or in bits."""
    if task.measure == "accuracy":
        return 100 * run["accuracy"][-1]
    loss = run["loss"][-1]
    return math.inf if loss is None else loss / math.log(2)


class Plan:
    """Tasks and questions, and the runs that there are.

    Args:
        tasks: in the order of the tables.
        questions: likewise.
        path: the runs.
    """

    def __init__(self, tasks: list[Task], questions: list[Question], path: Path) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.questions = {question.name: question for question in questions}
        self.path = path
        self.results = load(path)

    def arm(self, question: str, name: str) -> Arm:
        return next(arm for arm in self.questions[question].arms if arm.name == name)

    def run_of(self, task: Task, arm: Arm, point: Mapping[str, Any], heldout: str, seed: int) -> Run | None:
        return self.results.get(key(settings_of(task, arm, point, heldout, seed)))

    def validated(self, task: Task, arm: Arm) -> list[tuple[float, dict[str, Any]]] | None:
        """What each point of an arm's grid reaches on the validation split; ``None`` before all were tried."""
        scores = []
        for point in grid(task, arm):
            runs = [self.run_of(task, arm, point, "validation", seed) for seed in arm.tuning_seeds or task.tuning_seeds]
            if None in runs:
                return None
            scores.append((fmean(measured(task, run) for run in runs if run is not None), point))
        return scores

    def tuned(self, task: Task, arm: Arm) -> dict[str, Any] | None:
        """The point that did best on the validation split; ``None`` before all were tried."""
        if task.tuned_on is not None:
            return self.tuned(self.tasks[task.tuned_on], arm)
        if arm.tuned_as is not None:
            return self.tuned(task, self.arm(*arm.tuned_as))
        if (scores := self.validated(task, arm)) is None:
            return None
        best = max if task.measure == "accuracy" else min
        return best(scores, key=lambda score: score[0])[1]

    def tests(self, task: Task, arm: Arm) -> list[Run]:
        """The test runs of a cell in the order of their seeds; empty if one is missing."""
        if (point := self.tuned(task, arm)) is None:
            return []
        runs = [self.run_of(task, arm, point, "test", seed) for seed in task.test_seeds]
        return [] if None in runs else runs  # type: ignore[return-value]

    def wanted(self, questions: list[str], tasks: list[str]) -> Iterator[Settings]:
        """What can be trained now: all of the tuning, and the tests of what is tuned."""
        seen: set[str] = set()
        for question in (self.questions[name] for name in questions):
            for task in (self.tasks[name] for name in question.tasks if name in tasks):
                for arm in question.arms:
                    point = self.tuned(task, arm)
                    if point is not None and question.tested:
                        found = [settings_of(task, arm, point, "test", seed) for seed in task.test_seeds]
                    elif arm.tuned_as is None and task.tuned_on is None:
                        found = [
                            settings_of(task, arm, point, "validation", seed)
                            for point in grid(task, arm)
                            for seed in arm.tuning_seeds or task.tuning_seeds
                        ]
                    else:
                        found = []
                    for settings in found:
                        if (name := key(settings)) not in self.results and name not in seen:
                            seen.add(name)
                            yield settings

    def main(self, description: str, unasked: tuple[str, ...] = ()) -> None:
        """The program.

        Args:
            description: what it says of itself.
            unasked: tasks that are only trained when they are named: they take long, or their data have to be fetched.
        """
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        usual = [name for name in self.tasks if name not in unasked]
        parser.add_argument("--questions", nargs="+", choices=self.questions, default=list(self.questions))
        parser.add_argument("--tasks", nargs="+", choices=self.tasks, default=usual)
        parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="processes of one thread each")
        parser.add_argument("--device", default="cpu", help="where to train")
        parser.add_argument("--dry-run", action="store_true", help="only say how many runs there are to do")
        args = parser.parse_args()
        if args.dry_run:
            print(len(list(self.wanted(args.questions, args.tasks))), "runs can start now")
            return
        from tqdm import tqdm

        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            while todo := list(self.wanted(args.questions, args.tasks)):
                futures = [pool.submit(run, settings, args.device) for settings in todo]
                for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
                    line = {**future.result(), "commit": git.stdout.strip()}
                    with self.path.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    self.results[key(line["settings"])] = line


# ------------------------------------------------------------------------------- one run


class InMemory:
    """In place of a results folder: a run is short, and starts again when it was stopped."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.folder = TemporaryDirectory()

    def checkpoint(self, *run: Any) -> None:
        return None

    def save_checkpoint(self, *run: Any) -> None: ...

    def save_densities(self, *run: Any) -> None: ...

    def finish(self, *run: Any) -> None: ...

    def pruned(self, *run: Any) -> Path:
        return Path(mkdtemp(dir=self.folder.name))

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


@lru_cache(maxsize=2)
def data_of(name: str, subset: int | None, heldout: str, device: str) -> Data:
    data = load_data(name, Path("data"))
    if heldout == "validation":  # of large sets no more than is needed
        data = data.validation_split(min(0.2, 3000 / len(data.y)))
    return (data if subset is None else data.subset(subset)).to(device)


def histogram(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """Weights by their importance, from 10^e to 10^(e + 1/8) with e from -4 to 2; those outside count at the ends."""
    if not isinstance(optimizer, Masked):
        return []
    weights = [optimizer.importance(p).flatten() for p in model.parameters() if p.dim() >= 2]
    exponents = torch.cat(weights).cpu().log10().clamp(-4.0, 1.999)
    return torch.histc(exponents, 48, -4.0, 2.0).long().tolist()


def pruning_of(settings: Settings) -> Pruning | None:
    if (prune := dict(settings.get("prune", {}))) == {}:
        return None
    return Pruning(schedule_of(prune.pop("remove"), prune.pop("by")), **prune)


def run(settings: Settings, device: str = "cpu") -> Run:
    """Trains once."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a network that has died computes with nothing else, a hundred times slower
    started = time.process_time()
    data = data_of(settings["data"], settings["subset"], settings["heldout"], device)
    names = ("model", "width", "epochs", "batch")
    recipe = Recipe(
        **{name: settings[name] for name in names},
        drop_schedule=settings["drop_schedule"],
        precision=settings["precision"],
        final_sparsity=settings["sparsity"],
        evaluate_every=settings.get("evaluate_every", 1),
        prune=pruning_of(settings),
    )
    base, built = settings["base"], []
    peer = PEERS.get(base)
    arm = base if peer is None else peer.arm
    common = {"lr": settings["lr"], "momentum": 0.9, "weight_decay": settings["weight_decay"]}
    common.update(base=settings["optimizer"], drop_rate=settings["drop_rate"])
    options = arm_options([arm], common, to_be_sparse=settings["sparsity"] is not None)[arm]
    options.update(settings["options"])
    steps = settings["epochs"] * batch_count(data, settings["batch"])

    def build(arm: str, model: nn.Module, options: Mapping[str, Any], seed: int) -> torch.optim.Optimizer:
        if peer is None:
            optimizer = build_optimizer(arm, model, options, seed)
        else:
            optimizer = peer.build(model, dict(options), settings, steps, seed)
        built.append((model, optimizer))
        return optimizer

    results = InMemory()
    note = None
    try:
        train(arm, settings["seed"], options, recipe, data, results, build=build)  # type: ignore[arg-type]
    except CannotBeSparse as error:  # the network is dead, and as good as chance
        note = str(error)
        chance = {"accuracy": 1 / data.classes, "train_accuracy": 1 / data.classes, "loss": math.log(data.classes)}
        results.lines += [{**results.lines[-1], **chance}] * (recipe.epochs - len(results.lines))
    lines, last, layers = results.lines, results.lines[-1], layer_densities(built[0][0])
    size = model_size(built[0][0], ((data.x[:1],), {}))

    def finite(value: float, digits: int = 4) -> float | None:
        return round(value, digits) if math.isfinite(value) else None

    return {
        "settings": settings,
        "accuracy": [finite(line["accuracy"]) for line in lines],
        "loss": [finite(line["loss"]) for line in lines],
        "train_accuracy": finite(last["train_accuracy"]),
        "train_loss": finite(last["train_loss"], 6),
        "dropped": finite(fmean(line["dropped"] for line in lines)),
        "sparsity": finite(1 - sum(layer.kept for layer in layers) / sum(layer.numel for layer in layers)),
        "macs": size.macs[""],
        "parameters": size.parameters[""],
        "layers": {layer.name: [layer.numel, layer.kept] for layer in layers},
        "importances": histogram(*built[0]),
        "cpu_seconds": finite(time.process_time() - started, 2),  # of one thread, with evaluation
        "note": note,
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
