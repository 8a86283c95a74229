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

ARMS = ["baseline", "dropconnect", "impacts", "impacts+regularization", "saliency", "fisher", "magnitude"]
LEARNING_RATES = [0.05, 0.1, 0.2, 0.4]


def run(out: Path, seeds: int, evaluate: str, options: list[str]) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Lines of every arm and seed, an epoch each."""
    command = [sys.executable, "-m", "impact_optim", "--seeds", str(seeds), "--evaluate", evaluate, "--out", str(out)]
    subprocess.run([*command, "--arms", *ARMS, *options], check=True, stdout=subprocess.DEVNULL)
    lines: dict[str, dict[int, list[dict[str, float]]]] = {arm: {} for arm in ARMS}
    for text in (out / "results.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines[line["arm"]].setdefault(line["seed"], []).append(line)
    return lines


def last(seeds: dict[int, list[dict[str, float]]]) -> list[float]:
    """Accuracy in % at the end, by seed."""
    return [100 * max(lines, key=lambda line: line["epoch"])["accuracy"] for _, lines in sorted(seeds.items())]


def early(seeds: dict[int, list[dict[str, float]]]) -> list[float]:
    """Accuracy in % after a tenth of the epochs, by seed."""
    return [
        100 * next(line["accuracy"] for line in lines if line["epoch"] == max(1, len(lines) // 10))
        for _, lines in sorted(seeds.items())
    ]


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
        best = {arm: max(LEARNING_RATES, key=lambda lr: mean(last(tuning[lr][arm]))) for arm in ARMS}
        tuned = [word for arm in ARMS for word in ("--set", f"{arm}.lr={best[arm]}")]
        results = run(folder / "test", args.seeds, "test", [*options, *tuned])
        uniform = last(results["dropconnect"])
        for arm in ARMS:
            accuracy, start = last(results[arm]), early(results[arm])
            gap = [
                100 * lines[-1]["train_accuracy"] - a
                for (_, lines), a in zip(sorted(results[arm].items()), accuracy, strict=True)
            ]
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
