"""Activation statistics: the mathematics by enumeration, the accumulators against the whole data at once."""

import copy
import datetime
import doctest
import gc
import itertools
import math
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import impact_optim.pruning.statistics as statistics_module
from impact_optim.pruning.graph import Observation, UnitGraph, UnitGroup
from impact_optim.pruning.plan import Plan
from impact_optim.pruning.statistics import (
    ActivationStatistics,
    UnitStatistics,
    channel_responses,
    coarsened,
    complexity_lost,
    entropy,
    observed,
    rademacher_complexity,
    rademacher_signs,
)

seeds = st.integers(0, 2**31 - 1)
quick = settings(deadline=None, max_examples=40)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gathered(responses: Tensor, **options: Any) -> UnitStatistics:
    """Statistics of [samples, units] in one batch."""
    result = UnitStatistics(responses.shape[1], **options)
    result.update(channel_responses(responses, 1), torch.arange(responses.shape[1]))
    return result


def assert_same(a: UnitStatistics, b: UnitStatistics, rtol: float = 0.0) -> None:
    for name, tensor in a._tensors().items():
        tolerance = rtol if tensor.is_floating_point() else 0.0
        torch.testing.assert_close(tensor, getattr(b, name), rtol=tolerance, atol=tolerance, msg=name)


def sum_of(*parts: UnitStatistics) -> dict[str, Tensor]:
    """What statistics say together, as :meth:`UnitStatistics.all_reduce` adds them up."""
    exponent = torch.stack([part.exponent for part in parts]).amax(0)
    counts = sum(coarsened(part.counts, exponent - part.exponent) for part in parts)
    names = ("projections", "signs", "total", "energy", "seen")
    return {"exponent": exponent, "counts": counts, **{name: sum(getattr(p, name) for p in parts) for name in names}}


def test_docstring_examples():
    assert doctest.testmod(statistics_module, extraglobs={"torch": torch}).failed == 0


# -- entropy --------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_entropy_is_the_formula(counts):
    total = sum(counts)
    expected = -sum(c / total * math.log2(c / total) for c in counts if c)
    assert entropy(torch.tensor(counts)).item() == pytest.approx(expected, abs=1e-12)
    assert 0.0 <= entropy(torch.tensor(counts)).item() <= math.log2(len(counts)) + 1e-12


@quick
@given(seed=seeds, shift=st.integers(0, 12))
def test_joining_bins_is_counting_on_wide_ones(seed, shift):
    place = torch.randint(-32, 32, (200,), generator=torch.Generator().manual_seed(seed))
    fine = torch.bincount(place + 32, minlength=64).view(1, 64)
    wide = torch.tensor([math.floor(k / 2**shift) for k in place.tolist()])
    assert torch.equal(coarsened(fine, torch.tensor([shift])), torch.bincount(wide + 32, minlength=64).view(1, 64))


def test_entropy_is_on_bins_of_one_width():
    """A unit that hardly moves fills few bins, whatever else is in the group; a common scale of all changes little."""
    a = torch.rand(4000, 1, dtype=torch.float64) * torch.tensor([1.0, 0.5, 0.25, 1e-3, 0.0]).double()
    values = gathered(a).entropy()
    torch.testing.assert_close(values, torch.tensor([7.0, 6.0, 5.0, 0.0, 0.0]).double(), atol=0.05, rtol=0)
    assert torch.equal(gathered(a * 8).entropy(), values)
    assert torch.equal(gathered(-a).entropy().round(decimals=1), values.round(decimals=1))
    scaled = gathered(a * 1.4).entropy()
    torch.testing.assert_close(scaled[:2] - scaled[1:3], values[:2] - values[1:3], atol=0.05, rtol=0)


# -- Rademacher complexity ------------------------------------------------------------------------------------------


def all_signs(n: int) -> Tensor:
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n)), dtype=torch.float64)


@quick
@given(seed=seeds, n=st.integers(1, 8))
def test_khintchine_by_enumeration(seed, n):
    a = rand(n, 1, seed=seed)
    complexity = rademacher_complexity(all_signs(n) @ a, n).item()
    rms = a.square().mean().sqrt().item()
    assert rms / math.sqrt(2 * n) <= complexity * (1 + 1e-12)
    assert complexity <= rms / math.sqrt(n) * (1 + 1e-12)


