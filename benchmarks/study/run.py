"""Trains what the study declares, on all cores; goes on where it was stopped.

    python benchmarks/study/run.py                     # everything that is not in results.jsonl yet
    python benchmarks/study/run.py --questions equal-0.3 best --tasks digits-mlp
    python benchmarks/study/report.py                  # docs/results.md and its pictures, from results.jsonl

A line of ``results.jsonl`` is one run: all it depends on, what it measured, and the versions it was made with.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from peers import GradualLAMP, RigL, shuffled_fisher
from plan import CIFAR10, QUESTIONS, TASKS, TEST_SEEDS, Arm, Question, Task

from impact_optim import SIGNALS
from impact_optim.experiments.arms import GRADUAL, arm_options, build_optimizer
from impact_optim.experiments.data import Data, batch_count, load_data
from impact_optim.experiments.pruning import Pruning
from impact_optim.experiments.sparse import CannotBeSparse
from impact_optim.experiments.training import Recipe, train

RESULTS = Path(__file__).parent / "results.jsonl"
SIGNALS["fisher-shuffled"] = shuffled_fisher

_OF_TUNING = ("name", "lrs", "drop_rates", "tuning_seeds", "tuned_on", "tuned_as")  # no run depends on these

Settings = dict[str, Any]


def settings_of(task: Task, arm: Arm, lr: float, drop_rate: float, heldout: str, seed: int) -> Settings:
    """All that a run depends on."""
    of_task = {k: v for k, v in asdict(task).items() if k not in _OF_TUNING}
    of_arm = {k: v for k, v in asdict(arm).items() if k not in _OF_TUNING}
    settings = {**of_task, **of_arm, "lr": lr, "drop_rate": drop_rate, "heldout": heldout, "seed": seed}
    return json.loads(json.dumps(settings))


def key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def load_results(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The runs that are there, by what they depend on."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(line["settings"]): line for line in map(json.loads, lines)}


def tuning_grid(task: Task, arm: Arm) -> list[tuple[float, float]]:
    """The learning rates and drop rates among which an arm is tuned on a task."""
    rates = task.drop_rates if arm.drop_rates is None else arm.drop_rates
    return [(lr, rate) for lr in arm.lrs or task.lrs for rate in rates]


def validated(task: Task, arm: Arm, results: Mapping[str, Any]) -> dict[tuple[float, float], float] | None:
    """The validation accuracy at each point of the grid of an arm; ``None`` before all were tried."""
    scores = {}
    for lr, rate in tuning_grid(task, arm):
        runs = [results.get(key(settings_of(task, arm, lr, rate, "validation", seed))) for seed in task.tuning_seeds]
        if None in runs:
            return None
        scores[lr, rate] = fmean(run["accuracy"][-1] for run in runs)  # type: ignore[index]
    return scores


def tuned(task: Task, arm: Arm, results: Mapping[str, Any]) -> tuple[float, float] | None:
    """The learning rate and drop rate that did best on the validation split; ``None`` before all were tried."""
    if task.tuned_on is not None:
        return tuned(TASKS[task.tuned_on], arm, results)
    if arm.tuned_as is not None:
        question, name = arm.tuned_as
        arms = next(q.arms for q in QUESTIONS if q.name == question)
        return tuned(task, next(a for a in arms if a.name == name), results)
    scores = validated(task, arm, results)
    return None if scores is None else max(scores, key=lambda at: scores[at])


# ------------------------------------------------------------------------------- one run


class InMemory:
    """In place of a results folder: a run is short, and starts again when it was stopped."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._folder = tempfile.TemporaryDirectory()

    def checkpoint(self, *run: Any) -> None:
        return None

    def save_checkpoint(self, *run: Any) -> None: ...

    def save_densities(self, *run: Any) -> None: ...

    def finish(self, *run: Any) -> None: ...

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def pruned(self, arm: str, seed: int) -> Path:
        return Path(self._folder.name) / f"{arm}-{seed}"


@lru_cache(maxsize=2)
def data_of(name: str, subset: int | None, heldout: str) -> Data:
    data = load_data(name, Path("data"))
    if heldout == "validation":  # of fashion-mnist no more than is needed
        data = data.validation_split(min(0.2, 3000 / len(data.y)))
    return data if subset is None else data.subset(subset)


