"""Do predictions averaged over masks know better how sure they are than plain softmax, and than a deep ensemble?

    python benchmarks/uncertainty.py            # trains what is not in the results yet, in this process, on one thread
    python benchmarks/uncertainty.py --report   # the tables and the picture of docs/uncertainty.md

10,000 images of Fashion-MNIST and the study's CNN. Every arm has the learning rate, and the drop rate or temperature,
with the least negative log-likelihood on a validation split, of predictions made *the way the arm makes them*. Then
five fresh seeds train and are tested once: on Fashion-MNIST's test set, and on how well they tell it from digits, which
take no part in tuning.

A line of the results is a run: one network, or with SGD three, the first of which is the one without an ensemble. Runs
of a seed begin with the same weights and see the same batches. Times are processor times of one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

sys.path.insert(0, str(Path(__file__).parent))
from runner import key, load
from tables import difference, filled, markdown, shown, signed

from impact_optim import ImpactSGD
from impact_optim.experiments.data import Data, batch_count, batches, load_data
from impact_optim.experiments.models import build_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "uncertainty.jsonl"
PAGE = ROOT / "docs" / "uncertainty.md"
PICTURE = ROOT / "docs" / "images" / "uncertainty.png"

IMAGES, EPOCHS, BATCH, MOMENTUM = 10_000, 10, 100, 0.9
LEARNING_RATES, DROP_RATES = (0.02, 0.05, 0.1), (0.1, 0.2, 0.3)
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2.0)
TUNING_SEED, TEST_SEEDS = 0, (100, 101, 102, 103, 104)
MEMBERS, MASKS, BINS = 3, 20, 15

# How a run trains, and how it predicts. A tempered softmax predicts by any of the temperatures.
ARMS = {
    "softmax": ("sgd", "softmax"),
    "softmax, tempered": ("sgd", "T="),
    "ensemble of 3": ("sgd", "ensemble"),
    "uniform, dense": ("uniform", "dense"),
    "uniform, sampled": ("uniform", "sampled"),
    "saliency, dense": ("saliency", "dense"),
    "saliency, sampled": ("saliency", "sampled"),
}
Settings = dict[str, Any]

# ------------------------------------------------------------------------------- measures


def measures(p: Tensor, y: Tensor) -> dict[str, Any]:
    """What predictions are worth.

    Args:
        p: probabilities of the examples, and after them of those that belong to no class, if there are any.
        y: labels of the examples.
    """
    from sklearn.metrics import roc_auc_score

    if not p.isfinite().all():
        return {"nll": None}
    inside = p[: len(y)]
    confidence, predicted = inside.max(1)
    bins = calibration_bins(confidence, predicted == y)
    found: dict[str, Any] = {
        "accuracy": (predicted == y).double().mean().item(),
        "nll": F.nll_loss(inside.log(), y).item(),
        "ece": calibration_error(bins),
    }
    if len(p) > len(y):
        is_outside = torch.arange(len(p)) >= len(y)
        found["auroc_confidence"] = roc_auc_score(is_outside, -p.max(1).values)
        found["auroc_entropy"] = roc_auc_score(is_outside, -torch.xlogy(p, p).sum(1))
    return {**{name: round(float(value), 6) for name, value in found.items()}, "bins": bins}


def calibration_bins(confidence: Tensor, correct: Tensor) -> list[list[float]]:
    """Examples, mean confidence and accuracy in bins (i / 15, (i + 1) / 15]; empty ones are left out."""
    index = (confidence * BINS).ceil().long() - 1
    bins = ((confidence[index == i], correct[index == i].double()) for i in range(BINS))
    return [[len(c), round(c.mean().item(), 6), round(k.mean().item(), 6)] for c, k in bins if len(c)]


def calibration_error(bins: Sequence[Sequence[float]]) -> float:
    """The expected calibration error: the mean distance of confidence and accuracy, weighted by examples."""
    return sum(n * abs(confidence - accuracy) for n, confidence, accuracy in bins) / sum(n for n, *_ in bins)


# ------------------------------------------------------------------------------- one run


@lru_cache(maxsize=2)
def data_of(heldout: str) -> Data:
    data = load_data("fashion-mnist", Path("data"))
    if heldout == "validation":
        data = data.validation_split(3000 / len(data.y))
    return data.subset(IMAGES)


@lru_cache(maxsize=1)
def digits() -> Tensor:
    """scikit-learn's digits at the size of the garments, standardised as these are."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    black, white = data_of("test").x.aminmax()  # what the pixels 0 and 255 have become
    return F.interpolate(x, size=28, mode="bilinear", align_corners=False) * (white - black) + black