def test_khintchine_is_tight():
    two = rademacher_complexity(all_signs(2) @ torch.ones(2, 1, dtype=torch.float64), 2)
    assert two.item() == pytest.approx(1 / math.sqrt(2 * 2))
    one = rademacher_complexity(all_signs(3) @ torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64), 3)
    assert one.item() == pytest.approx(1 / 3)


@quick
@given(seed=seeds, n=st.integers(1, 6), d=st.integers(1, 4))
def test_layer_complexity_by_enumeration_is_the_supremum(seed, n, d):
    a, signs = rand(n, d, seed=seed), all_signs(n)
    complexity = rademacher_complexity(signs @ a, n).item()
    # For each sign vector the supremum over the ball is attained along the sum, and by no other direction.
    sums = signs @ a
    best = torch.nn.functional.normalize(sums, dim=1)
    others = torch.nn.functional.normalize(rand(len(signs), 50, d, seed=seed + 1), dim=2)
    values = (signs * (best @ a.t())).sum(1) / n
    assert complexity == pytest.approx(values.mean().item())
    assert ((signs.unsqueeze(1) * (others @ a.t())).sum(2) / n <= values.unsqueeze(1) + 1e-12).all()
    assert complexity <= a.square().sum().sqrt().item() / n * (1 + 1e-12)
    assert complexity >= a.square().sum().sqrt().item() / n / math.sqrt(2) * (1 - 1e-12)


def test_layer_complexity_of_orthogonal_inputs_is_the_bound():
    a = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert rademacher_complexity(all_signs(2) @ a, 2).item() == pytest.approx(5.0 / 2)


@quick
@given(seed=seeds, d=st.integers(1, 7))
def test_complexity_lost_is_that_of_what_is_left(seed, d):
    projections, order = rand(5, d, seed=seed), torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    lost = complexity_lost(projections, order)
    whole = rademacher_complexity(projections, 1)
    for j in range(d + 1):
        left = rademacher_complexity(projections[:, order[j:]], 1)
        assert lost[j].item() == pytest.approx(1 - (left / whole).item(), abs=1e-12)
    assert (lost.diff() >= -1e-12).all()


def test_complexity_lost_of_a_dead_layer_is_the_share_of_units():
    assert complexity_lost(torch.zeros(3, 4).double(), torch.arange(4)).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_signs_do_not_depend_on_the_batches():
    whole = rademacher_signs(0, 20, 128, seed=5, rank=1)
    parts = [rademacher_signs(first, 5, 128, seed=5, rank=1) for first in range(0, 20, 5)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert torch.equal(whole[:7], rademacher_signs(0, 20, 7, seed=5, rank=1))
    assert set(whole.unique().tolist()) == {-1.0, 1.0}


def test_signs_are_balanced_and_independent():
    n = 20_000
    signs = rademacher_signs(0, n, 128)
    assert (signs.mean(1).abs() < 5 / math.sqrt(n)).all()
    products = (signs @ signs.t() / n).fill_diagonal_(0.0)
    assert products.abs().max() < 5.5 / math.sqrt(n)
    across = (signs[:, :-1] * signs[:, 1:]).mean(1)
    assert (across.abs() < 5 / math.sqrt(n)).all()
    for other in (rademacher_signs(0, n, 128, seed=1), rademacher_signs(0, n, 128, rank=1)):
        assert ((signs * other).mean(1).abs() < 5 / math.sqrt(n)).all()


def test_streamed_complexity_is_that_of_the_fixed_signs_and_close_to_the_expectation():
    a = rand(2000, 6).relu() * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 0.0])
    stats = UnitStatistics(6, seed=3)
    for part in a.split(300):
        stats.update(channel_responses(part, 1), torch.arange(6))
    signs = rademacher_signs(0, 2000, 64, seed=3)
    torch.testing.assert_close(stats.projections, signs @ a)
    torch.testing.assert_close(stats.centred_projections(), signs @ (a - a.mean(0)))
    torch.testing.assert_close(stats.mean(), a.mean(0))
    torch.testing.assert_close(stats.std(), a.std(0, correction=0))
    # Many samples: the sum is nearly normal, and E|sum| = sqrt(2 / pi) of its standard deviation.
    expected = stats.std() / math.sqrt(2000) * math.sqrt(2 / math.pi)
    torch.testing.assert_close(stats.rademacher(), expected, rtol=4 * 0.76 / math.sqrt(64), atol=0)
    assert stats.rademacher()[-1] == 0


