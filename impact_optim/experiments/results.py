"""What a study leaves in its folder, how it is resumed from there, and the table made of it.

::

    config.json                  what the runs depend on
    results.jsonl                a line per run and epoch, written as it ends
    checkpoints/<arm>-<seed>.pt  of runs under way
    layers/<arm>-<seed>.json     importances and keep probabilities of finished runs, by layer
    pruned/<arm>-<seed>/         networks of finished runs that were cut, as save_pruned() keeps them, and what was cut
    sparse/<arm>-<seed>.json     how many weights each layer of finished runs has kept, where a sparsity was asked for
    table.md, *.png, report.html the report; tensorboard/ where that was asked for
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO, NamedTuple

import torch

from ..plots import LayerStatistics
from .sparse import LayerDensity

Line = dict[str, Any]


class ResultsFolder:
    """The files of a study, which no other process may touch before :meth:`close`.

    Args:
        path: the folder; it is made, and may hold an earlier part of the same study.
        settings: what all runs depend on.
        arms: the optimizer's options of each arm.

    Raises:
        ValueError: the folder holds runs that were made with other settings, another process is at work in it, or a
            line of its results is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = path
        self._lines_path = path / "results.jsonl"
        for folder in (path, path / "checkpoints", path / "layers"):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            self._claim(settings, arms)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets other processes work in the folder."""
        self._lock.close()

    def _claim(self, settings: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> None:
        config = {"settings": dict(settings), "arms": {arm: dict(options) for arm, options in arms.items()}}
        config = json.loads(json.dumps(config))  # as it will be read
        path = self.path / "config.json"
        if path.exists():
            # Other arms and more seeds may join: no run depends on them.
            earlier = json.loads(path.read_text())
            self._check_same("", earlier["settings"], config["settings"])
            for arm in config["arms"].keys() & earlier["arms"].keys():
                self._check_same(f" of arm {arm}", earlier["arms"][arm], config["arms"][arm])
            config["arms"] = {**earlier["arms"], **config["arms"]}
        self._cut_torn_line()
        self.lines()
        _write(path, lambda file: file.write(json.dumps(config, indent=2).encode() + b"\n"))

    def _check_same(self, where: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in [*earlier, *(name for name in now if name not in earlier)]:
            if earlier.get(name) != now.get(name):
                raise ValueError(
                    f"the runs in {self.path} were made with {name}={earlier.get(name)}{where}, but now "
                    f"{name}={now.get(name)}: give this study another --out, or go on with the options in "
                    f"{self.path / 'config.json'}"
                )

    def _cut_torn_line(self) -> None:
        if self._lines_path.exists():
            content = self._lines_path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self._lines_path, content.rfind(b"\n") + 1)

    # ---------------------------------------------------------------- lines

    def append(self, line: Line) -> None:
        """Adds the line of an epoch; numbers that are not finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with self._lines_path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def lines(self) -> list[Line]:
        """One line per run and epoch: the later one where a killed run had to repeat an epoch; null becomes nan.

        Raises:
            ValueError: a line other than the last one is not JSON.
        """
        if not self._lines_path.exists():
            return []
        found: dict[tuple[str, int, int], Line] = {}
        # A line without its end was cut short by a kill, and its epoch is repeated.
        for number, text in enumerate(self._lines_path.read_text().split("\n")[:-1], start=1):
            try:
                line: Line = {k: math.nan if v is None else v for k, v in json.loads(text).items()}
                found[line["arm"], line["seed"], line["epoch"]] = line
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{self._lines_path}, line {number} is no result: {text[:60]!r}; remove it") from error
        return list(found.values())

    # ---------------------------------------------------------------- runs

    def checkpoint(self, arm: str, seed: int, device: torch.device) -> dict[str, Any] | None:
        """The last checkpoint of a run under way, or ``None``."""
        path = self._checkpoint_path(arm, seed)
        return torch.load(path, map_location=device, weights_only=True) if path.exists() else None

    def save_checkpoint(self, arm: str, seed: int, checkpoint: dict[str, Any]) -> None:
        """Replaces the checkpoint of a run, all or nothing."""
        _write(self._checkpoint_path(arm, seed), lambda file: torch.save(checkpoint, file))

    def finish(self, arm: str, seed: int, layers: Sequence[LayerStatistics]) -> None:
        """Keeps what the pictures need of a run, and lets its checkpoint go."""
        text = json.dumps([layer._asdict() for layer in layers])
        _write(self._layers_path(arm, seed), lambda file: file.write(text.encode() + b"\n"))
        self._checkpoint_path(arm, seed).unlink(missing_ok=True)

    def finished(self, arm: str, seed: int) -> bool:
        """Whether a run has come to its end."""
        return self._layers_path(arm, seed).exists()

    def layers(self, arm: str, seed: int) -> list[LayerStatistics]:
        """What :meth:`finish` kept; empty for an arm without masks."""
        return [LayerStatistics(**layer) for layer in json.loads(self._layers_path(arm, seed).read_text())]

    def pruned(self, arm: str, seed: int) -> Path:
        """The folder of the network that a run with cuts has left."""
        return self.path / "pruned" / f"{arm}-{seed}"

    def save_densities(self, arm: str, seed: int, layers: Sequence[LayerDensity]) -> None:
        """Keeps how many weights each layer of a run has kept."""
        path = self._densities_path(arm, seed)
        path.parent.mkdir(exist_ok=True)
        text = json.dumps([layer._asdict() for layer in layers])
        _write(path, lambda file: file.write(text.encode() + b"\n"))

    def densities(self, arm: str, seed: int) -> list[LayerDensity]:
        """What :meth:`save_densities` kept."""
        return [LayerDensity(**layer) for layer in json.loads(self._densities_path(arm, seed).read_text())]

    def _densities_path(self, arm: str, seed: int) -> Path:
        return self.path / "sparse" / f"{arm}-{seed}.json"

    def _checkpoint_path(self, arm: str, seed: int) -> Path:
        return self.path / "checkpoints" / f"{arm}-{seed}.pt"

    def _layers_path(self, arm: str, seed: int) -> Path:
        return self.path / "layers" / f"{arm}-{seed}.json"