def train(settings: Settings, seed: int, data: Data) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = build_model("cnn", data.x.shape[1:], data.classes).to(memory_format=torch.channels_last)
    common = {"lr": settings["lr"], "momentum": MOMENTUM}
    if settings["arm"] == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), **common)
    else:
        masks = {"importance": settings["arm"], "drop_rate": settings["drop_rate"]}
        optimizer = ImpactSGD(model, **common, **masks, seed=seed)
    scheduler = CosineAnnealingLR(optimizer, EPOCHS * batch_count(data, BATCH))
    for epoch in range(EPOCHS):
        for x, y in batches(data, BATCH, seed, epoch):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.eval(), optimizer


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model(part.to(memory_format=torch.channels_last)) for part in x.split(1000)]).double()


def run(settings: Settings) -> dict[str, Any]:
    """Trains, and measures all ways of predicting."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a network that has died computes with nothing else, a hundred times slower
    data, seed = data_of(settings["heldout"]), settings["seed"]
    x = data.heldout_x if settings["heldout"] == "validation" else torch.cat([data.heldout_x, digits()])
    started = time.process_time()
    # The first seed is that of all arms; the others are nobody else's.
    members = range(seed, seed + 1000 * MEMBERS, 1000) if settings["arm"] == "sgd" else [seed]
    trained = [train(settings, member, data) for member in members]
    seconds = (time.process_time() - started) / len(trained)
    model, optimizer = trained[0]
    predictions = {}
    if isinstance(optimizer, ImpactSGD):
        predictions["dense"] = logits(model, x).softmax(1)
        with optimizer.sampled():
            predictions["sampled"] = torch.stack([logits(model, x).softmax(1) for _ in range(MASKS)]).mean(0)
    else:
        outputs = torch.stack([logits(each, x) for each, _ in trained])
        predictions["softmax"] = outputs[0].softmax(1)
        predictions["ensemble"] = outputs.softmax(2).mean(0)
        predictions |= {f"T={t:g}": (outputs[0] / t).softmax(1) for t in TEMPERATURES}
    return {
        "settings": settings,
        "measures": {way: measures(p, data.heldout_y) for way, p in predictions.items()},
        "seconds": round(seconds, 2),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


# ------------------------------------------------------------------------------- all of them

Results = dict[str, dict[str, Any]]


def settings_of(arm: str, lr: float, drop_rate: float, heldout: str, seed: int) -> Settings:
    fixed = {"images": IMAGES, "epochs": EPOCHS, "batch": BATCH}
    return {"arm": arm, "lr": lr, "drop_rate": drop_rate, "heldout": heldout, "seed": seed, **fixed}


def tuning_grid(arm: str) -> list[Settings]:
    rates = (0.0,) if arm == "sgd" else DROP_RATES
    return [settings_of(arm, lr, rate, "validation", TUNING_SEED) for lr in LEARNING_RATES for rate in rates]


def tuned(name: str, results: Results) -> tuple[float, float, str] | None:
    """Learning rate, drop rate and way of predicting of the least validation loss; ``None`` before all were tried."""
    arm, way = ARMS[name]
    scores = {}
    for settings in tuning_grid(arm):
        if (line := results.get(key(settings))) is None:
            return None
        for each, found in line["measures"].items():
            if each == way or way == "T=" == each[:2]:
                scores[settings["lr"], settings["drop_rate"], each] = found["nll"] or math.inf  # None: it diverged
    return min(scores, key=lambda at: scores[at])


def wanted(results: Results) -> Iterator[Settings]:
    for arm in dict.fromkeys(arm for arm, _ in ARMS.values()):
        yield from tuning_grid(arm)
    for seed in TEST_SEEDS:
        for name, (arm, _) in ARMS.items():
            if (best := tuned(name, results)) is not None:
                yield settings_of(arm, *best[:2], "test", seed)


def train_all() -> None:
    results = load(RESULTS)
    RESULTS.parent.mkdir(exist_ok=True)
    while todo := list({key(each): each for each in wanted(results) if key(each) not in results}.values()):
        line = run(todo[0])
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        results[key(line["settings"])] = line
        nll = {way: found["nll"] for way, found in line["measures"].items() if way[:2] != "T="}
        of = " ".join(str(line["settings"][name]) for name in ("arm", "lr", "drop_rate", "heldout", "seed"))
        print(f"{len(todo) - 1} to go; {of}: {nll}", flush=True)


# ------------------------------------------------------------------------------- the page

MEASURES = {  # title, factor, digits
    "accuracy": ("accuracy, %", 100, 1),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE, %", 100, 1),
    "auroc_confidence": ("AUROC by confidence, %", 100, 1),
    "auroc_entropy": ("by entropy, %", 100, 1),
}
COMPARED = ("accuracy", "nll", "ece", "auroc_confidence")


@lru_cache(maxsize=1)
def finished() -> Results:
    return load(RESULTS)


def lines_of(name: str) -> list[tuple[dict[str, Any], str]]:
    """The test runs of an arm in the order of their seeds, and the way it predicts."""
    *best, way = tuned(name, finished())  # type: ignore[misc]
    found = [finished()[key(settings_of(ARMS[name][0], *best, "test", seed))] for seed in TEST_SEEDS]
    return [(line, way) for line in found]


def values(name: str, measure: str) -> list[float]:
    return [MEASURES[measure][1] * line["measures"][way][measure] for line, way in lines_of(name)]


def difference_of(name: str, reference: str, measure: str, comparisons: int) -> tuple[float, float]:
    return difference(values(name, measure), values(reference, measure), comparisons)


def means() -> str:
    table = [["arm", *(title for title, *_ in MEASURES.values())]]
    for name in ARMS:
        table.append([name, *(shown(values(name, measure), MEASURES[measure][2]) for measure in MEASURES)])
    return markdown(table)


def compared(pairs: Sequence[tuple[str, str]], title: Callable[[str, str], str]) -> str:
    """Paired differences with Bonferroni's correction for all cells of the table."""
    table = [["", *(MEASURES[measure][0] for measure in COMPARED)]]
    for name, reference in pairs:
        row = [title(name, reference)]
        for measure in COMPARED:
            found = difference_of(name, reference, measure, len(pairs) * len(COMPARED))
            row.append(signed(*found, MEASURES[measure][2] + 1))
        table.append(row)
    return markdown(table)