def test_a_constant_has_no_complexity():
    shifted = gathered(rand(500, 1) + torch.tensor([0.0, 100.0]))
    torch.testing.assert_close(shifted.rademacher()[0], shifted.rademacher()[1])
    constant = torch.full((500, 1), 7.0)
    constant[3] = math.nan
    assert gathered(constant).rademacher().item() < 1e-12


# -- responses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), [((4, 6), 1), ((4, 6, 5, 3), 1), ((4, 5, 6), 2), ((4, 5, 6), -1)])
def test_responses_are_means_over_positions(shape, dim, dtype):
    activation = rand(*shape).to(dtype)
    mean = channel_responses(activation, dim)
    others = tuple(d for d in range(1, len(shape)) if d != dim % len(shape))
    exact = activation.double()
    torch.testing.assert_close(mean.double(), exact.mean(others) if others else exact, rtol=1e-5, atol=1e-6)
    assert mean.dtype == torch.promote_types(dtype, torch.float32)


def test_responses_do_not_depend_on_the_memory_format():
    activation = rand(4, 6, 5, 3)
    a, b = (channel_responses(t, 1) for t in (activation, activation.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["permuted", "some in no unit", "a unit not there"])
def test_channels_find_their_units(where):
    activation = rand(7, 5, 3)
    order = {"permuted": [3, 1, 0, 4, 2], "some in no unit": [-1, 2, 0, -1, 1], "a unit not there": [3, 1, 0, 4, 5]}[
        where
    ]
    stats = UnitStatistics(6)
    stats.update(channel_responses(activation, 1), torch.tensor(order))
    alone = gathered(activation.mean(2))
    for unit in range(6):
        if unit in order:
            channel = order.index(unit)
            torch.testing.assert_close(stats.energy[unit], alone.energy[channel])
            assert torch.equal(stats.counts[unit], alone.counts[channel])
            assert stats.seen[unit] == 7
        else:
            assert stats.seen[unit] == stats.counts[unit].sum() == 0


@quick
@given(seed=seeds, counts=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(lambda c: max(c) > 1))
def test_a_unit_of_several_channels_answers_with_their_root_mean_square(seed, counts):
    """A head, or a channel that has been flattened."""
    units = torch.tensor([-1, *(u for u, c in enumerate(counts) for _ in range(c))])
    units = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))]
    activation = rand(5, 3, len(units), seed=seed)
    stats = UnitStatistics(len(counts))
    stats.update(channel_responses(activation, 2), units)
    for unit, count in enumerate(counts):
        own = activation[:, :, units == unit]
        response = own.mean(1).square().sum(1).div(max(count, 1)).sqrt()
        torch.testing.assert_close(stats.energy[unit], response.square().sum())
        assert stats.seen[unit] == (5 if count else 0)


def test_a_rotation_within_heads_changes_nothing():
    activation, units = rand(20, 8), torch.arange(2).repeat_interleave(4)
    rotation = torch.block_diag(*(torch.linalg.qr(rand(4, 4, seed=i)).Q for i in range(2)))
    a, b = UnitStatistics(2), UnitStatistics(2)
    a.update(channel_responses(activation, 1), units)
    b.update(channel_responses(activation @ rotation, 1), units)
    torch.testing.assert_close(a.energy, b.energy)
    torch.testing.assert_close(a.rademacher(), b.rademacher())


# -- accumulators ---------------------------------------------------------------------------------------------------


def test_powers_of_two_are_exact():
    exponents = torch.arange(-128, 129)
    assert torch.exp2(exponents.double()).tolist() == [2.0**e for e in exponents.tolist()]


@quick
@given(values=st.lists(st.floats(-(2.0**100), 2.0**100), min_size=1, max_size=30))
def test_a_histogram_counts_on_the_least_grid_that_holds_all(values):
    stats, bins = gathered(torch.tensor(values, dtype=torch.float64).unsqueeze(1)), 256
    width, half = 2.0 ** stats.exponent.item(), bins // 2
    expected = [0] * bins
    for value in values:
        place = math.floor(value / width)
        assert -half <= place < half
        expected[place + half] += 1
    assert stats.counts.flatten().tolist() == expected
    if stats.exponent > -64:  # half the width would not reach
        assert max(abs(v) for v in values) >= width / 2 * half


