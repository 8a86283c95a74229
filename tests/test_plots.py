"""The pictures: what they show, for whom, and that they leave nothing behind."""

import math

import pytest
import torch
from torch import nn

from impact_optim import ImpactSGD
from impact_optim.plots import (
    LayerStatistics,
    arm_colors,
    layer_statistics,
    merge_statistics,
    plot_convergence,
    plot_importances,
    plot_importances_of,
    plot_keep_probabilities,
    plot_keep_probabilities_of,
    plot_sparsity,
)

plt = pytest.importorskip("matplotlib.pyplot")


def trained(**options) -> tuple[ImpactSGD, nn.Module]:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, **{"drop_rate": 0.25, "importance_lr": 0.3, **options})
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer, model


def bars(ax) -> dict[float, float]:
    """The bars of a histogram that have a height, by the centre of their bin on the log scale."""
    data = ax.patches[0].get_data()
    centres = [math.sqrt(a * b) for a, b in zip(data.edges, data.edges[1:], strict=False)]
    return {centre: value for centre, value in zip(centres, data.values, strict=True) if value > 0}


def test_statistics_count_every_weight_of_every_layer():
    optimizer, model = trained(importance="saliency")
    statistics = layer_statistics(optimizer, model)
    assert [(s.name, s.numel) for s in statistics] == [("0", 48), ("2", 24)]
    for s, param in zip(statistics, (model[0].weight, model[2].weight), strict=True):
        assert sum(s.importance) == sum(s.keep) == param.numel()
        keep = optimizer.keep_probability(param)
        assert s.keep_mean == pytest.approx(keep.mean().item())
        assert sum(k * count for k, count in enumerate(s.keep)) / param.numel() == pytest.approx(
            100 * s.keep_mean, abs=0.5
        )


def test_statistics_want_the_model_of_the_optimizer():
    optimizer, _ = trained()
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        layer_statistics(optimizer, nn.Linear(2, 2))


def test_uniform_importances_are_one_spike_at_one():
    figure = plot_importances(*trained(importance="uniform"))
    assert [ax.get_title() for ax in figure.axes] == ["0", "2"]
    for ax in figure.axes:
        assert list(bars(ax).items()) == [(pytest.approx(1.0), 1.0)]
        assert ax.get_xscale() == ax.get_yscale() == "log"


