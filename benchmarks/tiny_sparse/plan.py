"""What the benchmark of sparse training trains: tasks, methods and sparsities."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from runner import Arm, Plan, Question, Task

from impact_optim.experiments.arms import RAMPED

FIVE = tuple(range(100, 105))
TASKS = [
    Task(
        "mnist1d-mlp", "mnist1d", "mlp", epochs=40, batch=100, lrs=(0.2, 0.4, 0.6), tuning_seeds=(0,), test_seeds=FIVE
    ),
    Task(
        "mnist1d-cnn", "mnist1d", "cnn", epochs=40, batch=100, lrs=(0.1, 0.2, 0.4), tuning_seeds=(0,), test_seeds=FIVE
    ),
    Task(
        "fashion-lenet",
        "fashion-mnist",
        "lenet-300-100",
        epochs=8,
        batch=100,
        lrs=(0.05, 0.1, 0.2),
        tuning_seeds=(0,),
        test_seeds=(100, 101, 102),
    ),
]
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
TUNED_AT = 0.9

# Every method has six points to be tuned at: what has no option but the learning rate has six of those.
_SIX = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
DENSE = Arm("dense", "baseline", lrs=_SIX)
_EVERY = {"every": (25, 100)}
PEERS = [
    Arm("one-shot magnitude", "one-shot-magnitude", lrs=_SIX),
    Arm("gradual magnitude", "gradual-magnitude", lrs=_SIX),
    Arm("targeted dropout", "targeted-dropout", tune={"alpha": (0.9, 0.99)}),
    Arm("static random", "static", lrs=_SIX),
    Arm("SET", "set", tune=_EVERY),
    Arm("RigL", "rigl", tune=_EVERY),
]
OURS = Arm("ours", "saliency", dict(RAMPED), (0.1,), lrs=_SIX)  # the ramp moves the drop rate


def question_of(sparsity: float, arm: Arm) -> str:
    """Ours is a question of its own, to be trained alone."""
    return f"{sparsity} ours" if arm == OURS else f"{sparsity}"


def at(sparsity: float, arm: Arm) -> Arm:
    """A method at a sparsity; the others take what did best at 90%."""
    tuned_as = None if sparsity == TUNED_AT else (question_of(TUNED_AT, arm), arm.name)
    return replace(arm, sparsity=sparsity, tuned_as=tuned_as)


NAMES = tuple(task.name for task in TASKS)
QUESTIONS = [
    Question("dense", [DENSE], NAMES),
    *(Question(f"{s}", [at(s, arm) for arm in PEERS], NAMES) for s in SPARSITIES),
    *(Question(f"{s} ours", [at(s, OURS)], NAMES) for s in SPARSITIES),
]
PLAN = Plan(TASKS, QUESTIONS, Path(__file__).parent / "results.jsonl")