def against(reference: str, *without: str) -> str:
    pairs = [(name, reference) for name in ARMS if name not in (reference, *without)]
    return compared(pairs, lambda name, reference: name)


def sampling() -> str:
    pairs = [
        ("uniform, sampled", "uniform, dense"),
        ("saliency, sampled", "saliency, dense"),
        ("saliency, sampled", "uniform, sampled"),
    ]
    return compared(pairs, lambda name, reference: f"{name} − {reference}")


def chosen() -> str:
    table = [["arm", "learning rate", "drop rate", "temperature", "validation NLL"]]
    for name, (arm, _) in ARMS.items():
        lr, rate, way = tuned(name, finished())  # type: ignore[misc]
        nll = finished()[key(settings_of(arm, lr, rate, "validation", TUNING_SEED))]["measures"][way]["nll"]
        temperature = way[2:] if way.startswith("T=") else ""
        table.append([name, f"{lr:g}", f"{rate:g}" if rate else "", temperature, f"{nll:.3f}"])
    return markdown(table)


def validation() -> str:
    """The validation loss over the grid of every arm with masks."""
    arms = [name for name, (arm, _) in ARMS.items() if arm != "sgd"]
    table = [["learning rate, drop rate", *arms]]
    for lr in LEARNING_RATES:
        for rate in DROP_RATES:
            row = [f"{lr:g}, {rate:g}"]
            for arm, way in map(ARMS.__getitem__, arms):
                found = finished()[key(settings_of(arm, lr, rate, "validation", TUNING_SEED))]["measures"][way]["nll"]
                row.append("diverged" if found is None else f"{found:.3f}")
            table.append(row)
    return markdown(table)


