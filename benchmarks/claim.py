"""The study's claim on small data: importance-driven masks against uniform ones that drop as many weights.

    python benchmarks/claim.py --data mnist1d

Every arm gets its own learning rate, the best of a grid on a validation split (two seeds); then five seeds train on the
whole training set and are tested once. Prints a Markdown table with the paired difference to uniform masks. Resumes
where it was stopped, since `python -m impact_optim` does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from impact_optim.experiments.results import Line, early_epoch, runs_of

ARMS = ["baseline", "dropconnect", "impacts", "impacts+regularization", "saliency", "fisher", "magnitude"]
LEARNING_RATES = [0.05, 0.1, 0.2, 0.4]


def run(out: Path, seeds: int, evaluate: str, options: list[str]) -> dict[str, list[list[Line]]]:
    """The lines of every arm, seed and epoch."""
    command = [sys.executable, "-m", "impact_optim", "--seeds", str(seeds), "--evaluate", evaluate, "--out", str(out)]
    subprocess.run([*command, "--arms", *ARMS, *options], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    epochs = max(line["epoch"] for line in lines)
    return {arm: list(runs_of(lines, arm, epochs).values()) for arm in ARMS}


def accuracies(runs: list[list[Line]]) -> list[float]:
    """Accuracy in % at the end, by seed."""
    return [100 * lines[-1]["accuracy"] for lines in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist1d")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--drop-rates", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/claim"))
    args = parser.parse_args()
    common = ["--data", args.data, "--model", args.model, "--epochs", str(args.epochs), "--batch", "100"]
    common += ["--threads", "1", "--no-progress"]

    print("| drop rate | arm | lr | test accuracy | after 10% | train − test | minus dropconnect, paired |")
    print("|---|---|---|---|---|---|---|")
    for drop_rate in args.drop_rates:
        folder = args.out / f"{args.data}-{args.model}-{drop_rate}"
        options = [*common, "--drop-rate", str(drop_rate)]
        tuning = {lr: run(folder / f"lr{lr}", 2, "validation", [*options, "--lr", str(lr)]) for lr in LEARNING_RATES}
        best = {arm: max(LEARNING_RATES, key=lambda lr: mean(accuracies(tuning[lr][arm]))) for arm in ARMS}
        tuned = [word for arm in ARMS for word in ("--set", f"{arm}.lr={best[arm]}")]
        results = run(folder / "test", args.seeds, "test", [*options, *tuned])
        uniform = accuracies(results["dropconnect"])
        for arm in ARMS:
            accuracy = accuracies(results[arm])
            start = [100 * lines[early_epoch(args.epochs) - 1]["accuracy"] for lines in results[arm]]
            gap = [100 * (lines[-1]["train_accuracy"] - lines[-1]["accuracy"]) for lines in results[arm]]
            difference = [a - u for a, u in zip(accuracy, uniform, strict=True)]
            paired = "" if arm == "dropconnect" else f"{mean(difference):+.1f} ± {stdev(difference):.1f}"
            cells = [
                f"{drop_rate if arm != 'baseline' else 0}",
                arm,
                f"{best[arm]}",
                f"{mean(accuracy):.1f} ± {stdev(accuracy):.1f}",
                f"{mean(start):.1f} ± {stdev(start):.1f}",
                f"{mean(gap):.1f}",
                paired,
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