@quick
@given(seed=seeds, n=st.integers(2, 40), cut=st.floats(0, 1))
def test_two_halves_are_the_whole_in_any_order(seed, n, cut):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-80, 80, (n, 3), generator=generator).double())
    a = rand(n, 3, seed=seed) * scale
    middle = int(cut * n)
    whole, first, second = gathered(a), UnitStatistics(3), UnitStatistics(3)
    second.samples = middle
    for stats, part in ((first, a[:middle]), (second, a[middle:])):
        for batch in part.split(7):
            stats.update(channel_responses(batch, 1), torch.arange(3))
    for added in (sum_of(first, second), sum_of(second, first)):
        for name, tensor in added.items():
            if name == "projections":  # with signs, so that sums may cancel: to rounding of what they add up
                bound = 64 * torch.finfo(torch.float64).eps * a.abs().sum(0)
                assert ((tensor - whole.projections).abs() <= bound).all()
            else:
                torch.testing.assert_close(tensor, getattr(whole, name), rtol=1e-12, atol=1e-12, msg=name)
    shuffled = gathered(a[torch.randperm(n, generator=generator)])
    assert torch.equal(shuffled.counts, whole.counts)
    assert torch.equal(shuffled.exponent, whole.exponent)


@quick
@given(seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]), share=st.floats(0, 1))
def test_what_is_not_finite_is_left_out(seed, bad, share):
    generator = torch.Generator().manual_seed(seed)
    a = rand(30, 2, 3, seed=seed)
    poisoned = a.clone()
    where = torch.rand(30, 2, 3, generator=generator) < share / 2
    poisoned[where] = bad
    stats = UnitStatistics(2)
    stats.update(channel_responses(poisoned, 1), torch.arange(2))
    for unit in range(2):
        good = ~where[:, unit].any(1)
        clean = gathered(a[good, unit].mean(1, keepdim=True))
        assert torch.equal(stats.counts[unit], clean.counts[0])
        assert stats.seen[unit] == good.sum()
        torch.testing.assert_close(stats.energy[unit], clean.energy[0])
        signs = rademacher_signs(0, 30, 64)[:, good]
        torch.testing.assert_close(stats.projections[:, unit], signs @ a[good, unit].mean(1))
        assert torch.equal(stats.signs[:, unit], signs.sum(1).int())


@quick
@given(seed=seeds, kept=st.lists(st.integers(0, 5), unique=True))
def test_kept_units_keep_their_statistics(seed, kept):
    a = rand(30, 6, seed=seed)
    stats, alone = gathered(a), gathered(a[:, kept])
    stats.keep(torch.tensor(kept, dtype=torch.int64))
    assert stats.size == len(kept)
    assert_same(stats, alone, rtol=1e-12)
    stats.update(channel_responses(a[:, kept], 1), torch.arange(len(kept)))
    alone.update(channel_responses(a[:, kept], 1), torch.arange(len(kept)))
    assert_same(stats, alone, rtol=1e-12)


def test_a_checkpoint_resumes_exactly(tmp_path):
    a = rand(40, 3)
    whole, first = gathered(a), gathered(a[:25])
    torch.save(first.state_dict(), tmp_path / "s.pt")
    resumed = UnitStatistics(3)
    resumed.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert_same(resumed, first)
    resumed.update(channel_responses(a[25:], 1), torch.arange(3))
    first.update(channel_responses(a[25:], 1), torch.arange(3))
    assert_same(resumed, first)
    assert_same(resumed, whole, rtol=1e-12)
    with pytest.raises(ValueError, match="of other units"):
        resumed.load_state_dict(UnitStatistics(4).state_dict())
    with pytest.raises(ValueError, match="missing"):
        resumed.load_state_dict({"samples": 1, "seed": 0})
    assert_same(resumed, first)


