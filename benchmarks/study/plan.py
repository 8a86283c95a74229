"""What the study trains: tasks, arms, and which of them answer which question.

A *cell* is an arm on a task. Each is tuned on a validation split, by its own grid of learning rates and drop rates, and
then trained with fresh seeds on the whole training set and tested once. Cells are compared by what they depend on, not
by their names: what two questions share is trained once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TUNING_SEEDS = (0, 1)
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
    weight_decay: float = 0.0
    lrs: tuple[float, ...] = (0.05, 0.1, 0.2)
    drop_rates: tuple[float, ...] = (0.05, 0.1, 0.3)
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    tuned_on: str | None = None
    """The task whose best learning rates and drop rates are taken, where tuning would take too long."""


@dataclass(frozen=True)
class Arm:
    """An arm: the optimizer, its fixed options, and what is tuned."""

    name: str
    base: str
    """An arm of the main job, or a peer: ``"rigl"``, ``"gradual-lamp"``."""
    options: dict[str, Any] = field(default_factory=dict)
    drop_rates: tuple[float, ...] | None = (0.0,)
    """What is tuned; ``None`` takes the task's."""
    drop_schedule: str = "constant"
    sparsity: float | None = None
    lrs: tuple[float, ...] | None = None
    prune: tuple[tuple[int, float], ...] = ()
    """Epoch -> share of the MACs that are gone after it."""
    criterion: str = "entropy"
    tuned_as: tuple[str, str] | None = None
    """Question and arm whose best learning rate and drop rate it takes."""


MNIST1D_MLP = Task("mnist1d-mlp", "mnist1d", "mlp", epochs=40, batch=100, lrs=(0.1, 0.2, 0.4))
MNIST1D_CNN = Task("mnist1d-cnn", "mnist1d", "cnn", epochs=40, batch=100, lrs=(0.05, 0.1, 0.2))
DIGITS = Task("digits-mlp", "digits", "mlp", epochs=40, batch=100, lrs=(0.05, 0.1, 0.2))
FASHION_5K = Task(
    "fashion5k-cnn",
    "fashion-mnist",
    "cnn",
    epochs=12,
    batch=100,
    subset=5000,
    precision="bfloat16",
    lrs=(0.02, 0.05, 0.1, 0.2),
    drop_rates=(0.1, 0.3),
    tuning_seeds=(0,),
)
FASHION_5K_RESNET = Task(
    "fashion5k-resnet18",
    "fashion-mnist",
    "resnet18",
    epochs=10,
    batch=100,
    width=8,
    subset=5000,
    precision="bfloat16",
    weight_decay=5e-4,
    lrs=(0.1, 0.2),
    drop_rates=(0.1,),
    tuning_seeds=(0,),
)
FASHION = Task(
    "fashion-resnet18",
    "fashion-mnist",
    "resnet18",
    epochs=3,
    batch=100,
    width=8,
    precision="bfloat16",
    weight_decay=5e-4,
    tuned_on=FASHION_5K_RESNET.name,
)
# Ready to run; not run, for want of the data set.
CIFAR10 = Task("cifar10-resnet18", "cifar10", "resnet18", 90, 128, width=64, precision="bfloat16", weight_decay=5e-4)
SMALL = (MNIST1D_MLP.name, MNIST1D_CNN.name, DIGITS.name, FASHION_5K.name)
TASKS = {
    task.name: task for task in (MNIST1D_MLP, MNIST1D_CNN, DIGITS, FASHION_5K, FASHION_5K_RESNET, FASHION, CIFAR10)
}

# ------------------------------------------------------------------------------- the questions

