"""Fills the tables of docs/pruning.md from results.jsonl alone.

    python benchmarks/pruning/report.py

The page keeps its words; what stands between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from plan import PLAN, SMALL, UNCUT, UNCUT_IMPACT
from runner import Arm, Run, Task, measured
from tables import difference, filled, markdown, shown, signed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pruning.md"


def uncut_of(arm: Arm) -> Arm:
    return UNCUT_IMPACT if arm.base == "saliency" else UNCUT


def row(name: str, runs: list[Run], task: Task, peers: list[list[Run]], comparisons: int) -> list[str]:
    """An arm: its accuracy, the paired difference to others, and what is left of the network."""
    found = [measured(task, run) for run in runs]
    cells = [name, shown(found, 2)]
    for other in peers:
        same = not other or other is runs
        versus = [measured(task, run) for run in other]
        cells.append("" if same else signed(*difference(found, versus, comparisons), 2))
    whole = PLAN.tests(task, UNCUT)
    return cells + [f"{fmean(run[key] for run in runs) / whole[0][key]:.0%}" for key in ("macs", "parameters")]


def cuts(task: Task, *questions: str) -> str:
    """What the cuts of some questions cost; all intervals of the table together hold at 95%."""
    arms = [(q, arm) for q in questions for arm in PLAN.questions[q].arms if PLAN.tests(task, arm)]
    table = [["what decides", "at the end", "− uncut", "− Torch-Pruning", "MACs", "parameters"]]
    comparisons = 2 * len(arms) - len(questions)
    if len(questions) == 1:
        for arm in (UNCUT, UNCUT_IMPACT):
            if runs := PLAN.tests(task, arm):
                table.append(row(arm.name, runs, task, [[], []], 1))
    for question, arm in arms:
        runs = PLAN.tests(task, arm)
        peer = next(each for each in PLAN.questions[question].arms if each.base == "torch-pruning")
        versus = runs if arm == peer else PLAN.tests(task, peer)
        target, removed = question.split("-")
        name = arm.name if len(questions) == 1 else f"{float(removed):.0%} of the {target}: {arm.name}"
        table.append(row(name, runs, task, [PLAN.tests(task, uncut_of(arm)), versus], comparisons))
    return markdown(table)


def chosen() -> str:
    """The learning rates of the uncut networks."""
    table = [["network", *(f"{lr:g}" for lr in UNCUT.lrs or ())]]
    for arm in (UNCUT, UNCUT_IMPACT):
        if scores := PLAN.validated(SMALL, arm):
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
    table = [["what decides", "at the end", "− uncut", "− Torch-Pruning", "MACs", "parameters"]]
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
    "half": partial(cuts, SMALL, "macs-0.5"),
    "shares": partial(cuts, SMALL, "macs-0.3", "macs-0.7", "params-0.5"),
    "chosen": chosen,
}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), TABLES))