def run(settings: Settings) -> dict[str, Any]:
    """Trains once."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a network that has died computes with nothing else, a hundred times slower
    data = data_of(settings["data"], settings["subset"], settings["heldout"])
    prune = Pruning(dict(map(tuple, settings["prune"])), settings["criterion"], "macs") if settings["prune"] else None
    recipe = Recipe(
        settings["model"],
        settings["width"],
        settings["epochs"],
        settings["batch"],
        "cosine",
        settings["drop_schedule"],
        settings["precision"],
        prune,
        settings["sparsity"],
    )
    base = settings["base"]
    common = {"lr": settings["lr"], "momentum": 0.9, "weight_decay": settings["weight_decay"]}

    def rigl(arm: str, model: nn.Module, options: Mapping[str, Any], seed: int) -> torch.optim.Optimizer:
        steps = settings["epochs"] * batch_count(data, settings["batch"])
        return RigL(model, sparsity=settings["sparsity"], steps=steps, seed=seed, **options)

    def by_lamp(arm: str, model: nn.Module, options: Mapping[str, Any], seed: int) -> torch.optim.Optimizer:
        return GradualLAMP(model, seed=seed, **options)

    if base == "rigl":
        options, build = common, rigl
    else:
        build = build_optimizer
        if base == "gradual-lamp":  # another score on the same ramp
            base, build = GRADUAL, by_lamp
        to_be_sparse = settings["sparsity"] is not None
        common["drop_rate"] = settings["drop_rate"]
        options = arm_options([base], common, to_be_sparse=to_be_sparse)[base]
        options.update(settings["options"])
    results = InMemory()
    note = None
    try:
        train(base, settings["seed"], options, recipe, data, results, build=build)  # type: ignore[arg-type]
    except CannotBeSparse as error:  # the network is dead, and as good as chance
        note = str(error)
        chance = {"accuracy": 1 / data.classes, "train_accuracy": 1 / data.classes}
        results.lines += [{**results.lines[-1], **chance}] * (recipe.epochs - len(results.lines))
    lines, last = results.lines, results.lines[-1]

    def finite(value: float, digits: int = 4) -> float | None:
        return round(value, digits) if math.isfinite(value) else None

    return {
        "settings": settings,
        "accuracy": [finite(line["accuracy"]) for line in lines],
        "loss": finite(last["loss"]),
        "train_accuracy": finite(last["train_accuracy"]),
        "train_loss": finite(last["train_loss"], 6),
        "dropped": finite(fmean(line["dropped"] for line in lines)),
        "before_cut": finite(last.get("accuracy_before_cut", math.nan)),
        "sparsity": finite(last.get("sparsity", math.nan)),
        "seconds": finite(sum(line["seconds"] for line in lines), 2),
        "note": note,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


# ------------------------------------------------------------------------------- all of them


def wanted(questions: list[Question], tasks: list[str], results: Mapping[str, Any]) -> Iterator[Settings]:
    """What can be trained now: all of the tuning, and the tests of what is tuned."""
    seen: set[str] = set()
    for question in questions:
        for task in (TASKS[name] for name in question.tasks if name in tasks):
            for arm in question.arms:
                best = tuned(task, arm, results)
                if best is not None:
                    found = [settings_of(task, arm, *best, "test", seed) for seed in TEST_SEEDS]
                elif arm.tuned_as is None and task.tuned_on is None:
                    found = [
                        settings_of(task, arm, lr, rate, "validation", seed)
                        for lr, rate in tuning_grid(task, arm)
                        for seed in task.tuning_seeds
                    ]
                else:
                    found = []
                for settings in found:
                    if (name := key(settings)) not in results and name not in seen:
                        seen.add(name)
                        yield settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [question.name for question in QUESTIONS]
    parser.add_argument("--questions", nargs="+", choices=names, default=names)
    # CIFAR-10 only when asked for: it has to be put into data/ first.
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[name for name in TASKS if name != CIFAR10.name])
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="processes of one thread each")
    parser.add_argument("--dry-run", action="store_true", help="only say how many runs there are to do")
    args = parser.parse_args()
    questions = [question for question in QUESTIONS if question.name in args.questions]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    results = load_results()
    if args.dry_run:
        print(len(list(wanted(questions, args.tasks, results))), "runs can start now")
        return
    from tqdm import tqdm

    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        while todo := list(wanted(questions, args.tasks, results)):
            futures = [pool.submit(run, settings) for settings in todo]
            for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
                line = {**future.result(), "commit": commit}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                results[key(line["settings"])] = line


if __name__ == "__main__":
    main()
