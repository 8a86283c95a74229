"""The mathematics of the simplex, by its invariants."""

import doctest
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import impact_optim.simplex as simplex_module
from impact_optim.layout import BLOCK
from impact_optim.simplex import (
    LOG_BOUND,
    SAMPLE,
    fill_level,
    fill_target,
    keep_probability,
    log_mean_exp,
    mirror_step,
    perplexity,
    water_level,
)

seeds = st.integers(0, 2**31 - 1)
shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4)


def random_simplex(shapes, sigma, seed):
    generator = torch.Generator().manual_seed(seed)
    log_w = [torch.randn(shape, generator=generator) * sigma for shape in shapes]
    normalizer = log_mean_exp(log_w)
    return [t - normalizer for t in log_w]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def exact_level(log_w, mean):
    """The water level in float64 by sorting, an algorithm that shares nothing with Newton's method."""
    w = flat(log_w).double().exp().sort(descending=True).values
    n = w.numel()
    below = w.flip(0).cumsum(0).flip(0)  # the sum of what is not full yet
    for full in range(n):
        level = (mean * n - full) / below[full]
        if level * w[full] <= 1 + 1e-12:
            return level.item()
    raise AssertionError("unreachable for a mean below 1")


def test_docstring_examples():
    assert doctest.testmod(simplex_module, extraglobs={"torch": torch}).failed == 0


