"""What each criterion removes first, and that budgets are met, split and limited as promised."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from impact_optim.pruning.budget import SPLITS, nearest_zero, possible_cuts, removal_order, units_per_step
from impact_optim.pruning.criteria import CRITERIA, Context, mean_over_places
from impact_optim.pruning.graph import Axis, UnitGroup
from impact_optim.pruning.statistics import UnitStatistics, channel_responses, complexity_lost

quick = settings(deadline=None, max_examples=60)
N = 2000


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathered(responses: Tensor, **options: Any) -> UnitStatistics:
    result = UnitStatistics(responses.shape[1], **options)
    result.update(channel_responses(responses, 1), torch.arange(responses.shape[1]))
    return result


def group_of(size: int) -> UnitGroup:
    """Units of a convolution that a flattened linear layer of 4 positions reads, behind 3 channels of another group."""
    units = torch.arange(size)
    group = UnitGroup("conv", units, size)
    group.producers = [Axis("conv.weight", 0, units), Axis("conv.bias", 0, units)]
    behind = torch.cat([torch.full((3,), -1), units]).repeat_interleave(4)
    group.consumers = [Axis("fc.weight", 1, behind)]
    return group


def parameters_of(size: int) -> dict[str, Tensor]:
    return {
        "conv.weight": rand(size, 2, 3, 3, seed=1).float(),
        "conv.bias": rand(size, seed=2).float(),
        "fc.weight": rand(5, 4 * (size + 3), seed=3).float(),
    }


# -- criteria -------------------------------------------------------------------------------------------------------


def first_removed(name: str, responses: Tensor, **context: Any) -> int:
    """The unit that a criterion would remove first."""
    size = responses.shape[1]
    statistics = {"conv": [gathered(responses)]}
    scores = CRITERIA[name](group_of(size), Context(parameters_of(size), statistics, **context))
    assert scores.shape == (size,)
    assert scores.isfinite().all()
    return int(scores.argmin())


def test_entropy_removes_the_unit_that_answers_alike():
    a = rand(N, 4).relu() + 1.0
    a[:, 2] = 100.0
    assert first_removed("entropy", a) == 2


def test_rademacher_weighs_the_response_with_what_reads_it():
    a = rand(N, 4) * torch.tensor([1.0, 1.0, 3.0, 1.0]) + torch.tensor([0.0, 0.0, 9.0, 0.0])
    group, parameters = group_of(4), parameters_of(4)
    outgoing = parameters["fc.weight"].view(5, 7, 4)
    outgoing[:, 3:] = 1.0
    outgoing[:, 3 + 2] = 0.2  # three times the response, a fifth of the weight
    statistics = gathered(a)
    scores = CRITERIA["rademacher"](group, Context(parameters, {"conv": [statistics]}))
    assert scores.argmin() == 2
    norms = torch.tensor([1.0, 1.0, 0.2, 1.0]).double() * math.sqrt(20)
    torch.testing.assert_close(scores, norms * statistics.centred_projections().abs().mean(0) / N)


def test_l1_adds_the_filters_and_neither_biases_nor_norms():
    parameters = parameters_of(4)
    scores = CRITERIA["l1"](group_of(4), Context(parameters))
    torch.testing.assert_close(scores, parameters["conv.weight"].abs().sum((1, 2, 3)).double())


def test_importance_is_the_mean_over_all_weights_of_a_unit():
    importances = {name: w.abs() for name, w in parameters_of(4).items() if w.ndim > 1}
    scores = CRITERIA["importance"](group_of(4), Context({}, importances=importances))
    outgoing = importances["fc.weight"].view(5, 7, 4)[:, 3:]
    for unit in range(4):
        own = torch.cat([importances["conv.weight"][unit].flatten(), outgoing[:, unit].flatten()])
        assert scores[unit].item() == pytest.approx(own.mean().item(), rel=1e-6)


def test_random_depends_on_the_seed_and_stays_with_the_unit():
    group = group_of(6)
    scores = CRITERIA["random"](group, Context({}, seed=1))
    assert torch.equal(scores, CRITERIA["random"](group, Context({}, seed=1)))
    assert not torch.equal(scores, CRITERIA["random"](group, Context({}, seed=2)))
    group.original = torch.tensor([0, 3, 4])
    assert torch.equal(CRITERIA["random"](group, Context({}, seed=1)), scores[[0, 3, 4]])


def test_scores_are_the_mean_over_the_places_where_a_unit_was_seen():
    whole, half = gathered(rand(N, 2)), UnitStatistics(2)
    half.update(channel_responses(10 * rand(N, 1, seed=1), 1), torch.tensor([1]))
    values = mean_over_places(group_of(2), Context({}, {"conv": [whole, half]}), UnitStatistics.std)
    torch.testing.assert_close(values, torch.stack([whole.std()[0], (whole.std()[1] + half.std()[1]) / 2]))


@pytest.mark.parametrize(
    ("name", "context", "error"),
    [
        ("entropy", Context({}), "no statistics of 'conv'"),
        ("entropy", Context({}, {"conv": [UnitStatistics(4)]}), "4 of 4 units of 'conv' have not been seen,"),
        ("entropy", Context({}, {"conv": [gathered(torch.full((3, 4), math.nan))]}), "4 of 4 .* that are not finite"),
        ("importance", Context(parameters_of(4)), "no importances of the weights of 'conv'"),
        ("l1", Context({}), "no weights produce"),
    ],
)
def test_what_a_criterion_cannot_read_is_named(name, context, error):
    with pytest.raises(ValueError, match=error):
        CRITERIA[name](group_of(4), context)


def test_rademacher_needs_readers():
    group = group_of(4)
    group.consumers = []
    with pytest.raises(ValueError, match="no weights read"):
        CRITERIA["rademacher"](group, Context({}, {"conv": [gathered(rand(3, 4))]}))


# -- budgets --------------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 70), min_size=1, max_size=5)
options = st.fixed_dictionaries(
    {
        "split": st.sampled_from(SPLITS),
        "round_to": st.sampled_from([1, 2, 3, 8]),
        "min_units": st.integers(1, 10),
    }
)


def units_to_remove(
    scores: dict[str, Tensor], fraction: float, *, round_to: Any = 8, min_units: Any = 1, **options: Any
) -> dict[str, Tensor]:
    """With one number for all groups, or one for each."""
    stops = {
        name: possible_cuts(len(score), *(n if isinstance(n, int) else n[name] for n in (round_to, min_units)))
        for name, score in scores.items()
    }
    order = removal_order(scores, stops, **options)
    return order.first(order.nearest(fraction * sum(map(len, scores.values()))))


def drawn(sizes: list[int], seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Scores, some of them equal, and what the splits need."""
    scores, statistics = {}, {}
    for i, size in enumerate(sizes):
        name = f"layer{i}"
        scores[name] = (rand(size, seed=seed + i) * 4 * (i + 1)).round()
        statistics[name] = [gathered(rand(20, size, seed=seed + i))]
    return scores, {"statistics": statistics}


