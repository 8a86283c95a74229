"""What removed units contribute on average stays, exactly where they are constant."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked_networks import difference, randomised, run, tensors
from test_pruning_surgery import counting, same, state
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from impact_optim.pruning import ActivationPruner, UnitGraph, cut, surgery, trace
from impact_optim.pruning.folding import fold
from impact_optim.pruning.statistics import ActivationStatistics

IMAGES = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def replaced(
    model: nn.Module, graph: UnitGraph, units: Mapping[str, list[int]], constants: Mapping[str, Tensor]
) -> nn.Module:
    """A copy whose layers read constants in the place of units."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for name, positions in units.items():
        for axis in graph.groups[name].consumers:
            reader = axis.name.removesuffix(".weight")
            gone = torch.isin(axis.units, torch.tensor(positions)).nonzero().flatten()

            def fill(module: nn.Module, args: tuple[Tensor], gone: Tensor = gone, reader: str = reader) -> Tensor:
                x, dim = args[0].clone(), -1 if isinstance(module, nn.Linear) else 1
                return (
                    x.movedim(dim, -1)
                    .index_copy(-1, gone, constants[reader][gone].expand(*_rest(x, dim), -1))
                    .movedim(-1, dim)
                )

            modules[reader].register_forward_pre_hook(fill)
    return model


def _rest(x: Tensor, dim: int) -> list[int]:
    return [size for d, size in enumerate(x.shape) if d != dim % x.dim()]


def network(**second: Any) -> nn.Module:
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 6, 3, **second),
            nn.BatchNorm2d(6),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 10),
            nn.Sigmoid(),
            nn.Linear(10, 4),
        )
    )


def constants_of(model: nn.Module, graph: UnitGraph) -> dict[str, Tensor]:
    weights = {axis.name for group in graph.groups.values() for axis in group.consumers}
    named, generator = tensors(model), torch.Generator().manual_seed(1)
    return {
        name.removesuffix(".weight"): torch.randn(named[name].shape[1], generator=generator, dtype=torch.float64)
        for name in weights
    }


@pytest.mark.parametrize(
    "second",
    [
        {},
        {"bias": False},  # the running mean of the norm behind takes it
        {"padding": 1, "padding_mode": "replicate"},
        {"padding": 2, "padding_mode": "circular", "bias": False, "dilation": 2, "stride": 2},
    ],
)
def test_a_cut_with_constants_equals_a_network_that_reads_them(second: dict[str, Any]) -> None:
    model = network(**second)
    graph = trace(model, IMAGES)
    for _ in range(2):
        constants = constants_of(model, graph)
        units = {"0": [1, 3], "3": [0], "8": [2, 4, 5]}
        reference = replaced(model, graph, units, constants)
        assert not fold(model, graph, units, constants).left_out
        without = run(reference, (IMAGES,))
        cut(model, graph, units, constants)
        assert difference(without, run(model, (IMAGES,))) < 1e-12


def test_the_mean_of_the_batch_takes_what_the_running_mean_does() -> None:
    model = network(bias=False).train()
    graph = trace(model, IMAGES)
    constants, units = constants_of(model, graph), {"0": [1, 3]}
    reference = replaced(model, graph, units, constants)
    cut(model, graph, units, constants)
    assert difference(run(reference, (IMAGES,)), run(model, (IMAGES,))) < 1e-12


def test_units_that_are_constant_already_leave_the_network_as_it_is() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[[2, 5]] = 0  # what is left of them is a bias, through a norm and an activation
        model[1].weight[6] = 0
        model[8].weight[3] = 0
    graph = trace(model, IMAGES)
    statistics = ActivationStatistics(model, graph, every=1, means=True)
    statistics.attach()
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()  # frozen, so that training and evaluation compute the same
    model(IMAGES)
    statistics.detach()
    before = run(model.eval(), (IMAGES,))
    cut(model, graph, {"0": [2, 5, 6], "8": [3]}, statistics.mean_inputs())
    assert difference(before, run(model, (IMAGES,))) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