def _lock(folder: Path) -> BinaryIO:
    """Keeps other processes out of a folder until the returned file is closed, at the latest by the process's end."""
    file = (folder / ".lock").open("wb")
    with contextlib.suppress(ImportError):  # Windows has no fcntl; users there keep their processes apart themselves
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(
                f"another process is at work in {folder}: wait for it, or give this study another --out"
            ) from error
    return file


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that is either the old or the new one, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------- the table


class Spread(NamedTuple):
    """Mean over seeds and standard deviation (of a sample; nan for one seed)."""

    mean: float
    std: float

    def __format__(self, spec: str) -> str:
        return format(self.mean, spec) + ("" if math.isnan(self.std) else f" ± {self.std:{spec}}")


class Measure(NamedTuple):
    """What arms are judged by."""

    key: str
    """Of a line, which has ``train_KEY`` as well, and ``KEY_before_cut`` around a cut."""
    scale: float
    """What the line's number is multiplied by."""
    name: str
    unit: str
    digits: int
    lower_is_better: bool
    lead: str
    """Joins the difference of two arms and the name of the other."""
    loss_name: str
    """What losses are shown as, where they are."""
    loss_scale: float


ACCURACY = Measure("accuracy", 100.0, "accuracy", "%", 2, False, "points above", "loss", 1.0)
BITS = Measure(
    "loss", 1 / math.log(2), "bits per character", "", 3, True, "bits below", "bits per character", 1 / math.log(2)
)
"""What is usual for texts: the loss to the base of 2."""


class ArmSummary(NamedTuple):
    """What the finished runs of an arm came to; scores are accuracies in percent, or what :class:`Measure` says."""

    arm: str
    seeds: int
    score: Spread
    """Of the held-out examples, after the last epoch."""
    early_score: Spread
    """The same after a tenth of the epochs."""
    score_gap: Spread
    """By how much the score is better in training: the generalisation gap."""
    loss_gap: Spread
    """Held-out minus training loss."""
    dropped: Spread
    """Expected share of dropped weights, mean over the epochs."""
    seconds: Spread
    """Spent training, without evaluation."""
    sparsity: Spread | None = None
    """Share of weights that are zero in the end, where that was asked for."""
    before_cut: Spread | None = None
    """Score before a cut after the last epoch, where there was one."""


def early_epoch(epochs: int) -> int:
    """The epoch that ends the first tenth of training, counted from 1."""
    return max(1, round(0.1 * epochs))


def runs_of(lines: Iterable[Line], arm: str, epochs: int) -> dict[int, list[Line]]:
    """The complete runs of an arm by seed, each a list of lines in the order of the epochs."""
    runs: dict[int, list[Line]] = {}
    for line in lines:
        if line["arm"] == arm:
            runs.setdefault(line["seed"], []).append(line)
    return {
        seed: sorted(run, key=lambda line: line["epoch"]) for seed, run in sorted(runs.items()) if len(run) == epochs
    }