def stops(size: int, round_to: int, min_units: int) -> list[int]:
    """How many units may go, the slow way."""
    while round_to > 1 and 2 * round_to > size:
        round_to //= 2
    return [0, *(gone for gone in range(1, size) if (size - gone) % round_to == 0 and size - gone >= min_units)]


@quick
@given(sizes=sizes, seed=st.integers(0, 1000), fraction=st.floats(0, 1), options=options)
def test_the_budget_is_met_within_half_a_step_and_all_limits_hold(sizes, seed, fraction, options):
    scores, rest = drawn(sizes, seed)
    removed = units_to_remove(scores, fraction, **rest, **options)
    wanted, reached = fraction * sum(sizes), sum(map(len, removed.values()))
    steps, exhausted = [0], True
    for name, score in scores.items():
        gone = removed.get(name, torch.empty(0, dtype=torch.int64))
        order = sorted(range(len(score)), key=lambda i: (score[i].item(), i))
        assert gone.tolist() == sorted(order[: len(gone)])  # the lowest, equal ones by position
        allowed = stops(len(score), options["round_to"], options["min_units"])
        assert len(gone) in allowed
        exhausted &= len(gone) == allowed[-1]
        steps += [b - a for a, b in itertools.pairwise(allowed)]
    assert reached <= wanted + max(steps) / 2 + 1e-9
    assert exhausted or reached >= wanted - max(steps) / 2 - 1e-9
    assert removed.keys() <= scores.keys()
    assert all(len(gone) for gone in removed.values())


@quick
@given(sizes=sizes, seed=st.integers(0, 1000), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)), options=options)
def test_a_larger_budget_removes_the_same_units_and_more(sizes, seed, fractions, options):
    scores, rest = drawn(sizes, seed)
    less, more = (units_to_remove(scores, fraction, **rest, **options) for fraction in sorted(fractions))
    for name, gone in less.items():
        assert set(gone.tolist()) <= set(more[name].tolist())


