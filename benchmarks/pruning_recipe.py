"""Which recipe takes half of a ResNet's MACs without loss at the end of a run of realistic length.

    python benchmarks/pruning_recipe.py --phase screen   # learning rates and variants, on a validation split
    python benchmarks/pruning_recipe.py --phase final    # what that has chosen, and its peers, on the test set
    python benchmarks/pruning_recipe.py --table

A ResNet-18 in its CIFAR form and narrow, on Fashion-MNIST, SGD with a cosine schedule. The first phase never sees the
test set, and chooses the two of our arms that end highest on average over its seeds. The second trains these, the peers
and the uncut network with other seeds, and reports on the test set. In both a seed gives all arms the same initial
weights and the same batches, and all arms of an optimizer have the learning rate with which its *uncut* network did
best on the validation split.

An arm is written ``CRITERION:SPLIT:SCHEDULE@TARGET``:

- criterion: one of the package's; ``torch-pruning``, that package's group norm, cut and repaired here; or one of
  ``VARIANTS``. ``importance`` trains with ImpactSGD, whose uncut network is ``uncut+impact``.
- split: one of the package's, or ``share`` and ``percost``; see :class:`RecipePruner`.
- schedule: ``cubic2-14`` (after every epoch from 3 to 14), ``linear2-14``, ``cubic2-14x3`` (after every third),
  ``once10``, or ``ramp``, which stands for ``--schedule``.
- target: ``macs0.5`` or ``params0.5``, what is removed in the end; ``macs0.5`` if it is left out.

``uncut`` is cut nowhere, ``scratch@macs0.5`` is the network with all layers narrower, trained from the start.

Runs go to ``--workers`` processes that share the device, the most important first. Every finished one is a line of
``--out``, and is not repeated; the tables are made of these lines alone. After ``--deadline`` seconds no run starts,
and none that is not expected to end by ``--stop``, at which what still runs is dropped.

In the final phase the first of ``--recipes``, the uncut network and torch-pruning get ``--more-seeds`` beyond those of
the others: five seeds tell a mean difference to 1.24 times its standard deviation, ten to 0.72.

Renewing the statistics of batch norm after a cut does not change what comes of it, since training normalises by each
batch. All accuracies but "just after" are measured with statistics renewed on the same training examples; those around
a cut on 2000 held-out examples, those at the end on all.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import mkdtemp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from impact_optim import ImpactSGD
from impact_optim.experiments.data import Data, load_data
from impact_optim.experiments.models import build_model
from impact_optim.experiments.training import evaluate
from impact_optim.pruning import ActivationPruner, Plan, UnitGroup, ramp
from impact_optim.pruning.budget import SPLITS, Budget, Scores
from impact_optim.pruning.criteria import CRITERIA, Context, Criterion, mean_over_places
from impact_optim.pruning.report import model_size
from impact_optim.pruning.statistics import UnitStatistics

Line = dict[str, Any]

LEARNING_RATES = [0.05, 0.1, 0.2, 0.4]
SCREEN_SEEDS = [100, 101]  # none of those that are reported; learning rates are tuned with the first
RENEWING = 20  # batches that the statistics of batch norm are renewed on
AROUND = 2000  # held-out examples that accuracies around a cut are measured on
NUMERICS = ["bf16-nhwc", "bf16-nchw", "tf32-nhwc", "tf32-nchw"]
MAX_RATIO = 0.9  # that a layer may lose, in all arms

SCREENED = [
    "entropy:uniform:ramp",
    "entropy:global:ramp",
    "entropy:rademacher:ramp",
    "rademacher:uniform:ramp",
    "rademacher:rademacher:ramp",
    "rademacher:global:ramp",
    "energy:share:ramp",
    "energy:percost:ramp",
    "entropy-out:global:ramp",
    "entropy:percost:ramp",
    "l1:uniform:ramp",
    "torch-pruning:uniform:ramp",
    "random:uniform:ramp",
    "rademacher:percost:ramp",
    "entropy-z:global:ramp",
    "entropy-smooth:uniform:ramp",
    "entropy:uniform:early",
    "entropy:uniform:linear",
    "entropy:uniform:once",
    "importance:uniform:ramp",
    "torch-pruning:global:ramp",
]
NOT_OURS = ("uncut", "uncut+impact", "l1", "random", "torch-pruning", "importance")
PEERS = ["torch-pruning:uniform:ramp", "l1:uniform:ramp", "random:uniform:ramp"]


# ------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """What a run cuts; ``text`` names it."""

    text: str
    criterion: str | None = None
    split: str = "uniform"
    schedule: str = ""
    target: str = "macs"
    removed: float = 0.0

    @property
    def optimizer(self) -> str:
        return "ImpactSGD" if self.criterion == "importance" or self.text == "uncut+impact" else "SGD"

    @property
    def uncut(self) -> str:
        return "uncut+impact" if self.optimizer == "ImpactSGD" else "uncut"

    def fractions(self) -> dict[int, float]:
        """Epoch -> what is removed by then."""
        if once := re.fullmatch(r"once(\d+)", self.schedule):
            return {int(once[1]): self.removed}
        form = re.fullmatch(r"(cubic|linear)(\d+)-(\d+)(?:x(\d+))?", self.schedule)
        if not form:
            raise ValueError(f"cannot read the schedule {self.schedule!r}")
        start, end, every = int(form[2]), int(form[3]), int(form[4] or 1)
        cuts = [*range(start + every, end, every), end]
        if form[1] == "cubic":
            whole = ramp(self.removed, start=start, end=end)
            return {epoch: whole[epoch] for epoch in cuts}
        return {epoch: self.removed * (epoch - start) / (end - start) for epoch in cuts}


def read_arm(text: str, args: argparse.Namespace) -> Arm:
    """Reads ``CRITERION:SPLIT:SCHEDULE@TARGET``; its name has the schedule in full."""
    if text in ("uncut", "uncut+impact"):
        return Arm(text)
    head, _, target = text.partition("@")
    form = re.fullmatch(r"(macs|params)(0?\.\d+)", target or "macs0.5")
    parts = head.split(":")
    if form and parts == ["scratch"]:
        return Arm(f"scratch@{form[1]}{float(form[2])}", None, "uniform", "", form[1], float(form[2]))
    if not form or len(parts) != 3:
        raise ValueError(f"cannot read the arm {text!r}: write CRITERION:SPLIT:SCHEDULE@TARGET")
    criterion, split, schedule = parts
    if criterion not in (*CRITERIA, *VARIANTS, "torch-pruning") or split not in (*SPLITS, *OUR_SPLITS):
        raise ValueError(f"there is no such criterion or split: {text!r}")
    schedule = {"ramp": args.schedule, **other_schedules(args.epochs)}.get(schedule, schedule)
    name = f"{criterion}:{split}:{schedule}@{form[1]}{float(form[2])}"
    arm = Arm(name, criterion, split, schedule, form[1], float(form[2]))
    if max(arm.fractions()) >= args.epochs:
        raise ValueError(f"{name} cuts after epoch {max(arm.fractions())} of {args.epochs}")
    return arm


def usual_schedule(epochs: int) -> str:
    return f"cubic{round(0.1 * epochs)}-{round(0.7 * epochs)}"


def other_schedules(epochs: int) -> dict[str, str]:
    return {
        "early": f"cubic{round(0.1 * epochs)}-{round(0.4 * epochs)}",
        "linear": f"linear{round(0.1 * epochs)}-{round(0.7 * epochs)}",
        "once": f"once{round(0.5 * epochs)}",
    }


# ------------------------------------------------------------------------------- criteria and splits


def outgoing_norm(group: UnitGroup, context: Context) -> Tensor:
    """The norm of the weights that read a unit, [units]."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for axis in group.consumers:
        squares = context.parameters[axis.name].detach().float().square().movedim(axis.dim, 0)
        owned = axis.units >= 0
        total.index_add_(0, axis.units[owned], squares.reshape(len(squares), -1).sum(1).cpu().double()[owned])
    return total.sqrt()