def test_many_samples_are_taken_in_by_parts(monkeypatch):
    a = rand(100, 4, 2)
    results = []
    for rows in (100, 7):
        monkeypatch.setattr(statistics_module, "_ROWS", rows)
        stats = UnitStatistics(2)
        stats.update(channel_responses(a, 1), torch.tensor([0, 1, 1, -1]))
        results.append(stats)
    assert_same(*results, rtol=1e-12)
    assert results[1].samples == 100


def test_reset_forgets_all_but_the_place_in_the_stream():
    stats = gathered(rand(9, 3))
    stats.reset()
    assert_same(stats, UnitStatistics(3))
    assert stats.samples == 9


def test_an_empty_batch_changes_nothing():
    stats = gathered(rand(9, 3))
    before = copy.deepcopy(stats)
    stats.update(channel_responses(torch.zeros(0, 3, 4), 1), torch.arange(3))
    assert_same(stats, before)


@pytest.mark.parametrize(
    ("activation", "dim", "units", "error"),
    [
        (torch.zeros(4, 3), 0, 3, "holds the samples"),
        (torch.zeros(4, 3), -2, 3, "holds the samples"),
        (torch.zeros(4, 3), 3, 3, "or is not there"),
        (torch.zeros(()), 0, 3, "or is not there"),
        (torch.zeros(4, 3), 1, 2, "given for 2 channels"),
        (torch.zeros(4, 3, dtype=torch.int64), 1, 3, "floating point"),
    ],
)
def test_bad_activations_are_refused(activation, dim, units, error):
    stats = UnitStatistics(3)
    with pytest.raises((TypeError, ValueError), match=error):
        stats.update(channel_responses(activation, dim), torch.arange(units))
    assert_same(stats, UnitStatistics(3))
    assert stats.samples == 0


# -- hooks ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.last = nn.Linear(5 * 16, 4)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = checkpoint(self.second, x, use_reentrant=False) if self.checkpointed else self.second(x)
        return self.last(torch.relu(x).flatten(1))


def net_graph() -> UnitGraph:
    flat = torch.arange(5).repeat_interleave(16)
    a, b = (
        UnitGroup(name, torch.arange(size), size, observations=observations)
        for name, size, observations in (
            ("first", 6, [Observation("second", "input", 1, torch.arange(6))]),
            ("second", 5, [Observation("last", "input", 1, flat), Observation("second", "output", 1, torch.arange(5))]),
        )
    )
    return UnitGraph(groups={"first": a, "second": b})


def inputs(seed: int = 0, n: int = 8) -> Tensor:
    return rand(n, 3, 4, 4, seed=seed, dtype=torch.float32)


def watched(net: Net | None = None, **options: Any) -> ActivationStatistics:
    result = ActivationStatistics(net or Net(), net_graph(), **{"every": 1, **options})
    result.attach()
    return result


def seen(stats: ActivationStatistics) -> list[int]:
    return [int(place.seen.max()) for places in stats.groups.values() for place in places]


def test_hooks_see_what_consumers_read():
    stats = watched()
    x = inputs()
    stats.model(x)
    hidden = torch.relu(stats.model.first(x))
    expected = UnitStatistics(6)
    expected.update(channel_responses(hidden, 1), torch.arange(6))
    assert_same(stats.groups["first"][0], expected)
    expected = UnitStatistics(5)
    deeper = torch.relu(stats.model.second(hidden)).flatten(1)
    expected.update(channel_responses(deeper, 1), torch.arange(5).repeat_interleave(16))
    assert_same(stats.groups["second"][0], expected)
    assert [len(places) for places in stats.groups.values()] == [1, 1]  # outputs only where no input is seen


def test_outputs_are_looked_at_where_no_input_is():
    graph = net_graph()
    del graph.groups["second"].observations[0]
    stats = ActivationStatistics(Net(), graph, every=1)
    stats.attach()
    stats.model(inputs())
    expected = UnitStatistics(5)
    expected.update(channel_responses(stats.model.second(torch.relu(stats.model.first(inputs()))), 1), torch.arange(5))
    assert_same(stats.groups["second"][0], expected)


def test_at_most_four_places_are_looked_at():
    group = UnitGroup("g", torch.arange(2), 2)
    for number in range(1, 12):
        group.observations = [Observation(str(i), "input", 1, torch.arange(2)) for i in range(number)]
        names = [int(place.module) for place in observed(group)]
        assert len(set(names)) == min(number, 4)
        assert names == sorted(names)
        assert names[0] == 0
        assert names[-1] == (number - 1 if number > 1 else 0)


