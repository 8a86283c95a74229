"""The report of a study: a sentence and tables on the terminal, pictures, and a page that holds all of it."""

from __future__ import annotations

import base64
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .pruning import PrunedNetwork, format_pruned_table
from .results import Line, Measure, ResultsFolder, format_table, runs_of, summarise, verdict
from .sparse import mean_densities
from .training import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CAPTIONS = {
    "convergence": "Held-out and training curves over the epochs: mean over seeds, ± one standard deviation shaded.",
    "importances": "Importances by layer; 1 is the mean, and where all of them begin.",
    "keep_probability": "How likely the weights of each layer are kept by a mask.",
    "sparsity": "The share of weights that each layer has kept.",
    "pruned": "What the cuts have left of each layer, first seed of",
}
_VERSIONS = ("numpy", "matplotlib")
_NOT_CURVES = ("arm", "seed", "epoch", "heldout")


def write_report(
    results: ResultsFolder,
    arms: Mapping[str, Any],
    seeds: Sequence[int],
    recipe: Recipe,
    heldout: str,
    measure: Measure,
) -> None:
    """Prints what the finished runs came to, and writes ``table.md``, the pictures and ``report.html``.

    Args:
        results: of the study.
        arms: to show.
        seeds: to count.
        recipe: of all runs.
        heldout: what the held-out examples are.
        measure: what arms are judged by.
    """
    epochs = recipe.epochs
    lines = [line for line in results.lines() if line["seed"] in seeds and results.finished(line["arm"], line["seed"])]
    summaries = summarise(lines, arms, epochs, measure)
    if not summaries:
        print("no run has finished yet")
        return
    sentence = verdict(summaries, lines, epochs, heldout, measure)
    tables = [format_table(summaries, epochs, heldout, measure)]
    if recipe.prune is not None:
        tables.append(format_pruned_table(lines, arms, epochs, heldout, lambda *run: _pruned(results, *run), measure))
    (results.path / "table.md").write_text("\n\n".join([*tables, sentence]) + "\n")
    print("\n\n".join([*tables, sentence]))
    try:
        figures = _figures(results, arms, recipe, heldout, lines, measure)
    except ImportError:
        print("the pictures need matplotlib, which is not installed: pip install matplotlib", file=sys.stderr)
        figures = {}
    written = [results.path / "table.md"]
    for name, figure in figures.items():
        written.append(results.path / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    written.append(results.path / "report.html")
    written[-1].write_text(_page(results.path, sentence, tables, figures), encoding="utf-8")
    print("\n" + "\n".join(map(str, written)))


class Curves:
    """What TensorBoard shows: a folder of curves for each run.

    Args:
        folder: made with the first line.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run = ""
        self._writer: Any = None

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, line: Line) -> None:
        """Adds the line of an epoch; later ones of a run that was killed are purged."""
        from torch.utils.tensorboard.writer import SummaryWriter

        if self._run != (run := f"{line['arm']}-{line['seed']}"):
            self.__exit__()
            self._run, self._writer = run, SummaryWriter(self._folder / run, purge_step=line["epoch"])
        for name, value in line.items():
            if name not in _NOT_CURVES:
                self._writer.add_scalar(name, value, line["epoch"])


def _pruned(results: ResultsFolder, arm: str, seed: int) -> PrunedNetwork:
    return PrunedNetwork.from_json(json.loads((results.pruned(arm, seed) / "cut.json").read_text()))


def _figures(
    results: ResultsFolder,
    arms: Iterable[str],
    recipe: Recipe,
    heldout: str,
    lines: Sequence[Line],
    measure: Measure,
) -> dict[str, Figure]:
    from ..plots import (
        arm_colors,
        merge_statistics,
        plot_convergence,
        plot_importances_of,
        plot_keep_probabilities_of,
        plot_pruning,
        plot_sparsity,
    )

    runs = {arm: runs_of(lines, arm, recipe.epochs) for arm in arms}
    runs = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    colors = arm_colors(arms)

    def curves(key: str, scale: float) -> dict[str, list[list[float]]]:
        return {arm: [[scale * line[key] for line in run] for run in by_seed.values()] for arm, by_seed in runs.items()}

    heading = f"{heldout} {measure.name}" + (f" ({measure.unit})" if measure.unit else "")
    panels = {
        heading: curves(measure.key, measure.scale),
        f"training {measure.loss_name}": curves("train_loss", measure.loss_scale),
    }
    figures = {"convergence": plot_convergence(panels, colors)}
    layers = {arm: merge_statistics(results.layers(arm, seed) for seed in by_seed) for arm, by_seed in runs.items()}
    layers = {arm: statistics for arm, statistics in layers.items() if statistics}
    if layers:
        figures["importances"] = plot_importances_of(layers, colors)
        figures["keep_probability"] = plot_keep_probabilities_of(layers, colors)
    if recipe.final_sparsity is not None:
        figures["sparsity"] = plot_sparsity(
            {arm: mean_densities(results.densities(arm, seed) for seed in by_seed) for arm, by_seed in runs.items()},
            colors,
        )
    if recipe.prune is not None:
        for arm, by_seed in runs.items():  # seeds differ little in their widths
            figures[f"pruned-{arm}"] = plot_pruning(_pruned(results, arm, min(by_seed)).report)
    return figures


# ------------------------------------------------------------------------------- the page


def _page(folder: Path, sentence: str, tables: Sequence[str], figures: Mapping[str, Figure]) -> str:
    """All of a report as one page, which needs no other file and no network."""
    config = json.loads((folder / "config.json").read_text())
    settings = {name: value for name, value in config["settings"].items() if value is not None}
    title = f"{settings['data']}, {settings['model']}: {len(config['arms'])} arms"
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=verdict>{escape(sentence)}</p>"]
    parts += [_table(table) for table in tables]
    for name, figure in figures.items():
        kind, _, arm = name.partition("-")
        caption = f"{_CAPTIONS[kind]} {arm}." if arm else _CAPTIONS[kind]
        parts.append(
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{_png(figure)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    parts += ["<h2>Configuration</h2>", _pairs(settings), "<h2>Options of the arms</h2>"]
    parts.append(_pairs({arm: ", ".join(f"{k}={v!r}" for k, v in own.items()) for arm, own in config["arms"].items()}))
    parts += ["<h2>Versions</h2>", _pairs(_versions(settings["device"]))]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem;color:#222;background:#fff}"
    "h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}.verdict{font-size:1.1rem}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:1rem 0}"
    "td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}.pairs td{text-align:left;white-space:normal}"
    "figure{margin:1.5rem 0}img{max-width:100%}figcaption{font-size:.85rem;color:#555}"
)


def _table(markdown: str) -> str:
    header, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines())
    head = "".join(f"<th>{escape(cell)}" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    return f"<div class=wide><table><thead><tr>{head}<tbody>{body}</table></div>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(str(value))}" for name, value in values.items())
    return f"<div class=wide><table class=pairs>{rows}</table></div>"


def _png(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _versions(device: str) -> dict[str, str]:
    from .. import __version__

    found = {"impact_optim": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["machine"] = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        found["GPU"] = torch.cuda.get_device_name()
    return found
