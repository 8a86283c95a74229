"""The whole step against the float64 reference, over random options."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ReferenceImpactSGD

from impact_optim import ImpactSGD
from impact_optim.sampling import uniform

SHAPES = [(7, 5), (11,), (3, 2, 2), (6, 4), ()]

options = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 0.1),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "maximize": st.booleans(),
        "drop_rate": st.sampled_from([0.0, 0.1, 0.3, 0.6]),
        "importance": st.sampled_from(["hypergradient", "saliency", "fisher", "magnitude", "uniform"]),
        "importance_lr": st.sampled_from([0.0, 0.01, 0.1]),
        "kl_weight": st.sampled_from([0.0, 0.1, 1.0, 10.0]),
        "simplex": st.sampled_from(["group", "tensor"]),
        "drop": st.sampled_from(["unimportant", "important"]),
        "rescale": st.sampled_from(["inverse", "none"]),
        "keep_floor": st.sampled_from([0.01, 0.2, 0.4]),
        "scale_steps": st.booleans(),
    }
)


@pytest.mark.parametrize("foreach", [False, True])
@settings(deadline=None, max_examples=60)
@given(options=options, nesterov=st.booleans(), dampening=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 10**6))
def test_a_run_equals_the_reference(foreach, options, nesterov, dampening, seed):
    if options["momentum"] > 0:
        options = {**options, "nesterov": nesterov, "dampening": 0.0 if nesterov else dampening}
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]
    targets = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    optimizer = ImpactSGD(params, foreach=foreach, seed=seed, **options)
    reference = ReferenceImpactSGD([p.detach().numpy() for p in params], **options)

    for step in range(6):
        noise = [0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
        masked_by_reference = [torch.tensor(1.0)] * len(SHAPES)
        if options["drop_rate"] > 0:
            u = [
                uniform(p.numel(), seed=seed, step=step, tensor=i).view(p.shape).double().numpy()
                for i, p in enumerate(params)
            ]
            masked_by_reference = reference.factors(u)
        else:
            masked_by_reference = [1.0] * len(SHAPES)
        with optimizer.masked():
            for p, x, factor, target, extra in zip(
                params, reference.x, masked_by_reference, targets, noise, strict=True
            ):
                # The masked weights themselves agree, so every mask does, weight by weight.
                np.testing.assert_allclose(p.detach().numpy(), x * factor, rtol=2e-4, atol=2e-6)
                p.grad = p.detach() - target + extra
        grads = [
            (x * factor) - target.numpy() + extra.numpy()
            for x, factor, target, extra in zip(reference.x, masked_by_reference, targets, noise, strict=True)
        ]
        optimizer.step()
        reference.step(grads, masked_by_reference)
        for p, x, w in zip(params, reference.x, reference.w, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), x, rtol=2e-4, atol=2e-6)
            np.testing.assert_allclose(optimizer.importance(p).numpy(), w, rtol=1e-3, atol=1e-6)
