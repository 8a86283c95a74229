"""Pictures of importances, keep probabilities and convergence.

Every function returns a ``matplotlib.figure.Figure`` of its own, which no global state knows of: there is nothing to
close. Save it with ``figure.savefig("name.png", dpi=150)``. Needs matplotlib, which the package does not depend on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .impact import Impact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

    from .pruning.report import PruneReport

__all__ = [
    "LayerStatistics",
    "arm_colors",
    "layer_statistics",
    "merge_statistics",
    "plot_convergence",
    "plot_importances",
    "plot_importances_of",
    "plot_keep_probabilities",
    "plot_keep_probabilities_of",
    "plot_pruning",
    "plot_sparsity",
]

# Okabe & Ito's palette, which colour-blind readers can tell apart, in an order that also works in print.
_PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", ":")  # one for each time round the palette
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.4,
}

# Importances are counted in bins of equal width on a log scale, one of which is centred at 1.
_BINS_PER_DECADE = 30
_LOWEST, _HIGHEST = -3, 8  # decades; what lies beyond is counted in the bins at the ends
_KEEP_BINS = 100
_MOST_LAYERS = 6


class LayerStatistics(NamedTuple):
    """How importances and keep probabilities are distributed over one tensor of weights."""

    name: str
    numel: int
    importance: list[int]
    """Counts of weights by importance, in log-spaced bins from 1e-3 to 1e8."""
    keep: list[int]
    """Counts of weights by keep probability, rounded to percent: 101 of them."""
    keep_mean: float


@torch.no_grad()
def layer_statistics(optimizer: Impact, model: nn.Module) -> list[LayerStatistics]:
    """Importances and keep probabilities of every maskable tensor of a model, in the model's order.

    Raises:
        ValueError: a weight of the model that is trained does not belong to the optimizer.
    """
    statistics = []
    for name, param in model.named_parameters():
        if param.dim() >= 2 and param.requires_grad:
            importance, keep = optimizer.importance(param), optimizer.keep_probability(param)
            bins = (importance.clamp_min(1e-30).log10() * _BINS_PER_DECADE).round().long()
            bins = bins.clamp(_LOWEST * _BINS_PER_DECADE, _HIGHEST * _BINS_PER_DECADE) - _LOWEST * _BINS_PER_DECADE
            statistics.append(
                LayerStatistics(
                    name.removesuffix(".weight"),
                    param.numel(),
                    bins.flatten().bincount(minlength=(_HIGHEST - _LOWEST) * _BINS_PER_DECADE + 1).tolist(),
                    (keep * _KEEP_BINS).round().long().flatten().bincount(minlength=_KEEP_BINS + 1).tolist(),
                    keep.double().mean().item(),
                )
            )
    return statistics


def merge_statistics(runs: Iterable[Sequence[LayerStatistics]]) -> list[LayerStatistics]:
    """Pools the statistics of several runs of one model, such as those of several seeds, layer by layer."""
    return [
        LayerStatistics(
            layers[0].name,
            sum(layer.numel for layer in layers),
            [sum(counts) for counts in zip(*(layer.importance for layer in layers), strict=True)],
            [sum(counts) for counts in zip(*(layer.keep for layer in layers), strict=True)],
            sum(layer.keep_mean for layer in layers) / len(layers),
        )
        for layers in zip(*runs, strict=True)
    ]


def arm_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in order; hand it to several pictures so that they agree."""
    return {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(names)}


def plot_importances(optimizer: Impact, model: nn.Module) -> Figure:
    """Histogram of the importances of a model's weights, a panel per layer.

    Uniform importances are a spike at 1; degenerate ones are a single large value, with all others far below.

    Example:
        >>> plot_importances(optimizer, model).savefig("importances.png", dpi=150)
    """
    return plot_importances_of({"": layer_statistics(optimizer, model)})


