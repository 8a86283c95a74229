"""Fills the tables of docs/pruning.md from results.jsonl alone.

    python benchmarks/pruning/report.py
    python benchmarks/pruning/report.py --print half-fashion5k-cnn    # shows this table instead

The page keeps its words; what stands between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from guard import load
from plan import PLAN, TASKS, UNCUT, UNCUT_IMPACT
from runner import Arm, Task, measured
from tables import difference, markdown, report, shown, signed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pruning.md"


HEADER = ["what decides", "at the end", "− uncut", "− Torch-Pruning", "MACs", "parameters"]
SHARES = ("macs-0.3", "macs-0.7", "params-0.5")


def uncut_of(arm: Arm) -> Arm:
    return UNCUT_IMPACT if arm.base == "saliency" else UNCUT


def row(name: str, task: Task, arm: Arm, uncut: Arm | None, peer: Arm | None, comparisons: int) -> list[str]:
    """An arm: its accuracy, the paired differences to others, and what is left of the network."""
    runs, whole = PLAN.tests(task, arm), PLAN.tests(task, UNCUT)
    found = [measured(task, run) for run in runs]
    cells = [name, shown(found, 2)]
    for other in (uncut, peer):
        versus = [] if other in (None, arm) else [measured(task, run) for run in PLAN.tests(task, other)]
        cells.append(signed(*difference(found, versus, comparisons), 2) if versus else "")
    return cells + [f"{fmean(run[key] for run in runs) / whole[0][key]:.0%}" for key in ("macs", "parameters")]


def half(task: Task) -> str:
    """Half of the MACs, by what decides; all intervals of the table together hold at 95%."""
    peer = torch_pruning("macs-0.5")
    arms = [arm for question in ("macs-0.5", "importance", "apart") for arm in PLAN.questions[question].arms]
    arms = [arm for arm in arms if arm != UNCUT_IMPACT and PLAN.tests(task, arm)]
    rows = [row(arm.name, task, arm, None, None, 1) for arm in (UNCUT, UNCUT_IMPACT) if PLAN.tests(task, arm)]
    rows += [row(arm.name, task, arm, uncut_of(arm), peer, 2 * len(arms) - 1) for arm in arms]
    return markdown([HEADER, *rows])


def shares(task: Task) -> str:
    """Other shares than half of the MACs; all intervals of the table together hold at 95%."""
    found = [(q, arm) for q in SHARES for arm in PLAN.questions[q].arms if PLAN.tests(task, arm)]
    return markdown(
        [
            HEADER,
            *(
                row(f"{title(q)}: {arm.name}", task, arm, UNCUT, torch_pruning(q), 2 * len(found) - len(SHARES))
                for q, arm in found
            ),
        ]
    )


def torch_pruning(question: str) -> Arm:
    return next(arm for arm in PLAN.questions[question].arms if arm.base == "torch-pruning")


def title(question: str) -> str:
    target, share = question.split("-")
    return f"{float(share):.0%} of the {'MACs' if target == 'macs' else 'parameters'}"


def chosen(task: Task) -> str:
    """The learning rates of the uncut networks, on the validation split."""
    table = [["network", *(f"{lr:g}" for lr in UNCUT.lrs or ())]]
    for arm in (UNCUT, UNCUT_IMPACT):
        if scores := PLAN.validated(task, arm):
            table.append([arm.name, *(f"{score:.2f}" for score, _ in scores)])
    return markdown(table)


def full() -> str:
    """The same on all of Fashion-MNIST, at width 16; runs of an earlier program, each with its own batches."""
    lines = [json.loads(line) for line in Path(__file__).with_name("h200.jsonl").read_text().splitlines()]
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["phase"] == "final":
            runs.setdefault(line["arm"], {})[line["seed"]] = line
    ends = {arm: [found[seed]["end"] for seed in sorted(found)] for arm, found in runs.items()}
    peer = "torch-pruning:uniform:cubic2-14@macs0.5"
    table = [HEADER]
    for arm, name in EARLIER.items():
        versus = [
            "" if arm in ("uncut", other) else signed(*difference(ends[arm], ends[other], 2 * len(EARLIER) - 3), 2)
            for other in ("uncut", peer)
        ]
        left = [
            f"{fmean(run[key][1] / run[key][0] for run in runs[arm].values()):.0%}" for key in ("macs", "parameters")
        ]
        table.append([name, shown(ends[arm], 2), *versus, *left])
    return markdown(table)


def guarded() -> str:
    """What is left under a guard, by its tolerance."""
    by: dict[float | None, dict[int, dict[str, Any]]] = {}
    for line in load():
        by.setdefault(line["tolerance"], {})[line["seed"]] = line
    table = [["tolerance", "MACs left", "parameters left", "test accuracy", "− uncut"]]
    for tolerance, runs in by.items():
        lines = [runs[seed] for seed in sorted(runs)]
        tests, uncut = [line["test"] for line in lines], [by[None][seed]["test"] for seed in sorted(runs)]
        name = "(uncut)" if tolerance is None else "no guard" if tolerance == 100 else f"{tolerance:g} points"
        left = [shown([100 * line[key] for line in lines], 0) + "%" for key in ("macs", "parameters")]
        versus = "" if tolerance is None else signed(*difference(tests, uncut, len(by) - 1), 2)
        table.append([name, *left, shown(tests, 2), versus])
    return markdown(table)


EARLIER = {
    "uncut": "uncut",
    "rademacher:rademacher:cubic2-14@macs0.5": "rademacher",
    "torch-pruning:uniform:cubic2-14@macs0.5": "torch-pruning, uniform",
    "scratch@macs0.5": "from scratch",
    "entropy:uniform:cubic2-14@macs0.5": "entropy, uniform",
    "random:uniform:cubic2-14@macs0.5": "random",
}
"""The arms of h200.jsonl, by their names there."""

TABLES: dict[str, Callable[[], str]] = {
    "full": full,
    "guard": guarded,
    **{
        f"{name}-{task.name}": partial(table, task)
        for task in TASKS
        for name, table in (("half", half), ("shares", shares))
    },
    **{f"chosen-{task.name}": partial(chosen, task) for task in TASKS},
}


if __name__ == "__main__":
    report(__doc__, PAGE, TABLES, draw=lambda: None)