def test_the_mean_output_of_what_reads_the_units_stays(bias: bool, padding: int) -> None:
    """At the border as well, where part of the taps read the padding."""
    model = network(bias=bias, padding=padding, stride=2)
    graph = trace(model, IMAGES)
    statistics = ActivationStatistics(model, graph, every=1, means=True)
    statistics.attach()
    model.train()
    model(IMAGES[:4])
    model(IMAGES[4:])
    statistics.detach()
    model.train()
    first = model[:3]
    with torch.no_grad():
        before = torch.cat([model[3](first(part)) for part in (IMAGES[:4], IMAGES[4:])]).mean((0, 2, 3))
        level = model[4].running_mean.clone()
        cut(model, graph, {"0": [0, 4, 7]}, statistics.mean_inputs())
        after = torch.cat([model[3](first(part)) for part in (IMAGES[:4], IMAGES[4:])]).mean((0, 2, 3))
    torch.testing.assert_close(before - level, after - model[4].running_mean)


def test_where_it_cannot_stay_it_is_zero_and_said_so() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bare, self.up = (
                nn.Conv2d(3, 6, 1),
                nn.Conv2d(6, 4, 1, bias=False),
                nn.ConvTranspose2d(6, 4, 2),
            )
            self.one, self.two, self.third = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1), nn.Parameter(torch.randn(4, 6))
            self.two.bias = self.one.bias
            self.shared, self.norm = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.alike = nn.Conv2d(6, 4, 1, bias=False)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.first(x).relu()
            functional = torch.einsum("oc,bchw->bohw", self.third, x)
            normed = self.norm(self.shared(x)) + self.norm(self.alike(x))
            return [self.bare(x), self.up(x), self.one(x), self.two(x), functional, normed]

    model = randomised(Parts())
    graph = trace(model, IMAGES)
    constants = {name: torch.randn(6) for name in ("bare", "one", "two", "shared", "alike", "up")}
    folded = fold(model, graph, {"first": [1]}, constants)
    assert folded.values == {}
    assert {name: why.split()[-1] for name, why in folded.left_out.items()} == {
        "bare": "it", "up": "nn.Conv", "one": "bias", "two": "bias", "third": "nn.Conv", "shared": "it", "alike": "it",
    }  # fmt: skip
    plain = copy.deepcopy(model)
    cut(plain, copy.deepcopy(graph), {"first": [1]})
    cut(model, graph, {"first": [1]}, constants)
    assert difference(run(plain, (IMAGES,)), run(model, (IMAGES,))) == 0


def test_tied_weights_go_into_the_bias_of_each() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(self.up(x).relu()), self.two(self.up(x).sigmoid())], -1)

    model, x = randomised(Tied()), torch.randn(4, 5, dtype=torch.float64)
    graph = trace(model, x)
    one, two = torch.randn(2, 7, dtype=torch.float64)
    with torch.no_grad():
        up, weight, gone = model.up(x), model.one.weight, torch.tensor([2, 6])
        expected = torch.cat(
            [
                layer(activation.index_copy(1, gone, constant[gone].expand(4, 2)))
                for layer, activation, constant in ((model.one, up.relu(), one), (model.two, up.sigmoid(), two))
            ],
            -1,
        )
    cut(model, graph, {"up": gone}, {"one": one, "two": two})
    assert difference([expected], run(model, (x,))) < 1e-12
    assert model.one.weight is model.two.weight
    assert weight is model.one.weight


@pytest.mark.parametrize(
    "stage", [*(("select", at) for at in (0, 5)), *(("_give", at) for at in range(8)), ("fold", 0)]
)
def test_a_failure_at_any_stage_changes_nothing(stage: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(bias=False)
    graph = trace(model, IMAGES)
    model(IMAGES).sum().backward()
    constants, units = constants_of(model, graph), {"0": [1, 2], "8": [0]}
    before = state(model, graph)
    with monkeypatch.context() as patch:
        patch.setattr(surgery, stage[0], counting(getattr(surgery, stage[0]), stage[1]))
        with pytest.raises(MemoryError, match="injected"):
            cut(model, graph, units, constants)
    assert same(before, state(model, graph))
    reference = replaced(model, graph, units, constants)
    cut(model, graph, units, constants)
    assert difference(run(reference, (IMAGES,)), run(model, (IMAGES,))) < 1e-12


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ({"nowhere": torch.zeros(8)}, "no module"),
        ({"3": torch.zeros(7)}, r"shape \(7,\)"),
        ({"3": torch.zeros(8, 3)}, "shape"),
    ],
)
def test_means_that_do_not_fit_are_refused(means: dict[str, Tensor], message: str) -> None:
    model = network()
    graph = trace(model, IMAGES)
    before = state(model, graph)
    with pytest.raises(ValueError, match=message):
        cut(model, graph, {"0": [1]}, means)
    assert same(before, state(model, graph))