def plot_importances_of(
    arms: Mapping[str, Sequence[LayerStatistics]], colors: Mapping[str, str] | None = None
) -> Figure:
    """:func:`plot_importances` for several arms, a row each; of more than six layers, six spread evenly are shown.

    Raises:
        ValueError: there is nothing to show, or the arms do not have the same layers.
    """
    from matplotlib import rc_context
    from matplotlib.ticker import NullLocator

    names = _layer_names(arms)
    shown = _spread_evenly(len(names), _MOST_LAYERS)
    colors = colors or arm_colors(["", *arms])
    with rc_context(_STYLE):
        figure, axes = _grid(len(arms), len(shown), width=1.8, height=1.5, sharex="row", sharey=True)
        smallest = 1.0
        for row, (arm, layers) in enumerate(arms.items()):
            edges, shares, (low, high) = _importance_shares([layers[i] for i in shown])
            smallest = min(smallest, shares[shares > 0].min())
            for ax, i, layer_shares in zip(axes[row], shown, shares, strict=True):
                ax.axvline(1, color="0.7", linewidth=0.8, zorder=0)
                # The outline keeps a bin visible that is thinner than a pixel: the one weight that took everything.
                ax.stairs(layer_shares, edges, fill=True, facecolor=colors[arm], edgecolor=colors[arm], linewidth=0.9)
                if row == 0:
                    ax.set_title(names[i])
                ax.set_xscale("log")
                ax.xaxis.set_minor_locator(NullLocator())
            axes[row][0].set_xticks(*_importance_ticks(low, high))
            axes[row][0].set_xlim(min(low / 1.3, 0.08), max(high * 1.3, 12.5))
            axes[row][0].set_ylabel(arm)
        axes[0][0].set_yscale("log")
        axes[0][0].set_ylim(smallest / 2, 2)
        figure.supxlabel("importance (mean 1)", fontsize=9)
        figure.supylabel("share of the layer's weights", fontsize=9)
    return figure


def plot_keep_probabilities(optimizer: Impact, model: nn.Module) -> Figure:
    """How likely each layer's weights are kept: their distribution, and its mean as a dot.

    Example:
        >>> plot_keep_probabilities(optimizer, model).savefig("keep.png", dpi=150)
    """
    return plot_keep_probabilities_of({"": layer_statistics(optimizer, model)})


