"""One step per epoch: what is cut when, that training goes on, and that nothing is left half done."""

import copy
import dataclasses
import datetime
import functools
import itertools
import math
import re
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import slow, traced_once
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning_repair import Both
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import impact_optim.pruning.pruner as pruner_module
from impact_optim import Impact, ImpactAdamW, ImpactSGD
from impact_optim.impact import impact_of
from impact_optim.pruning import open_heads
from impact_optim.pruning.architecture import load_pruned, save_pruned
from impact_optim.pruning.pruner import ActivationPruner
from impact_optim.pruning.report import model_size
from impact_optim.pruning.schedule import ramp

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def network(seed=0, width=16):
    """A convolutional network with a residual stream and a hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        Block(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def impact(model):
    return ImpactSGD(model, lr=0.05, momentum=0.9, drop_rate=0.2, importance_lr=0.1)


def impact_adamw(model):
    return ImpactAdamW(model, lr=0.01, drop_rate=0.2, importance_lr=0.1)


def impact_rmsprop(model):
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5)
    Impact(model, optimizer, drop_rate=0.2, importance_lr=0.1)
    return optimizer


def impact_muon(model):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return Both(model, lr=0.01, drop_rate=0.2, importance_lr=0.1)


def engine_of(optimizer):
    return optimizer.impact if isinstance(optimizer, Both) else impact_of(optimizer)


def itself(optimizer):
    return optimizer


@pytest.fixture(autouse=True, scope="module")
def _each_network_is_traced_once():
    with traced_once():
        yield


def prune(model, schedule, optimizer=(), **options):
    options = {"target": "units", "max_ratio": 1.0, "every": 1, **options}
    return ActivationPruner(model, X[:1], schedule, optimizer=optimizer, **options)


def epoch(model, optimizer, seed, steps=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(12, 3, 8, 8, generator=generator), torch.randint(5, (12,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def everything(pruner):
    """All that a failed cut must leave as it was."""
    return copy.deepcopy(
        {
            "model": pruner.model.state_dict(),
            "grads": [p.grad for p in pruner.model.parameters()],
            "sizes": repr(pruner.model),
            "modes": [m.training for m in pruner.model.modules()],
            "optimizers": [o.state_dict() for o in pruner.optimizers],
            "averaged": [a.state_dict() for a in pruner.averaged],
            "graph": str(pruner.graph),
            "units": {name: group.original for name, group in pruner.graph.groups.items()},
            "state": pruner.state_dict(),
            "hooks": hooks(pruner.model),
        }
    )


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (u, v) in enumerate(zip(a, b, strict=True)):
            assert_same(u, v, f"{path}[{i}]")
    else:
        assert a == b, path


def hooks(model):
    return [
        len(table)
        for m in model.modules()
        for table in (m._forward_hooks, m._forward_pre_hooks, m._forward_hooks_with_kwargs)
    ]


def units(pruner):
    return sum(group.size for group in pruner.graph.groups.values())


# ------------------------------------------------------------------------------- the schedule


@given(st.floats(0.01, 0.99), st.integers(0, 30), st.integers(1, 40))
def test_a_ramp_rises_to_its_end(final, start, length):
    schedule = ramp(final, start=start, end=start + length)
    epochs, fractions = list(schedule), list(schedule.values())
    assert epochs == list(range(start + 1, start + length + 1))
    assert fractions[-1] == final
    assert fractions[0] > 0
    assert fractions == sorted(fractions)
    if length % 2 == 0:
        assert schedule[start + length // 2] == pytest.approx(0.875 * final)


def test_how_much_and_by_when_is_the_recipe_that_was_measured():
    """That of benchmarks/pruning, and of docs/pruning.md: half of the MACs on a cubic in epochs 3 to 14."""
    model = network()
    pruner = ActivationPruner(model, X[:1], remove=0.5, by=14)
    assert pruner.schedule == {t: 0.5 * (1 - (1 - (t - 2) / 12) ** 3) for t in range(3, 15)}
    budget = pruner.budget
    assert (pruner.criterion, budget.target, budget.split) == ("rademacher", "macs", "rademacher")
    assert ActivationPruner(model, X[:1], 0.5, by=14, criterion="l1").budget.split == "uniform"
    assert (budget.round_to, budget.max_ratio, pruner.statistics.every) == (1, 0.9, 8)
    assert list(ActivationPruner(model, X[:1], 0.3, by=1).schedule.items()) == [(1, 0.3)]


@pytest.mark.parametrize("target", ["macs", "params"])
def test_half_of_them_is_gone_little_by_little(target):
    model = network()
    optimizer = sgd(model)
    pruner = ActivationPruner(
        model,
        X[:1],
        remove=0.5,
        by=4,
        criterion="entropy",
        split="uniform",
        target=target,
        optimizer=optimizer,
        every=1,
    )
    reports = []
    for i in range(6):
        epoch(model, optimizer, i)
        reports.append(pruner.step())
    assert [bool(report.records) for report in reports] == [False, True, True, True, False, False]
    left = [(report.macs if target == "macs" else report.parameters)[1] for report in reports]
    for now, gone in zip(left[1:4], pruner.schedule.values(), strict=True):
        assert now / left[0] == pytest.approx(1 - gone, abs=0.03)


def test_what_is_cut_when():
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {2: 0.25, 4: 0.5}, optimizer)
    total = units(pruner)
    reports = []
    for i in range(1, 6):
        epoch(model, optimizer, i)
        reports.append(pruner.step())
        left = {1: 1, 2: 0.75, 3: 0.75, 4: 0.5, 5: 0.5}[i]
        assert units(pruner) == pytest.approx(left * total, abs=1)
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 5]
    assert [bool(report.records) for report in reports] == [False, True, False, True, False]
    for a, b in itertools.pairwise(reports):
        assert a.macs[1] == b.macs[0]
        assert [layer.units[2] for layer in a.layers] == [layer.units[1] for layer in b.layers]
    assert reports[3].macs[1] < reports[3].macs[0]
    assert reports[4].macs[0] == reports[4].macs[1]
    assert reports[4].parameters[1] == sum(p.numel() for p in model.parameters())
    for record in reports[3].records:
        tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[record.name]
        assert tensor.shape[record.dim] == len(record.kept)
        assert torch.equal(record.kept, record.kept.unique())


def test_nothing_is_cut_where_as_much_is_gone_already():
    pruner = prune(network(), {1: 0.5, 2: 0.5}, criterion="l1")
    assert pruner.step().records
    report = pruner.step()
    assert report.records == []
    assert "0.5 of the units are gone already" in str(report)


def test_the_report_is_a_table():
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {1: 0.5}, optimizer, criterion="l1")
    text = str(pruner.step())
    lines = text.splitlines()
    assert lines[0] == "epoch 1"
    assert lines[1].split() == ["layer", "units", "score", "MACs", "parameters"]
    assert [line.split()[0] for line in lines[2:]] == [*pruner.graph.groups, "total"]
    hidden = next(line for line in lines if line.startswith("4 "))
    assert "24 → 12" in hidden
    assert "…" in hidden
    assert (
        f"{sum(p.numel() for p in network().parameters()):,} → {sum(p.numel() for p in model.parameters()):,}" in text
    )


@pytest.mark.parametrize("fraction", [0.3, slow(0.7)])
def test_macs_are_met_as_nearly_as_whole_units_allow(fraction):
    model = network()
    pruner = prune(model, {1: fraction / 2, 2: fraction}, criterion="random", target="macs")
    before = pruner.step().macs[0]
    wanted = (1 - fraction) * before
    order, possible = pruner.budget.order(pruner._scores()), []
    for steps in range(1 + len(order.steps)):
        plan = pruner.graph.plan(order.first(steps))
        possible.append(model_size(model, ((X[:1],), {}), plan).macs[""])
    assert abs(pruner.step().macs[1] - wanted) <= max(min(abs(m - wanted) for m in possible), 0.002 * before)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_macs_count_recurrent_layers(kind, gates):
    x = torch.randn(2, 7, 6)
    assert model_size(kind(6, 5, batch_first=True), ((x,), {})).macs[""] == 2 * 7 * gates * 5 * (6 + 5)


def test_a_report_counts_what_every_kind_of_layer_has():
    layer = open_heads(nn.TransformerEncoderLayer(12, 3, 16, batch_first=True))
    report = ActivationPruner(layer, torch.randn(2, 5, 12), {1: 0.5}, criterion="random", round_to=1).step()
    assert [row.name for row in report.layers] == ["self_attn", "linear1"]
    for row in report.layers:
        assert row.macs[0] > row.macs[1] > 0
        assert row.parameters[0] > row.parameters[1] > 0


def test_macs_count_what_is_ignored():
    model = network()
    original = model_size(model, ((X[:1],), {}))
    pruner = prune(model, {1: 0.3}, criterion="random", target="macs", ignore=[model[4]])
    report = pruner.step()
    left = model_size(model, ((X[:1],), {}))
    assert report.macs == (original.macs[""], left.macs[""])
    assert report.parameters == (original.parameters[""], left.parameters[""])
    assert left.macs[""] / original.macs[""] == pytest.approx(0.7, abs=0.1)


def test_macs_count_attention():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    pruner = ActivationPruner(layer, torch.randn(2, 10, 16), {1: 0.5}, criterion="random")
    tokens, width = 2 * 10, 16
    attention = 2 * 2 * 10 * 10 * width
    linear = tokens * width * (4 * width + 2 * 32)
    assert pruner.dry_run(0.1).macs[0] == attention + linear


# ------------------------------------------------------------------------------- hooks


def test_hooks_are_there_in_the_epochs_that_end_with_a_cut_only():
    model = network()
    bare = hooks(model)
    optimizer = sgd(model)
    pruner = prune(model, {2: 0.2, 3: 0.4}, optimizer)
    seen = []
    for i in range(5):
        seen.append(hooks(model) != bare)
        epoch(model, optimizer, i)
        pruner.step()
    assert seen == [False, True, True, False, False]
    for criterion in ("l1", "random"):
        prune(model, {1: 0.2}, criterion=criterion)
        assert hooks(model) == bare


def test_evaluation_is_not_observed():
    model = network()
    pruner = prune(model, {1: 0.2})
    model.eval()(X)
    assert pruner.statistics.batches == 0
    with pytest.raises(ValueError, match="have not been seen"):
        pruner.step()
    model.train()(X)
    assert pruner.step().records


def test_a_copy_goes_its_own_way():
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {2: 0.5}, optimizer)
    epoch(model, optimizer, 0)
    pruner.step()
    plain = copy.deepcopy(model)  # as an averaged copy is made: it must not gather for the first
    plain.train()(X)
    assert pruner.statistics.batches == 0
    before = everything(pruner)
    other_model, other_optimizer, other = copy.deepcopy((model, optimizer, pruner))
    epoch(other_model, other_optimizer, 1)
    assert other.step().records
    assert other.optimizers == [other_optimizer]
    assert_same(everything(pruner), before)
    epoch(model, optimizer, 1)
    pruner.step()
    assert_same(everything(pruner), everything(other))


# ------------------------------------------------------------------------------- training goes on


@pytest.mark.parametrize("build", [sgd, adam])
def test_training_equals_that_of_a_network_built_small(build, tmp_path):
    model = network()
    optimizer = build(model)
    pruner = prune(model, {1: 0.3, 2: 0.6}, optimizer)
    for i in range(2):
        epoch(model, optimizer, i)
        pruner.step()
    save_pruned(model, tmp_path)
    small = load_pruned(network(seed=1), tmp_path)
    reference = build(small)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(2, 5):
        assert epoch(model, optimizer, i) == epoch(small, reference, i)
    assert_same(model.state_dict(), small.state_dict())


def test_momentum_is_that_of_the_kept_weights():
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {1: 0.4}, optimizer)
    epoch(model, optimizer, 0)
    params = dict(model.named_parameters())
    expected = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in params.items()}
    for name, dim, kept, _ in pruner.step().records:
        if name in expected:
            expected[name] = expected[name].index_select(dim, kept)
    assert dict(model.named_parameters()).keys() == params.keys()
    for name, param in model.named_parameters():
        assert param is params[name]
        assert torch.equal(optimizer.state[param]["momentum_buffer"], expected[name])


def test_what_a_loop_keeps_alive_does_not_hold_the_old_shapes():
    """A loss keeps its graph, and with it the nodes that hand gradients to the parameters; so do hooks."""
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {1: 0.4}, optimizer)
    shapes = []
    for param in model.parameters():
        param.register_hook(lambda grad: shapes.append(grad.shape))
        param.register_post_accumulate_grad_hook(lambda param: shapes.append(param.grad.shape))
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        shapes.clear()
        losses.append(model(X).square().mean())
        losses[-1].backward()
        optimizer.step()
        pruner.step()
    assert sorted(shapes) == sorted(2 * [p.shape for p in model.parameters()])


def test_several_optimizers_and_an_average_follow():
    model = network()
    average = AveragedModel(model, use_buffers=True)
    optimizers = [sgd(model[:2]), adam(model[2:])]
    pruner = prune(model, {1: 0.4}, optimizers, averaged=average)
    epoch(model, optimizers[0], 0)
    optimizers[1].step()
    average.update_parameters(model)
    pruner.step()
    model.eval()
    average.eval()
    torch.testing.assert_close(average(X), model(X))
    epoch(model.train(), optimizers[0], 1)
    optimizers[1].step()
    average.update_parameters(model)
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]


# ------------------------------------------------------------------------------- importances, masks and zeros


def test_masks_are_seen_by_the_statistics():
    def energy(drop_rate):
        model = network()
        optimizer = ImpactSGD(model, lr=0.0, drop_rate=drop_rate)
        pruner = prune(model, {1: 0.4}, optimizer)
        epoch(model, optimizer, 0, steps=1)
        return pruner.statistics.groups["4"][0].energy

    assert not torch.equal(energy(0.5), energy(0.0))


@pytest.mark.parametrize(
    ("build", "criterion"),
    [
        (impact, "entropy"),
        (impact_adamw, "importance"),
        (impact_rmsprop, "importance"),
        slow(impact, "importance"),
        slow(impact_adamw, "entropy"),
        slow(impact_rmsprop, "entropy"),
        (impact_muon, "importance"),
    ],
)
def test_training_goes_on_with_masks(criterion, build):
    model = network()
    optimizer = build(model)
    pruner = prune(model, {1: 0.3, 2: 0.5}, optimizer, criterion=criterion)
    for i in range(4):
        epoch(model, optimizer, i)
        model(X)  # masks that no step uses
        pruner.step()
    rows = engine_of(optimizer).importance_summary()
    assert sorted(row.numel for row in rows) == sorted(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sum(row.numel * row.drop_rate for row in rows) / sum(row.numel for row in rows) == pytest.approx(
        0.2, abs=1e-3
    )


@pytest.mark.parametrize(
    ("build", "hand_in"),
    [
        (impact, itself),
        (impact_adamw, engine_of),
        (impact_rmsprop, itself),
        (impact_rmsprop, engine_of),
        (impact_muon, itself),
        (impact_muon, engine_of),
    ],
)
def test_importance_removes_the_units_of_least_importance(build, hand_in):
    model = network()
    optimizer = build(model)
    pruner = prune(model, {1: 0.4}, hand_in(optimizer), criterion="importance")
    epoch(model, optimizer, 0)
    importance = engine_of(optimizer).importance
    into, out = importance(model[4].weight), importance(model[6].weight)
    removed = {record.name: record for record in pruner.step().records}["4.bias"].kept
    mean = (into.sum(1) + out.sum(0)) / (into.shape[1] + out.shape[0])
    lost = sorted(set(range(24)) - set(removed.tolist()))
    assert mean[lost].max() <= mean[removed].min()


def test_a_loss_and_gradients_of_before_the_cut_do_no_harm():
    model = network()
    optimizer = impact(model)
    pruner = prune(model, {1: 0.4}, optimizer, criterion="l1")
    loss = model(X).square().mean()
    loss.backward()
    assert pruner.step().records
    optimizer.step()
    epoch(model, optimizer, 1)


@pytest.mark.parametrize("scope", ["masked", "expected"])
def test_nothing_is_cut_while_the_parameters_hold_masked_weights(scope):
    model = network()
    optimizer = impact(model)
    pruner = prune(model, {1: 0.4}, optimizer, criterion="l1")
    before = everything(pruner)
    with getattr(optimizer, scope)(), pytest.raises(RuntimeError, match="leave the scope"):
        pruner.step()
    assert_same(everything(pruner), before)


@pytest.mark.parametrize("build", [impact, impact_adamw, impact_rmsprop, impact_muon])
def test_zeros_stay_zero_through_cuts(build):
    model = network()
    optimizer = build(model)
    pruner = prune(model, {1: 0.3, 2: 0.5}, optimizer, criterion="importance")
    epoch(model, optimizer, 0)
    engine_of(optimizer).sparsify(0.5)
    for i in range(1, 4):
        report = pruner.step()
        assert bool(report.records) == (i < 3)
        zero = {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}
        assert sum(int(mask.sum()) for mask in zero.values()) > 100
        epoch(model, optimizer, i)
        for name, mask in zero.items():
            assert torch.equal(model.get_parameter(name) == 0, mask)


@pytest.mark.parametrize("build", [impact, impact_adamw, impact_rmsprop, impact_muon])
def test_an_optimizer_with_masks_must_not_be_forgotten(build):
    model = network()
    optimizer = build(model)
    with pytest.raises(ValueError, match=r"trains this Sequential with masks.*hand it in, as optimizer="):
        prune(model, {1: 0.5})
    with pytest.raises(ValueError, match=r"trains this Sequential with masks"):
        prune(model, {1: 0.5}, sgd(model))
    prune(model, {1: 0.5}, optimizer)
    engine_of(optimizer).detach()
    prune(model, {1: 0.5})


# ------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("build", "options", "saved"),
    [
        slow(sgd, {}, 1),
        (sgd, {}, 2),
        slow(sgd, {}, 3),
        (adam, {"criterion": "rademacher", "split": "rademacher", "every": 2}, 3),
        slow(impact, {"criterion": "entropy"}, 2),
        (impact, {"criterion": "importance", "target": "macs"}, 3),
        (impact_adamw, {"criterion": "importance"}, 3),
        (impact_rmsprop, {"criterion": "importance"}, 3),
        (impact_muon, {"criterion": "importance"}, 3),
        slow(sgd, {"criterion": "random", "seed": 3}, 2),
    ],
)
def test_a_run_resumes_bit_for_bit(build, options, saved, tmp_path):
    def setup(seed):
        model = network(seed)
        optimizer = build(model)
        return model, optimizer, prune(model, {2: 0.3, 4: 0.5}, optimizer, **options)

    model, optimizer, pruner = setup(0)
    for i in range(5):
        if i == saved:
            torch.save([x.state_dict() for x in (pruner, model, optimizer)], tmp_path / "checkpoint.pt")
        epoch(model, optimizer, i)
        pruner.step()

    resumed = setup(1)
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for x, state in zip((resumed[2], resumed[0], resumed[1]), states, strict=True):
        x.load_state_dict(state)
    for i in range(saved, 5):
        epoch(resumed[0], resumed[1], i)
        resumed[2].step()
    assert_same(everything(resumed[2]), everything(pruner))


def test_the_wrong_order_is_refused():
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {1: 0.5}, optimizer)
    epoch(model, optimizer, 0)
    pruner.step()
    epoch(model, optimizer, 1)
    fresh = network(1)
    other = sgd(fresh)
    resumed = prune(fresh, {1: 0.5}, other)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    before = everything(resumed)
    with pytest.raises(ValueError, match="before the optimizers"):
        resumed.load_state_dict(pruner.state_dict())
    assert_same(everything(resumed), before)


def test_the_state_of_another_run_is_refused():
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {1: 0.5}, optimizer, criterion="l1")
    uncut = copy.deepcopy(pruner.state_dict())
    pruner.step()
    with pytest.raises(ValueError, match="load into a newly built model"):
        pruner.load_state_dict(uncut)
    other = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)), {1: 0.5})
    with pytest.raises(ValueError, match="of another model"):
        other.load_state_dict(uncut)


# ------------------------------------------------------------------------------- all or nothing


@functools.cache
def _trained(build, target):
    model = network()
    optimizer = build(model)
    pruner = prune(model, {2: 0.5}, optimizer, averaged=AveragedModel(model), target=target)
    epoch(model, optimizer, 0)
    pruner.step()
    return pruner


def trained(build=sgd, target="units", guard=None):
    """A pruner at the end of an epoch that ends with a cut."""
    pruner = copy.deepcopy(_trained(build, target))
    pruner.guard = guard
    if build is impact:
        pruner.optimizers[0].attach(pruner.model)
    epoch(pruner.model, pruner.optimizers[0], 1)
    return pruner


def fail(*args, **kwargs):
    raise RuntimeError("injected")


def fail_after(function):
    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        raise RuntimeError("injected")

    return wrapped


@pytest.mark.parametrize("build", [slow(adam), impact])
@pytest.mark.parametrize("place", ["cut", "repair", "size_with", "keep", "reset", "criterion"])
@pytest.mark.parametrize("when", [fail, fail_after])
def test_a_failure_anywhere_leaves_everything(build, place, when, monkeypatch):
    pruner = trained(build)
    before, attached = everything(pruner), hooks(pruner.model)
    with monkeypatch.context() as patch:
        owner, name = pruner_module, place
        if place in ("keep", "reset"):
            owner = pruner.statistics
        elif place == "size_with":
            owner = pruner.budget
        elif place == "criterion":
            owner, name = pruner, "_scores"
        patch.setattr(owner, name, fail if when is fail else fail_after(getattr(owner, name)))
        with pytest.raises(RuntimeError, match="injected"):
            pruner.step()
    assert_same(everything(pruner), before)
    assert hooks(pruner.model) == attached
    assert pruner.step().records  # and the same step can be done
    assert pruner.epoch == 2


def test_hooks_that_cannot_be_attached_leave_everything(monkeypatch):
    pruner = trained()
    pruner.schedule[3] = 0.6
    before = everything(pruner)
    attach, calls = pruner.statistics.attach, []

    def fails_once():
        calls.append(0)
        attach()
        if len(calls) == 1:
            raise MemoryError

    monkeypatch.setattr(pruner.statistics, "attach", fails_once)
    with pytest.raises(MemoryError):
        pruner.step()
    assert_same(everything(pruner), before)


@pytest.mark.parametrize("epoch", ["x", "missing", -3, *map(slow, (None, math.nan, math.inf, [], 10**9, 2.7, True))])
def test_a_state_with_a_damaged_epoch_is_refused_before_anything_is_cut(epoch):
    state = {**(pruner := trained()).state_dict(), "epoch": epoch}
    pruner.step()
    state["units"] = {name: group.original for name, group in pruner.graph.groups.items()}
    if epoch == "missing":
        del state["epoch"]
    new = prune(network(), {2: 0.5})
    before = everything(new)
    with pytest.raises(ValueError, match="epoch"):
        new.load_state_dict(state)
    assert_same(everything(new), before)


def test_a_state_with_damaged_units_is_refused_before_anything_is_cut():
    new = prune(network(), {2: 0.5})
    state, before = new.state_dict(), everything(new)
    for units in (None, torch.zeros(3), torch.tensor([2, 1]), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="no ascending numbers"):
            new.load_state_dict({**state, "units": {**state["units"], "4": units}})
    assert_same(everything(new), before)


def test_an_optimizer_that_cannot_be_cut_leaves_the_model():
    pruner = trained()
    hidden = pruner.model[4].weight
    pruner.optimizers[0].state[hidden]["odd"] = torch.zeros(7)
    before = everything(pruner)
    with pytest.raises(ValueError, match=r"'odd' of 4.weight in SGD"):
        pruner.step()
    assert_same(everything(pruner), before)


# ------------------------------------------------------------------------------- the guard, the dry run


def test_a_cut_that_no_part_of_can_be_borne_is_undone():
    def metric(model):
        """Of everything that is not as it was, the worst; and it renews the statistics of the norms."""
        model.train()(X + 1)
        return float(sum(p.numel() for p in model.parameters()))

    pruner = trained()
    pruner.guard = (metric, 0.0)
    before = everything(pruner)
    report = pruner.step()
    after = everything(pruner)
    assert report.records == []
    assert report.metric[0] == report.metric[1]
    assert "the guard bears 0 of the units" in str(report)
    for key in before.keys() - {"state", "hooks"}:  # the epoch has ended
        assert_same(after[key], before[key], key)
    assert pruner.epoch == 2


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 1))
def test_the_largest_bearable_cut_is_found_to_a_sixteenth_whatever_it_is(tolerance):
    test_the_largest_bearable_cut_is_found_to_a_sixteenth(tolerance)


@pytest.mark.parametrize("tolerance", [0.07, 0.6])
def test_the_largest_bearable_cut_is_found_to_a_sixteenth(tolerance):
    pruner = trained()
    total = units(pruner)
    pruner.guard = (lambda model: units(pruner) / total, tolerance * 0.5)
    report = pruner.step()
    lost = 1 - units(pruner) / total
    assert lost <= tolerance * 0.5
    assert lost >= min(0.5, tolerance * 0.5) - 0.5 / 16 - 2 / total
    assert report.metric[1] == pytest.approx(1 - lost)


def test_what_all_cuts_together_cost_is_what_one_may():
    model = network()
    total = None
    pruner = prune(model, {1: 0.1, 2: 0.3, 3: 0.5, 4: 0.6}, criterion="l1")
    total = units(pruner)
    pruner.guard = (lambda model: units(pruner) / total, 0.25)
    reports = [pruner.step() for _ in range(3)]
    resumed = prune(network(), pruner.schedule, criterion="l1", guard=(lambda model: units(resumed) / total, 0.25))
    resumed.load_state_dict(pruner.state_dict())
    for each in (pruner, resumed):
        assert each.step().records == []
        lost = 1 - units(each) / total
        assert 0.25 - 0.2 / 16 - 2 / total <= lost <= 0.25
    assert [report.metric[0] for report in reports] == [1.0, reports[0].metric[1], reports[1].metric[1]]
    assert "the guard bears" not in reports[0].note
    assert "the guard bears" in reports[2].note


def test_a_cut_that_can_be_borne_is_that_without_a_guard():
    guarded, plain = trained(guard=(lambda model: 1.0, 0.0)), trained()
    reports = [guarded.step(), plain.step()]
    assert reports[0].metric == (1.0, 1.0)
    after = everything(guarded)
    assert after["state"].pop("best_metric") == 1.0
    without = everything(plain)
    del without["state"]["best_metric"]
    assert_same(after, without)


def test_a_guard_that_raises_leaves_everything():
    values = iter([1.0, 0.0])
    pruner = trained(guard=(lambda model: next(values), 0.1))
    before = everything(pruner)
    with pytest.raises(StopIteration):
        pruner.step()
    assert_same(everything(pruner), before)


def test_a_metric_that_is_not_a_number_bears_nothing():
    for metrics in ([0.5] + [math.nan] * 5, [math.nan] + [0.5] * 5):
        values = iter(metrics)
        pruner = trained(guard=(lambda model, values=values: next(values), 10.0))
        assert pruner.step().records == []


@pytest.mark.parametrize("target", ["units", "macs"])
def test_a_dry_run_says_what_would_be_cut_and_cuts_nothing(target):
    pruner = trained(target=target)
    before, attached = everything(pruner), hooks(pruner.model)
    dry = pruner.dry_run(0.5)
    assert_same(everything(pruner), before)
    assert hooks(pruner.model) == attached
    report = pruner.step()
    assert str(dry).splitlines()[1:] == str(report).splitlines()[1:]
    assert dry.note == "dry run"
    assert_same([tuple(r) for r in dry.records], [tuple(r) for r in report.records])


# ------------------------------------------------------------------------------- options


def sizes(**options):
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {1: 0.5}, optimizer, **{"criterion": "l1", **options})
    epoch(model, optimizer, 0)
    pruner.step()
    return {name: group.size for name, group in pruner.graph.groups.items()}


def test_options_of_the_budget():
    assert sizes()["4"] == 12
    assert sizes(round_to=8)["4"] in (8, 16)
    model = network()
    pruner = prune(model, {1: 0.25, 2: 0.5}, criterion="l1", max_ratio=0.25)
    pruner.step()
    assert re.search(r"0\.\d+ of the units can go, not 0.5: .* max_ratio=0.25", pruner.step().note)
    assert all(group.size >= 0.75 * group.original_size for group in pruner.graph.groups.values())


class Skipped(nn.Module):
    """A block that training leaves out, as stochastic depth may."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x if self.training else x + self.down(torch.relu(self.up(x)))


