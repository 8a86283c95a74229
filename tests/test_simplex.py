"""The mathematics of the simplex, by its invariants."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import impact_optim.simplex as simplex_module
from impact_optim.simplex import (
    LOG_BOUND,
    SAMPLE,
    fill_target,
    keep_probability,
    log_mean_exp,
    mirror_step,
    next_water_level,
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


@settings(deadline=None, max_examples=80)
@given(shapes=shapes, sigma=st.floats(0, 12), mean=st.floats(0.01, 0.99), seed=seeds)
def test_water_level_from_a_cold_start_is_exact(shapes, sigma, mean, seed):
    log_w = random_simplex(shapes, sigma, seed)
    level = water_level(log_w, mean)
    filled = flat(log_w).double().add(level.double()).exp().clamp(max=1)
    assert filled.mean().item() == pytest.approx(mean, abs=1e-5)
    if flat(log_w).numel() > 1:
        reference = flat(log_w).double().exp().mul(exact_level(log_w, mean)).clamp(max=1)
        torch.testing.assert_close(filled, reference, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    shapes=shapes,
    sigma=st.floats(0, 4),
    drop_rate=st.floats(0.01, 0.95),
    floor_share=st.floats(0, 1),
    drop=st.sampled_from(["unimportant", "important"]),
    seed=seeds,
)
def test_keep_probabilities_meet_the_budget_and_the_floor(shapes, sigma, drop_rate, floor_share, drop, seed):
    log_w = random_simplex(shapes, sigma, seed)
    floor = floor_share * (1 - drop_rate)
    target = fill_target(drop_rate, floor, drop)
    level = water_level(log_w, target) if 0 < target < 1 else torch.zeros(())
    keep = flat([keep_probability(t, level, drop_rate=drop_rate, keep_floor=floor, drop=drop) for t in log_w])
    assert keep.double().mean().item() == pytest.approx(1 - drop_rate, abs=1e-5)
    assert keep.max() <= 1 + 1e-6
    assert keep.min() >= floor - 1e-6
    order = flat(log_w).argsort()
    steps = keep[order].diff()
    assert ((steps >= -1e-6) if drop == "unimportant" else (steps <= 1e-6)).all()


def test_clipping_alone_would_miss_the_budget():
    """Why there is a water level: min(1, w/2) keeps 0.41 of lognormal weights where 0.50 was asked."""
    log_w = random_simplex([(1000, 100)], 1.0, seed=0)
    clipped = (0.5 * log_w[0].exp()).clamp(max=1).mean().item()
    assert clipped == pytest.approx(0.41, abs=0.01)
    level = water_level(log_w, 0.5)
    assert keep_probability(log_w[0], level, drop_rate=0.5).mean().item() == pytest.approx(0.5, abs=1e-5)


def test_a_level_follows_a_moving_simplex():
    """From a sample of each step and the error that the step before has measured, without a pass of its own."""
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(20_000, generator=generator)
    level, error = water_level([log_w], 0.7), 0.0
    some = torch.randperm(20_000, generator=generator)[:SAMPLE]
    for _ in range(100):
        new = log_w + 0.01 * torch.randn(20_000, generator=generator)
        level = next_water_level(log_w[some], new[some], level, error)
        mean = (new + level).exp().clamp(max=1).mean().item()
        assert mean == pytest.approx(0.7, abs=1e-3)
        log_w, error = new, mean - 0.7


def test_perplexity_counts_the_effective_weights():
    assert perplexity([torch.zeros(5, 4), torch.zeros(5)]).item() == pytest.approx(25)
    assert perplexity([torch.tensor([0.0, -1e4, -1e4])]).item() == pytest.approx(1)
    assert perplexity([torch.tensor([0.0, 0.0, -1e4])]).item() == pytest.approx(2)
