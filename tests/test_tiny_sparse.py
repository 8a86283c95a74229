"""The peers of the benchmarks that are sparse are what they are said to be."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytest.importorskip("sklearn")


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_rewired_networks_keep_their_sparsity_and_their_densities():
    from peers import Rewired

    for grow in ("gradient", "random", None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
        optimizer = Rewired(model, sparsity=0.8, steps=40, seed=0, grow=grow, every=10, lr=0.1, momentum=0.9)
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
        moved = [not torch.equal(mask, now) for mask, now in zip(first, optimizer._masks.values(), strict=True)]
        assert any(moved) == (grow is not None)


def test_rigl_grows_where_the_gradient_is_large_and_set_anywhere():
    from peers import Rewired

    def grown(grow: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(40, 40)
        optimizer = Rewired(model, sparsity=0.9, steps=100, seed=seed, grow=grow, every=1, lr=0.1)
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
    from peers import OneShot

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    optimizer = OneShot(model, sparsity=0.8, cut=3, lr=0.1, importance="uniform", drop_rate=0.0)
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
    from peers import TargetedDropout, smallest_of_units

    weight = torch.tensor([[4.0, -1.0, 2.0, 3.0], [-8.0, 7.0, -5.0, 6.0]])
    mask = [[False, True, True, False], [False, False, True, True]]
    assert smallest_of_units(weight, 0.5).tolist() == mask
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    optimizer = TargetedDropout(model, sparsity=0.9, steps=9, seed=0, lr=0.1)
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
