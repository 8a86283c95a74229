"""Networks that are cut in the runs of a study: when and how, what is left of them, and the table of that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..pruning.pruner import ActivationPruner
from ..pruning.report import LayerReport, PruneReport, model_size
from .data import Data
from .results import ACCURACY, Line, Measure, aligned_table, runs_of, spread

LATENCY_BATCHES = (1, 64)
_LATENCY_REPEATS = 15
_RECORDED = 32  # passes of an epoch that its statistics are made of, where it has as many


@dataclass(frozen=True)
class Pruning:
    """What all runs of a study cut; see :class:`~impact_optim.pruning.ActivationPruner`.

    Args:
        schedule: epoch -> fraction removed by then.
        criterion: a name in :data:`~impact_optim.pruning.CRITERIA`.
        target: what the fractions are of, ``"macs"``, ``"params"`` or ``"units"``.
        split: how the budget is spread over layers.
    """

    schedule: Mapping[int, float]
    criterion: str = "rademacher"
    target: str = "macs"
    split: str | None = None


class PrunedNetwork(NamedTuple):
    """What the cuts of a finished run have left."""

    report: PruneReport
    """Of all cuts together: what there was before the first, and after the last."""
    latency: dict[int, tuple[float, float]]
    """Median milliseconds of an evaluation by batch size, of the network before the first cut and after the last."""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values; indices that were kept are not in it."""
        report = {name: getattr(self.report, name) for name in ("epoch", "macs", "parameters")}
        return {"report": {**report, "layers": [layer._asdict() for layer in self.report.layers]}, "ms": self.latency}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PrunedNetwork:
        """The inverse of :meth:`to_json`."""
        report = content["report"]
        layers = [
            LayerReport(each["name"], tuple(each["units"]), None, tuple(each["macs"]), tuple(each["parameters"]))
            for each in report["layers"]
        ]
        return cls(
            PruneReport(report["epoch"], layers, tuple(report["macs"]), tuple(report["parameters"])),
            {int(batch): tuple(ms) for batch, ms in content["ms"].items()},
        )


def parse_schedule(text: str) -> dict[int, float]:
    """Reads ``"10:0.2,20:0.4"``.

    Raises:
        ValueError: it is not of that form.

    Example:
        >>> parse_schedule("10:0.2,20:0.4")
        {10: 0.2, 20: 0.4}
    """
    try:
        pairs = [(int(epoch), float(fraction)) for epoch, fraction in (part.split(":") for part in text.split(","))]
    except ValueError as error:
        raise ValueError(f"cannot read {text!r}: write EPOCH:FRACTION,..., as in 10:0.2,20:0.4") from error
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{text!r} names an epoch twice")
    return dict(pairs)


def build_pruner(
    pruning: Pruning, model: nn.Module, data: Data, steps: int, optimizer: Optimizer | Sequence[Optimizer], seed: int
) -> ActivationPruner:
    """The pruner of a run.

    Args:
        pruning: what is cut.
        model: on the device of the data.
        data: gives an example.
        steps: of an epoch.
        optimizer: of the model.
        seed: of the run.

    Raises:
        ValueError: the schedule is not of its form.
    """
    return ActivationPruner(
        model,
        data.x[:1],
        pruning.schedule,
        criterion=pruning.criterion,
        optimizer=optimizer,
        target=pruning.target,
        split=pruning.split,
        every=min(8, max(1, steps // _RECORDED)),  # a small set has few passes to spare
        seed=seed,
    )


def pruned_network(pruner: ActivationPruner, original: nn.Module, left: nn.Module, example: Tensor) -> PrunedNetwork:
    """Compares a network with itself before all cuts.

    Args:
        pruner: at the end of its run.
        original, left: plain networks of the sizes that ``pruner.model`` had at first and has now.
        example: one input, [1, ...], on the same device.
    """
    before, after = (model_size(model, ((example,), {})) for model in (original, left))
    layers = [
        LayerReport(
            name,
            (group.original_size, group.original_size, group.size),
            None,
            (before.macs.get(name, 0), after.macs.get(name, 0)),
            (before.parameters.get(name, 0), after.parameters.get(name, 0)),
        )
        for name, group in pruner.graph.groups.items()
    ]
    totals = ((before.macs[""], after.macs[""]), (before.parameters[""], after.parameters[""]))
    report = PruneReport(pruner.epoch, layers, *totals)
    inputs = {batch: example.expand(batch, *example.shape[1:]).contiguous() for batch in LATENCY_BATCHES}
    return PrunedNetwork(report, {batch: latency(original, left, x) for batch, x in inputs.items()})


def latency(first: nn.Module, second: nn.Module, x: Tensor) -> tuple[float, float]:
    """Median milliseconds that two networks take to evaluate the same inputs in float32.

    They take turns, so that a machine whose speed drifts does not show. Both are left in train mode.
    """

    def milliseconds(model: nn.Module) -> float:
        _wait_for(x.device)
        started = time.perf_counter()
        model(x)
        _wait_for(x.device)
        return 1000 * (time.perf_counter() - started)

    first.eval(), second.eval()
    with torch.inference_mode():
        times = [(milliseconds(first), milliseconds(second)) for _ in range(_LATENCY_REPEATS + 2)][2:]
    first.train(), second.train()
    return median(a for a, _ in times), median(b for _, b in times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------- the table


def format_pruned_table(
    lines: Iterable[Line],
    arms: Iterable[str],
    epochs: int,
    heldout: str,
    network: Callable[[str, int], PrunedNetwork],
    measure: Measure = ACCURACY,
) -> str:
    """A row per arm: held-out score around each cut and at the end, size and latency before → after.

    Args:
        lines: of all runs.
        arms: to show; those without finished runs are left out.
        epochs: of a finished run.
        heldout: what the held-out examples are.
        network: what is left of a run, by arm and seed.
        measure: what arms are judged by.
    """
    key, scale, digits = measure.key, measure.scale, f".{measure.digits}f"
    lines = list(lines)
    cuts = sorted({line["epoch"] for line in lines if "accuracy_before_cut" in line})
    what = f"{heldout} {measure.unit or measure.name}"
    header = ["arm", "seeds", *(f"cut after epoch {epoch}: {what}" for epoch in cuts), "at the end"]
    header += ["MACs", "parameters", *(f"ms, batch {batch}" for batch in LATENCY_BATCHES)]
    rows = [header]
    for arm in arms:
        if not (runs := runs_of(lines, arm, epochs)):
            continue
        networks = [network(arm, seed) for seed in runs]
        row = [arm, str(len(runs))]
        for epoch in cuts:
            around = [run[epoch - 1] for run in runs.values() if "accuracy_before_cut" in run[epoch - 1]]
            scores = [spread(scale * line[k] for line in around) for k in (f"{key}_before_cut", key) if around]
            row.append(_change([f"{score:{digits}}" for score in scores]))
        row.append(f"{spread(scale * run[-1][key] for run in runs.values()):{digits}}")
        for sizes in ([n.report.macs for n in networks], [n.report.parameters for n in networks]):
            row.append(_change([_engineering(fmean(size[i] for size in sizes)) for i in (0, 1)]))
        for batch in LATENCY_BATCHES:
            row.append(_change([f"{fmean(n.latency[batch][i] for n in networks):.2f}" for i in (0, 1)]))
        rows.append(row)
    return aligned_table(rows)


def _change(before_after: Sequence[str]) -> str:
    return " → ".join(before_after)


def _engineering(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
