"""What cutting a network while it trains costs in accuracy and in time, and what it saves.

    python benchmarks/pruning.py              # everything, resumed where it was stopped; then the tables
    python benchmarks/pruning.py latency cost # these parts only; accuracy, latency, cost

``accuracy``: a ResNet-18 in its CIFAR form on Fashion-MNIST loses half of its MACs in the middle of training, by every
criterion from the same weights, statistics and batches: runs of a seed share what comes before the cut. All keep the
MACs and the learning rate, the one of a grid with which the uncut network does best on a validation split. Beside ours
stands Torch-Pruning's group norm, ranked by that package, and cut and repaired like the others.
``latency``: the cut network against the uncut one, at full width; it needs no training.
``cost``: building graphs, a cut with repair, and the statistics' share of a training step.

Times are processor times of a single thread, which the rest of the machine disturbs little.

Every run and measurement is a line of ``--out``; the tables are made of these lines alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from impact_optim import ImpactSGD
from impact_optim.experiments.data import Data, batch_count, batches, load_data
from impact_optim.experiments.models import build_model
from impact_optim.experiments.training import evaluate
from impact_optim.pruning import ActivationPruner, UnitGroup, cut, repair, trace
from impact_optim.pruning.criteria import Context, Criterion
from impact_optim.pruning.report import model_size

LEARNING_RATES = [0.025, 0.05, 0.1, 0.2]
TUNING_SEED = 100  # none of those that are reported
TESTED = 3000
BATCH = 64

# Optimizer, criterion, split of the budget over layers. Without a criterion nothing is cut.
RUNS = [
    ("SGD", None, "uniform"),
    ("SGD", "entropy", "uniform"),
    ("SGD", "rademacher", "uniform"),
    ("SGD", "l1", "uniform"),
    ("SGD", "torch-pruning", "uniform"),
    ("SGD", "random", "uniform"),
    ("ImpactSGD", None, "uniform"),
    ("ImpactSGD", "importance", "uniform"),
    ("SGD", "rademacher", "rademacher"),
]

Line = dict[str, Any]


class Lines:
    """A file of JSON lines that is only added to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, line: Line) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def matching(self, **wanted: Any) -> list[Line]:
        text = self.path.read_text() if self.path.exists() else ""
        lines = [json.loads(row) for row in text.splitlines()]
        return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


# ------------------------------------------------------------------------------- accuracy