def test_nothing_of_training_changes():
    net = Net()
    plain = copy.deepcopy(net)
    stats = watched(net)
    for model in (net, plain):
        model(inputs()).square().sum().backward()
    assert seen(stats) == [8, 8]
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(net(inputs()), plain(inputs()))


def test_one_pass_in_every_few_is_recorded():
    stats = watched(every=3)
    for i in range(7):
        stats.model(inputs(i))
    assert seen(stats) == [24, 24]  # passes 0, 3 and 6
    stats.reset()
    stats.model(inputs())
    assert seen(stats) == [8, 8]


def test_evaluation_recomputation_and_parts_on_their_own_are_not_recorded():
    stats = watched()
    net = stats.model
    net.eval()(inputs())
    net.train()
    net.second(torch.relu(net.first(inputs())))
    with torch.no_grad():  # as update_bn does, which gathers the batch norms' statistics anew
        net(inputs())
    assert seen(stats) == [0, 0]
    assert stats.batches == 0
    net.checkpointed = True
    net(inputs()).sum().backward()
    assert seen(stats) == [8, 8]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        net(mode.from_tensor(inputs()))
    torch.export.export(net, (inputs(),))
    assert seen(stats) == [8, 8]


def test_a_failed_pass_ends_the_recording():
    stats = watched()
    with pytest.raises(ValueError, match="input of 'last': units are given for 80 channels"):
        stats.model(torch.zeros(2, 3, 5, 5))
    assert seen(stats) == [2, 0]
    stats.model.second(torch.zeros(2, 6, 5, 5))
    assert seen(stats) == [2, 0]


