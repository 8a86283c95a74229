"""What the study trains: tasks, arms, and which of them answer which question."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from runner import Arm, Plan, Question, Task

MNIST1D_MLP = Task("mnist1d-mlp", "mnist1d", "mlp", epochs=40, batch=100, lrs=(0.1, 0.2, 0.4))
MNIST1D_CNN = Task("mnist1d-cnn", "mnist1d", "cnn", epochs=40, batch=100, lrs=(0.05, 0.1, 0.2))
DIGITS = Task("digits-mlp", "digits", "mlp", epochs=40, batch=100, lrs=(0.05, 0.1, 0.2))
FASHION = Task(
    "fashion5k-cnn",
    "fashion-mnist",
    "cnn",
    epochs=20,
    batch=100,
    width=32,
    subset=5000,
    evaluate_every=2,
    lrs=(0.02, 0.05, 0.1),
)
# The source's experiment, ResNet-18 for 90 epochs, as wide and on as many images as two cores can train.
RESNET = Task(
    "fashion-resnet18",
    "fashion-mnist",
    "resnet18",
    epochs=90,
    batch=100,
    width=8,
    subset=1000,
    evaluate_every=9,
    weight_decay=5e-4,
    tuned_on="fashion-resnet18-tuning",
)
RESNET_TUNING = replace(
    RESNET, name="fashion-resnet18-tuning", epochs=30, tuning_seeds=(0,), test_seeds=(), tuned_on=None
)
# Ready to run; not run, for want of the data set.
CIFAR10 = Task("cifar10-resnet18", "cifar10", "resnet18", 90, 128, width=64, precision="bfloat16", weight_decay=5e-4)
VIT = Task(
    "fashion-vit",
    "fashion-mnist",
    "vit",
    epochs=10,
    batch=100,
    subset=10_000,
    weight_decay=0.05,
    optimizer="adamw",
    lrs=(1e-3, 2e-3, 4e-3),
    drop_rates=(0.05, 0.1),
    tuning_seeds=(0,),
)
GPT = replace(
    VIT,
    name="shakespeare-gpt",
    data="shakespeare",
    model="gpt",
    epochs=20,
    subset=8000,
    weight_decay=0.1,
    measure="bits",
)
SMALL = [MNIST1D_MLP, MNIST1D_CNN, DIGITS]


def named(tasks: list[Task]) -> tuple[str, ...]:
    return tuple(task.name for task in tasks)


# ------------------------------------------------------------------------------- which weights are dropped

TWO = (0, 1)  # validation seeds, where a seed may be lost
LONG = (0.02, 0.05, 0.1, 0.2, 0.4)  # of learning rates, for what the others are compared with
BASELINES = [
    Arm("SGD", "baseline", lrs=LONG),
    Arm("AdamW", "adamw", lrs=(1e-3, 3e-3, 1e-2, 3e-2)),
]


def at_rate(rate: float) -> list[Arm]:
    """Arms that drop as many weights as each other."""
    fixed: dict[str, Any] = {"drop_rates": (rate,)}
    arms = [
        Arm("uniform", "dropconnect", **fixed, lrs=LONG, tuning_seeds=TWO if rate == 0.3 else None),
        Arm("saliency", "saliency", **fixed),
        Arm("magnitude", "magnitude", **fixed),
    ]
    if rate != 0.3:
        return arms
    shuffled = {"importance": "saliency-shuffled"}
    return [*arms, Arm("saliency, shuffled", "saliency", shuffled, **fixed)]


BEST = [
    Arm("uniform", "dropconnect", drop_rates=None),
    Arm("uniform, decaying", "dropconnect", drop_rates=None, drop_schedule="linear"),
    Arm("saliency", "saliency", drop_rates=None),
    Arm("magnitude", "magnitude", drop_rates=None),
]

# ------------------------------------------------------------------------------- the source's own method


def source(name: str, signal: str, simplex: str, kl_weight: float, **options: Any) -> Arm:
    """An arm of the source: a signal, what shares a simplex, and the KL weight, at a drop rate of 0.3."""
    base = "lookahead-step" if signal == "lookahead along the step" else "lookahead"
    importance = "hypergradient" if signal == "hypergradient" else "lookahead"
    lrs = options.pop("lrs", (0.05, 0.1, 0.2))
    given = {"importance": importance, "simplex": simplex, "kl_weight": kl_weight, **options}
    return Arm(name, base, given, (0.3,), lrs=lrs, tuning_seeds=TWO)


SOURCE = [
    Arm("uniform", "dropconnect", drop_rates=(0.3,), lrs=LONG, tuning_seeds=TWO),
    *(
        source(f"{signal}: per {simplex}, λ = {kl_weight:g}", signal, simplex, kl_weight)
        for signal in ("lookahead", "lookahead along the step", "hypergradient")
        for simplex in ("tensor", "group")
        for kl_weight in (0.0, 1.0)
    ),
]
ON_FASHION = [
    SOURCE[0],
    *(source(f"lookahead: per tensor, λ = {kl:g}", "lookahead", "tensor", kl, lrs=FASHION.lrs) for kl in (0.0, 1.0)),
]
PER_TENSOR = [arm for arm in SOURCE if "per group" not in arm.name]
WITHOUT_RESCALING = [
    Arm("uniform", "dropconnect", {"rescale": "none"}, (0.3,), lrs=LONG, tuning_seeds=TWO),
    *(source(f"lookahead: λ = {kl:g}", "lookahead", "tensor", kl, rescale="none") for kl in (0.0, 1.0)),
]
_PLAIN = (0.1, 0.2, 0.5, 1.0)
WITHOUT_MOMENTUM = [
    Arm("uniform", "dropconnect", {"momentum": 0.0}, (0.3,), lrs=_PLAIN, tuning_seeds=TWO),
    *(
        source(f"{signal}: λ = {kl:g}", signal, "tensor", kl, momentum=0.0, lrs=_PLAIN)
        for signal in ("lookahead", "hypergradient")
        for kl in (0.0, 1.0)
    ),
]

RESNET_ARMS = [
    Arm("uniform", "dropconnect", drop_rates=(0.3,), lrs=(0.05, 0.1, 0.2)),
    Arm("SGD", "baseline", lrs=(0.05, 0.1, 0.2)),
    *(replace(source(f"lookahead: λ = {kl:g}", "lookahead", "tensor", kl), tuning_seeds=None) for kl in (0.0, 1.0)),
]

# ------------------------------------------------------------------------------- AdamW and transformers

TRANSFORMERS = [
    Arm("AdamW", "baseline"),
    Arm("AdamW, dropout", "adamw-dropout", tune={"dropout": (0.05, 0.1)}),
    Arm("uniform", "dropconnect", drop_rates=None),
    Arm("saliency", "saliency", drop_rates=None),
    Arm("magnitude", "magnitude", drop_rates=None),
]
ONE_SIMPLEX = {"simplex": "group", "kl_weight": 0.3}
SPARSE_TRANSFORMERS = [
    Arm("gradual magnitude, of all", "gradual-magnitude", sparsity=0.9),
    Arm("gradual magnitude, of each", "gradual-per-tensor", sparsity=0.9),
    Arm("saliency ramp, one simplex", "saliency", ONE_SIMPLEX, (0.1,), sparsity=0.9),
    Arm("magnitude ramp, one simplex", "magnitude", ONE_SIMPLEX, (0.1,), sparsity=0.9),
]
SETTINGS = [
    Arm(f"λ = {kl_weight:g}, η = {lr:g}", "saliency", {"kl_weight": kl_weight, "importance_lr": lr}, (0.1,))
    for kl_weight, lr in ((10.0, 0.01), (3.0, 0.01), (30.0, 0.01), (10.0, 0.001), (10.0, 0.1))
]

QUESTIONS = [
    Question("baselines", BASELINES, named(SMALL)),
    Question("baseline", BASELINES[:1], named([FASHION])),
    Question("equal-0.3", at_rate(0.3), named([*SMALL, FASHION])),
    *(Question(f"equal-{rate}", at_rate(rate), named(SMALL)) for rate in (0.1, 0.5)),
    Question("source", SOURCE, named([MNIST1D_MLP])),
    Question("source-tensor", PER_TENSOR, named([MNIST1D_MLP, MNIST1D_CNN])),
    Question("source-fashion", ON_FASHION, named([FASHION])),
    Question("source-rescale", WITHOUT_RESCALING, named([MNIST1D_MLP])),
    Question("source-momentum", WITHOUT_MOMENTUM, named([MNIST1D_MLP])),
    Question("source-resnet", RESNET_ARMS, named([RESNET_TUNING, RESNET, CIFAR10])),
    Question("transformers", TRANSFORMERS, named([VIT, GPT])),
    Question("transformers-sparse", SPARSE_TRANSFORMERS, named([VIT])),
    Question("transformers-settings", SETTINGS, named([VIT, GPT]), tested=False),
    Question("best", BEST, named(SMALL)),
]
TASKS = [*SMALL, FASHION, RESNET_TUNING, RESNET, CIFAR10, VIT, GPT]
PLAN = Plan(TASKS, QUESTIONS, Path(__file__).parent / "results.jsonl")
