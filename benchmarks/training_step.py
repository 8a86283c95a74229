"""What a whole training step of ResNet-18 costs with ImpactSGD: its time as a ratio to torch.optim.SGD's.

    python benchmarks/training_step.py

CIFAR form, width 64, batch 64, channels_last, bf16 autocast on the CPU. The two take turns, and the ratio is that
of neighbours, so that a machine whose speed drifts does not show.
"""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from impact_optim import ImpactSGD
from impact_optim.experiments.models import build_model

PAIRS = 8


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(10, (64,))
    models = [build_model("resnet18", (3, 32, 32), 10, 64).to(memory_format=torch.channels_last) for _ in range(2)]
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    optimizers = [torch.optim.SGD(models[0].parameters(), **options), ImpactSGD(models[1], **options)]
    ratios = []
    for pair in range(PAIRS + 1):
        sgd, ours = (seconds(model, optimizer, x, y) for model, optimizer in zip(models, optimizers, strict=True))
        if pair > 0:  # the first one warms up
            ratios.append(ours / sgd)
    print(f"ImpactSGD / SGD: median {median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}, {PAIRS} pairs")


if __name__ == "__main__":
    main()