def test_a_group_without_scores_stays_and_the_others_go_instead():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), Skipped(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    pruner = ActivationPruner(model, torch.zeros(2, 5), {1: 0.25}, target="units", every=1)
    model(torch.randn(20, 5))
    report = pruner.step()
    assert {name: group.size for name, group in pruner.graph.groups.items()} == {"2.up": 16, "3": 8}
    assert "have not been seen" in report.left_out["2.up"]
    assert "left out: 2.up: 16 of 16 units" in str(report)
    assert not report.note


def test_layers_that_are_not_trained_have_no_importance_and_stay():
    model = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    model[0].requires_grad_(False), model[2].requires_grad_(False)
    optimizer = ImpactSGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pruner = ActivationPruner(
        model, torch.zeros(2, 5), {1: 0.3}, criterion="importance", round_to=1, optimizer=optimizer
    )
    report = pruner.step()
    assert list(report.left_out) == ["0"]
    assert {name: group.size for name, group in pruner.graph.groups.items()}["0"] == 8
    assert report.records


@pytest.mark.parametrize(
    ("layers", "options", "note"),
    [
        ((nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)), {"round_to": 8}, "0 of the units can go, not 0.2"),
        ((nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)), {}, "see pruner.graph.frozen"),
        (
            (nn.Linear(5, 64), nn.LayerNorm(64), nn.Linear(64, 4), nn.Linear(4, 3)),
            {"target": "macs"},
            "of the macs can go",
        ),
    ],
)
def test_the_note_says_why_less_has_been_cut_than_was_asked(layers, options, note, recwarn):
    model = nn.Sequential(*layers)
    options = {"criterion": "l1", "target": "units", **options}
    assert (
        note
        in ActivationPruner(model, torch.zeros(2, 5), {1: 0.2 if options["target"] == "units" else 0.5}, **options)
        .step()
        .note
    )
    assert not recwarn.list


