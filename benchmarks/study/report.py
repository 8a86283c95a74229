"""Fills the tables of docs/results.md and draws its pictures, from results.jsonl alone.

    python benchmarks/study/report.py            # writes them
    python benchmarks/study/report.py --check    # says whether the page has them as they are

The page keeps its words; what stands between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from plan import QUESTIONS, TASKS, TEST_SEEDS, Arm, Task
from run import key, load_results, settings_of, tuned, validated

from impact_optim.experiments.results import early_epoch, spread

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

RESULTS = load_results()
Runs = list[dict[str, Any]]
TITLES = {
    "mnist1d-mlp": "MNIST-1D, MLP",
    "mnist1d-cnn": "MNIST-1D, CNN",
    "digits-mlp": "digits, MLP",
    "fashion5k-cnn": "Fashion-MNIST 5k, CNN",
    "fashion5k-resnet18": "Fashion-MNIST 5k, ResNet-18",
    "fashion-resnet18": "Fashion-MNIST, ResNet-18",
}


def arms_of(question: str) -> list[Arm]:
    return next(q.arms for q in QUESTIONS if q.name == question)


def tasks_of(*questions: str) -> list[Task]:
    """The tasks on which all cells of the questions are finished."""
    tasks = [TASKS[name] for name in next(q.tasks for q in QUESTIONS if q.name == questions[-1])]
    return [task for task in tasks if all(runs_of(task, arm) for q in questions for arm in arms_of(q))]


def runs_of(task: Task, arm: Arm) -> Runs:
    """The test runs of a cell in the order of their seeds; empty if one is missing."""
    best = tuned(task, arm, RESULTS)
    if best is None:
        return []
    runs = [RESULTS.get(key(settings_of(task, arm, *best, "test", seed))) for seed in TEST_SEEDS]
    return [] if None in runs else runs  # type: ignore[return-value]


# ------------------------------------------------------------------------------- numbers

Measure = Callable[[dict[str, Any]], float]


def final(run: dict[str, Any]) -> float:
    return 100 * run["accuracy"][-1]


def early(run: dict[str, Any]) -> float:
    return 100 * run["accuracy"][early_epoch(len(run["accuracy"])) - 1]


def accuracy_gap(run: dict[str, Any]) -> float:
    return 100 * (run["train_accuracy"] - run["accuracy"][-1])


def loss_gap(run: dict[str, Any]) -> float:
    return math.nan if run["loss"] is None or run["train_loss"] is None else run["loss"] - run["train_loss"]


def seconds(run: dict[str, Any]) -> float:
    return run["seconds"]


def shown(runs: Runs, measure: Measure, digits: int = 1) -> str:
    return f"{spread(map(measure, runs)):.{digits}f}"


def difference(runs: Runs, reference: Runs, measure: Measure) -> tuple[float, float]:
    """Mean of the differences paired by seed, and half of its 95% interval."""
    pairs = [measure(a) - measure(b) for a, b in zip(runs, reference, strict=True)]
    return fmean(pairs), T_95[len(pairs)] * stdev(pairs) / math.sqrt(len(pairs))


def signed(mean: float, half: float) -> str:
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


# ------------------------------------------------------------------------------- tables


def compared(
    tasks: Iterable[Task],
    rows: Sequence[tuple[str, Arm]],
    reference: Callable[[Task], Arm],
    measure: Measure = final,
    versus: str = "",
) -> str:
    """Each arm's measure on each task, and the paired difference to a reference."""
    tasks = list(tasks)
    header = ["arm"]
    for task in tasks:
        header += [TITLES[task.name], versus]
    table = [header]
    for name, arm in rows:
        row = [name]
        for task in tasks:
            runs, base = runs_of(task, arm), reference(task)
            row += [
                shown(runs, measure),
                "" if arm == base else signed(*difference(runs, runs_of(task, base), measure)),
            ]
        table.append(row)
    return markdown(table)


def named(question: str) -> list[tuple[str, Arm]]:
    return [(arm.name, arm) for arm in arms_of(question)]


def equal(rate: str, measure: Measure) -> str:
    question = f"equal-{rate}"
    uniform = arms_of(question)[0]
    rows = [("SGD, nothing dropped", arms_of("baselines")[0]), *named(question)]
    return compared(tasks_of("baselines", question), rows, lambda task: uniform, measure, "− uniform")


def strongest(task: Task) -> Arm:
    """The baseline with the best test accuracy, which favours the baselines."""
    baselines = [*arms_of("baselines"), *arms_of("best")[:2]]
    return max(baselines, key=lambda arm: fmean(map(final, runs_of(task, arm))))


def best(measure: Measure) -> str:
    rows = [*named("baselines"), *named("best")]
    return compared(tasks_of("baselines", "best"), rows, strongest, measure, "− strongest baseline")


def best_against_sgd() -> str:
    sgd = arms_of("baselines")[0]
    rows = named("best")
    return compared(tasks_of("baselines", "best"), rows, lambda task: sgd, final, "− SGD")


