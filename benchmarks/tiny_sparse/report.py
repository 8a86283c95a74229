"""Fills the tables of docs/tiny_sparse.md and draws its picture, from results.jsonl alone.

    python benchmarks/tiny_sparse/report.py

The page keeps its words; what stands between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from plan import CNN, GPT, LENET, METHODS, MLP, PLAN, SPARSITIES, TASKS, TUNED_AT, dense, methods
from runner import Arm, Task, measured
from tables import difference, markdown, report, shown, signed
from torch import Tensor, nn

from impact_optim.experiments.models import build_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tiny_sparse.md"
TITLES = {
    MLP.name: "MNIST-1D, MLP",
    CNN.name: "MNIST-1D, CNN",
    LENET.name: "Fashion-MNIST, LeNet-300-100",
    GPT.name: "Shakespeare, GPT",
}
INPUTS = {
    MLP.name: torch.zeros(1, 1, 40),
    CNN.name: torch.zeros(1, 1, 40),
    LENET.name: torch.zeros(1, 1, 28, 28),
    GPT.name: torch.zeros(1, 64, dtype=torch.long),
}
MISSING = "–"
CLASSES = 10  # or letters: of no matter to how often a weight is used


def values(task: Task, arm: Arm) -> list[float]:
    """The test accuracies in %, or bits, in the order of the seeds; empty before all are there."""
    return [measured(task, run) for run in PLAN.tests(task, arm)]


def digits(task: Task) -> int:
    return 1 if task.measure == "accuracy" else 3


def percent(sparsity: float) -> str:
    return f"{100 * sparsity:g}%"


def by_sparsity(task: Task, cell: Callable[[float, int], str], of: list[int]) -> list[list[str]]:
    """A row for each of some methods, a column for each sparsity."""
    arms, levels = methods(task, TUNED_AT), SPARSITIES[task.name]
    rows = [["method", *(f"{percent(s)} zeros" for s in levels)]]
    return rows + [[arms[i].name, *(cell(s, i) for s in levels)] for i in of]


def accuracy(task: Task) -> str:
    def cell(sparsity: float, i: int) -> str:
        found = values(task, methods(task, sparsity)[i])
        return shown(found, digits(task)) if found else MISSING

    found = values(task, dense(task))
    table = by_sparsity(task, cell, list(range(len(methods(task, TUNED_AT)))))
    table.insert(1, ["dense", *[shown(found, digits(task)) if found else MISSING] * len(SPARSITIES[task.name])])
    return markdown(table)


def differences(task: Task) -> str:
    """Ours less each peer; all intervals of the table together hold at 95%."""
    peers = list(range(len(methods(task, TUNED_AT)) - 1))

    def cell(sparsity: float, i: int) -> str:
        ours, peer = (values(task, methods(task, sparsity)[j]) for j in (-1, i))
        if not (ours and peer):
            return MISSING
        return signed(*difference(ours, peer, len(peers) * len(SPARSITIES[task.name])), digits(task))

    return markdown(by_sparsity(task, cell, peers))


def places(task: Task) -> dict[str, int]:
    """How often a forward pass of one input multiplies by each weight, by the name of its tensor."""
    example = INPUTS[task.name]
    model, found = build_model(task.model, example.shape[1:], CLASSES), {}

    def note(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        found[f"{name}.weight"] = output.numel() // module.weight.shape[0]  # type: ignore[operator, union-attr]

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.register_forward_hook(partial(note, name))
        elif isinstance(module, nn.Embedding):  # looks rows up
            found[f"{name}.weight"] = 0
    model(example)
    return found


def costs(task: Task) -> str:
    """What is left of the network, and what a run takes, at 90% zeros."""
    used = places(task)
    table = [["method", "zeros", "multiply-adds, dense", "of nonzero weights", "CPU seconds of a run"]]
    for arm in [dense(task), *methods(task, TUNED_AT)]:
        if runs := PLAN.tests(task, arm):
            whole = sum(used[name] * numel for name, (numel, _) in runs[0]["layers"].items())
            left = fmean(sum(used[name] * kept for name, (_, kept) in run["layers"].items()) for run in runs)
            zeros = 100 * fmean(run["sparsity"] for run in runs)
            seconds = shown([run["cpu_seconds"] for run in runs])
            table.append([arm.name, f"{zeros:.1f}%", f"{whole:,}", f"{left:,.0f}", seconds])
    return markdown(table)


def chosen() -> str:
    """What the tuning has chosen, and what that reached on the validation split."""
    table = [["method", *(TITLES[task.name] for task in TASKS)]]
    for name in ["dense", *METHODS]:
        row = [name]
        for task in TASKS:
            arms = {arm.name: arm for arm in [dense(task), *methods(task, TUNED_AT)]}
            scores = PLAN.validated(task, arms[name]) if name in arms else None
            if scores is None:
                row.append(MISSING)
                continue
            score, point = (max if task.measure == "accuracy" else min)(scores, key=lambda each: each[0])
            options = "".join(f", {option} {value:g}" for option, value in point["options"].items())
            row.append(f"lr {point['lr']:g}{options}: {score:.{digits(task)}f}")
        table.append(row)
    return markdown(table)


TRIED = {
    "gradual": "gradual magnitude",
    "default": "before: one simplex, λ = 0.3",
    "floor0": "no floor on the keep probabilities",
    "ramp05": "the ramp over half of the epochs",
    "expected": 'the cut by="expected"',
    "kl1": "λ = 1",
    "half-kl.5": "signal over the root of its tensor's mean, λ = 0.5",
    "tensor": "a simplex per tensor, the same drop rate for all",
    "tensor-kl1": "the same, λ = 1",
    "halferk": "a simplex per tensor, half-way to ERK",
    "erk": "a simplex per tensor, ERK (MLP: also ER)",
    "erk-kl1": "the same, λ = 1",
    "er": "a simplex per tensor, ER",
    "er-kl.5": "the same, λ = 0.5",
    "er-kl1": "the same, λ = 1",
    "final": "as it is now: λ = 0.5, the floor a tenth of what is left at most",
}
"""What was tried to make ours better, by its name in tried.jsonl."""
TRIED_ON_GPT = {
    "compete": "one simplex, λ = 0.3, each layer keeps a tenth of the common share at least",
    "compete-lr.02": "the same, learning rate 0.02",
    "compete-floor.3": "three tenths at least",
    "compete-kl.5": "λ = 0.5",
}


def tried(names: dict[str, str], *tasks: Task) -> str:
    """Validation accuracies, or bits, mean over the seeds."""
    lines = [json.loads(line) for line in Path(__file__).with_name("tried.jsonl").read_text().splitlines()]
    table = [["tried", *(TITLES[task.name] for task in tasks)]]
    for name, title in names.items():
        row = [title]
        for task in tasks:
            of = f"validation_{task.measure}"
            found = [each[of] for each in lines if (each["tried"], each["task"]) == (name, task.name)]
            row.append(f"{fmean(found):.{digits(task)}f} ({len(found)})" if found else "")
        table.append(row)
    return markdown(table)


TABLES: dict[str, Callable[[], str]] = {
    **{f"accuracy-{task.name}": partial(accuracy, task) for task in TASKS},
    **{f"differences-{task.name}": partial(differences, task) for task in TASKS},
    **{f"costs-{task.name}": partial(costs, task) for task in TASKS},
    "chosen": chosen,
    "tried": partial(tried, TRIED, MLP, CNN),
    "tried-gpt": partial(tried, TRIED_ON_GPT, GPT),
}


FIXED_COLORS = {
    "gradual magnitude, our densities": "0.4",
    "our ramp, by magnitude": "0.7",
    "ours, densities by size": "0.55",
    "gradual magnitude, of each layer": "saddlebrown",
}
"""Of variants, which are dotted: the palette is for the methods."""


def draw() -> None:
    """Accuracy or bits against sparsity, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from impact_optim.plots import arm_colors

    tasks = [task for task in TASKS if values(task, dense(task))]
    drawn = {arm.name for task in tasks for arm in methods(task, TUNED_AT)}
    names = [name for name in METHODS if name in drawn]
    colors = {**arm_colors([name for name in names if name not in FIXED_COLORS]), **FIXED_COLORS}
    figure = Figure(figsize=(3.4 * len(tasks) + 1.8, 3.4), layout="constrained")
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        levels = SPARSITIES[task.name]
        for i, arm in enumerate(methods(task, TUNED_AT)):
            found = [(s, values(task, methods(task, s)[i])) for s in levels]
            found = [(k, v) for k, (_, v) in enumerate(found) if v]
            ax.errorbar(
                [k for k, _ in found],
                [fmean(v) for _, v in found],
                yerr=[stdev(v) for _, v in found],
                label=arm.name,
                color=colors[arm.name],
                linestyle="-" if arm.name == "ours" else ":" if arm.name in FIXED_COLORS else "--",
                linewidth=2.5 if arm.name == "ours" else 1.2,
                marker="o",
                markersize=4,
                capsize=2,
            )
        ax.axhline(fmean(values(task, dense(task))), color="0.6", linestyle=":", label="dense")
        ax.set_xticks(range(len(levels)), [percent(s) for s in levels])
        ax.set_xlabel("zero weights")
        ax.set_title(TITLES[task.name], fontsize=9)
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylabel("test accuracy (%)" if task.measure == "accuracy" else "bits per character")
    shown = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / "tiny_sparse.png", dpi=130)


if __name__ == "__main__":
    report(__doc__, PAGE, TABLES, draw)