def test_units_that_no_module_shows_have_no_statistics():
    class Bare(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(i, o))

        def forward(self, x):
            return x @ self.weight

    report = ActivationPruner(nn.Sequential(Bare(5, 8), nn.ReLU(), Bare(8, 2)), torch.zeros(2, 5), {1: 0.5}).step()
    assert report.left_out == {"0": "no module shows the activations of its units"}
    assert report.note == "no group of units can be cut: see report.left_out"


def test_ignored_layers_stay():
    model = network()
    pruner = prune(model, {1: 0.5}, criterion="l1", ignore=[model[4]])
    pruner.step()
    assert model[4].weight.shape[0] == 24
    assert model[1].conv1.weight.shape[0] == 8


def test_the_seed_is_that_of_random():
    def kept(seed):
        model = network()
        return {r.name: r.kept for r in prune(model, {1: 0.5}, criterion="random", seed=seed).step().records}["4.bias"]

    assert torch.equal(kept(0), kept(0))
    assert not torch.equal(kept(0), kept(1))


def test_every_k_th_pass_is_observed():
    model = network()
    pruner = prune(model, {1: 0.5}, every=4)
    for _ in range(5):
        model(X)
    assert pruner.statistics.groups["4"][0].seen[0] == 2 * len(X)


def test_a_criterion_of_ones_own():
    def last_first(group, context):
        return -torch.arange(group.size, dtype=torch.float64)

    model = network()
    pruner = prune(model, {1: 0.5}, criterion=last_first)
    records = {record.name: record.kept for record in pruner.step().records}
    assert records["4.bias"].tolist() == list(range(12))