def test_autocast_and_channels_last():
    stats = watched(Net().to(memory_format=torch.channels_last))
    x = inputs(n=64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        stats.model(x).sum().backward()
    expected = UnitStatistics(6)
    expected.update(channel_responses(torch.relu(stats.model.first(x)), 1), torch.arange(6))
    place = stats.groups["first"][0]
    torch.testing.assert_close(place.energy, expected.energy, rtol=0.02, atol=0)
    torch.testing.assert_close(place.projections, expected.projections, rtol=0.05, atol=0.1)
    assert place.energy.dtype == torch.float64


def test_compiled_models_are_recorded():
    torch._dynamo.reset()
    stats = watched(every=2)
    plain = watched(stats.model, every=2)
    plain.detach()
    compiled = torch.compile(stats.model, backend="eager")
    for i in range(4):
        compiled(inputs(i)).sum().backward()
    assert seen(stats) == [16, 16]
    stats.detach()
    plain.attach()
    for i in range(4):
        stats.model(inputs(i))
    for name, places in plain.groups.items():
        assert_same(places[0], stats.groups[name][0], rtol=1e-5)
    torch._dynamo.reset()


def test_no_graph_is_kept_alive():
    stats, hidden = watched(), []
    handle = stats.model.second.register_forward_pre_hook(lambda module, args: hidden.append(weakref.ref(args[0])))
    stats.model(inputs())
    handle.remove()
    assert seen(stats) == [8, 8]
    assert not any(t.requires_grad for place in stats.groups["first"] for t in place._tensors().values())
    gc.collect()
    assert hidden[0]() is None


def test_copies_have_no_hooks_and_detaching_leaves_none():
    stats = watched()
    twin = copy.deepcopy(stats.model)
    twin(inputs())
    assert seen(stats) == [0, 0]
    stats.attach()  # twice is once
    stats.model(inputs())
    assert seen(stats) == [8, 8]
    stats.detach()
    for module in stats.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
        assert not module._forward_pre_hooks_with_kwargs
    stats.model(inputs())
    assert seen(stats) == [8, 8]


def test_statistics_that_are_gone_are_not_missed():
    net = Net()
    gone = weakref.ref(watched(net))
    gc.collect()
    assert gone() is None
    net(inputs())


def test_a_cut_goes_on_with_the_updated_graph():
    stats = watched()
    stats.model(inputs())
    kept = torch.tensor([0, 2, 5])
    net, group = stats.model, stats.graph.groups["first"]
    net.first.weight.data, net.first.bias.data = net.first.weight.data[kept], net.first.bias.data[kept]
    net.second.weight.data = net.second.weight.data[:, kept]
    group.original = kept
    group.observations = [Observation("second", "input", 1, torch.arange(3))]
    before = stats.groups["first"][0].energy[kept]
    stats.keep(Plan(left={"first": kept}))
    assert torch.equal(stats.groups["first"][0].energy, before)
    net(inputs(1))
    assert seen(stats) == [16, 16]
    assert stats.groups["first"][0].size == 3


def test_all_groups_are_saved_and_loaded(tmp_path):
    stats = watched(every=2)
    for i in range(3):
        stats.model(inputs(i))
    torch.save(stats.state_dict(), tmp_path / "s.pt")
    other = ActivationStatistics(Net(), net_graph(), every=2)
    other.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert other.batches == 3
    for name in stats.groups:
        assert_same(stats.groups[name][0], other.groups[name][0])
    assert seen(other) == [16, 16]
    graph = net_graph()
    del graph.groups["second"]
    smaller = ActivationStatistics(Net(), graph)
    with pytest.raises(ValueError, match="second"):
        smaller.load_state_dict(stats.state_dict())
    assert seen(smaller) == [0]


def test_bad_frequencies_are_refused():
    with pytest.raises(ValueError, match="every"):
        ActivationStatistics(Net(), net_graph(), every=0)


def test_what_is_no_tensor_is_refused():
    net = Net()
    net.second = nn.LSTM(4, 4)
    graph = UnitGraph(groups={"g": UnitGroup("g", torch.arange(4), 4)})
    graph.groups["g"].observations.append(Observation("second", "output", 2, torch.arange(4)))
    net.forward = lambda x: net.second(x)[0]
    stats = ActivationStatistics(net, graph, every=1)
    stats.attach()
    with pytest.raises(TypeError, match="output of 'second' is a tuple"):
        net(torch.zeros(2, 3, 4))


# -- processes ------------------------------------------------------------------------------------------------------

WORLD = 2
TIMEOUT = 120.0  # seconds; processes that have not ended by then are ended


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    try:
        torch.manual_seed(0)
        stats = watched()
        model = DistributedDataParallel(stats.model)
        for i in range(2):
            model(inputs(10 * i + rank) * (1 + 99 * rank)).sum().backward()
        first = stats.all_reduce()
        second = stats.all_reduce()
        result = [
            {name: places[0].state_dict() for name, places in groups.items()}
            for groups in (stats.groups, first, second)
        ]
        torch.save(result, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_processes_add_up_what_each_has_seen(tmp_path):
    context = mp.start_processes(work, args=(str(tmp_path),), nprocs=WORLD, join=False, start_method="spawn")
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=max(deadline - time.monotonic(), 0.1)):
            if time.monotonic() > deadline:
                pytest.fail(f"the processes did not finish in {TIMEOUT:.0f} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    ranks = [torch.load(Path(tmp_path, f"{rank}.pt"), weights_only=True) for rank in range(WORLD)]
    for name, size in (("first", 6), ("second", 5)):
        local = [UnitStatistics(size, rank=rank) for rank in range(WORLD)]
        for stats, rank in zip(local, ranks, strict=True):
            stats.load_state_dict(rank[0][name])
        assert not torch.equal(local[0].exponent, local[1].exponent)
        together = sum_of(*local)
        for rank, again in itertools.product(ranks, (1, 2)):
            reduced = UnitStatistics(size)
            reduced.load_state_dict(rank[again][name])
            for key, tensor in together.items():
                torch.testing.assert_close(getattr(reduced, key), tensor, rtol=1e-12, atol=0, msg=key)
            assert reduced.seen.tolist() == [32] * size
        for rank, result in enumerate(ranks):
            own = rademacher_signs(0, 16, 64, rank=rank).sum(1, keepdim=True).int()
            assert torch.equal(result[0][name]["signs"], own.expand(-1, size))


def test_one_process_reduces_to_a_copy():
    stats = watched()
    stats.model(inputs())
    reduced = stats.all_reduce()
    assert_same(reduced["first"][0], stats.groups["first"][0])
    stats.model(inputs())
    assert reduced["first"][0].seen.tolist() == [8] * 6