@settings(deadline=None, max_examples=60)
@given(
    shapes=shapes,
    exponent=st.floats(-30, 30),
    eta=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    lam=st.floats(0, 1e6),
    seed=seeds,
)
def test_mirror_steps_stay_on_the_simplex(shapes, exponent, eta, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    log_w = [torch.zeros(shape) for shape in shapes]
    normalizer = torch.zeros(())
    for _ in range(5):
        signals = [torch.randn(shape, generator=generator) * 10.0**exponent for shape in shapes]
        log_w = [mirror_step(t, h, eta, lam, normalizer) for t, h in zip(log_w, signals, strict=True)]
        normalizer = log_mean_exp(log_w)
        w = flat([(t - normalizer).exp() for t in log_w])
        assert torch.isfinite(w).all()
        assert (w >= 0).all()
        assert w.double().mean().item() == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("signal", [torch.zeros(7), torch.full((7,), 3.0)], ids=["zeros", "equal"])
def test_a_signal_that_prefers_nothing_leaves_the_weights_uniform(signal):
    log_w = mirror_step(torch.zeros(7), signal, 0.5, 0.1)
    torch.testing.assert_close((log_w - log_mean_exp([log_w])).exp(), torch.ones(7))


def test_a_simplex_of_one_weight():
    log_w = mirror_step(torch.zeros(1), torch.tensor([1e30]), 1.0, 0.0)
    assert (log_w - log_mean_exp([log_w])).exp().item() == 1.0


def test_ten_million_weights_sum_to_ten_million():
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(10_000_000, generator=generator)
    w = (log_w - log_mean_exp([log_w])).exp()
    assert w.double().mean().item() == pytest.approx(1.0, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(lam=st.floats(0.05, 20), seed=seeds)
def test_a_constant_signal_leads_to_its_gibbs_distribution(lam, seed):
    h = torch.randn(50, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
    log_w, normalizer = torch.zeros(50), torch.zeros(())
    eta = 1.0
    for _ in range(int(25 / math.log1p(eta * lam)) + 5):
        log_w = mirror_step(log_w, h, eta, lam, normalizer)
        normalizer = log_mean_exp([log_w])
    gibbs = torch.softmax(-h / lam, 0) * 50
    inside = -h / lam > (-h / lam).max() - LOG_BOUND
    torch.testing.assert_close((log_w - normalizer).exp()[inside], gibbs[inside], rtol=2e-3, atol=1e-6)


def test_mirror_step_solves_its_problem():
    """No point of the simplex near the closed form has a lower objective."""
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(6, generator=generator, dtype=torch.float64)
    old = old - log_mean_exp([old])
    h = torch.randn(6, generator=generator, dtype=torch.float64)
    eta, lam = 0.7, 0.3
    new = mirror_step(old, h, eta, lam)
    new = new - log_mean_exp([new])

    def objective(log_w):
        w = log_w.exp()
        return ((w * h).sum() + lam * (w * log_w).sum() + (w * (log_w - old)).sum() / eta).item()

    best = objective(new)
    for _ in range(200):
        other = new + 0.05 * torch.randn(6, generator=generator, dtype=torch.float64)
        assert objective(other - log_mean_exp([other])) > best


# -- the budget --

# Rates and spreads of importances: σ = 40 reaches the bounds of the logarithms.
rates = st.one_of(st.floats(-6, -0.0044).map(lambda exponent: 10**exponent), st.sampled_from([1e-6, 0.01, 0.5, 0.99]))
spreads = st.one_of(st.floats(0, 12), st.sampled_from([0.0, 1e-6, 40.0]))
ROUNDING = 6e-8  # of a float32 just below 1


def importances(n, kind, spread, seed):
    """Log-importances of very different kinds, as a step may leave them."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "lognormal":
        log_w = torch.randn(n, generator=generator) * spread
    elif kind == "two values":
        log_w = torch.where(torch.rand(n, generator=generator) < 0.1, spread, 0.0)
    elif kind == "one peak":
        log_w = torch.zeros(n)
        log_w[seed % n] = spread
    elif kind == "few below":
        log_w = torch.where(torch.rand(n, generator=generator) < 1e-3, -spread, 0.0)
    else:
        return torch.where(torch.rand(n, generator=generator) < 0.5, -LOG_BOUND, LOG_BOUND)
    log_w = log_w.clamp(-LOG_BOUND, LOG_BOUND)
    return (log_w - log_mean_exp([log_w])).clamp(-LOG_BOUND, LOG_BOUND)


kinds = st.sampled_from(["lognormal", "two values", "one peak", "few below", "bounds"])


def assert_on_budget(keep, drop_rate):
    """To 1e-3 of the mean and to 5% of the rate itself, but for the rounding of π to float32."""
    dropped = 1.0 - keep.double()
    assert dropped.mean().item() == pytest.approx(drop_rate, abs=min(1e-3, 0.05 * drop_rate) + ROUNDING)


def keep_of(w, drop_rate, floor, drop, alive=None):
    target = fill_target(drop_rate, floor, drop)
    if not 0 < target < 1:
        return torch.full_like(torch.cat(w), 1 - drop_rate)
    level = fill_level(w, target, alive).float()
    return torch.cat([keep_probability(t * level, floor, drop) for t in w])


def check_budget(sizes, kind, spread, drop_rate, floor_share, drop, seed):
    n = sum(sizes)
    w = importances(n, kind, spread, seed).exp()
    floor = floor_share * (1 - drop_rate)
    keep = keep_of(list(w.split(sizes)), drop_rate, floor, drop)
    assert_on_budget(keep, drop_rate)
    assert keep.max() <= 1 + 1e-6
    assert keep.min() >= floor - 1e-6
    steps = keep[w.argsort()].diff()
    assert ((steps >= -1e-6) if drop == "unimportant" else (steps <= 1e-6)).all()


budgets = {
    "kind": kinds,
    "spread": spreads,
    "drop_rate": rates,
    "floor_share": st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.0]),
    "drop": st.sampled_from(["unimportant", "important"]),
    "seed": seeds,
}


@settings(deadline=None, max_examples=100)
@given(sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=3).filter(lambda s: 2 <= sum(s) <= SAMPLE), **budgets)
def test_a_small_simplex_meets_the_budget_and_the_floor(sizes, **case):
    check_budget(sizes, **case)


@settings(deadline=None, max_examples=100)
@given(sizes=st.sampled_from([[SAMPLE + 1], [3000, 3000], [1, 20_000, 7]]), **budgets)
def test_a_simplex_too_large_to_be_sorted_meets_them_too(sizes, **case):
    check_budget(sizes, **case)


@settings(deadline=None, max_examples=20)
@given(sizes=st.sampled_from([[BLOCK + 1], [2 * BLOCK, 5, BLOCK - 1]]), **budgets)
def test_a_simplex_of_several_blocks_meets_them_too(sizes, **case):
    check_budget(sizes, **case)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(sizes=st.sampled_from([[700], [SAMPLE + 1], [BLOCK + 1], [3 * BLOCK, BLOCK]]), **budgets)
def test_the_budget_in_a_long_sweep(sizes, **case):
    check_budget(sizes, **case)


@settings(deadline=None, max_examples=60)
@given(
    n=st.sampled_from([50, 3000, SAMPLE + 50, 30_000]),
    zeros=st.floats(0, 0.9),
    kind=kinds,
    spread=spreads,
    drop_rate=rates,
    seed=seeds,
)
def test_zeros_that_are_held_have_no_part_in_the_budget(n, zeros, kind, spread, drop_rate, seed):
    is_alive = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) >= zeros
    is_alive[0] = True
    w = importances(n, kind, spread, seed).exp() * is_alive
    keep = keep_of([w], drop_rate, 0.0, "unimportant", is_alive.sum())
    assert_on_budget(keep[is_alive], drop_rate)
    assert not keep[~is_alive].any()


@settings(deadline=None, max_examples=80)
@given(shapes=shapes, sigma=st.floats(0, 12), mean=st.floats(0.01, 0.99), seed=seeds)
def test_the_level_of_a_small_simplex_is_exact(shapes, sigma, mean, seed):
    log_w = random_simplex(shapes, sigma, seed)
    level = water_level(log_w, mean)
    filled = flat(log_w).double().add(level.double()).exp().clamp(max=1)
    assert filled.mean().item() == pytest.approx(mean, abs=1e-5)
    if flat(log_w).numel() > 1:
        reference = flat(log_w).double().exp().mul(exact_level(log_w, mean)).clamp(max=1)
        torch.testing.assert_close(filled, reference, rtol=1e-4, atol=1e-5)


class CountPasses(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.count_nonzero.default
        return func(*args, **(kwargs or {}))


@settings(deadline=None, max_examples=60)
@example(n=SAMPLE + 1, kind="lognormal", spread=0.0, drop_rate=10**-5.90234375, seed=0)
@given(n=st.sampled_from([SAMPLE + 1, BLOCK - 1]), kind=kinds, spread=spreads, drop_rate=rates, seed=seeds)
def test_the_level_never_takes_a_hundred_passes(n, kind, spread, drop_rate, seed):
    """Also where the budget is finer than float32: importances just off uniform and a small rate, as at a warm-up."""
    w = importances(n, kind, spread, seed).exp()
    with CountPasses() as passes:
        fill_level([w], 1 - drop_rate)
    assert passes.count <= 100


@pytest.mark.parametrize("drop_rate", [1e-4, 1e-3, 0.1, 0.5])
def test_the_level_takes_few_passes_where_nothing_is_odd(drop_rate):
    for spread in (1e-6, 0.01, 0.3, 1.0):
        w = importances(BLOCK - 1, "lognormal", spread, 0).exp()
        with CountPasses() as passes:
            fill_level([w], 1 - drop_rate)
        assert passes.count <= 10


def test_the_level_is_a_pure_function_of_the_importances():
    """A constant in the logarithms moves the level by as much, and nothing but rounding."""
    log_w = importances(20_000, "lognormal", 2.0, 0)
    levels = [water_level([log_w + shift], 0.9).item() + shift for shift in (0.0, -7.0, 7.0)]
    assert levels == pytest.approx([levels[0]] * 3, abs=1e-4)
    assert water_level([log_w], 0.9) == water_level([log_w.clone()], 0.9)


def test_clipping_alone_would_miss_the_budget():
    """Why there is a water level: min(1, w/2) keeps 0.41 of lognormal weights where 0.50 was asked."""
    w = importances(100_000, "lognormal", 1.0, 0).exp()
    assert (0.5 * w).clamp(max=1).mean().item() == pytest.approx(0.41, abs=0.01)
    assert keep_of([w], 0.5, 0.0, "unimportant").mean().item() == pytest.approx(0.5, abs=1e-5)


# -- read-outs --


def test_perplexity_counts_the_effective_weights():
    assert perplexity(torch.ones(25)).item() == pytest.approx(25)
    assert perplexity(torch.tensor([3.0, 0.0, 0.0])).item() == pytest.approx(1)
    assert perplexity(torch.tensor([[1.5, 1.5, 0.0]])).item() == pytest.approx(2)