def entropy_out(group: UnitGroup, context: Context) -> Tensor:
    """Entropy times the norm of the weights that read the unit."""
    return CRITERIA["entropy"](group, context) * outgoing_norm(group, context)


def entropy_z(group: UnitGroup, context: Context) -> Tensor:
    """Entropy in standard deviations from the layer's mean."""
    score = CRITERIA["entropy"](group, context)
    return (score - score.mean()) / score.std(correction=0).clamp_min(1e-12)


def energy(group: UnitGroup, context: Context) -> Tensor:
    """Squared norm of the weights that read the unit times its variance: its part of what its readers' inputs vary by,
    were units independent."""
    variance = mean_over_places(group, context, lambda statistics: UnitStatistics.std(statistics).square())
    return outgoing_norm(group, context).square() * variance


class Smooth:
    """The running mean of a criterion over the cuts of a run, half of it of the newest."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.before: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, group: UnitGroup, context: Context) -> Tensor:
        score = self.criterion(group, context)
        if group.name in self.before:
            original, old = self.before[group.name]
            score = 0.5 * score + 0.5 * old[torch.searchsorted(original, group.original)]
        self.before[group.name] = (group.original.clone(), score)
        return score


class GroupNorm:
    """Torch-Pruning's importance of a group: the norm of all weights that would go with a unit."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model, self.example = model, example

    def prepare(self) -> None:
        """Reads the model as it is; to be called before every cut."""
        import torch_pruning

        model = deepcopy(self.model).float()  # that package leaves models in evaluation mode, and thaws parameters
        self.dependencies = torch_pruning.DependencyGraph().build_dependency(model, self.example)
        self.importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        self.cut = torch_pruning.prune_conv_out_channels
        self.modules = dict(model.named_modules())

    def __call__(self, group: UnitGroup, context: Context) -> Tensor:
        axis = next(axis for axis in group.producers if context.parameters[axis.name].dim() > 1)
        assert torch.equal(axis.units, torch.arange(group.size)), f"{group.name}: a unit is not a channel"
        layer = self.modules[axis.name.removesuffix(".weight")]
        coupled = self.dependencies.get_pruning_group(layer, self.cut, idxs=list(range(group.size)))
        return self.importance(coupled).double()


VARIANTS: dict[str, Callable[[], Criterion]] = {
    "entropy-out": lambda: entropy_out,
    "entropy-z": lambda: entropy_z,
    "energy": lambda: energy,
    "entropy-smooth": lambda: Smooth(CRITERIA["entropy"]),
    "rademacher-smooth": lambda: Smooth(CRITERIA["rademacher"]),
    "energy-smooth": lambda: Smooth(energy),
}
OUR_SPLITS = ("share", "percost")


