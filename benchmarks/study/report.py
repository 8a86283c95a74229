"""Fills the tables of docs/results.md and draws its pictures, from results.jsonl alone.

    python benchmarks/study/report.py                        # writes them
    python benchmarks/study/report.py --print source best    # shows these tables instead

The page keeps its words; what stands between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from plan import PLAN
from runner import Arm, Run, Task, measured
from tables import difference, markdown, report, shown, signed

from impact_optim.experiments.results import early_epoch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
TITLES = {
    "mnist1d-mlp": "MNIST-1D, MLP",
    "mnist1d-cnn": "MNIST-1D, CNN",
    "digits-mlp": "digits, MLP",
    "fashion5k-cnn": "Fashion-MNIST 5k, CNN",
    "fashion-resnet18": "Fashion-MNIST 1k, ResNet-18",
    "fashion-vit": "Fashion-MNIST 10k, ViT",
    "shakespeare-gpt": "Shakespeare, GPT, bits per character",
}

# ------------------------------------------------------------------------------- numbers

Measure = Callable[[Task, Run], float]
Rows = Sequence[tuple[str, Arm]]
Reference = Callable[[Task], Arm]


def early(task: Task, run: Run) -> float:
    """The accuracy in % after the first tenth of the epochs."""
    return 100 * run["accuracy"][early_epoch(len(run["accuracy"])) - 1]


def rows_of(question: str) -> Rows:
    return [(arm.name, arm) for arm in PLAN.questions[question].arms]


def tasks_of(*questions: str) -> list[Task]:
    """The tasks on which all cells of the questions are finished."""
    tasks = [PLAN.tasks[name] for name in PLAN.questions[questions[-1]].tasks]
    return [task for task in tasks if all(PLAN.tests(task, arm) for q in questions for arm in PLAN.questions[q].arms)]


def values(task: Task, arm: Arm, measure: Measure) -> list[float]:
    return [measure(task, run) for run in PLAN.tests(task, arm)]


def first_of(question: str) -> Reference:
    return lambda task: PLAN.questions[question].arms[0]


def strongest(task: Task) -> Arm:
    """The baseline with the best test accuracy, which favours the baselines."""
    baselines = [*PLAN.questions["baselines"].arms, *PLAN.questions["best"].arms[:2]]
    return max(baselines, key=lambda arm: fmean(values(task, arm, measured)))


# ------------------------------------------------------------------------------- tables


def compared(tasks: list[Task], rows: Rows, reference: Reference, versus: str, measure: Measure = measured) -> str:
    """Each arm's measure on each task, and the paired difference to a reference.

    The intervals of a table hold together: each is of level 1 - 0.05 / (number of differences).
    """
    pairs = [(task, arm) for task in tasks for _, arm in rows if arm != reference(task)]
    table = [["arm", *(text for task in tasks for text in (TITLES[task.name], f"− {versus}"))]]
    for name, arm in rows:
        row = [name]
        for task in tasks:
            found, base = values(task, arm, measure), values(task, reference(task), measure)
            digits = 1 if task.measure == "accuracy" else 3
            alike = arm == reference(task)
            row += [
                shown(found, digits),
                "" if alike else signed(*difference(found, base, len(pairs)), digits),
            ]
        table.append(row)
    return markdown(table)


def simple(question: str, measure: Measure = measured) -> str:
    first = PLAN.questions[question].arms[0].name
    return compared(tasks_of(question), rows_of(question), first_of(question), first, measure)


def equal(rate: str, measure: Measure = measured) -> str:
    question = f"equal-{rate}"
    rows = [("SGD, nothing dropped", PLAN.arm("baselines", "SGD")), *rows_of(question)]
    return compared(tasks_of(question), rows, first_of(question), "uniform", measure)


def best(measure: Measure = measured) -> str:
    rows = [*rows_of("baselines"), *rows_of("best")]
    return compared(tasks_of("baselines", "best"), rows, strongest, "strongest baseline", measure)


def gaps() -> str:
    """Training minus test accuracy in points, and test minus training loss."""
    tasks = tasks_of("equal-0.3")
    table = [["arm", *(f"{TITLES[task.name]}: {what}" for task in tasks for what in ("points", "loss"))]]

    def points(task: Task, run: Run) -> float:
        return 100 * (run["train_accuracy"] - run["accuracy"][-1])

    def loss(task: Task, run: Run) -> float:
        pair = run["loss"][-1], run["train_loss"]
        return math.nan if None in pair else pair[0] - pair[1]

    for name, arm in [("SGD, nothing dropped", PLAN.arm("baselines", "SGD")), *rows_of("equal-0.3")]:
        cells = [(shown(values(t, arm, points)), shown(values(t, arm, loss), 2)) for t in tasks]
        table.append([name, *(text for cell in cells for text in cell)])
    return markdown(table)


def chosen(*questions: str) -> str:
    """What the tuning has chosen."""
    tasks = tasks_of(*questions)
    table = [["arm", *(TITLES[task.name] for task in tasks)]]
    for name, arm in (row for question in questions for row in rows_of(question)):
        row = [name]
        for task in tasks:
            point = PLAN.tuned(task, arm)
            assert point is not None  # the tasks are those that are finished
            drop = {"drop": point["drop_rate"]} if arm.drop_rates is None else {}
            row.append(", ".join(f"{k} {v:g}" for k, v in {"lr": point["lr"], **drop, **point["options"]}.items()))
        table.append(row)
    return markdown(table)


def settings() -> str:
    """What λ and η reach on the validation split."""
    tasks = [PLAN.tasks[name] for name in PLAN.questions["transformers-settings"].tasks]
    tasks = [t for t in tasks if all(PLAN.validated(t, arm) for _, arm in rows_of("transformers-settings"))]
    table = [["setting", *(TITLES[task.name] for task in tasks)]]
    for name, arm in rows_of("transformers-settings"):
        row = [name]
        for task in tasks:
            best = max if task.measure == "accuracy" else min
            row.append(f"{best(score for score, _ in PLAN.validated(task, arm) or []):.2f}")
        table.append(row)
    return markdown(table)


TABLES: dict[str, Callable[[], str]] = {
    "source": lambda: simple("source"),
    "source-tensor-early": lambda: simple("source-tensor", early),
    "source-tensor": lambda: simple("source-tensor"),
    "source-fashion": lambda: simple("source-fashion"),
    "source-rescale": lambda: simple("source-rescale"),
    "source-momentum": lambda: simple("source-momentum"),
    "source-resnet": lambda: simple("source-resnet"),
    "source-resnet-early": lambda: simple("source-resnet", early),
    "equal-0.3": lambda: equal("0.3"),
    "equal-0.3-early": lambda: equal("0.3", early),
    "equal-0.1": lambda: equal("0.1"),
    "equal-0.5": lambda: equal("0.5"),
    "gaps": gaps,
    "best": best,
    "chosen": lambda: chosen("baselines", "best"),
    "transformers": lambda: simple("transformers"),
    "transformers-sparse": lambda: simple("transformers-sparse"),
    "transformers-settings": settings,
    "transformers-chosen": lambda: chosen("transformers"),
}

# ------------------------------------------------------------------------------- pictures


def forest(name: str, tasks: list[Task], rows: Rows, reference: Reference, versus: str) -> None:
    """Paired differences with their intervals, a panel per task."""
    from matplotlib.figure import Figure

    if not tasks:
        return
    figure = Figure(figsize=(max(6.8, 2.4 * len(tasks) + 1.8), 0.32 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    pairs = [(task, arm) for task in tasks for _, arm in rows if arm != reference(task)]
    is_cut = False
    for ax, task in zip(axes, tasks, strict=True):
        base = values(task, reference(task), measured)
        for y, (_, arm) in enumerate(rows):
            mean, half = difference(values(task, arm, measured), base, len(pairs))
            is_cut |= mean < -20
            color = "#009E73" if mean > half else "#D55E00" if mean < -half else "0.4"
            ax.errorbar(max(mean, -20), y, xerr=half if mean > -20 else 0, fmt="o", color=color, capsize=2)
        ax.axvline(0, color="0.6", linewidth=0.8)
        ax.set_title(TITLES[task.name], fontsize=9)
        ax.set_yticks(range(len(rows)), [title for title, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        low, high = ax.get_xlim()
        ax.set_xlim(max(low, -20.5), min(high, 60))
        ax.grid(axis="x", color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    label = f"test accuracy − {versus}: points, 95% intervals" + (" (below −20: at −20)" if is_cut else "")
    figure.supxlabel(label, fontsize=9)
    figure.savefig(IMAGES / f"study_{name}.png", dpi=130)


def histograms(name: str, task: Task, rows: Rows) -> None:
    """The importances at the end of the training, mean over the seeds."""
    from matplotlib.figure import Figure

    from impact_optim.plots import arm_colors

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    ax = figure.subplots()
    colors = arm_colors([title for title, _ in rows])
    for title, arm in rows:
        runs = [run["importances"] for run in PLAN.tests(task, arm)]
        share = [100 * sum(counts) / sum(map(sum, runs)) for counts in zip(*runs, strict=True)]
        ax.stairs(share, [10 ** (-4 + i / 8) for i in range(len(share) + 1)], label=title, color=colors[title])
    ax.set(xscale="log", xlabel="importance (mean 1)", ylabel="weights (%)", yscale="log")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / f"study_{name}.png", dpi=130)


def convergence(name: str, task: Task, rows: Rows) -> None:
    """Accuracy over the epochs, straight between those that were evaluated."""
    import numpy as np

    from impact_optim.plots import arm_colors, plot_convergence

    def curve(run: Run) -> Any:
        accuracy = np.array(run["accuracy"], dtype=float)
        (known,) = np.nonzero(np.isfinite(accuracy))
        return 100 * np.interp(np.arange(len(accuracy)), known, accuracy[known], left=math.nan)

    curves = {title: [curve(run) for run in PLAN.tests(task, arm)] for title, arm in rows}
    figure = plot_convergence({"test accuracy (%)": curves}, arm_colors([title for title, _ in rows]))
    figure.savefig(IMAGES / f"study_{name}.png", dpi=130)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    forest("source", tasks_of("source"), rows_of("source")[1:], first_of("source"), "uniform masks")
    for rate in ("0.1", "0.3", "0.5"):
        question = f"equal-{rate}"
        rows = [("SGD", PLAN.arm("baselines", "SGD")), *rows_of(question)[1:]]
        forest(question, tasks_of(question), rows, first_of(question), "uniform masks")
    rows = [*rows_of("baselines"), *rows_of("best")]
    forest("best", tasks_of("baselines", "best"), rows, strongest, "strongest baseline")
    for task in tasks_of("source-resnet"):
        rows = rows_of("source-resnet")
        convergence("resnet_convergence", task, rows)
        histograms("resnet_histogram", task, [row for row in rows if "λ" in row[0] or row[0] == "saliency"])


if __name__ == "__main__":
    report(__doc__, PAGE, TABLES, draw)