BASELINES = [
    Arm("SGD", "baseline", lrs=(0.02, 0.05, 0.1, 0.2, 0.4)),
    Arm("AdamW", "adamw", lrs=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
]


def at_rate(rate: float) -> list[Arm]:
    """Arms that drop as many weights as each other."""
    fixed = {"drop_rates": (rate,)}
    return [
        Arm("uniform", "dropconnect", **fixed, lrs=(0.02, 0.05, 0.1, 0.2, 0.4)),  # the reference
        Arm("impacts", "impacts", **fixed),
        Arm("impacts + KL", "impacts+regularization", **fixed),
        Arm("saliency", "saliency", **fixed),
        Arm("fisher", "fisher", **fixed),
        Arm("magnitude", "magnitude", **fixed),
        Arm("fisher, shuffled", "fisher", {"importance": "fisher-shuffled"}, **fixed),
    ]


BEST = [
    Arm("uniform", "dropconnect", drop_rates=None),
    Arm("uniform, decaying", "dropconnect", drop_rates=None, drop_schedule="linear"),
    Arm("fisher", "fisher", drop_rates=None),
    Arm("fisher, decaying", "fisher", drop_rates=None, drop_schedule="linear"),
    Arm("saliency", "saliency", drop_rates=None),
    Arm("saliency, decaying", "saliency", drop_rates=None, drop_schedule="linear"),
    Arm("magnitude", "magnitude", drop_rates=None),
    Arm("magnitude, decaying", "magnitude", drop_rates=None, drop_schedule="linear"),
]
IMPORTANT = [
    Arm(f"{which}, {rate}", "saliency", {"drop": which}, drop_rates=(rate,))
    for rate in (0.05, 0.1, 0.3)
    for which in ("unimportant", "important")
]
DETAILS = [
    Arm("as is", "saliency", drop_rates=(0.3,)),
    Arm("per tensor", "saliency", {"simplex": "tensor"}, drop_rates=(0.3,)),
    Arm("not rescaled", "saliency", {"rescale": "none"}, drop_rates=(0.3,)),
    Arm("λ = 1", "saliency", {"kl_weight": 1.0}, drop_rates=(0.3,)),
    Arm("λ = 3", "saliency", {"kl_weight": 3.0}, drop_rates=(0.3,)),
    Arm("λ = 30", "saliency", {"kl_weight": 30.0}, drop_rates=(0.3,)),
    Arm("η = 0.001", "saliency", {"importance_lr": 0.001}, drop_rates=(0.3,)),
    Arm("η = 0.1", "saliency", {"importance_lr": 0.1}, drop_rates=(0.3,)),
]
RAMPED = {"rescale": "none", "importance_lr": 0.03, "kl_weight": 0.3}


def sparse(sparsity: float) -> list[Arm]:
    """Ways to a sparse network; tuned at 90%."""

    def arm(name: str, base: str, options: dict[str, Any] | None = None, drop_rate: float = 0.0) -> Arm:
        tuned_as = None if sparsity == 0.9 else ("sparse-0.9", name)
        return Arm(name, base, options or {}, (drop_rate,), sparsity=sparsity, tuned_as=tuned_as)

    return [
        arm("one-shot magnitude", "baseline"),
        arm("gradual magnitude", "gradual-magnitude"),
        arm("gradual, LAMP", "gradual-lamp"),
        arm("RigL", "rigl"),
        arm("uniform, then magnitude", "dropconnect", drop_rate=0.1),
        arm("saliency ramp", "saliency", RAMPED, 0.1),
        arm("fisher ramp", "fisher", RAMPED, 0.1),
        arm("magnitude ramp", "magnitude", RAMPED, 0.1),
    ]


RESIDUAL = [  # the few that a residual network leaves time for
    Arm("SGD", "baseline"),
    Arm("uniform", "dropconnect", drop_rates=None),
    Arm("saliency", "saliency", drop_rates=None),
    Arm("saliency, decaying", "saliency", drop_rates=None, drop_schedule="linear"),
    Arm("gradual magnitude, 90%", "gradual-magnitude", sparsity=0.9),
    Arm("saliency ramp, 90%", "saliency", RAMPED, (0.1,), sparsity=0.9),
]
FULL = [arm for arm in RESIDUAL if arm.name in ("SGD", "saliency", "gradual magnitude, 90%", "saliency ramp, 90%")]
CUTS = ((4, 0.3), (7, 0.5))
PRUNED = [
    Arm("SGD, entropy", "baseline", prune=CUTS, tuned_as=("baselines", "SGD")),
    Arm("SGD, rademacher", "baseline", prune=CUTS, criterion="rademacher", tuned_as=("baselines", "SGD")),
    Arm("SGD, l1", "baseline", prune=CUTS, criterion="l1", tuned_as=("baselines", "SGD")),
    Arm("SGD, random", "baseline", prune=CUTS, criterion="random", tuned_as=("baselines", "SGD")),
    Arm("saliency, entropy", "saliency", prune=CUTS, tuned_as=("best", "saliency")),
    Arm("saliency, importance", "saliency", prune=CUTS, criterion="importance", tuned_as=("best", "saliency")),
]


@dataclass(frozen=True)
class Question:
    """What is asked, and the cells that answer it."""

    name: str
    arms: list[Arm]
    tasks: tuple[str, ...]


QUESTIONS = [
    Question("baselines", BASELINES, SMALL),
    Question("equal-0.3", at_rate(0.3), SMALL),
    Question("best", BEST, SMALL),
    Question("sparse-0.9", sparse(0.9), SMALL),
    Question("resnet", RESIDUAL, (FASHION_5K_RESNET.name, CIFAR10.name)),
    Question("full", FULL, (FASHION.name,)),
    Question("pruned", PRUNED, (FASHION_5K.name,)),
    Question("sparse-0.5", sparse(0.5), (MNIST1D_MLP.name,)),
    *(Question(f"sparse-{s}", sparse(s), (MNIST1D_MLP.name, MNIST1D_CNN.name)) for s in (0.8, 0.95)),
    *(Question(f"equal-{rate}", at_rate(rate), (MNIST1D_MLP.name, DIGITS.name)) for rate in (0.1, 0.5)),
    Question("important", IMPORTANT, (MNIST1D_MLP.name, DIGITS.name)),
    Question("details", DETAILS, (MNIST1D_MLP.name, MNIST1D_CNN.name)),
]