class RecipeBudget(Budget):
    """What is tried here and not in the package: two more splits.

    ``"share"``: units of all layers stand in one line by their share of their layer's scores. ``"percost"``: by that
    over the MACs (or parameters, whichever is the target) which go with one unit of the layer.
    """

    our_split = ""

    def plan(self, fraction: float, scores: Scores) -> Plan:
        if self.our_split:
            self._cost = self._costs(scores.values) if self.our_split == "percost" else {}
        return super().plan(fraction, scores)

    def _costs(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """What goes with one unit of a group."""
        costs = {}
        for name in values:
            if self.graph.groups[name].size > 1:
                size = self.size_with(self.graph.plan({name: torch.tensor([0])}))
                now, then = (s.macs[""] if self.target == "macs" else s.parameters[""] for s in (self.size, size))
                costs[name] = float(now - then)
        return costs

    def lowest(self, fraction: float, scores: Scores) -> Plan:
        if not self.our_split:
            return super().lowest(fraction, scores)
        places = []
        for name, score in scores.values.items():
            group, score = self.graph.groups[name], score.double()
            least = max(math.ceil(group.original_size * (1 - self.max_ratio) - 1e-9), 1)
            share = score / score.sum().clamp_min(1e-300) / self._cost.get(name, 1.0)
            order = score.argsort(stable=True)[: max(0, group.size - least)]
            places += [(share[unit].item(), name, int(unit)) for unit in order]
        places.sort(key=lambda place: place[0])
        total = sum(len(score) for score in scores.values.values())
        chosen: dict[str, list[int]] = {}
        for _, name, unit in places[: round(fraction * total)]:
            chosen.setdefault(name, []).append(unit)
        return self.graph.plan({name: torch.tensor(sorted(units)) for name, units in chosen.items()})


class RecipePruner(ActivationPruner):
    """A pruner with a :class:`RecipeBudget`."""

    def __init__(self, *arguments: Any, split: str, **options: Any) -> None:
        ours = split in OUR_SPLITS
        super().__init__(*arguments, split="uniform" if ours else split, **options)
        self.budget = RecipeBudget(**{each.name: getattr(self.budget, each.name) for each in fields(Budget)})
        self.budget.our_split = split if ours else ""


# ------------------------------------------------------------------------------- a run


class Inputs:
    """Examples on the device, in batches whose order depends on seed and epoch alone."""

    def __init__(self, data: Data, batch: int, numerics: str, device: torch.device) -> None:
        self.nhwc = numerics.endswith("nhwc")
        self.x, self.y = self._stored(data.x).to(device), data.y.to(device)
        held = self._stored(data.heldout_x).to(device)
        self.heldout_x = held.permute(0, 3, 1, 2) if self.nhwc else held
        self.heldout_y = data.heldout_y.to(device)
        self.batch, self.shape, self.classes, self.heldout = batch, data.x.shape[1:], data.classes, data.heldout
        self.steps = max(1, len(data.y) // batch)

    # Images of one channel have no memory order of their own unless they are stored in it.
    def _stored(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous() if self.nhwc else x

    def order(self, seed: int, epoch: int) -> Tensor:
        """On the CPU, so that every device sees the same."""
        return torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))

    def take(self, index: Tensor) -> Tensor:
        x = self.x[index]
        return x.permute(0, 3, 1, 2) if self.nhwc else x

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(seed, epoch).to(self.x.device)
        for index in order.split(self.batch)[: self.steps]:
            yield self.take(index), self.y[index]


def checksum(tensors: Iterable[Tensor]) -> str:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), total)
    return f"{total:08x}"


