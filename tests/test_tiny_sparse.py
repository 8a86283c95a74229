"""The benchmark of sparse training: its peers are what they are said to be, and its page says what the runs say."""

import pytest
import torch
from helpers import benchmark
from torch import nn
from torch.optim import SGD, AdamW

from impact_optim import ImpactSGD, erdos_renyi

pytest.importorskip("sklearn")


@pytest.fixture(scope="module", autouse=True)
def tiny_sparse():
    with benchmark("tiny_sparse"):
        yield


@pytest.mark.parametrize(("base", "options"), [(SGD, {"lr": 0.1, "momentum": 0.9}), (AdamW, {"lr": 0.01})])
def test_rewired_networks_keep_their_sparsity_and_their_densities(base, options):
    from peers import Rewired, around

    for grow in ("gradient", "random", None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
        optimizer = around(Rewired, base)(model, sparsity=0.8, steps=40, seed=0, grow=grow, every=10, **options)
        weights = [model[0].weight, model[2].weight]
        first = [w != 0 for w in weights]
        counts = [int(mask.sum()) for mask in optimizer._masks.values()]
        assert sum(counts) == pytest.approx(0.2 * sum(w.numel() for w in weights), abs=2)
        assert counts[1] / weights[1].numel() > counts[0] / weights[0].numel()  # the smaller tensor is denser
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(16, 20)).square().mean().backward()
            optimizer.step()
            assert [int(mask.sum()) for mask in optimizer._masks.values()] == counts
            for w, mask in optimizer._masks.items():
                assert not w[~mask].any()
                for state in optimizer.state[w].values():
                    assert state.shape != w.shape or not state[~mask].any()
        moved = [not torch.equal(mask, now) for mask, now in zip(first, optimizer._masks.values(), strict=True)]
        assert any(moved) == (grow is not None)


def test_gradual_magnitude_with_our_densities_keeps_the_largest_of_each_tensor():
    from peers import GradualByDensities, around

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 5, bias=False))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = around(GradualByDensities, ImpactSGD)(model, lr=0.1, importance="uniform", drop_rate=0.0)
    for sparsity in (0.5, 0.8):
        optimizer.sparsify(sparsity, by="magnitude")
        for p, old, density in zip(
            model.parameters(), before, erdos_renyi([p.shape for p in before], 1 - sparsity), strict=True
        ):
            kept = p != 0
            assert kept.sum() == round(density * p.numel())
            assert kept.all() or old[kept].abs().min() >= old[~kept].abs().max()


def test_rigl_grows_where_the_gradient_is_large_and_set_anywhere():
    from peers import Rewired, around

    def grown(grow: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(40, 40)
        optimizer = around(Rewired, SGD)(model, sparsity=0.9, steps=100, seed=seed, grow=grow, every=1, lr=0.1)
        optimizer._taken = 1
        old, before = next(iter(optimizer._masks.values())).clone(), model.weight.detach().clone()
        model.weight.grad = torch.randn(40, 40)
        gradient = model.weight.grad.abs()
        optimizer.step()
        new = next(iter(optimizer._masks.values())) & ~old
        assert not model.weight[new].any()
        stays = torch.equal(model.weight[old & ~new & (model.weight != 0)], before[old & ~new & (model.weight != 0)])
        assert stays == (grow == "gradient")  # there the change takes the place of the step
        return new, gradient

    new, gradient = grown("gradient", 0)
    assert gradient[new].min() >= gradient.flatten().sort().values[-3 * int(new.sum())]
    (new, gradient), (other, _) = grown("random", 0), grown("random", 1)
    assert not torch.equal(new, other)
    assert gradient[new].min() < gradient.median()


def test_one_shot_is_dense_before_the_cut_and_sparse_after_it():
    from peers import OneShot, around

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    optimizer = around(OneShot, ImpactSGD)(model, sparsity=0.8, cut=3, lr=0.1, importance="uniform", drop_rate=0.0)
    zeros = []
    for _ in range(5):

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(4, 20)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        zeros.append(sum(int((model[i].weight == 0).sum()) for i in (0, 2)))
    assert zeros == [0, 0, 0, 400, 400]


def test_targeted_dropout_drops_the_smallest_of_each_unit_and_cuts_them_in_the_end():
    from peers import TargetedDropout, around, smallest_of_units

    weight = torch.tensor([[4.0, -1.0, 2.0, 3.0], [-8.0, 7.0, -5.0, 6.0]])
    mask = [[False, True, True, False], [False, False, True, True]]
    assert smallest_of_units(weight, 0.5).tolist() == mask
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    optimizer = around(TargetedDropout, SGD)(model, sparsity=0.9, steps=9, seed=0, lr=0.1)
    seen = []
    for _ in range(9):

        def closure():
            seen.append([(model[i].weight == 0).float().mean().item() for i in (0, 2)])
            optimizer.zero_grad()
            loss = model(torch.randn(16, 20)).square().mean()
            loss.backward()
            return loss

        assert model[0].weight.all()  # dense between the steps
        optimizer.step(closure)
    assert seen[0] == [0, 0]  # the share ramps up
    assert 0.8 < seen[-1][0] <= 0.9
    assert [int((model[i].weight != 0).sum(1).unique()) for i in (0, 2)] == [2, 3]


def test_every_method_is_tuned_by_as_many_trials_and_tested_with_fresh_seeds():
    from plan import TASKS, TUNED_AT, dense, methods
    from runner import grid

    for task in TASKS:
        assert {len(grid(task, arm)) for arm in [dense(task), *methods(task, TUNED_AT)]} == {4}
        assert not set(task.tuning_seeds) & set(task.test_seeds)
        assert methods(task, TUNED_AT)[-1].name == "ours"


def test_the_page_has_the_tables_that_the_runs_make():
    import report
    from tables import filled

    assert report.PLAN.results, "benchmarks/tiny_sparse/results.jsonl is missing"
    page = report.PAGE.read_text()
    assert page.count("<!-- table ") == len(report.TABLES)
    assert filled(page, report.TABLES) == page


def test_intervals_widen_with_the_number_of_comparisons():
    from scipy.stats import ttest_rel
    from tables import difference, signed

    a, b = [3.0, 5.0, 4.0, 6.5], [1.0, 4.0, 2.5, 3.0]
    mean, half = difference(a, b)
    interval = ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    interval = ttest_rel(a, b).confidence_interval(1 - 0.05 / 7)
    assert difference(a, b, comparisons=7)[1] == pytest.approx(mean - interval.low)
    assert signed(mean, half) == "**+2.0 ± 1.7**"
    assert signed(1.0, 2.0, 2) == "+1.00 ± 2.00"


def test_multiply_adds_are_counted_by_place():
    from plan import CNN, GPT, LENET
    from report import places

    assert places(LENET) == {"hidden1.weight": 1, "hidden2.weight": 1, "head.weight": 1}
    assert places(CNN) == {"conv1.weight": 19, "conv2.weight": 10, "conv3.weight": 5, "head.weight": 1}
    assert set(places(GPT).values()) == {0, 64}  # the embedding, and what each letter goes through