def validation() -> str:
    """The best accuracy of each signal on the validation split, which defaults are chosen by."""
    tasks = tasks_of("baselines", "equal-0.3")
    table = [["arm", *(f"{TITLES[task.name]}: {what}" for task in tasks for what in ("rate 0.3", "rate tuned"))]]
    for name in ("saliency", "fisher", "magnitude"):
        row = [name]
        for task in tasks:
            for question in ("equal-0.3", "best"):
                arm = next(arm for arm in arms_of(question) if arm.name == name)
                row.append(f"{100 * max(validated(task, arm, RESULTS).values()):.1f}")  # type: ignore[union-attr]
        table.append(row)
    return markdown(table)


def chosen() -> str:
    """What the tuning has chosen."""
    tasks = tasks_of("baselines", "best")
    table = [["arm", *(TITLES[task.name] for task in tasks)]]
    for name, arm in [*named("baselines"), *named("best")]:
        row = [name]
        for task in tasks:
            lr, rate = tuned(task, arm, RESULTS)  # type: ignore[misc]
            row.append(f"lr {lr:g}" + (f", drop {rate:g}" if arm.base not in ("baseline", "adamw") else ""))
        table.append(row)
    return markdown(table)


def simple(question: str, reference: int = 0, versus: str | None = None) -> str:
    base = arms_of(question)[reference]
    return compared(tasks_of(question), named(question), lambda task: base, final, versus or f"− {base.name}")


def sparse_tasks() -> str:
    gradual = arms_of("sparse-0.9")[1]
    rows = [("dense SGD", arms_of("baselines")[0]), *named("sparse-0.9")]
    return compared(tasks_of("baselines", "sparse-0.9"), rows, lambda task: gradual, final, "− gradual magnitude")


def pruned_rows() -> list[tuple[str, Arm]]:
    uncut = [("SGD, uncut", arms_of("baselines")[0])]
    uncut += [("saliency, uncut", arm) for name, arm in named("best") if name == "saliency"]
    return [*uncut, *named("pruned")]


def pruned() -> str:
    l1 = arms_of("pruned")[2]
    return compared(tasks_of("baselines", "best", "pruned"), pruned_rows(), lambda task: l1, final, "− SGD, l1")


SPARSITIES = ("0.5", "0.8", "0.9", "0.95")
LEVEL_TASKS = ("mnist1d-mlp", "mnist1d-cnn")


def sparsities(task: Task) -> list[str]:
    return [s for s in SPARSITIES if task in tasks_of(f"sparse-{s}")]


def sparse_levels() -> str:
    tasks = [TASKS[name] for name in LEVEL_TASKS]
    columns = [(task, s) for task in tasks for s in sparsities(task)]
    table = [["arm", *(f"{TITLES[task.name]}: {100 * float(s):g}%" for task, s in columns)]]
    for i, arm in enumerate(arms_of("sparse-0.9")):
        table.append([arm.name, *(shown(runs_of(task, arms_of(f"sparse-{s}")[i]), final) for task, s in columns)])
    return markdown(table)


def gaps() -> str:
    tasks = tasks_of("baselines", "equal-0.3")
    table = [["arm", *(f"{TITLES[task.name]}: {what}" for task in tasks for what in ("accuracy, points", "loss"))]]
    for name, arm in [("SGD, nothing dropped", arms_of("baselines")[0]), *named("equal-0.3")]:
        row = [name]
        for task in tasks:
            runs = runs_of(task, arm)
            row += [shown(runs, accuracy_gap), shown(runs, loss_gap, 2)]
        table.append(row)
    return markdown(table)


def times() -> str:
    tasks = tasks_of("baselines", "equal-0.3")
    table = [["arm", *(TITLES[task.name] for task in tasks)]]
    for name, arm in [("SGD", arms_of("baselines")[0]), *named("equal-0.3")]:
        table.append([name, *(shown(runs_of(task, arm), seconds) for task in tasks)])
    return markdown(table)


TABLES: dict[str, Callable[[], str]] = {
    "equal-0.1": lambda: equal("0.1", final),
    "equal-0.1-early": lambda: equal("0.1", early),
    "equal-0.3": lambda: equal("0.3", final),
    "equal-0.3-early": lambda: equal("0.3", early),
    "equal-0.5": lambda: equal("0.5", final),
    "equal-0.5-early": lambda: equal("0.5", early),
    "best": lambda: best(final),
    "best-early": lambda: best(early),
    "best-sgd": best_against_sgd,
    "chosen": chosen,
    "validation": validation,
    "gaps": gaps,
    "important": lambda: simple("important"),
    "details": lambda: simple("details"),
    "sparse-tasks": sparse_tasks,
    "sparse-levels": sparse_levels,
    "pruned": pruned,
    "resnet": lambda: simple("resnet"),
    "full": lambda: simple("full"),
    "times": times,
}