def test_degenerate_importances_are_one_large_value_and_the_rest_far_below():
    optimizer, model = trained(importance="saliency")
    with torch.no_grad():
        for param in (model[0].weight, model[2].weight):
            optimizer.state[param]["log_importance"].fill_(-60)
            optimizer.state[param]["log_normalizer"] = torch.tensor(-math.log(72))
        optimizer.state[model[0].weight]["log_importance"][3, 2] = 0  # of 72 weights, this one has everything
    figure = plot_importances(optimizer, model)
    first, second = map(bars, figure.axes)
    assert list(second) == [pytest.approx(1e-3, rel=0.2)]
    assert list(first) == [pytest.approx(1e-3, rel=0.2), pytest.approx(72, rel=0.2)]
    assert first[max(first)] == pytest.approx(1 / 48)
    # Both ends are in sight, and the lower one is labelled as what it is.
    low, high = figure.axes[0].get_xlim()
    bottom, top = figure.axes[0].get_ylim()
    assert low < 1e-3
    assert high > 72
    assert bottom < 1 / 48
    assert top > 1
    figure.draw_without_rendering()
    assert "≤$10^{-3}$" in [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_wide_importances_keep_a_bin_centred_at_one():
    counts = [0] * 331
    counts[0] = counts[90] = counts[330] = 5  # 1e-3, 1 and 1e8
    figure = plot_importances_of({"arm": [LayerStatistics("layer", 15, counts, [15] + [0] * 100, 0.0)]})
    assert any(
        centre == pytest.approx(1.0) and share == pytest.approx(1 / 3) for centre, share in bars(figure.axes[0]).items()
    )


def test_importances_show_a_row_per_arm_and_at_most_six_layers():
    layers = [
        LayerStatistics(f"layer{i}", 4, [0] * 90 + [4] + [0] * 240, [0] * 90 + [4] + [0] * 10, 0.9) for i in range(21)
    ]
    figure = plot_importances_of({"one": layers, "two": layers})
    assert [ax.get_title() for ax in figure.axes[:6]] == [f"layer{i}" for i in (0, 4, 8, 12, 16, 20)]
    assert len(figure.axes) == 12
    assert [figure.axes[i].get_ylabel() for i in (0, 6)] == ["one", "two"]


def test_keep_probabilities_show_each_layers_mean_and_the_budget():
    optimizer, model = trained(importance="saliency")
    (ax,) = plot_keep_probabilities(optimizer, model).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2"]
    dots = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert dots == pytest.approx([s.keep_mean for s in layer_statistics(optimizer, model)])
    dashed = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == [pytest.approx(0.75, abs=1e-3)]
    assert len(ax.patches) == 2


def test_keep_probabilities_show_a_column_per_arm():
    arms = {"saliency": trained(importance="saliency"), "uniform": trained(importance="uniform")}
    statistics = {name: layer_statistics(*arm) for name, arm in arms.items()}
    figure = plot_keep_probabilities_of(statistics, {"saliency": "red", "uniform": "blue"})
    assert [ax.get_title() for ax in figure.axes] == ["saliency", "uniform"]
    assert {line.get_color() for line in figure.axes[1].lines if line.get_marker() == "o"} == {"blue"}


@pytest.mark.parametrize("plot", [plot_importances_of, plot_keep_probabilities_of])
def test_arms_must_have_something_to_show_and_the_same_layers(plot):
    optimizer, model = trained()
    layers = layer_statistics(optimizer, model)
    with pytest.raises(ValueError, match="nothing to show"):
        plot({})
    with pytest.raises(ValueError, match="'one' and 'two' have different layers"):
        plot({"one": layers, "two": layers[:1]})


def test_merged_statistics_pool_the_runs():
    one = [LayerStatistics("layer", 4, [1, 3], [4, 0], 0.25)]
    two = [LayerStatistics("layer", 4, [2, 2], [1, 3], 0.75)]
    assert merge_statistics([one, two]) == [LayerStatistics("layer", 8, [3, 5], [5, 3], 0.5)]


def test_convergence_draws_mean_and_deviation_of_each_arm():
    curves = {
        "test accuracy (%)": {"baseline": [[80, 90], [84, 92]], "fisher": [[70, 95], [72, 97]]},
        "training loss": {"baseline": [[1.0, 0.5], [1.2, 0.7]]},
    }
    figure = plot_convergence(curves)
    accuracy, loss = figure.axes
    assert (accuracy.get_ylabel(), loss.get_ylabel()) == ("test accuracy (%)", "training loss")
    assert {line.get_label(): list(line.get_ydata()) for line in accuracy.lines} == {
        "baseline": [82, 91],
        "fisher": [71, 96],
    }
    assert list(accuracy.lines[0].get_xdata()) == [1, 2]
    assert accuracy.get_ylim()[1] <= 100
    band = accuracy.collections[0].get_datalim(accuracy.transData)
    assert (band.y0, band.y1) == (pytest.approx(82 - math.sqrt(8)), pytest.approx(91 + math.sqrt(2)))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["baseline", "fisher"]
    assert loss.get_yscale() == "linear"


def test_convergence_of_a_loss_that_falls_far_is_logarithmic_in_axis_mean_and_deviation():
    (ax,) = plot_convergence({"loss": {"arm": [[1.0, 0.001], [1.0, 0.1]]}}).axes
    assert ax.get_yscale() == "log"
    assert list(ax.lines[0].get_ydata()) == [pytest.approx(1.0), pytest.approx(0.01)]
    assert ax.collections[0].get_paths()[0].vertices[:, 1].min() > 0


def test_convergence_leaves_out_the_steep_start_of_an_accuracy_but_no_later_fall():
    rise = [20 + 5 * i for i in range(15)] + [95] * 25
    (ax,) = plot_convergence({"accuracy": {"arm": rise}}).axes
    assert 20 < ax.get_ylim()[0] < 30
    (ax,) = plot_convergence({"accuracy": {"arm": [*rise[:-1], 10]}}).axes
    assert ax.get_ylim()[0] < 10


def test_convergence_survives_a_run_that_diverged():
    (ax,) = plot_convergence({"loss": {"arm": [[1.0, 0.5], [1.0, math.nan]], "other": [[math.nan] * 2]}}).axes
    assert ax.lines[0].get_ydata()[0] == 1.0
    assert math.isnan(ax.lines[0].get_ydata()[1])


def test_convergence_of_one_epoch_is_a_dot():
    (ax,) = plot_convergence({"accuracy": {"arm": [[90]]}}).axes
    assert ax.lines[0].get_marker() == "o"


@pytest.mark.parametrize("curves", [{}, {"loss": {}}])
def test_convergence_wants_curves(curves):
    with pytest.raises(ValueError, match="no curves"):
        plot_convergence(curves)


def test_convergence_names_curves_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"loss of arm has shape \(1, 1, 2\)"):
        plot_convergence({"loss": {"arm": [[[1, 2]]]}})


def test_sparsity_shows_what_each_layer_kept():
    figure = plot_sparsity({"a": {"first": 0.5, "last": 0.01}, "b": {"first": 0.25, "last": 1.0}})
    (ax,) = figure.axes
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.5, 0.01], [0.25, 1.0]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "last"]
    assert ax.get_xscale() == "log"
    for arms in ({}, {"a": {"first": 0.5}, "b": {"last": 0.5}}):
        with pytest.raises(ValueError, match="the same layers for all arms"):
            plot_sparsity(arms)


def test_colors_tell_seven_arms_apart_and_lines_the_rest():
    names = [f"arm{i}" for i in range(9)]
    assert len(set(arm_colors(names[:7]).values())) == 7
    (ax,) = plot_convergence({"loss": {name: [1.0, 0.5] for name in names}}).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 9


def test_figures_are_savable_and_unknown_to_pyplot(tmp_path):
    before = plt.get_fignums()
    size = plt.rcParams["font.size"]
    arm = trained()
    figures = [plot_importances(*arm), plot_keep_probabilities(*arm), plot_convergence({"loss": {"arm": [1.0, 0.5]}})]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png", dpi=50)
        assert (tmp_path / f"{i}.png").stat().st_size > 1000
    assert plt.get_fignums() == before
    assert plt.rcParams["font.size"] == size
