"""What the benchmark of cut networks trains: the networks, what is cut out of them, and by what."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from runner import Arm, Plan, Question, Task

CNN = Task("fashion5k-cnn", "fashion-mnist", "cnn", 20, 100, width=16, subset=5000, evaluate_every=20)
NARROW_RESNET = replace(CNN, name="fashion5k-resnet18", model="resnet18", width=8, weight_decay=5e-4)
# For a GPU: an hour on two cores for each run.
RESNET = Task("fashion-resnet18", "fashion-mnist", "resnet18", 20, 256, width=16, evaluate_every=20, weight_decay=5e-4)
TASKS = [CNN, NARROW_RESNET, RESNET]
BY = 14  # cuts follow the epochs 3 to 14

UNCUT = Arm("uncut", "baseline", lrs=(0.02, 0.05, 0.1, 0.2, 0.4))
UNCUT_IMPACT = Arm("uncut, ImpactSGD", "saliency", drop_rates=(0.1,), lrs=UNCUT.lrs)


def cut(
    remove: float, target: str = "macs", criterion: str = "rademacher", split: str | None = None, base: str = "baseline"
) -> Arm:
    """An arm that is cut, little by little, and trains with the learning rate at which the uncut network does best."""
    prune: dict[str, Any] = {"remove": remove, "by": BY, "target": target, "criterion": criterion, "split": split}
    name = criterion if split is None else f"{criterion}, {split}"
    if criterion == "importance":
        return Arm(name, "saliency", drop_rates=(0.1,), prune=prune, lrs=(), tuned_as=("importance", UNCUT_IMPACT.name))
    return Arm(name, base, prune=prune, lrs=(), tuned_as=("uncut", UNCUT.name))


def peers(remove: float, target: str = "macs") -> list[Arm]:
    """What Torch-Pruning cuts, and a network as small that is trained from the start."""
    narrow = {"narrow": {"remove": remove, "target": target}}
    return [
        cut(remove, target, "torch-pruning", "uniform", base="torch-pruning"),
        Arm("from scratch", "narrow", narrow, lrs=(), tuned_as=("uncut", UNCUT.name)),
    ]


def named(remove: float, target: str) -> str:
    return f"{target}-{remove:g}"


BOTH, ALL = (CNN.name, RESNET.name), (CNN.name, NARROW_RESNET.name, RESNET.name)
QUESTIONS = [
    Question("uncut", [UNCUT], ALL),
    Question(named(0.5, "macs"), [cut(0.5), *peers(0.5), cut(0.5, criterion="l1")], ALL),
    *(
        Question(named(remove, target), [cut(remove, target), *peers(remove, target)], BOTH)
        for remove, target in ((0.7, "macs"), (0.3, "macs"), (0.5, "params"))
    ),
    Question("importance", [UNCUT_IMPACT, cut(0.5, criterion="importance")], BOTH),
    Question(
        "apart",  # criterion and split
        [
            cut(0.5, criterion="rademacher", split="uniform"),
            cut(0.5, criterion="l1", split="rademacher"),
            cut(0.5, criterion="entropy", split="uniform"),
            cut(0.5, criterion="random"),
        ],
        BOTH,
    ),
]
PLAN = Plan(TASKS, QUESTIONS, Path(__file__).parent / "results.jsonl")
