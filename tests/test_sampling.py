"""The mask stream: the generator against its published vectors, and the draws against what they promise."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from impact_optim.layout import BLOCK
from impact_optim.sampling import (
    ROW,
    SAMPLED,
    TRAINING,
    as_uniform,
    bits,
    kept_bits,
    pareto_sample,
    philox4x32,
    row_bits,
)
from impact_optim.simplex import fill_level, keep_probability

PLACE = {"seed": 1, "step": 2, "group": 3}


def uniform(n, **place):
    """The first uniforms of a group's stream."""
    return as_uniform(bits(range(-(-n // ROW)), **place)[:n])


# Known-answer vectors of the Random123 library: rounds, counter, key, result.
VECTORS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "result"), VECTORS)
def test_philox_gives_the_published_words(rounds, counter, key, result):
    words = [int(word, 16) for word in counter.split()]
    out = philox4x32(tuple(torch.tensor([w]) for w in words), tuple(int(w, 16) for w in key.split()), rounds)
    assert [f"{word.item():08x}" for word in out] == result.split()


def chi_square(values, bins):
    """Standardised: about N(0, 1) when the values are uniform on (0, 1)."""
    counts = torch.histc(values.double(), bins, 0, 1)
    expected = values.numel() / bins
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_draws_are_uniform(seed):
    u = uniform(1_000_003, seed=seed, step=0, group=0)
    assert abs(chi_square(u, 256)) < 5
    assert abs(chi_square(u.mul(256).frac(), 256)) < 5  # the next eight bits
    assert u.min() > 0
    assert u.max() < 1


@pytest.mark.parametrize("change", ["element", "step", "group", "seed", "stream"])
def test_draws_are_independent(change):
    """Pairs of draws that differ in one coordinate of the stream fill the unit square evenly."""
    n = 400_000
    a = uniform(n + 1, **PLACE)
    if change == "element":
        pairs = (a[:-1], a[1:])
    else:
        place = {**PLACE, "stream": TRAINING}
        pairs = (a[:-1], uniform(n, **{**place, change: place[change] + 1}))
    cells = (pairs[0] * 32).floor() * 32 + (pairs[1] * 32).floor()
    assert abs(chi_square((cells + 0.5) / 1024, 1024)) < 5
    assert abs(torch.corrcoef(torch.stack(pairs))[0, 1].item()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("step", [0, 1])
def test_rows_are_independent(step):
    """Rows share nothing but their generator: neither the same places of two rows nor those next to each other."""
    u = uniform(64 * ROW, seed=0, step=step, group=0).view(64, ROW)
    for rows in (u, u.roll(1, dims=1), u[:, torch.arange(ROW) ^ 1]):
        correlation = torch.corrcoef(torch.cat([u, rows]))[:64, 64:] - (rows is u) * torch.eye(64)
        assert correlation.abs().max().item() < 5.5 / math.sqrt(ROW)


def test_what_decides_changes_with_every_bit_of_position_and_keys():
    """Avalanche: one bit of the input flips each of the upper 16 bits about half of the time."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**31), 2**31, (4000, 3), generator=generator).to(torch.int32)
    position = torch.randint(0, ROW, (4000, 1), generator=generator, dtype=torch.int32)
    words = row_bits(keys.unsqueeze(1), position)
    for bit in range(32):
        flip = torch.tensor(1 << bit).to(torch.int32)
        changed = [row_bits((keys ^ torch.stack([flip, flip * 0, flip * 0])).unsqueeze(1), position)]
        if bit < 12:
            changed.append(row_bits(keys.unsqueeze(1), position ^ flip))
        for other in changed:
            flipped = torch.stack([((words ^ other) >> i & 1).float().mean() for i in range(16, 32)])
            assert (flipped - 0.5).abs().max() < 0.06


def test_steps_far_apart_and_large_seeds_have_their_own_draws():
    draws = [uniform(64, seed=s, step=t, group=0) for s in (0, 1 << 32, (1 << 32) + 1) for t in (0, 1, 2**31)]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_masks_of_training_and_sampled_ones_have_streams_of_their_own():
    assert TRAINING != SAMPLED
    assert not torch.equal(bits(range(1), **PLACE, stream=TRAINING), bits(range(1), **PLACE, stream=SAMPLED))


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, 2**40), cuts=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_rows_are_the_same_however_they_are_asked_for(start, cuts):
    ends = [start]
    for cut in cuts:
        ends.append(ends[-1] + cut)
    words = bits(range(start, ends[-1]), **PLACE)
    assert words.shape == ((ends[-1] - start) * ROW,)
    assert words.dtype == torch.int32
    parts = [bits(range(a, b), **PLACE) for a, b in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(parts), words)
    assert as_uniform(words).dtype == torch.float64


def test_blocks_hold_whole_rows():
    assert BLOCK % ROW == 0  # otherwise a mask would depend on the size of a block


@pytest.mark.cuda
def test_every_device_draws_the_same_bits():
    assert torch.equal(uniform(100_003, **PLACE), uniform(100_003, **PLACE, device="cuda").cpu())


def test_a_mask_keeps_what_its_probability_says_at_both_ends():
    words = bits(range(25), **PLACE)
    assert (kept_bits(words, torch.ones(len(words))) == -1).all()
    assert (kept_bits(words, torch.zeros(len(words))) == 0).all()
    kept = -kept_bits(words, torch.full((len(words),), 0.3)).double().mean().item()
    assert kept == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / len(words)))


@settings(deadline=None, max_examples=60)
@given(p=st.one_of(st.floats(0, 1, width=32), st.sampled_from([1e-6, 1 - 1e-6, 0.5])), seed=st.integers(0, 2**63 - 1))
def test_a_weight_is_kept_where_its_uniform_is_below_its_probability(p, seed):
    words = bits(range(4), seed=seed, step=0, group=0)
    kept = kept_bits(words, torch.full((len(words),), p)) != 0
    u = as_uniform(words)
    assert torch.equal(kept, u < p) or (u[kept != (u < p)] - p).abs().max() < 1e-7  # 31 bits decide


def test_bernoulli_masks_have_their_inclusion_probabilities():
    keep = torch.linspace(0, 1, 41)
    trials = 4000
    counts = (uniform(41 * trials, seed=5, step=0, group=0).view(trials, 41) < keep).sum(0)
    error = (counts / trials - keep) / (keep * (1 - keep) / trials).sqrt().clamp_min(1e-9)
    assert counts[0] == 0
    assert counts[-1] == trials
    assert error[1:-1].abs().max() < 4.5


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_exact_masks_have_their_size_and_inclusion_probabilities(spread):
    n, size, trials = 60, 42, 6000
    w = (spread * torch.randn(n, generator=torch.Generator().manual_seed(0))).exp()
    keep = keep_probability(w * fill_level([w], size / n).float())
    counts = torch.zeros(n)
    for u in uniform(n * trials, seed=0, step=0, group=0).view(trials, n):
        mask = pareto_sample(keep, u, size)
        assert mask.sum() == size
        counts += mask
    certain = keep >= 1
    assert (counts[certain] == trials).all()
    # Pareto sampling is exact only in the limit: allow for 0.5% beside the noise.
    noise = (keep * (1 - keep) / trials).sqrt()
    assert ((counts / trials - keep).abs() <= 4.5 * noise + 0.005).all()


def test_gumbel_top_k_would_have_other_inclusion_probabilities():
    """Why Pareto sampling: what top-k of perturbed log π includes differs from π by far more than noise."""
    keep = torch.tensor([0.95] * 10 + [0.25] * 10)
    trials, size = 4000, 12
    counts = torch.zeros(20)
    for u in uniform(20 * trials, seed=0, step=0, group=0).view(trials, 20):
        gumbel = keep.log() - torch.log(-torch.log(u))
        counts[gumbel.topk(size).indices] += 1
    assert (counts / trials - keep).abs().max() > 0.1


def test_ties_still_give_the_exact_size():
    assert pareto_sample(torch.full((100,), 0.3), torch.full((100,), 0.5), 30).sum() == 30
    assert pareto_sample(torch.ones(100), torch.full((100,), 0.5), 100).all()