def plot_keep_probabilities_of(
    arms: Mapping[str, Sequence[LayerStatistics]], colors: Mapping[str, str] | None = None
) -> Figure:
    """:func:`plot_keep_probabilities` for several arms, a column each.

    Raises:
        ValueError: there is nothing to show, or the arms do not have the same layers.
    """
    from matplotlib import rc_context

    names = _layer_names(arms)
    colors = colors or arm_colors(["", *arms])
    with rc_context(_STYLE):
        figure, axes = _grid(1, len(arms), width=2.3, height=0.8 + 0.36 * len(names), sharex=True, sharey=True)
        for (arm, layers), ax in zip(arms.items(), axes[0], strict=True):
            budget = sum(layer.keep_mean * layer.numel for layer in layers) / sum(layer.numel for layer in layers)
            ax.axvline(budget, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            for y, layer in enumerate(layers):
                ax.axhline(y, color="0.85", linewidth=0.6, zorder=0)
                tallest = max(layer.keep)
                heights = [-0.8 * (count / tallest) ** 0.5 for count in layer.keep]  # the root shows thin tails
                edges = [(k - 0.5) / _KEEP_BINS for k in range(_KEEP_BINS + 2)]
                ax.stairs([y + h for h in heights], edges, baseline=y, fill=True, color=colors[arm], alpha=0.45)
                ax.plot(layer.keep_mean, y, "o", color=colors[arm], markersize=4, clip_on=False)
            ax.set_title(arm)
            ax.set_xlim(-0.02, 1.02)
            ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes[0][0].set_yticks(range(len(names)), names)
        axes[0][0].set_ylim(len(names) - 0.7, -0.95)
        figure.supxlabel("keep probability\n(dot: layer's mean, dashed: mean of all weights)", fontsize=9)
    return figure


def plot_convergence(curves: Mapping[str, Mapping[str, ArrayLike]], colors: Mapping[str, str] | None = None) -> Figure:
    """Curves over the epochs, mean over seeds with ± one standard deviation shaded, a panel per quantity.

    Where a loss falls by a decade or more, its axis is logarithmic, and so are its mean and deviation. The axis of an
    accuracy leaves out the steep first twentieth of the epochs, in favour of what the arms differ in.

    Args:
        curves: quantity -> arm -> values of shape ``(seeds, epochs)`` or ``(epochs,)``. A quantity labels its panel;
            "loss" or "accuracy" in it says what it is.
        colors: of the arms, as from :func:`arm_colors`.

    Raises:
        ValueError: no curves, or values of another shape.

    Example:
        >>> plot_convergence({"test accuracy (%)": {"baseline": [[90, 95, 96], [91, 94, 97]]}})
    """
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    if not any(curves.values()):
        raise ValueError("plot_convergence() got no curves: pass {quantity: {arm: values of shape (seeds, epochs)}}")
    names = list(dict.fromkeys(arm for panel in curves.values() for arm in panel))
    colors = colors or arm_colors(names)
    with rc_context(_STYLE):
        figure, axes = _grid(1, len(curves), width=3.5, height=2.9)
        handles = {}
        for (quantity, panel), ax in zip(curves.items(), axes[0], strict=True):
            arrays = {arm: np.atleast_2d(np.asarray(values, dtype=float)) for arm, values in panel.items()}
            for arm, values in arrays.items():
                if values.ndim != 2 or values.size == 0:
                    raise ValueError(f"{quantity} of {arm} has shape {values.shape}, but must be (seeds, epochs)")
            everything = np.concatenate([values.ravel() for values in arrays.values()])
            everything = everything[np.isfinite(everything)]  # a run that diverged has no loss
            log = "loss" in quantity and everything.size > 0 and 0 < 10 * everything.min() < everything.max()
            late = []
            for arm, values in arrays.items():
                seeds, epochs = values.shape
                values = np.log(values) if log else values
                mean, std = values.mean(0), values.std(0, ddof=1) if seeds > 1 else np.zeros(epochs)
                curve, *band = (np.exp(v) if log else v for v in (mean, mean - std, mean + std))
                x = np.arange(1, epochs + 1)
                marker = "o" if epochs == 1 else ""
                line = _LINES[names.index(arm) // len(_PALETTE) % len(_LINES)]
                (handles[arm],) = ax.plot(x, curve, label=arm, color=colors[arm], linestyle=line, marker=marker)
                ax.fill_between(x, *band, color=colors[arm], alpha=0.15, linewidth=0)
                late.extend(curve[epochs // 20 :][np.isfinite(curve[epochs // 20 :])])
            if log:
                ax.set_yscale("log")
            else:
                ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
            if "accuracy" in quantity and late:
                margin = 0.04 * (everything.max() - min(late)) or 1
                ax.set_ylim(min(late) - margin, everything.max() + margin)
            ax.set_xlabel("epoch")
            ax.set_ylabel(quantity)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(axis="y")
        columns = min(4, 2 * len(curves), len(handles))
        figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=columns)
    return figure


def plot_pruning(report: PruneReport) -> Figure:
    """What a cut left of every layer: its units and its multiply-accumulates (MACs), a row each.

    Solid is what stays, pale what this cut took; the outline of the units is what there was when the model was traced.

    Raises:
        ValueError: the model has no layer that can be cut.

    Example:
        >>> plot_pruning(pruner.step()).savefig("pruned.png", dpi=150)
    """
    from matplotlib import rc_context
    from matplotlib.ticker import EngFormatter, MaxNLocator

    layers = report.layers
    if not layers:
        raise ValueError("there is nothing to show: the model has no layer that can be cut")
    stays, goes = _PALETTE[1], _PALETTE[6]
    with rc_context(_STYLE):
        figure, axes = _grid(1, 2, width=3.2, height=0.5 + 0.2 * len(layers), sharey=True)
        rows = range(len(layers))
        for ax, before, after in (
            (axes[0][0], [layer.units[1] for layer in layers], [layer.units[2] for layer in layers]),
            (axes[0][1], [layer.macs[0] for layer in layers], [layer.macs[1] for layer in layers]),
        ):
            ax.barh(rows, before, height=0.7, color=goes, alpha=0.5, linewidth=0, label="taken by this cut")
            ax.barh(rows, after, height=0.7, color=stays, linewidth=0, label="left")
            ax.grid(axis="x")
        original = [layer.units[0] for layer in layers]
        axes[0][0].barh(rows, original, height=0.7, fill=False, edgecolor="0.4", linewidth=0.7, label="originally")
        axes[0][0].set_yticks(rows, [layer.name for layer in layers])
        axes[0][0].set_ylim(len(layers) - 0.4, -0.6)
        axes[0][0].xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes[0][1].xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes[0][1].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[0][0].set_xlabel("units")
        axes[0][1].set_xlabel(f"MACs (model: {report.macs[1] / max(report.macs[0], 1):.0%} of those before)")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=3)
    return figure


def plot_sparsity(arms: Mapping[str, Mapping[str, float]], colors: Mapping[str, str] | None = None) -> Figure:
    """The share of weights that every layer has kept, a row per layer and a point per arm, on a log scale.

    Args:
        arms: arm -> layer -> share kept, in (0, 1]; the same layers for all arms.
        colors: of the arms, as from :func:`arm_colors`.

    Raises:
        ValueError: no arm, or arms of different layers.

    Example:
        >>> report = optimizer.sparsify(0.9)
        >>> plot_sparsity({"saliency": {t.name: 1 - t.sparsity for t in report.tensors}})
    """
    from matplotlib import rc_context
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = [list(layers) for layers in arms.values()]
    if not names or any(layers != names[0] for layers in names):
        raise ValueError("plot_sparsity() wants {arm: {layer: share kept}}, with the same layers for all arms")
    colors = colors or arm_colors(arms)
    rows = range(len(names[0]))
    with rc_context(_STYLE):
        figure, axes = _grid(1, 1, width=4.5, height=0.6 + 0.22 * len(rows))
        ax = axes[0][0]
        for arm, layers in arms.items():
            ax.plot(list(layers.values()), rows, "o-", label=arm, color=colors[arm], markersize=4, linewidth=0.8)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(rows, names[0])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel("weights kept")
        ax.grid(axis="both")
        figure.legend(loc="outside upper center", ncols=min(3, len(arms)))
    return figure


# ------------------------------------------------------------------------------- helpers


def _grid(rows: int, columns: int, *, width: float, height: float, **shared: Any) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    # Not pyplot's: that would choose a window system and keep the figure open.
    figure = Figure(figsize=(width * columns + 0.9, height * rows + 0.7), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).tolist()


def _layer_names(arms: Mapping[str, Sequence[LayerStatistics]]) -> list[str]:
    names = {arm: [layer.name for layer in layers] for arm, layers in arms.items()}
    if not any(names.values()):
        raise ValueError("there is nothing to show: no arm, or a model without a weight that could be dropped")
    first, *others = names
    for other in others:
        if names[other] != names[first]:
            raise ValueError(
                f"the arms {first!r} and {other!r} have different layers: show models of one kind together"
            )
    return names[first]


def _spread_evenly(count: int, most: int) -> list[int]:
    """At most so many indices below ``count``, the first and the last among them."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _importance_shares(layers: Sequence[LayerStatistics]) -> tuple[NDArray[Any], NDArray[Any], tuple[float, float]]:
    """Bin edges, the share of each layer's weights in each bin, and the range of the bins that are not empty.

    Where importances range widely, an odd number of bins becomes one, so that one is centred at 1 still.
    """
    import numpy as np

    counts = np.array([layer.importance for layer in layers])
    bins = np.arange(counts.shape[1]) + _LOWEST * _BINS_PER_DECADE
    used = bins[counts.sum(0) > 0]
    joined = (used[-1] - used[0]) // 120 * 2 + 1
    groups = np.round(bins / joined).astype(int)
    edges = 10 ** ((np.arange(groups[0], groups[-1] + 2) - 0.5) * joined / _BINS_PER_DECADE)
    shares = np.stack([np.bincount(groups - groups[0], weights=c) / c.sum() for c in counts])
    filled = np.flatnonzero(shares.sum(0))
    return edges, shares, (edges[filled[0]], edges[filled[-1] + 1])


def _importance_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Powers of ten for an axis of importances, about five of them, and what to write there."""
    first, last = min(-1, math.ceil(math.log10(low))), max(1, math.floor(math.log10(high)))
    step = max(1, math.ceil((last - first) / 4))
    decades = [d for d in range(first, last + 1) if d % step == 0]
    labels = {d: f"{10.0**d:g}" if -2 <= d <= 2 else f"$10^{{{d}}}$" for d in decades}
    if low < 10**_LOWEST:  # the lowest bin is in use, which holds all that is smaller
        labels = {d: label for d, label in labels.items() if d >= _LOWEST + step}
        labels[_LOWEST] = f"≤$10^{{{_LOWEST}}}$"
    return [10.0**d for d in labels], list(labels.values())