# -- the pruner --


def pruned(model: nn.Module, **options: Any) -> tuple[ActivationPruner, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = {"round_to": 1, "every": 1, "keep_means": True, **options}
    return ActivationPruner(model, IMAGES[:1], {1: 0.3, 3: 0.5}, optimizer=optimizer, **options), optimizer


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for part in (IMAGES[:4], IMAGES[4:]):
        optimizer.zero_grad()
        F.mse_loss(model(part), torch.ones(len(part), 4, dtype=torch.float64)).backward()
        optimizer.step()


@pytest.mark.parametrize("criterion", ["entropy", "l1"])
def test_the_pruner_keeps_means_of_model_and_averages(criterion: str) -> None:
    model = network(padding=1)
    average = AveragedModel(model)
    pruner, optimizer = pruned(model, criterion=criterion, averaged=average)
    epoch(model, optimizer)
    average.update_parameters(model)
    means, before, of_average = pruner.statistics.mean_inputs(), copy.deepcopy(model), copy.deepcopy(average.module)
    assert set(means) == {"3", "8", "10"}
    graph = copy.deepcopy(pruner.graph)
    report = pruner.step()
    assert report.records
    assert report.left_out == {}
    kept = {record.name: record.kept for record in report.records if record.dim == 0}
    units = {
        name: [unit for unit in range(graph.groups[name].size) if unit not in kept[f"{name}.weight"]]
        for name in ("0", "3", "8")
    }
    for reference, result in ((before, model), (of_average, average.module)):
        cut(reference, copy.deepcopy(graph), units, means)
        assert all(torch.equal(tensor, tensors(result)[name]) for name, tensor in tensors(reference).items())


def test_a_cut_that_is_undone_leaves_no_means_behind() -> None:
    model = network(bias=False)
    pruner, optimizer = pruned(model, guard=(lambda model: sum(p.numel() for p in model.parameters()), 0.0))
    epoch(model, optimizer)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    report = pruner.step()
    assert not report.records
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


def test_means_resume_bit_for_bit() -> None:
    model = network(bias=False)
    pruner, optimizer = pruned(model)
    epoch(model, optimizer)
    pruner.step()
    epoch(model, optimizer)
    pruner.step()
    epoch(model, optimizer)  # observed, not cut yet
    saved = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))
    resumed = network(bias=False)
    other, other_optimizer = pruned(resumed)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    assert pruner.step().records
    other.step()
    assert all(torch.equal(tensor, tensors(resumed)[name]) for name, tensor in tensors(model).items())
    with pytest.raises(ValueError, match="mean inputs are of other layers"):
        pruned(network(bias=False), keep_means=False)[0].load_state_dict(saved[0])


def test_means_survive_a_cut_and_merge() -> None:
    model = network(padding=1)
    graph = trace(model, IMAGES)
    whole, half, other = (ActivationStatistics(model, graph, every=1, means=True) for _ in range(3))
    model.train()
    for statistics, x in ((whole, IMAGES[:3]), (whole, IMAGES[3:]), (half, IMAGES[:3]), (other, IMAGES[3:])):
        statistics.attach()
        model(x)
        statistics.detach()
    half.merge(other)
    means = whole.mean_inputs()
    for name, mean in half.mean_inputs().items():
        torch.testing.assert_close(mean, means[name])
    cut(model, graph, {"0": [1, 2]})
    whole.keep({"0": torch.tensor([0, 3, 4, 5, 6, 7])})
    assert torch.equal(whole.mean_inputs()["3"], means["3"][[0, 3, 4, 5, 6, 7]])
    assert torch.equal(whole.mean_inputs()["8"], means["8"])
    whole.reset()
    assert whole.mean_inputs() == {}