def summarise(lines: Iterable[Line], arms: Iterable[str], epochs: int, measure: Measure = ACCURACY) -> list[ArmSummary]:
    """Summarises the finished runs of each arm; arms without any are left out."""
    lines, summaries = list(lines), []
    key, scale, cut_key = measure.key, measure.scale, f"{measure.key}_before_cut"
    sign = -1 if measure.lower_is_better else 1
    for arm in arms:
        runs = list(runs_of(lines, arm, epochs).values())
        if runs:
            last = [run[-1] for run in runs]
            summaries.append(
                ArmSummary(
                    arm,
                    len(runs),
                    score=spread(scale * end[key] for end in last),
                    early_score=spread(scale * run[early_epoch(epochs) - 1][key] for run in runs),
                    score_gap=spread(sign * scale * (end[f"train_{key}"] - end[key]) for end in last),
                    loss_gap=spread(end["loss"] - end["train_loss"] for end in last),
                    dropped=spread(100 * fmean(line["dropped"] for line in run) for run in runs),
                    seconds=spread(sum(line["seconds"] for line in run) for run in runs),
                    sparsity=spread(100 * end["sparsity"] for end in last) if "sparsity" in last[0] else None,
                    before_cut=spread(scale * end[cut_key] for end in last) if cut_key in last[0] else None,
                )
            )
    return summaries


def verdict(
    summaries: Sequence[ArmSummary],
    lines: Iterable[Line],
    epochs: int,
    heldout: str = "test",
    measure: Measure = ACCURACY,
) -> str:
    """One sentence: which arm is best, and by how much beyond the spread.

    Arms are compared in pairs of runs that share a seed, and so initial weights and batches. The spread is the standard
    deviation of these differences.
    """
    lines = list(lines)
    sign, digits = -1 if measure.lower_is_better else 1, f".{measure.digits}f"

    def rank(summary: ArmSummary) -> float:  # a run that diverged has no loss
        return -math.inf if math.isnan(summary.score.mean) else sign * summary.score.mean

    best, *others = sorted(summaries, key=rank, reverse=True)
    reached = f"{best.score:{digits}}{measure.unit} {heldout} {measure.name}"
    if not others:
        return f"{best.arm} has {reached}; there is nothing to compare it with."
    found = []
    for other in dict.fromkeys([others[0].arm, *(s.arm for s in others if s.arm == "baseline")]):
        first, second = (runs_of(lines, arm, epochs) for arm in (best.arm, other))
        shared = sorted(first.keys() & second.keys())
        if not shared:
            found.append(f"not to be compared with {other}, which shares no seed with it")
            continue
        ends = [(first[seed][-1][measure.key], second[seed][-1][measure.key]) for seed in shared]
        lead = spread(sign * measure.scale * (ours - theirs) for ours, theirs in ends)
        if math.isnan(lead.std):
            beyond = "of one seed, which has no spread"
        elif lead.mean - lead.std >= 0.5 * 10**-measure.digits:  # what shows with so many digits
            beyond = f"{lead.mean - lead.std:{digits}} beyond the spread"
        else:
            beyond = "within the spread"
        found.append(f"{lead:{digits}} {measure.lead} {other} ({beyond})")
    return f"{best.arm} is best, with {reached}: {', and '.join(found)}."


def format_table(
    summaries: Sequence[ArmSummary], epochs: int, heldout: str = "test", measure: Measure = ACCURACY
) -> str:
    """The summaries as an aligned table that is Markdown too."""
    unit, digits, by_loss = f" {measure.unit}".rstrip(), f".{measure.digits}f", measure.key == "loss"
    header = [
        "arm",
        "seeds",
        f"{heldout} {measure.name}{unit}",
        f"after epoch {early_epoch(epochs)}{unit}",
        (f"{heldout} − train" if measure.lower_is_better else f"train − {heldout}") + unit,
        *([] if by_loss else ["loss gap"]),
        "dropped %",
        "seconds",
    ]
    is_sparse = any(s.sparsity is not None for s in summaries)
    rows = [[*header, "zero %", f"before the cut{unit}"] if is_sparse else header]
    for s in summaries:
        scores = [f"{value:{digits}}" for value in (s.score, s.early_score, s.score_gap)]
        losses = [] if by_loss else [f"{s.loss_gap:.3f}"]
        row = [s.arm, str(s.seeds), *scores, *losses, f"{s.dropped.mean:.1f}", f"{s.seconds:.1f}"]
        if is_sparse:
            row.append("" if s.sparsity is None else f"{s.sparsity.mean:.1f}")
            row.append("" if s.before_cut is None else f"{s.before_cut:{digits}}")
        rows.append(row)
    return aligned_table(rows)


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them the header, as an aligned Markdown table: the first column left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [aligned[0], rule, *aligned[1:]])


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard deviation of the values."""
    values = list(values)
    mean = fmean(values)
    # Not statistics.stdev, which cannot take the nan of a run that diverged.
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1) if len(values) > 1 else math.nan
    return Spread(mean, math.sqrt(variance))
