"""The whole step against the float64 reference, over random options, for the steps of SGD and of AdamW."""

import numpy as np
import pytest
import reference
import torch
from helpers import FACES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from impact_optim.sampling import ROW, as_uniform, bits

SHAPES = [(7, 5), (11,), (3, 2, 2), (1, 9), (64, 70), (6, 4), ()]
ROUNDING = 1e-6  # a draw may differ from ``u < π`` where u lies that close to π
FACE = {face.built_in.__name__: face for face in FACES if face.built_in}

sgd = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 0.1),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "maximize": st.booleans(),
    }
)
adamw = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 0.1),
        "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9)]),
        "eps": st.just(1e-3),  # what divides by a gradient near 0 would enlarge its rounding without bound
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)
options = st.fixed_dictionaries(
    {
        "drop_rate": st.sampled_from([0.0, 0.001, 0.1, 0.3, 0.6]),
        "importance": st.sampled_from(["hypergradient", "lookahead", "saliency", "fisher", "magnitude", "uniform"]),
        "importance_lr": st.sampled_from([0.0, 0.01, 0.1]),
        "kl_weight": st.sampled_from([0.0, 0.1, 1.0, 10.0]),
        "drop": st.sampled_from(["unimportant", "important"]),
        "rescale": st.sampled_from(["inverse", "none"]),
        "keep_floor": st.sampled_from([0.0, 0.01, 0.2, 0.4]),
        "hold_zeros": st.booleans(),
    }
)


def uniforms(n, seed, step):
    """Those of group 0, from the stream as it is documented: by row of the group's flat buffer."""
    return as_uniform(bits(range(-(-n // ROW)), seed=seed, step=step, group=0)[:n]).numpy()


def compare(face, base, base_options, options, seed, foreach, steps=6):
    """Runs both; returns how many draws lay within rounding, and how many draws there were."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]
    if options["hold_zeros"]:
        with torch.no_grad():
            for p in params:
                p.masked_fill_(torch.rand(p.shape, generator=generator) < 0.2, 0.0)
    targets = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    impact, optimizer = face(params, **base_options, **options, seed=seed, foreach=foreach)
    expected = reference.ReferenceImpact(
        [p.detach().numpy() for p in params], base, maximize=base_options["maximize"], **options
    )
    n, doubtful, draws = len(expected.log_w), 0, 0
    for step in range(steps):
        noise = [0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
        factors = np.ones(n)
        if options["drop_rate"] > 0:
            x = expected.flat([p.detach().numpy() for p in params])
            with impact.masked():
                factors = expected.flat([p.detach().numpy() for p in params]) / np.where(x == 0, 1.0, x)
            u = uniforms(n, seed, step)
            ours = expected.flat({i: impact.keep_probability(p).numpy() for i, p in enumerate(params)})
            np.testing.assert_allclose(ours, expected.keep(), rtol=1e-3, atol=1e-4)
            # The factors are what π says, and so are the draws, but where u lies within rounding of it.
            kept = factors != 0
            np.testing.assert_allclose(factors[kept], expected.enlargement(ours)[kept], rtol=2e-5)  # 1/π of a rounded π
            differ = kept != (u < ours)
            assert (np.abs(u - ours)[differ] < ROUNDING).all()
            doubtful, draws = doubtful + int(differ.sum()), draws + n
        # The reference goes on with these very factors: its own are as good, but 1/π enlarges what rounding has done.
        factors = expected.arrays(factors)

        def gradients(weights, noise=noise):
            return [
                x - target.numpy() + extra.numpy() for x, target, extra in zip(weights, targets, noise, strict=True)
            ]

        def closure(noise=noise):
            with impact.masked():
                for p, target, extra in zip(params, targets, noise, strict=True):
                    p.grad = p.detach() - target + extra
            return 0.0

        optimizer.step(closure)
        expected.step(factors, gradients)
        w = expected.split(expected.w())
        for i, (p, x) in enumerate(zip(params, expected.x, strict=True)):
            np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(impact.importance(p).numpy(), w.get(i, np.ones(x.shape)), rtol=1e-3, atol=1e-5)
            if options["hold_zeros"] and i in expected.members:
                assert np.array_equal(p.detach().numpy() == 0, x == 0)
    return doubtful, draws


@pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])
@settings(deadline=None, max_examples=15)
@given(
    base=sgd, options=options, nesterov=st.booleans(), dampening=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 10**6)
)
def test_a_run_around_sgd_equals_the_reference(foreach, base, options, nesterov, dampening, seed):
    if base["momentum"] > 0:
        base = {**base, "nesterov": nesterov, "dampening": 0.0 if nesterov else dampening}
    compare(FACE["ImpactSGD"], reference.SGD(**base), base, options, seed, foreach)


@pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])
@settings(deadline=None, max_examples=15)
@given(base=adamw, options=options, seed=st.integers(0, 10**6))
def test_a_run_around_adamw_equals_the_reference(foreach, base, options, seed):
    compare(FACE["ImpactAdamW"], reference.AdamW(**base), base, options, seed, foreach)


@pytest.mark.parametrize("importance", ["saliency", "hypergradient", "lookahead"])
def test_draws_within_rounding_are_rare(importance):
    """A few in a million, on any processor."""
    options = {"importance": importance, "importance_lr": 0.1, "kl_weight": 1.0, "drop_rate": 0.3, "hold_zeros": False}
    base = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "maximize": False}
    doubtful, draws = compare(FACE["ImpactSGD"], reference.SGD(**base), base, options, 7, True, steps=60)
    assert draws > 250_000
    assert doubtful <= 3 + 1e-5 * draws