def test_a_criterion_of_the_wrong_shape_is_named():
    pruner = prune(network(), {1: 0.5}, criterion=lambda group, context: torch.zeros(3))
    with pytest.raises(ValueError, match=r"scores of shape \(3,\) to .*, which has \d+ units"):
        pruner.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"remove": {0: 0.1}}, ValueError, "counted from 1"),
        ({"remove": {1: 1.0}}, ValueError, "in \\(0, 1\\)"),
        ({"remove": {1: 0.5, 2: 0.4}}, ValueError, "never falling"),
        ({"remove": 1.0, "by": 3}, ValueError, "remove is 1.0; it must be the fraction"),
        ({"remove": True, "by": 3}, ValueError, "remove is True"),
        ({"remove": "half", "by": 3}, ValueError, "remove is 'half'"),
        ({"remove": 0.5}, ValueError, "say after which epoch, counted from 1"),
        ({"remove": 0.5, "by": 0}, ValueError, "by=0: say after which epoch"),
        ({"remove": 0.5, "by": 2.5}, ValueError, "by=2.5: say after which epoch"),
        ({"remove": {1: 0.5}, "by": 3}, ValueError, "leave out by=3"),
        ({"criterion": "entropi"}, ValueError, "criterion is 'entropi'; choose from"),
        ({"target": "flops"}, ValueError, "target is 'flops'"),
        ({"split": "even"}, ValueError, "split is 'even'"),
        ({"round_to": 0}, ValueError, "round_to=0"),
        ({"max_ratio": 2}, ValueError, "max_ratio=2"),
        ({"model": 3}, TypeError, "takes a torch.nn.Module"),
        ({"model": nn.DataParallel(network())}, TypeError, "hand in model.module"),
        ({"optimizer": sgd(network())}, ValueError, "SGD has no parameter of this Sequential"),
        ({"averaged": nn.Linear(2, 2)}, ValueError, "hand in a copy of this model"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    good = {"model": network(), "example_inputs": X, "remove": {1: 0.5}}
    with pytest.raises(error, match=message):
        ActivationPruner(**{**good, **arguments})


def test_a_compiled_module_is_refused():
    with pytest.raises(TypeError, match=r"the module that torch.compile got"):
        prune(torch.compile(network()), {1: 0.5})


# ------------------------------------------------------------------------------- torch.compile, several processes


@pytest.mark.parametrize("in_place", [True, slow(False)])
def test_a_compiled_module_is_observed_and_cut(in_place):
    torch.compiler.reset()
    model = network()
    optimizer = sgd(model)
    pruner = prune(model, {2: 0.5}, optimizer)
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    for i in range(3):
        epoch(compiled, optimizer, i, steps=2)
        report = pruner.step()
        assert bool(report.records) == (i == 1)
    reference_model = network()
    reference_optimizer = sgd(reference_model)
    reference = prune(reference_model, {2: 0.5}, reference_optimizer)
    for i in range(3):
        epoch(reference_model, reference_optimizer, i, steps=2)
        reference.step()
    assert_same(pruner.state_dict()["units"], reference.state_dict()["units"])


def work(rank, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    try:
        model = network()
        optimizer = sgd(model)
        pruner = prune(model, {1: 0.3, 2: 0.6}, optimizer)
        alone, kept, biases = [], [], []
        for i in range(3):
            epoch(DistributedDataParallel(model), optimizer, 10 * i + rank)  # wrapped anew after each cut
            if i < 2:
                statistics = pruner.statistics.groups["4"]
                alone.append(torch.stack([s.entropy() for s in statistics]).mean(0).argsort().tolist())
            # Only the mean over the processes stays the same, each changes its mind.
            values = iter([float(rank), 1.0 - rank])
            pruner.guard = (lambda model, values=values: next(values), 0.1)
            kept.append([(r.name, r.dim, r.kept.tolist()) for r in pruner.step().records])
            # Now: the next wrapper would give all of them those of the first process.
            biases.append({n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")})
        torch.save((alone, kept, model.state_dict(), biases), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_processes_cut_alike(tmp_path):
    context = mp.start_processes(work, args=(str(tmp_path),), nprocs=2, join=False, start_method="spawn")
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=max(deadline - time.monotonic(), 0.1)):
            assert time.monotonic() < deadline, "the processes did not finish"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    (alone, kept, weights, biases), other = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert alone[0] != other[0][0]  # each by itself would have cut otherwise
    assert all(kept[:2])
    assert kept == other[1]
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in other[2].items()}
    assert all(torch.equal(t, other[2][n]) for n, t in weights.items() if "running" not in n)
    for after, others in zip(biases, other[3], strict=True):
        assert all(torch.equal(t, others[n]) for n, t in after.items())


# ------------------------------------------------------------------------------- the picture


def test_the_picture_shows_what_is_left():
    plots = pytest.importorskip("impact_optim.plots")
    pytest.importorskip("matplotlib")
    report = trained().step()
    figure = plots.plot_pruning(report)
    width, cost = figure.axes
    labels = [label.get_text() for label in width.get_yticklabels()]
    assert labels == [layer.name for layer in report.layers]
    taken, left, original = ([bar.get_width() for bar in bars] for bars in width.containers)
    assert list(zip(original, taken, left, strict=True)) == [layer.units for layer in report.layers]
    taken, left = ([bar.get_width() for bar in bars] for bars in cost.containers)
    assert list(zip(taken, left, strict=True)) == [layer.macs for layer in report.layers]
    with pytest.raises(ValueError, match="no layer that can be cut"):
        plots.plot_pruning(dataclasses.replace(report, layers=[]))