def cost() -> str:
    """Processor time of training, as a multiple of SGD's, and passes of a prediction."""
    base = fmean(line["seconds"] for line, _ in lines_of("softmax"))
    table = [["arm", "training, × SGD", "networks kept", "passes a prediction"]]
    for name, (_, way) in ARMS.items():
        members = MEMBERS if way == "ensemble" else 1
        ratio = members * fmean(line["seconds"] for line, _ in lines_of(name)) / base
        table.append([name, f"{ratio:.1f}", str(members), str(MASKS if way == "sampled" else members)])
    return markdown(table)


TABLES: dict[str, Callable[[], str]] = {
    "means": means,
    "softmax": lambda: against("softmax"),
    "ensemble": lambda: against("ensemble of 3", "softmax"),
    "sampling": sampling,
    "chosen": chosen,
    "validation": validation,
    "cost": cost,
}


def draw() -> None:
    """Calibration of the ways to predict, and differences to plain softmax."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.5), layout="constrained")
    left, *others = figure.subplots(1, 4, width_ratios=[1.5, 1, 1, 1])
    left.axhline(0, color="0.6", linewidth=0.8)
    colors = dict(zip(ARMS, ("k", "0.55", "#0072B2", "#F0E442", "#E69F00", "#56B4E9", "#009E73"), strict=True))
    for name in ("softmax", "ensemble of 3", "uniform, sampled", "saliency, sampled"):
        bins = [b for line, way in lines_of(name) for b in line["measures"][way]["bins"]]
        points = []
        for i in range(BINS):  # all seeds together
            part = [(n, c, a) for n, c, a in bins if i < BINS * c <= i + 1]
            if (total := sum(n for n, *_ in part)) >= 100:
                confidence, accuracy = (sum(b[0] * b[k] for b in part) / total for k in (1, 2))
                points.append((confidence, 100 * (accuracy - confidence)))
        left.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colors[name], label=name)
    left.set_xlabel("confidence")
    left.set_ylabel("accuracy − confidence, points")
    left.legend(frameon=False, fontsize=8)
    names = [name for name in ARMS if name != "softmax"]
    for ax, measure in zip(others, COMPARED[1:], strict=True):
        for y, name in enumerate(names):
            mean, half = difference_of(name, "softmax", measure, len(names) * len(COMPARED))
            good = mean if measure.startswith("auroc") else -mean
            color = "0.4" if abs(mean) <= half else "#009E73" if good > 0 else "#D55E00"
            ax.errorbar(mean, y, xerr=half, fmt="o", color=color, capsize=2, markersize=4)
        ax.axvline(0, color="0.6", linewidth=0.8)
        ax.set_title(MEASURES[measure][0], fontsize=9)
        ax.set_yticks(range(len(names)), names if ax is others[0] else [""] * len(names), fontsize=8)
        ax.set_ylim(len(names) - 0.5, -0.5)
    for ax in (left, *others):
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    others[1].set_xlabel("difference to softmax, 95% for all together", fontsize=9)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="train nothing; write the tables and the picture")
    if parser.parse_args().report:
        PAGE.write_text(filled(PAGE.read_text(), TABLES))
        draw()
    else:
        train_all()


if __name__ == "__main__":
    main()
