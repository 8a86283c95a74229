"""What a guard leaves of a network: the smallest that keeps the metric, on real data.

    python benchmarks/pruning/guard.py            # what is missing in guard.jsonl
    python benchmarks/pruning/report.py           # the table of docs/pruning.md

A CNN of 32 channels on 5000 images of Fashion-MNIST. The guard measures accuracy on a fifth of them, which nothing
else sees; the schedule asks for nine tenths of the MACs, in epochs 2 to 9 of 15. The test set is measured at the end.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from impact_optim.experiments.data import Data, batch_count, batches, load_data
from impact_optim.experiments.models import build_model
from impact_optim.experiments.training import evaluate
from impact_optim.pruning import ActivationPruner
from impact_optim.pruning.report import model_size

RUNS = Path(__file__).with_name("guard.jsonl")
SEEDS = range(5)
TOLERANCES = (None, 0.5, 2.0, 100.0)
"""In points of accuracy; ``None`` cuts nothing, and 100 bears everything."""
EPOCHS, BATCH, LR, ASKED, BY = 15, 100, 0.05, 0.9, 9


def run(tolerance: float | None, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    whole = load_data("fashion-mnist", Path("data")).subset(5000)
    data = whole.validation_split(0.2)
    torch.manual_seed(seed)
    model = build_model("cnn", data.x.shape[1:], data.classes, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * batch_count(data, BATCH))
    inputs = ((data.x[:1],), {})
    before = model_size(model, inputs)
    pruner = None
    if tolerance is not None:
        guard = (lambda model: accuracy(model, data), tolerance)
        pruner = ActivationPruner(model, data.x[:1], ASKED, by=BY, every=1, optimizer=optimizer, guard=guard, seed=seed)
    notes = []
    for epoch in range(EPOCHS):
        for x, y in batches(data, BATCH, seed, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
        if pruner is not None:
            notes.append(pruner.step().note)
    after = model_size(model, inputs)
    return {
        "tolerance": tolerance,
        "seed": seed,
        "validation": accuracy(model, data),
        "test": 100 * evaluate(model, whole.heldout_x, whole.heldout_y)[1],
        "macs": after.macs[""] / before.macs[""],
        "parameters": after.parameters[""] / before.parameters[""],
        "notes": notes,
    }


def accuracy(model: nn.Module, data: Data) -> float:
    """In % of what is held out of the training set."""
    return 100 * evaluate(model, data.heldout_x, data.heldout_y)[1]


def load() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def main() -> None:
    from tqdm import tqdm

    done = {(line["tolerance"], line["seed"]) for line in load()}
    todo = [(tolerance, seed) for seed in SEEDS for tolerance in TOLERANCES if (tolerance, seed) not in done]
    with ProcessPoolExecutor(torch.get_num_threads(), mp_context=get_context("spawn")) as pool:
        for line in tqdm(pool.map(run, *zip(*todo, strict=True)) if todo else (), total=len(todo), unit="run"):
            with RUNS.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