class Run:
    """A network in training, which can be cut."""

    def __init__(
        self, args: argparse.Namespace, data: Data, lr: float, seed: int, optimizer: str, network: str = "resnet18"
    ) -> None:
        self.args, self.data, self.lr, self.seed = args, data, lr, seed
        torch.manual_seed(seed)
        model = build_model(network, data.x.shape[1:], data.classes, args.width if network == "resnet18" else None)
        self.model = model.to(memory_format=torch.channels_last)
        options = {"lr": lr, "momentum": 0.9, "weight_decay": 5e-4}
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.model.parameters(), **options)
            if optimizer == "SGD"
            else ImpactSGD(self.model, **options, seed=seed)
        )

    def pruner(self, criterion: str | Criterion, split: str) -> ActivationPruner:
        return ActivationPruner(
            self.model,
            self.data.x[:1],
            {self.args.cut_epoch: self.args.removed},
            criterion=criterion,
            split=split,
            max_ratio=1.0,
            # round_to=1, the default: in a narrow network equal MACs matter more than even widths
            optimizer=self.optimizer,
            every=4,
            seed=self.seed,
        )

    def inputs(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches(self.data, BATCH, self.seed, epoch):
            yield x.to(memory_format=torch.channels_last), y

    def train(self, first: int, last: int) -> None:
        """Epochs from ``first`` to before ``last``, of a learning rate that falls as half a cosine over the run."""
        per_epoch = batch_count(self.data, BATCH)
        for epoch in range(first, last):
            for i, (x, y) in enumerate(self.inputs(epoch)):
                done = torch.tensor((epoch + i / per_epoch) / self.args.epochs)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * (0.5 + 0.5 * torch.cos(torch.pi * done).item())
                self.optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(self.model(x), y)
                loss.backward()
                self.optimizer.step()

    def accuracy(self, renew_batch_norm: bool = True) -> float:
        """In percent; the statistics of batch norm are of the network as it is, unless they are left."""
        with torch.autocast("cpu", torch.bfloat16):
            if renew_batch_norm:
                update_bn((x for x, _ in islice(self.inputs(0), 20)), self.model)
            return 100 * evaluate(self.model, self.data.heldout_x[:TESTED], self.data.heldout_y[:TESTED])[1]


def group_norm(model: nn.Module, example: Tensor) -> Criterion:
    """Torch-Pruning's importance of a group: the norm of all weights that would go with a unit."""
    import torch_pruning

    model = deepcopy(model)  # that package leaves models in evaluation mode, and thaws parameters
    dependencies = torch_pruning.DependencyGraph().build_dependency(model, example)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    modules = dict(model.named_modules())

    def criterion(group: UnitGroup, context: Context) -> Tensor:
        axis = next(axis for axis in group.producers if context.parameters[axis.name].dim() > 1)
        assert torch.equal(axis.units, torch.arange(group.size)), f"{group.name}: a unit is not a channel"
        layer = modules[axis.name.removesuffix(".weight")]
        coupled = dependencies.get_pruning_group(
            layer, torch_pruning.prune_conv_out_channels, idxs=list(range(group.size))
        )
        return importance(coupled).double()

    return criterion


def measure_accuracy(args: argparse.Namespace, lines: Lines) -> None:
    settings = accuracy_settings(args)
    data = load_data("fashion-mnist", args.data_folder).subset(args.subset)
    lr = choose_learning_rate(args, data, lines)
    for seed in range(args.seeds):
        for optimizer in ("SGD", "ImpactSGD"):
            keys = [
                {**settings, "lr": lr, "seed": seed, "optimizer": optimizer, "criterion": criterion, "split": split}
                for name, criterion, split in RUNS
                if name == optimizer and (criterion != "torch-pruning" or find_spec("torch_pruning"))
            ]
            missing = [key for key in keys if not lines.matching(**key)]
            if not missing:
                continue
            trunk = Run(args, data, lr, seed, optimizer)
            states, before = train_to_the_cut(trunk)
            for key in missing:
                run = Run(args, data, lr, seed, optimizer)
                criterion = key["criterion"]
                if criterion == "torch-pruning":
                    criterion = group_norm(trunk.model, data.x[:1])
                line = {**key, "before": before, **finish(run, states, criterion, key["split"])}
                lines.add(line)
                print(f"seed {seed}, {optimizer}, {key['criterion']}, {key['split']}: {line['end']:.2f}", flush=True)


def train_to_the_cut(run: Run) -> tuple[list[Line], float]:
    """States of the pruner, the model and the optimizer before a cut, with statistics for all criteria; accuracy."""
    pruner = run.pruner("entropy", "uniform")
    run.train(0, run.args.cut_epoch - 1)
    pruner.epoch = run.args.cut_epoch - 1
    pruner.statistics.attach()
    run.train(run.args.cut_epoch - 1, run.args.cut_epoch)
    pruner.statistics.detach()
    accuracy = run.accuracy()
    return deepcopy([pruner.state_dict(), run.model.state_dict(), run.optimizer.state_dict()]), accuracy


def finish(run: Run, states: list[Line], criterion: str | Criterion | None, split: str) -> Line:
    """Goes on from :func:`train_to_the_cut`, cuts, and trains to the end."""
    pruner = run.pruner(criterion or "random", split)
    for part, state in zip((pruner, run.model, run.optimizer), states, strict=True):
        part.load_state_dict(deepcopy(state))
    example = ((run.data.x[:1],), {})
    before, line = model_size(run.model, example), {}
    if criterion is None:
        pruner.statistics.detach()
        line["after"] = line["after_renewed"] = run.accuracy()
    else:
        pruner.step()
        line = {"after": run.accuracy(renew_batch_norm=False), "after_renewed": run.accuracy()}
    after = model_size(run.model, example)
    run.train(run.args.cut_epoch, run.args.epochs)
    line["end"] = run.accuracy()
    return {
        **line,
        "macs": [before.macs[""], after.macs[""]],
        "parameters": [before.parameters[""], after.parameters[""]],
    }


def accuracy_settings(args: argparse.Namespace) -> Line:
    names = ("width", "subset", "epochs", "cut_epoch", "removed")
    return {"part": "accuracy", **{name: getattr(args, name) for name in names}}


def choose_learning_rate(args: argparse.Namespace, data: Data, lines: Lines) -> float:
    """With which the uncut network does best on a fifth of the training examples, held out."""
    settings = {**accuracy_settings(args), "part": "tuning"}
    for lr in LEARNING_RATES:
        if not lines.matching(**settings, lr=lr):
            run = Run(args, data.validation_split(0.2), lr, TUNING_SEED, "SGD")
            run.train(0, args.epochs)
            lines.add({**settings, "lr": lr, "validation": run.accuracy()})
    return best_learning_rate(args, lines)


def best_learning_rate(args: argparse.Namespace, lines: Lines) -> float | None:
    tried = lines.matching(**{**accuracy_settings(args), "part": "tuning"})
    return max(tried, key=lambda line: line["validation"])["lr"] if tried else None


def print_accuracy(args: argparse.Namespace, lines: Lines) -> None:
    print("\n| optimizer | criterion | split | seeds | before | after | renewed | end | − uncut | MACs | parameters |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    found = lines.matching(**accuracy_settings(args), lr=best_learning_rate(args, lines))
    found = [line for line in found if line["seed"] < args.seeds]
    uncut = {(line["optimizer"], line["seed"]): line["end"] for line in found if line["criterion"] is None}
    for optimizer, criterion, split in RUNS:
        runs = [
            line
            for line in found
            if (line["optimizer"], line["criterion"], line["split"]) == (optimizer, criterion, split)
        ]
        if runs:
            differences = [
                line["end"] - uncut[optimizer, line["seed"]] for line in runs if (optimizer, line["seed"]) in uncut
            ]
            cells = [optimizer, criterion or "(uncut)", split if criterion else "", str(len(runs))]
            cells += [spread([line[key] for line in runs]) for key in ("before", "after", "after_renewed", "end")]
            cells.append(spread(differences, "+") if criterion else "")
            cells += [f"{mean(line[key][1] / line[key][0] for line in runs):.1%}" for key in ("macs", "parameters")]
            print(f"| {' | '.join(cells)} |")


def spread(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "") if values else ""


# ------------------------------------------------------------------------------- time


def measure_latency(args: argparse.Namespace, lines: Lines) -> None:
    """Milliseconds of a forward pass in float32, the two networks taking turns."""
    uncut = build_model("resnet18", (1, 28, 28), 10, 64)
    model = deepcopy(uncut)
    example = torch.randn(1, 1, 28, 28)
    report = ActivationPruner(model, example, {1: args.removed}, criterion="l1", round_to=8).step()
    for batch, repeats in ((1, 40), (64, 9)):
        x = torch.randn(batch, 1, 28, 28)
        ms = in_turns(*(lambda m=m, x=x: forward(m, x) for m in (uncut, model)), repeats=repeats)
        lines.add({"part": "latency", "batch": batch, "ms": ms, "macs": report.macs})


def measure_cost(args: argparse.Namespace, lines: Lines) -> None:
    """Seconds that the pruner's own work takes, and what its hooks add to a training step."""
    example = torch.randn(1, 3, 224, 224)

    def add(what: str, value: float) -> None:
        lines.add({"part": "cost", "what": what, "value": value})

    for name in ("resnet50", "vit_b_16"):
        model = torchvision.models.get_model(name)
        started = time.process_time()
        graph = trace(model, example)
        add(f"graph of {name}, s", time.process_time() - started)
        if name == "resnet50":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            model(torch.randn(2, 3, 64, 64)).sum().backward()
            optimizer.step()
            halves = {group.name: range(group.size // 2) for group in graph.groups.values()}
            started = time.process_time()
            repair(cut(model, graph, halves), model, optimizers=[optimizer])
            add(f"cut of half the channels of {name}, with repair, s", time.process_time() - started)

    data = Data(torch.randn(64, 1, 28, 28), torch.arange(64) % 10, torch.empty(0), torch.empty(0), 10)
    wide = argparse.Namespace(width=64, epochs=1, cut_epoch=1, removed=args.removed)
    plain, observed = (Run(wide, data, 0.01, 0, "SGD") for _ in range(2))
    pruner = observed.pruner("entropy", "uniform")
    pruner.statistics.every = 1
    without, recorded = in_turns(lambda: plain.train(0, 1), lambda: observed.train(0, 1), repeats=8)
    add("a recorded step of ResNet-18, % longer (one in 8 is recorded)", 100 * (recorded / without - 1))


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


def print_times(lines: Lines) -> None:
    latest = {line["batch"]: line for line in lines.matching(part="latency")}
    if latest:
        print("\n| batch | uncut, ms | cut, ms | faster | MACs left |\n|---|---|---|---|---|")
    for batch, line in sorted(latest.items()):
        (before, after), macs = line["ms"], line["macs"]
        ratio = before / after
        print(f"| {batch} | {before:.1f} | {after:.1f} | {ratio:.2f}× | {macs[1] / macs[0]:.1%} |")
    costs = {line["what"]: line["value"] for line in lines.matching(part="cost")}
    if costs:
        print("\n| cost | |\n|---|---|")
    for what, value in costs.items():
        print(f"| {what} | {value:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="accuracy, latency, cost; table prints only (all)")
    parser.add_argument("--width", type=int, default=16, help="of the first stage (%(default)s)")
    parser.add_argument("--subset", type=int, default=4000, help="training examples (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--cut-epoch", type=int, default=3, help="after which is cut (%(default)s)")
    parser.add_argument("--removed", type=float, default=0.5, help="share of the MACs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the accuracy runs (%(default)s)")
    parser.add_argument("--data-folder", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pruning.jsonl")
    args = parser.parse_args()
    lines, parts = Lines(args.out), args.parts or ["accuracy", "latency", "cost"]
    torch.set_num_threads(1)
    if "latency" in parts:
        measure_latency(args, lines)
    if "cost" in parts:
        measure_cost(args, lines)
    if "accuracy" in parts:
        torch.set_num_threads(args.threads)
        measure_accuracy(args, lines)
    print_accuracy(args, lines)
    print_times(lines)


if __name__ == "__main__":
    main()