@pytest.mark.parametrize("split", SPLITS)
def test_it_is_deterministic_and_nothing_is_removed_of_nothing(split):
    scores, rest = drawn([16, 24, 64], 0)
    first, second = (units_to_remove(scores, 0.4, split=split, **rest) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert units_to_remove(scores, 0.0, split=split, **rest) == {}


@quick
@given(
    drops=st.lists(st.integers(0, 9) | st.just(10**6), min_size=1, max_size=300),
    share=st.floats(0.01, 0.99),
    power=st.integers(1, 2),
)
def test_the_search_finds_the_number_of_steps_that_comes_nearest_in_few_tries(drops, share, power):
    """What is left of a network falls with each step, at times by nothing, and beyond the last step to nothing."""
    left = [sum(drops[i:]) ** power + 1 for i in range(len(drops) + 1)]
    wanted, asked = (1 - share) * left[0], []

    def excess(steps: int) -> float:
        asked.append(steps)
        return left[steps] - wanted

    found = nearest_zero(excess, left[0] - wanted, -wanted, len(drops))
    assert abs(left[found] - wanted) == min(abs(value - wanted) for value in left)
    assert len(set(asked)) == len(asked) <= 3 * math.log2(len(drops) + 2) + 2
    assert set(asked) <= set(range(1, len(drops) + 1))


def counts(removed: dict[str, Tensor]) -> dict[str, int]:
    return {name: len(gone) for name, gone in removed.items()}


@quick
@given(sizes=st.lists(st.integers(20, 200), min_size=1, max_size=4), fraction=st.floats(0, 0.9))
def test_uniform_takes_the_same_share_of_each_layer(sizes, fraction):
    scores = {str(i): rand(size, seed=i) for i, size in enumerate(sizes)}
    removed = units_to_remove(scores, fraction, round_to=1)
    for name, score in scores.items():
        assert len(removed.get(name, ())) == pytest.approx(fraction * len(score), abs=1.0 + fraction * len(sizes))


@pytest.mark.parametrize("split", SPLITS)
def test_equal_scores_go_step_by_step(split):
    """Sums of equal numbers differ in their last bits; the steps of a group must not change places for that."""
    scores = {"a": torch.tensor([0.1] * 40 + [0.7] * 40, dtype=torch.float64)}
    statistics = {"a": [gathered(rand(9, 80))]}
    for steps in range(10):
        removed = units_to_remove(scores, steps / 10, split=split, statistics=statistics)
        assert removed.get("a", torch.arange(0)).tolist() == list(range(8 * steps))


def test_rademacher_takes_the_same_share_of_complexity_of_each_layer():
    """A layer that a few units carry gives many, an even one few."""
    few = rand(500, 64) * torch.logspace(0, -3, 64).flip(0)
    statistics = {"few": [gathered(few)], "even": [gathered(rand(500, 64, seed=1))]}
    scores = {name: places[0].std() for name, places in statistics.items()}
    removed = units_to_remove(scores, 0.4, split="rademacher", statistics=statistics, round_to=1)
    lost = {}
    for name, gone in removed.items():
        order = scores[name].argsort(stable=True)
        lost[name] = complexity_lost(statistics[name][0].centred_projections(), order)[len(gone)].item()
    assert len(removed["few"]) > 1.3 * len(removed["even"])
    assert lost["few"] == pytest.approx(lost["even"], abs=0.02)
    assert len(removed["few"]) + len(removed["even"]) == 51


def test_the_rademacher_split_of_even_layers_is_the_uniform_one():
    statistics = {str(size): [gathered(rand(4000, size, seed=size))] for size in (32, 64)}
    scores = {name: places[0].std() for name, places in statistics.items()}
    removed = counts(units_to_remove(scores, 0.5, split="rademacher", statistics=statistics, round_to=1))
    assert removed["64"] / removed["32"] == pytest.approx(2.0, abs=0.4)


def test_limits_may_differ_by_group():
    scores = {"a": torch.arange(16.0), "b": torch.arange(16.0)}
    removed = units_to_remove(scores, 0.9, round_to={"a": 8, "b": 1}, min_units=8)
    assert counts(removed) == {"a": 8, "b": 8}
    assert counts(units_to_remove(scores, 0.1, round_to={"a": 8, "b": 1})) == {"b": 3}


@pytest.mark.parametrize(("size", "left"), [(60, 56), (16, 8), (12, 8), (10, 8), (6, 4), (3, 2), (2, 1)])
def test_small_layers_are_rounded_to_less(size, left):
    removed = units_to_remove({"a": rand(size)}, (size - left) / size)
    assert len(removed["a"]) == size - left
    assert units_to_remove({"a": rand(size)}, 0.4 * (size - left) / size) == {}


def test_units_per_step_counts_channels():
    heads = UnitGroup("h", torch.arange(12), 12, producers=[Axis("q", 0, torch.arange(12).repeat_interleave(64))])
    assert units_per_step(heads, 8) == 1
    assert units_per_step(group_of(16), 8) == 8
    pairs = UnitGroup("p", torch.arange(8), 8, producers=[Axis("w", 0, torch.arange(8).repeat_interleave(2))])
    assert units_per_step(pairs, 8) == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"split": "rademacher"}, "needs statistics of 'a'"),
        ({"scores": {"a": torch.tensor([1.0, math.nan])}}, "1 scores of 'a' are not finite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(options, error):
    with pytest.raises(ValueError, match=error):
        units_to_remove(**{"scores": {"a": torch.arange(8.0)}, "fraction": 0.5, **options})


def test_a_criterion_of_ones_own_is_one_line(monkeypatch):
    own: Callable[[UnitGroup, Context], Tensor] = lambda group, context: mean_over_places(  # noqa: E731
        group, context, UnitStatistics.std
    )
    monkeypatch.setitem(CRITERIA, "std", own)
    assert first_removed("std", rand(N, 4) * torch.tensor([1.0, 0.1, 1.0, 1.0])) == 1
