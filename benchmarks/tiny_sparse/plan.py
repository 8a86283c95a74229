"""What the benchmark of sparse training trains: tasks, methods and sparsities."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from runner import Arm, Plan, Question, Task

from impact_optim.experiments.arms import RAMPED

TEN, FIVE, THREE = tuple(range(100, 110)), tuple(range(100, 105)), tuple(range(100, 103))
MLP = Task("mnist1d-mlp", "mnist1d", "mlp", epochs=40, batch=100, tuning_seeds=(0,), test_seeds=TEN)
CNN = Task("mnist1d-cnn", "mnist1d", "cnn", epochs=40, batch=100, tuning_seeds=(0,), test_seeds=FIVE)
LENET = Task(
    "fashion-lenet", "fashion-mnist", "lenet-300-100", epochs=8, batch=100, tuning_seeds=(0,), test_seeds=THREE
)
GPT = Task(
    "shakespeare-gpt",
    "shakespeare",
    "gpt",
    epochs=10,
    batch=25,
    width=32,
    subset=3200,
    evaluate_every=10,
    weight_decay=0.1,
    optimizer="adamw",
    measure="bits",
    tuning_seeds=(0,),
    test_seeds=FIVE,
)
TASKS = [MLP, CNN, LENET, GPT]
FOUR, THREE_LEVELS = (0.8, 0.9, 0.95, 0.98), (0.9, 0.95, 0.98)
SPARSITIES = {MLP.name: FOUR, CNN.name: FOUR, LENET.name: FOUR, GPT.name: THREE_LEVELS}
TUNED_AT = 0.9

# Every method has four points to be tuned at: four learning rates, or two and two values of an option.
FOUR_LRS = {
    MLP.name: (0.1, 0.2, 0.3, 0.4),
    CNN.name: (0.05, 0.1, 0.2, 0.3),
    LENET.name: (0.03, 0.05, 0.1, 0.2),
    GPT.name: (0.01, 0.02, 0.04, 0.08),
}
TWO_LRS = {MLP.name: (0.2, 0.4), CNN.name: (0.1, 0.2), LENET.name: (0.05, 0.1), GPT.name: (0.02, 0.04)}


# A threshold for every unit at every step takes three times as long as the rest of it; halves of ours cost what ours
# does. A share of each layer is the authors' own form, which the densities by size replace on the small tasks.
_OF_TRANSFORMERS = ("gradual magnitude, of each layer", "ours, densities by size")  # this is ours elsewhere
_COSTLY = ("targeted dropout", "gradual magnitude, our densities", "our ramp, by magnitude")
LEFT_OUT = {
    MLP.name: _OF_TRANSFORMERS,
    CNN.name: _OF_TRANSFORMERS,
    LENET.name: (*_OF_TRANSFORMERS, *_COSTLY),
    GPT.name: _COSTLY,
}


# The layers of a transformer have nearly the same size, and so the same density by it. In one simplex they compete.
COMPETING = {**RAMPED, "simplex": "group", "kl_weight": 0.3}


def dense(task: Task) -> Arm:
    return Arm("dense", "baseline", lrs=FOUR_LRS[task.name])


def all_methods(task: Task) -> list[Arm]:
    """All that make a network sparse, those that are left out on this task included."""
    four, two = FOUR_LRS[task.name], TWO_LRS[task.name]
    every = {"every": (25, 100)}
    return [
        Arm("one-shot magnitude", "one-shot-magnitude", lrs=four),
        Arm("gradual magnitude", "gradual-magnitude", lrs=four),
        Arm("gradual magnitude, of each layer", "gradual-per-tensor", lrs=four),
        Arm("targeted dropout", "targeted-dropout", lrs=two, tune={"alpha": (0.9, 0.99)}),
        Arm("static random", "static", lrs=four),
        Arm("SET", "set", lrs=two, tune=every),
        Arm("RigL", "rigl", lrs=two, tune=every),
        Arm("gradual magnitude, our densities", "gradual-by-densities", lrs=four),
        Arm("our ramp, by magnitude", "magnitude", dict(RAMPED), (0.1,), lrs=four),
        Arm("ours, densities by size", "saliency", dict(RAMPED), (0.1,), lrs=four),
        Arm("ours", "saliency", COMPETING if task == GPT else dict(RAMPED), (0.1,), lrs=four),
    ]


METHODS = [arm.name for arm in all_methods(MLP)]


def methods(task: Task, sparsity: float) -> list[Arm]:
    """Those of a task; at other sparsities with what did best at 90%."""

    def tuned_as(arm: Arm) -> tuple[str, str] | None:
        return None if sparsity == TUNED_AT else (question_of(task, TUNED_AT), arm.name)

    arms = [arm for arm in all_methods(task) if arm.name not in LEFT_OUT[task.name]]
    return [replace(arm, sparsity=sparsity, tuned_as=tuned_as(arm)) for arm in arms]


def question_of(task: Task, sparsity: float | None) -> str:
    return f"{task.name}-dense" if sparsity is None else f"{task.name}-{sparsity:g}"


QUESTIONS = [
    *(Question(question_of(task, None), [dense(task)], (task.name,)) for task in TASKS),
    *(
        Question(question_of(task, sparsity), methods(task, sparsity), (task.name,))
        for sparsity in (0.9, 0.95, 0.98, 0.8)
        for task in TASKS
        if sparsity in SPARSITIES[task.name]
    ),
]
PLAN = Plan(TASKS, QUESTIONS, Path(__file__).parent / "results.jsonl")