# ------------------------------------------------------------------------------- pictures


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from impact_optim.plots import arm_colors, plot_convergence

    def forest(
        name: str,
        tasks: list[Task],
        rows: list[tuple[str, Arm]],
        reference: Arm | Callable[[Task], Arm],
        versus: str,
    ) -> None:
        """Paired differences with their intervals, a panel per task."""
        if not tasks:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.4 * len(tasks) + 1.8, 0.32 * len(rows) + 1.0), layout="constrained")
        axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        is_cut = False
        for ax, task in zip(axes, tasks, strict=True):
            base = runs_of(task, reference if isinstance(reference, Arm) else reference(task))
            for y, (_, arm) in enumerate(rows):
                mean, half = difference(runs_of(task, arm), base, final)
                is_cut |= mean < -20
                color = "#009E73" if mean > half else "#D55E00" if mean < -half else "0.4"
                ax.errorbar(max(mean, -20), y, xerr=half if mean > -20 else 0, fmt="o", color=color, capsize=2)
            ax.axvline(0, color="0.6", linewidth=0.8)
            ax.set_title(TITLES[task.name], fontsize=9)
            ax.set_yticks(range(len(rows)), [title for title, _ in rows])
            ax.set_ylim(len(rows) - 0.5, -0.5)
            low, high = ax.get_xlim()
            ax.set_xlim(max(low, -20.5), high)
            ax.grid(axis="x", color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
        label = f"test accuracy − {versus}: points, 95% interval" + (" (below −20: at −20)" if is_cut else "")
        figure.supxlabel(label, fontsize=9)
        figure.savefig(IMAGES / f"{name}.png", dpi=130)

    sgd = arms_of("baselines")[0]
    for rate in ("0.1", "0.3", "0.5"):
        question = f"equal-{rate}"
        rows = [("SGD", sgd), *named(question)[1:]]
        forest(f"study_{question}", tasks_of("baselines", question), rows, arms_of(question)[0], "uniform masks")
    rows = [*named("baselines"), *named("best")]
    forest("study_best", tasks_of("baselines", "best"), rows, strongest, "strongest baseline")
    l1 = arms_of("pruned")[2]
    rows = [row for row in pruned_rows() if row[1] != l1]
    forest("study_pruned", tasks_of("baselines", "best", "pruned"), rows, l1, "SGD cut by l1")
    for question, reference, name in (
        ("important", 0, "unimportant, 0.05"),
        ("details", 0, "as is"),
        ("sparse-0.9", 1, "gradual magnitude"),
        ("resnet", 0, "SGD"),
        ("full", 0, "SGD"),
    ):
        rows = [row for i, row in enumerate(named(question)) if i != reference]
        forest(f"study_{question}", tasks_of(question), rows, arms_of(question)[reference], name)
    task = TASKS["mnist1d-mlp"]
    if task in tasks_of("baselines", "equal-0.3"):
        rows = [("SGD", arms_of("baselines")[0]), *named("equal-0.3")]
        curves = {n: [[100 * a for a in run["accuracy"]] for run in runs_of(task, arm)] for n, arm in rows}
        figure = plot_convergence({"test accuracy (%)": curves}, arm_colors([n for n, _ in rows]))
        figure.savefig(IMAGES / "study_convergence.png", dpi=130)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    names = [arm.name for arm in arms_of("sparse-0.9")]
    colors = arm_colors(names)
    for ax, task in zip(figure.subplots(1, len(LEVEL_TASKS)), map(TASKS.__getitem__, LEVEL_TASKS), strict=True):
        found = sparsities(task)
        for i, name in enumerate(names):
            values = [[final(run) for run in runs_of(task, arms_of(f"sparse-{s}")[i])] for s in found]
            ax.errorbar(
                [100 * float(s) for s in found],
                [fmean(v) for v in values],
                yerr=[stdev(v) for v in values],
                label=name,
                color=colors[name],
                linestyle="-" if name.endswith("ramp") else "--",
                marker="o",
                markersize=4,
                capsize=2,
            )
        ax.set_xticks([100 * float(s) for s in found])
        ax.axhline(fmean(map(final, runs_of(task, sgd))), color="0.6", linestyle=":", label="dense SGD")
        ax.set_xlabel("zero weights (%)")
        ax.set_title(TITLES[task.name], fontsize=9)
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test accuracy (%)")
    figure.axes[0].legend(frameon=False, fontsize=8, handlelength=3.5)
    figure.savefig(IMAGES / "study_sparse.png", dpi=130)


def filled(page: str) -> str:
    """The page with its tables as the results have them."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not up to date")
    parser.add_argument("--print", nargs="+", choices=TABLES, help="show these tables instead")
    args = parser.parse_args()
    if args.print:
        for name in args.print:
            print(f"{name}\n\n{TABLES[name]()}\n")
        return 0
    page = PAGE.read_text()
    new = filled(page)
    if args.check:
        return int(new != page)
    PAGE.write_text(new)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