def network(inputs: Inputs, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("resnet18", inputs.shape, inputs.classes, width).to(inputs.x.device)
    return model.to(memory_format=torch.channels_last) if inputs.nhwc else model


def narrow(model: nn.Module, arm: Arm, inputs: Inputs, seed: int) -> None:
    """Makes all layers narrower, and initialises them as layers of that width are."""
    options = {"criterion": "random", "split": "uniform", "target": arm.target, "seed": seed}
    RecipePruner(model, inputs.take(torch.arange(1)), {1: arm.removed}, **options).step()
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()


def train(task: Line, inputs: Inputs, stop: float) -> Line | None:
    """A run from its first to its last epoch, and what was measured; ``None`` if the time is up."""
    started, cutting = time.time(), 0.0
    args, arm, seed, epochs = argparse.Namespace(**task), Arm(**task["parsed"]), task["seed"], task["epochs"]
    model = network(inputs, args.width, seed)
    example = inputs.take(torch.arange(1))
    original = model_size(model, ((example,), {}))
    line: Line = {"weights": checksum(model.parameters()), "batches": checksum([inputs.order(seed, 0)])}
    if arm.text.startswith("scratch"):
        narrow(model, arm, inputs, seed)
    options = {"lr": args.lr, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer: torch.optim.Optimizer = (
        ImpactSGD(model, **options, seed=seed)
        if arm.optimizer == "ImpactSGD"
        else torch.optim.SGD(model.parameters(), **options)
    )
    compute = torch.autocast(inputs.x.device.type, torch.bfloat16, enabled=args.numerics.startswith("bf16"))

    def accuracy(tested: int | None = None, renewed: bool = True) -> float:
        with compute:
            if renewed:
                update_bn((x for x, _ in islice(inputs.batches(seed, 0), RENEWING)), model)
            return 100 * evaluate(model, inputs.heldout_x[:tested], inputs.heldout_y[:tested])[1]

    pruner, criterion = None, None
    if arm.criterion is not None:
        criterion = arm.criterion if arm.criterion in CRITERIA else None
        if arm.criterion == "torch-pruning":
            criterion = GroupNorm(model, example)
        elif criterion is None:
            criterion = VARIANTS[arm.criterion]()
        pruner = RecipePruner(
            model,
            example,
            arm.fractions(),
            criterion=criterion,
            split=arm.split,
            target=arm.target,
            round_to=args.round_to,
            max_ratio=MAX_RATIO,
            optimizer=optimizer,
            every=max(1, min(8, inputs.steps // 4)),
            seed=seed,
        )
    cuts, losses = [], []
    for epoch in range(epochs):
        total = torch.zeros((), device=inputs.x.device)
        for i, (x, y) in enumerate(inputs.batches(seed, epoch)):
            done = (epoch + i / inputs.steps) / epochs
            for group in optimizer.param_groups:
                group["lr"] = args.lr * (0.5 + 0.5 * math.cos(math.pi * done))
            optimizer.zero_grad()
            with compute:
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        losses.append(round(total.item() / inputs.steps, 5))
        if epoch == 0:
            line["weights_after_1"] = checksum(model.parameters())
        if time.time() > stop:
            return None
        if pruner is not None:
            is_due = epoch + 1 in pruner.schedule
            before = accuracy(AROUND) if is_due else 0.0
            start = time.time()
            if is_due and isinstance(criterion, GroupNorm):
                criterion.prepare()
            report = pruner.step()
            cutting += time.time() - start
            if is_due:
                after, renewed = accuracy(AROUND, renewed=False), accuracy(AROUND)
                sizes = {
                    "macs": report.macs[1],
                    "parameters": report.parameters[1],
                    "note": report.note,
                }
                cuts.append({"epoch": epoch + 1, "before": before, "after": after, "renewed": renewed, **sizes})
    line["end"] = accuracy()
    size = model_size(model, ((example,), {}))
    return {
        **{key: value for key, value in task.items() if key not in ("parsed", "stop")},
        **line,
        "optimizer": arm.optimizer,
        "heldout": inputs.heldout,
        "cuts": cuts,
        "loss": losses,
        "macs": [original.macs[""], size.macs[""]],
        "parameters": [original.parameters[""], size.parameters[""]],
        "units": {g.name: [g.original_size, g.size] for g in pruner.graph.groups.values()} if pruner else {},
        "seconds": round(time.time() - started, 1),
        "cutting": round(cutting, 1),
        "device": device_name(),
        "torch": torch.__version__,
    }


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def load_inputs(task: Line) -> Inputs:
    data = load_data("fashion-mnist", Path(task["data_root"]))
    if task["phase"] == "screen":
        data = data.validation_split(1 / 6)
    if task["subset"]:
        data = data.subset(task["subset"])
    if task["tested"]:
        data = replace(data, heldout_x=data.heldout_x[: task["tested"]], heldout_y=data.heldout_y[: task["tested"]])
    return Inputs(data, task["batch"], task["numerics"], torch.device(task["device_type"]))


# ------------------------------------------------------------------------------- workers


def worker(pipe: Connection, threads: int, first: Line) -> None:
    """Trains what it is sent, until it is sent nothing."""
    torch.set_num_threads(threads)
    inputs = load_inputs(first)
    pipe.send(("ready", None))
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        try:
            pipe.send(("line", train(task, inputs, task["stop"])))
        except Exception:
            pipe.send(("error", traceback.format_exc()))


class Lines:
    """A file of JSON lines that is only added to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, line: Line) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        cut_short = bool(content) and not content.endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * cut_short + json.dumps(line) + "\n")

    def all(self) -> list[Line]:
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        return [line for row in rows if (line := self._read(row)) is not None]

    def _read(self, row: str) -> Line | None:
        try:
            return json.loads(row)
        except json.JSONDecodeError:  # it was cut short when its run was stopped
            return None


SETTINGS = ("phase", "epochs", "width", "subset", "tested", "batch", "numerics", "round_to")


def settings(args: argparse.Namespace) -> Line:
    return {name: getattr(args, name) for name in SETTINGS}


def declared(args: argparse.Namespace) -> list[tuple[Arm, int, float | None]]:
    """All runs, the most important first: arm, seed, learning rate; ``None`` is the one found by tuning."""
    if args.phase == "screen":
        runs: list[tuple[Arm, int, float | None]] = []
        if args.lr is None:
            runs += [(read_arm("uncut", args), SCREEN_SEEDS[0], lr) for lr in args.learning_rates]
        if args.impact_lr is None:
            runs += [(read_arm("uncut+impact", args), SCREEN_SEEDS[0], lr) for lr in args.learning_rates]
        if args.lr is None and args.seeds > 1:  # probably needed, and there is nothing else to do meanwhile
            runs += [(read_arm("uncut", args), SCREEN_SEEDS[1], lr) for lr in args.learning_rates[1:-1]]
        for seed in SCREEN_SEEDS[: args.seeds]:
            runs += [(read_arm(text, args), seed, None) for text in ("uncut", *(args.arms or SCREENED))]
            if not args.arms:
                runs += [(read_arm("uncut+impact", args), seed, None)]
    else:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        more = range(seeds.stop, seeds.stop + args.more_seeds)
        first, rest = (args.arms, []) if args.arms else final_arms(args)
        runs = [(read_arm(text, args), seed, None) for text in first for seed in seeds]
        if not args.arms:
            runs += [(read_arm(text, args), seed, None) for text in (*first[:2], PEERS[0]) for seed in more]
        runs += [(read_arm(text, args), seed, None) for text in rest for seed in seeds]
    unique = list(dict.fromkeys(runs))
    theirs = [run for run in unique if run[0].criterion == "torch-pruning"]
    if not theirs:
        return unique
    try:
        import torch_pruning  # noqa: F401
    except ImportError as error:
        print(f"skipped: {len(theirs)} runs of torch-pruning, which cannot be imported: {error}", flush=True)
        return [run for run in unique if run not in theirs]
    return unique


def final_arms(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The arms that the answer hangs on, uncut and the best first; and others. Names may come twice."""
    best, *others = (text.partition("@")[0] for text in args.recipes)
    texts = [*others, *(f"entropy:{split}:ramp" for split in SPLITS)]
    texts += ["rademacher:rademacher:ramp", "rademacher:uniform:ramp"]
    texts += ["uncut+impact", "importance:uniform:ramp", "torch-pruning:global:ramp", "l1:global:ramp"]
    for target in ("@macs0.7", "@params0.5", "@macs0.3"):
        texts += [text + target for text in (best, "scratch", *PEERS[:2])]
    return ["uncut", best, *PEERS[:2], "scratch", *PEERS[2:]], texts


def screening(args: argparse.Namespace) -> list[Line]:
    """The lines of the screening that fits these settings."""
    wanted = {key: value for key, value in settings(args).items() if key not in ("phase", "numerics")}
    lines = Lines(args.screened or args.out).all()
    return [line for line in lines if line["phase"] == "screen" and same(line, wanted)]


def chosen_recipes(lines: Sequence[Line], at_least: int = 8) -> list[str]:
    """The two of our arms that end highest above the uncut network on the validation split, the best first.

    On average over as many seeds as at least so many arms have been trained with.
    """
    lr = best_learning_rate(lines, "uncut")
    ends: dict[str, dict[int, float]] = {}
    for line in lines:
        if line["lr"] == lr and line["optimizer"] == "SGD":
            ends.setdefault(line["arm"], {})[line["seed"]] = line["end"]
    uncut = ends.pop("uncut", {})
    ours = {
        arm: [end - uncut[seed] for seed, end in sorted(found.items()) if seed in uncut]
        for arm, found in ends.items()
        if arm.split(":")[0] not in NOT_OURS and arm.endswith("@macs0.5")
    }
    for seeds in range(len(SCREEN_SEEDS), 0, -1):
        means = {arm: fmean(found[:seeds]) for arm, found in ours.items() if len(found) >= seeds}
        if len(means) >= (at_least if seeds > 1 else 1):
            return sorted(means, key=lambda arm: -means[arm])[:2]
    raise SystemExit("nothing has been screened: give --recipes, or run --phase screen first")


def best_learning_rate(lines: Sequence[Line], name: str) -> float | None:
    """Of the uncut network on the validation split, with the seed of the tuning."""
    tried = [line for line in lines if line["phase"] == "screen" and line["arm"] == name]
    tried = [line for line in tried if line["seed"] == SCREEN_SEEDS[0]]
    return max(tried, key=lambda line: line["end"])["lr"] if tried else None


def is_tuning(seed: int, lr: float | None) -> bool:
    return lr is not None and seed == SCREEN_SEEDS[0]


def same(line: Line, wanted: Line) -> bool:
    return all(line.get(key) == value for key, value in wanted.items())


class Dispatcher:
    """Hands runs to processes in their order."""

    def __init__(self, args: argparse.Namespace, lines: Lines, started: float) -> None:
        self.args, self.lines, self.started = args, lines, started
        self.deadline, self.stop = started + args.deadline, started + args.stop
        self.pending = declared(args)
        self.flying: dict[Any, Line] = {}
        self.seconds: list[float] = []

    def learning_rate(self, arm: Arm) -> float | None:
        """``None`` while it is being tuned."""
        given = self.args.lr if arm.optimizer == "SGD" else self.args.impact_lr
        if given is not None:
            return given
        if any(a.text == arm.uncut and is_tuning(seed, lr) for a, seed, lr in self.pending):
            return None
        if any(task["tuning"] and task["arm"] == arm.uncut for task in self.flying.values()):
            return None
        found = best_learning_rate(screening(self.args), arm.uncut)
        if found is None:
            raise SystemExit(f"no learning rate of {arm.uncut}: give --lr and --impact-lr, or run --phase screen first")
        return found

    def next_task(self) -> Line | None:
        """``None`` if nothing can start now."""
        now = time.time()
        expected = median(self.seconds) if self.seconds else 0.0
        if now > self.deadline or now + 0.9 * expected > self.stop:
            self.pending.clear()
        for run in list(self.pending):
            arm, seed, tried = run
            lr = tried if tried is not None else self.learning_rate(arm)
            if lr is None:
                continue
            self.pending.remove(run)
            task = {**settings(self.args), "arm": arm.text, "seed": seed, "lr": lr}
            if any(same(line, task) for line in [*self.lines.all(), *self.flying.values()]):
                continue
            parsed = {name: getattr(arm, name) for name in Arm.__dataclass_fields__}
            return {**task, "tuning": is_tuning(seed, tried), "parsed": parsed, "stop": self.stop}
        return None

    def run(self) -> None:
        args, context = self.args, multiprocessing.get_context("spawn")
        first = {**settings(args), "data_root": str(args.data_root), "device_type": args.device}
        processes: dict[Any, Any] = {}
        for _ in range(max(1, min(args.workers, len(self.pending)))):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, args.threads, first), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        idle: list[Any] = []
        total, finished = len(self.pending), 0
        try:
            while processes and (self.pending or self.flying):
                for pipe in wait(list(processes), timeout=1.0):
                    try:
                        kind, content = pipe.recv()
                    except (EOFError, OSError):
                        print(f"a worker has died, with {self.flying.pop(pipe, {}).get('arm')}", flush=True)
                        del processes[pipe]
                        idle = [other for other in idle if other is not pipe]
                        continue
                    task = self.flying.pop(pipe, {})
                    name = f"{task.get('arm')} seed {task.get('seed')} lr {task.get('lr')}"
                    if kind == "line" and content is not None:
                        self.lines.add(content)
                        self.seconds.append(content["seconds"])
                        finished += 1
                        clock = time.time() - self.started
                        text = f"{clock:4.0f} s  {name}: {content['end']:.2f} in {content['seconds']:.0f} s"
                        print(f"{text}, {content['cutting']:.0f} of them cutting", flush=True)
                    elif kind == "line":
                        print(f"dropped: {name}", flush=True)
                    elif kind == "error":
                        print(f"FAILED: {name}\n{content}", flush=True)
                    idle.append(pipe)
                for pipe in list(idle):
                    if (task := self.next_task()) is None:
                        break
                    idle.remove(pipe)
                    self.flying[pipe] = task
                    with suppress(OSError):  # of one that has died: the next wait says so
                        pipe.send(task)
                if time.time() > self.stop + 20:
                    print("some workers do not answer", flush=True)
                    break
        finally:
            for pipe in processes:
                if pipe not in self.flying:
                    with suppress(OSError):
                        pipe.send(None)
            for pipe, process in processes.items():
                process.join(0 if pipe in self.flying else 20)
                if process.is_alive():
                    process.terminate()
        print(f"{finished} of {total} runs made in this call", flush=True)


# ------------------------------------------------------------------------------- the device


def time_numerics(args: argparse.Namespace) -> None:
    """Prints, as JSON, the milliseconds that the device is busy in a step, by numerics; the odd widths of a cut
    network are half of it."""
    result = {}
    tried = NUMERICS if args.device == "cuda" else ["tf32-nhwc"]
    for numerics in tried if args.numerics == "auto" else [args.numerics]:
        x, y = torch.randn(args.batch, 1, 28, 28), torch.randint(10, (args.batch,))
        inputs = Inputs(Data(x, y, x[:1], y[:1], 10), args.batch, numerics, torch.device(args.device))
        busy = []
        for width in (args.width, round(0.7 * args.width) | 1):
            model = network(inputs, width, 0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

            def steps(n: int, model: nn.Module = model, inputs: Inputs = inputs, numerics: str = numerics) -> None:
                for _ in range(n):
                    model.zero_grad()
                    with torch.autocast(args.device, torch.bfloat16, enabled=numerics.startswith("bf16")):
                        loss = F.cross_entropy(model(inputs.take(torch.arange(args.batch))), inputs.y)
                    loss.backward()
                    optimizer.step()  # noqa: B023
                if args.device == "cuda":
                    torch.cuda.synchronize()

            steps(3)
            started = time.perf_counter()
            steps(10)
            wall = 100 * (time.perf_counter() - started)
            busy.append([round(t, 3) for t in (wall, 1000 * device_seconds(lambda: steps(5)) / 5)])
        result[numerics] = busy
    print("PROBE " + json.dumps(result), flush=True)


def device_seconds(work: Callable[[], None]) -> float:
    """Of the kernels alone; 0 where they cannot be observed."""
    if not torch.cuda.is_available():
        return 0.0
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
        return sum(getattr(event, "self_device_time_total", 0.0) for event in profile.key_averages()) / 1e6
    except Exception as error:
        print(f"no profile: {error}", flush=True)
        return 0.0


def probe(args: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, list[list[float]]] | None:
    """What :func:`time_numerics` says in a process of its own; ``None`` if that fails or hangs."""
    command = [sys.executable, __file__, "--probe", "--device", args.device, "--numerics", args.numerics]
    command += ["--width", str(args.width), "--batch", str(args.batch)]
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        print("the probe hangs", flush=True)
        return None
    found = next((row for row in done.stdout.splitlines() if row.startswith("PROBE ")), None)
    if found is None:
        print(f"the probe failed: {done.stderr[-800:]}", flush=True)
        return None
    return json.loads(found.removeprefix("PROBE "))


def fastest(times: Mapping[str, list[list[float]]]) -> str:
    for numerics, rows in times.items():
        print(f"{numerics}: a step of the uncut, and of a cut network: {rows} ms [wall, device busy]", flush=True)
    column = 1 if all(row[1] > 0 for rows in times.values() for row in rows) else 0
    return min(times, key=lambda name: sum(row[column] for row in times[name]))


class MPS:
    """NVIDIA's server through which kernels of several processes run at once instead of in turns. It is a process of
    ours, with pipes of its own; the card's settings stay as they are."""

    def __init__(self) -> None:
        places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/nvidia/bin"])
        self.program = shutil.which("nvidia-cuda-mps-control", path=places)
        folder = mkdtemp(prefix="mps")
        pipes = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        self.environment = {**os.environ, **pipes}

    def start(self) -> bool:
        if self.program is None:
            print("no MPS: nvidia-cuda-mps-control is not there", flush=True)
            return False
        try:
            done = subprocess.run(
                [self.program, "-d"],
                env=self.environment,
                timeout=20,
                check=False,
                stdout=subprocess.DEVNULL,  # it lives on, and would hold a pipe open
                stderr=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"no MPS: {error}", flush=True)
            return False
        return done.returncode == 0

    def end(self) -> None:
        if self.program is not None:
            try:
                subprocess.run([self.program], env=self.environment, input="quit\n", text=True, timeout=20, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                print(f"MPS does not end: {error}", flush=True)


# ------------------------------------------------------------------------------- tables

# Of Student's t, 97.5%, by degrees of freedom.
_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120]


def interval(values: Sequence[float]) -> str:
    """Mean and 95% interval."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    half = (_T[len(values) - 2] if len(values) - 2 < len(_T) else 2.1) * stdev(values) / len(values) ** 0.5
    middle = fmean(values)
    return f"{middle:+.2f} [{middle - half:+.2f}, {middle + half:+.2f}]"


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") if values else ""


def print_tables(lines: Sequence[Line]) -> None:
    by_settings: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        by_settings.setdefault(tuple(line[name] for name in SETTINGS), []).append(line)
    for key, found in by_settings.items():
        title = ", ".join(f"{name} {value}" for name, value in zip(SETTINGS, key, strict=True))
        print(f"\n## {title}\n\n{found[0]['device']}, torch {found[0]['torch']}; in % of the {found[0]['heldout']} set")
        if key[0] == "screen":
            print_tuning(found)
            best = {name: best_learning_rate(found, name) for name in ("uncut", "uncut+impact")}
            chosen = [
                line
                for line in found
                if not line["arm"].startswith("uncut") or line["lr"] == best.get(line["arm"], line["lr"])
            ]
        else:
            chosen = found
        print_pairs(chosen)
        print_ends(chosen)
        print_cuts(chosen)


def print_tuning(lines: Sequence[Line]) -> None:
    rates = sorted({line["lr"] for line in lines})
    print(f"\n| learning rate | {' | '.join(f'{lr:g}' for lr in rates)} |")
    print("|---|" + "---|" * len(rates))
    for name in ("uncut", "uncut+impact"):
        cells = [spread([line["end"] for line in lines if (line["arm"], line["lr"]) == (name, lr)]) for lr in rates]
        print(f"| {name} | " + " | ".join(cells) + " |")


def print_pairs(lines: Sequence[Line]) -> None:
    """Whether the runs of a seed did start from the same weights, and see the same batches."""
    for key in ("weights", "batches"):
        seen: dict[int, set[str]] = {}
        for line in lines:
            seen.setdefault(line["seed"], set()).add(line[key])
        wrong = {seed: found for seed, found in seen.items() if len(found) > 1}
        assert not wrong, f"runs of a seed differ in their {key}: {wrong}"
    groups: dict[tuple[int, str, float], list[str]] = {}
    for line in lines:
        if not line["arm"].startswith("scratch"):
            key = (line["seed"], line["optimizer"], line["lr"])
            groups.setdefault(key, []).append(line["weights_after_1"])
    pairs = sum(len(found) - 1 for found in groups.values())
    equal = sum(found.count(found[0]) - 1 for found in groups.values())
    print("\nInitial weights and batches are the same in all arms of a seed;", end=" ")
    print(
        f"weights after the first epoch are, to the last bit, those of the seed's first arm in {equal} of {pairs} runs."
    )


def print_ends(lines: Sequence[Line]) -> None:
    print("\n| arm | seeds | at the end | − uncut | − scratch | − torch-pruning | − l1 | MACs | parameters | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    arms = dict.fromkeys(line["arm"] for line in lines)
    ends: dict[str, dict[int, Line]] = {
        arm: {line["seed"]: line for line in lines if line["arm"] == arm} for arm in arms
    }

    def minus(arm: str, other: str | None) -> str:
        if other is None or other == arm or other not in ends:
            return ""
        seeds = [seed for seed in ends[arm] if seed in ends[other]]
        return interval([ends[arm][seed]["end"] - ends[other][seed]["end"] for seed in seeds])

    for arm, runs in ends.items():
        head, _, target = arm.partition("@")
        schedule = head.split(":")[-1]
        is_impact = next(iter(runs.values()))["optimizer"] == "ImpactSGD"
        cells = [arm, str(len(runs)), spread([run["end"] for run in runs.values()])]
        cells.append(minus(arm, ("uncut+impact" if is_impact else "uncut") if target else None))
        cells.append(minus(arm, f"scratch@{target}" if target else None))
        for peer in ("torch-pruning", "l1"):
            cells.append(minus(arm, f"{peer}:uniform:{schedule}@{target}" if target else None))
        for key in ("macs", "parameters"):
            cells.append(f"{fmean(run[key][1] / run[key][0] for run in runs.values()):.1%}")
        cells.append(f"{fmean(run['seconds'] for run in runs.values()):.0f}")
        print(f"| {' | '.join(cells)} |")


def print_cuts(lines: Sequence[Line]) -> None:
    """Mean accuracies around each cut."""
    arms = dict.fromkeys(line["arm"] for line in lines if line["cuts"])
    if not arms:
        return
    print("\nJust before → just after each cut → with batch norm renewed, by epoch; means over seeds.\n")
    print("| arm | around the cuts |\n|---|---|")
    for arm in arms:
        runs = [line["cuts"] for line in lines if line["arm"] == arm]
        cells = []
        for cuts in zip(*runs, strict=True):
            steps = [f"{fmean(c[key] for c in cuts):.1f}" for key in ("before", "after", "renewed")]
            cells.append(f"{cuts[0]['epoch']}: {' → '.join(steps)}")
        print(f"| {arm} | {', '.join(cells)} |")
    print("\nUnits left by layer in the end, in %, means over seeds.\n")
    names = next(line["units"] for line in lines if line["cuts"])
    print(f"| arm | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for arm in arms:
        runs = [line["units"] for line in lines if line["arm"] == arm]
        cells = [f"{fmean(100 * units[name][1] / units[name][0] for units in runs):.0f}" for name in names]
        print(f"| {arm} | {' | '.join(cells)} |")


def main() -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("screen", "final"), default="screen")
    parser.add_argument("--table", action="store_true", help="print the tables of --out, and train nothing")
    parser.add_argument("--list", action="store_true", help="print the runs in their order, and train nothing")
    parser.add_argument("--recipes", nargs="+", help="of the final phase, the best first (chosen by the screening)")
    parser.add_argument("--screened", type=Path, help="lines of the screening, for the final phase (--out)")
    parser.add_argument("--arms", nargs="+", help="these instead of the phase's own")
    parser.add_argument("--schedule", help="what `ramp` stands for (cubic, from a tenth to 0.7 of the epochs)")
    parser.add_argument("--seeds", type=int, help="screen: at most 2 (2); final (5)")
    parser.add_argument("--more-seeds", type=int, default=5, help="of uncut, the first recipe and torch-pruning")
    parser.add_argument("--first-seed", type=int, default=0, help="of the final phase (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=16, help="of the first stage (%(default)s)")
    parser.add_argument("--subset", type=int, default=0, help="training examples; 0 for all")
    parser.add_argument("--tested", type=int, default=0, help="held-out examples; 0 for all")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--round-to", type=int, default=1, help="channels; 1 for equal MACs in a narrow network")
    parser.add_argument("--lr", type=float, help="of SGD; tuned if it is left out")
    parser.add_argument("--impact-lr", type=float, help="of ImpactSGD; tuned if it is left out")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES, help="that are tried")
    parser.add_argument("--numerics", choices=("auto", *NUMERICS), default="auto", help="auto: the fastest")
    parser.add_argument("--mps", action="store_true", help="share the GPU by NVIDIA's MPS, where it works")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--threads", type=int, default=1, help="of a worker (%(default)s)")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no run starts")
    parser.add_argument("--stop", type=float, help="seconds after which runs are dropped (deadline + 60)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="holds FashionMNIST/raw/*.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pruning_recipe.jsonl")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    lines = Lines(args.out)
    args.seeds = args.seeds or (2 if args.phase == "screen" else 5)
    args.stop = args.stop if args.stop is not None else args.deadline + 60
    if args.probe:
        return time_numerics(args)
    if args.phase == "final" and not args.table and not args.arms:
        args.recipes = args.recipes or chosen_recipes(screening(args))
        print(f"recipes: {' '.join(args.recipes)}", flush=True)
        schedule = args.recipes[0].partition("@")[0].split(":")[-1]  # the peers have that of the best
        args.schedule = args.schedule or (schedule if schedule != "ramp" else None)
    args.schedule = args.schedule or usual_schedule(args.epochs)
    if args.table:
        return print_tables(lines.all())
    if args.list:
        for arm, seed, lr in declared(args):
            print(arm.text, seed, "" if lr is None else lr)
        return
    mps = MPS() if args.mps and args.device == "cuda" else None
    if mps is not None:
        times = probe(args, mps.environment) if mps.start() else None
        print("MPS works" if times else "no MPS: processes take turns", flush=True)
        if times:
            os.environ.update(mps.environment)
        else:
            mps.end()
            mps = None
            times = probe(args, os.environ) if args.numerics == "auto" else None
    else:
        times = probe(args, os.environ) if args.numerics == "auto" else None
    if times and args.numerics == "auto":
        args.numerics = fastest(times)
    elif args.numerics == "auto":
        args.numerics = "tf32-nhwc"
    print(f"numerics {args.numerics}, after {time.time() - started:.0f} s", flush=True)
    try:
        Dispatcher(args, lines, started).run()
    finally:
        if mps is not None:
            mps.end()


if __name__ == "__main__":
    main()
