"""What the pruner's own work takes, and how much faster a cut network is.

    python benchmarks/pruning_time.py

The cut network against the uncut one, at full width, without training; building graphs, a cut with repair, and the
statistics' share of a training step. Times are processor times of a single thread, which the rest of the machine
disturbs little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from statistics import median

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from impact_optim.experiments.models import build_model
from impact_optim.pruning import ActivationPruner, cut, repair, trace


def latency() -> None:
    """Milliseconds of a forward pass in float32, the two networks taking turns."""
    uncut = build_model("resnet18", (1, 28, 28), 10, 64)
    model = deepcopy(uncut)
    report = ActivationPruner(model, torch.randn(1, 1, 28, 28), {1: 0.5}, criterion="l1", round_to=8).step()
    print("| batch | uncut, ms | cut, ms | faster | MACs left |\n|---|---|---|---|---|")
    for batch, repeats in ((1, 40), (64, 9)):
        x = torch.randn(batch, 1, 28, 28)
        before, after = in_turns(*(lambda m=m, x=x: forward(m, x) for m in (uncut, model)), repeats=repeats)
        macs = report.macs[1] / report.macs[0]
        print(f"| {batch} | {before:.1f} | {after:.1f} | {before / after:.2f}× | {macs:.1%} |")


def own_work() -> None:
    """Seconds that graphs and cuts take, and what hooks add to a training step."""
    example = torch.randn(1, 3, 224, 224)
    print("\n| the pruner's own work | |\n|---|---|")
    for name in ("resnet50", "vit_b_16"):
        model = torchvision.models.get_model(name)
        started = time.process_time()
        graph = trace(model, example)
        print(f"| graph of {name}, s | {time.process_time() - started:.2f} |")
        if name == "resnet50":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            model(torch.randn(2, 3, 64, 64)).sum().backward()
            optimizer.step()
            halves = {group.name: range(group.size // 2) for group in graph.groups.values()}
            started = time.process_time()
            repair(cut(model, graph, halves), model, optimizers=[optimizer])
            print(f"| cut of half the channels of {name}, with repair, s | {time.process_time() - started:.2f} |")
    plain, observed = (build_model("resnet18", (1, 28, 28), 10, 64) for _ in range(2))
    pruner = ActivationPruner(observed, torch.randn(1, 1, 28, 28), {1: 0.5}, every=1)
    x, y = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    without, recorded = in_turns(lambda: train(plain, x, y), lambda: train(observed, x, y), repeats=8)
    pruner.step()  # which fails if nothing was recorded
    longer = 100 * (recorded / without - 1)
    print(f"| a recorded step of ResNet-18, % longer (one in 8 is recorded) | {longer:.2f} |")


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model.train()(x), y).backward()


def forward(model: nn.Module, x: Tensor) -> None:
    model.eval()
    with torch.inference_mode():
        model(x)


def in_turns(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median milliseconds of each."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 2):
        pair = []
        for work in (first, second):
            started = time.process_time()
            work()
            pair.append(1000 * (time.process_time() - started))
        times.append((pair[0], pair[1]))
    warm = times[2:]
    return median(a for a, _ in warm), median(b for _, b in warm)


if __name__ == "__main__":
    torch.set_num_threads(1)
    latency()
    own_work()
