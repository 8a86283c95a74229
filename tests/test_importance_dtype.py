"""Log-importances in bfloat16, rounded at random: right on average, and the same in every implementation."""

import io
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import impact_optim.importances
from impact_optim import ImpactSGD
from impact_optim.sampling import bit_blocks, stochastic_round

BITS = {"seed": 3, "step": 11, "tensor": 0}
LOOPS = {"for-loop": {"fused": False, "foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def bits(n):
    return torch.cat(list(bit_blocks(n, **BITS)))


@given(st.floats(-60, 60, width=32, allow_subnormal=False))
@example(1.5513420656400086e-32)
def test_rounding_gives_a_neighbour_and_the_right_mean(x):
    n = 4096
    rounded = stochastic_round(torch.full((n,), x), bits(n))
    assert torch.equal(rounded, rounded.to(torch.bfloat16).float())
    low, high = rounded.min().item(), rounded.max().item()
    assert low <= x <= high or low == high
    gap = 2.0 ** (math.frexp(x)[1] - 8)
    assert (rounded - x).abs().max() <= gap
    assert abs(rounded.double().mean().item() - x) <= 5 * gap / 2 / math.sqrt(n)


def test_what_bfloat16_can_hold_is_not_rounded():
    exact = torch.randn(4096).to(torch.bfloat16).float()
    assert torch.equal(stochastic_round(exact, bits(4096)), exact)


def weights_under_a_constant_gradient(steps, **options):
    """Five kinds of weights, 40,000 of each, that differ in their gradient alone."""
    param = nn.Parameter(torch.zeros(5, 40_000))
    optimizer = ImpactSGD([param], lr=0.0, drop_rate=0.0, importance="fisher", fused=False, **options)
    param.grad = torch.tensor([0.2, 0.5, 1.0, 1.3, 1.7]).view(5, 1).expand(5, 40_000).contiguous()
    for _ in range(steps):
        optimizer.step()
    return optimizer.importance(param).double().log()


SLOW = {"importance_lr": 0.001, "kl_weight": 0.5}  # a step is a fraction of what bfloat16 can tell apart


def test_the_trajectory_is_that_of_float32_on_average():
    exact = weights_under_a_constant_gradient(400, **SLOW).mean(1)
    assert exact.std() > 0.1  # there is something to follow
    found = weights_under_a_constant_gradient(400, importance_dtype=torch.bfloat16, **SLOW)
    spread = found.std(1).max().item()  # of one kind; the normaliser carries it to the others
    assert spread < 0.02
    assert (found.mean(1) - exact).abs().max() < 5 * spread / math.sqrt(40_000) + spread**2


def test_rounding_to_the_nearest_would_not_follow(monkeypatch):
    monkeypatch.setattr(impact_optim.importances, "stochastic_round", lambda x, bits: x.to(torch.bfloat16).float())
    exact = weights_under_a_constant_gradient(400, **SLOW).mean(1)
    found = weights_under_a_constant_gradient(400, importance_dtype=torch.bfloat16, **SLOW)
    assert (found.mean(1) - exact).abs().max() > 0.01


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 4))


def trained(steps, start=0, model=None, optimizer=None, **options):
    model = network() if model is None else model
    options = {"lr": 0.1, "momentum": 0.9, "drop_rate": 0.3, "importance_dtype": torch.bfloat16, **options}
    optimizer = ImpactSGD(model, **options) if optimizer is None else optimizer
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 40, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
    return model, optimizer


def weights(model):
    return [p for p in model.parameters() if p.dim() >= 2]


def log_importances(model, optimizer):
    return torch.cat([optimizer.state[p]["log_importance"].flatten() for p in weights(model)])


def loaded(model, optimizer, **options):
    """A copy that goes through a file."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group.update(options)
    new = network()
    new.load_state_dict(state["model"])
    new_optimizer = ImpactSGD(new, lr=0.1, **options)
    new_optimizer.load_state_dict(state["optimizer"])
    return new, new_optimizer


@pytest.mark.parametrize("other", ["foreach", "fused"])
def test_implementations_round_alike(other):
    model, optimizer = trained(10, **LOOPS["for-loop"])
    results = []
    for name in ("for-loop", other):
        options = {"foreach": None, "fused": None, **LOOPS[name]}
        results.append(log_importances(*trained(1, 10, *loaded(model, optimizer, **options))))
    assert results[0].dtype == torch.bfloat16
    differ = (results[0] != results[1]).float().mean().item()
    assert differ <= (2e-3 if other == "fused" else 0.0)  # the last bits of float32 decide a few
    assert (results[0].float() - results[1].float()).abs().max() <= 2.0**-8 * results[0].float().abs().max()


@pytest.mark.parametrize("name", LOOPS)
def test_importances_stay_on_the_simplex_and_masks_on_their_budget(name):
    model, optimizer = trained(30, **LOOPS[name])
    total = sum(optimizer.importance(p).double().sum().item() for p in weights(model))
    kept = sum(optimizer.keep_probability(p).double().sum().item() for p in weights(model))
    n = sum(p.numel() for p in weights(model))
    assert total / n == pytest.approx(1, abs=1e-4)
    assert kept / n == pytest.approx(0.7, abs=1e-3)
    assert log_importances(model, optimizer).float().std() > 0.05


@pytest.mark.parametrize("name", LOOPS)
def test_resume_is_exact(name):
    through = trained(12, **LOOPS[name])
    model, optimizer = trained(7, **LOOPS[name])
    resumed = trained(5, 7, *loaded(model, optimizer))
    assert torch.equal(log_importances(*through), log_importances(*resumed))
    assert all(torch.equal(a, b) for a, b in zip(through[0].parameters(), resumed[0].parameters(), strict=True))


def test_a_checkpoint_in_float32_goes_on_in_bfloat16():
    model, optimizer = trained(5, importance_dtype=torch.float32)
    before = torch.cat([optimizer.importance(p).flatten() for p in weights(model)])
    new = loaded(model, optimizer, importance_dtype=torch.bfloat16)
    after = torch.cat([new[1].importance(p).flatten() for p in weights(new[0])])
    torch.testing.assert_close(after, before, rtol=2**-8, atol=2**-8)
    assert log_importances(*trained(1, 5, *new)).dtype == torch.bfloat16


def test_the_option_can_change_between_two_steps():
    model, optimizer = trained(5, importance_dtype=torch.float32)
    optimizer.param_groups[0]["importance_dtype"] = torch.bfloat16
    assert log_importances(*trained(2, 5, model, optimizer)).dtype == torch.bfloat16
    optimizer.param_groups[0]["importance_dtype"] = torch.float32
    assert log_importances(*trained(2, 7, model, optimizer)).dtype == torch.float32


def test_it_takes_two_bytes_a_weight_also_for_a_model_in_bfloat16():
    model = network().to(torch.bfloat16)
    optimizer = ImpactSGD(model, lr=0.1, importance_dtype=torch.bfloat16)
    model(torch.ones(2, 40, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for p in weights(model):
        assert optimizer.state[p]["log_importance"].untyped_storage().nbytes() == 2 * p.numel()
    assert all(optimizer.state[p]["log_normalizer"].dtype == torch.float32 for p in weights(model))


def test_weights_without_a_gradient_keep_their_share():
    moving, idle = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))
    options = {"importance_dtype": torch.bfloat16, "importance_lr": 0.05, "kl_weight": 0.5}
    optimizer = ImpactSGD([moving, idle], lr=0.0, drop_rate=0.0, **options)
    for step in range(200):
        generator = torch.Generator().manual_seed(step)
        moving.grad = torch.randn(64, 64, generator=generator)
        idle.grad = torch.randn(64, 64, generator=generator) if step < 20 else None
        optimizer.step()
        if step == 19:
            share = optimizer.importance(idle).double().mean().item()
    assert share != pytest.approx(1, abs=1e-6)
    assert optimizer.importance(idle).double().mean().item() == pytest.approx(share, abs=2e-3)
    total = optimizer.importance(idle).double().mean() + optimizer.importance(moving).double().mean()
    assert total.item() / 2 == pytest.approx(1, abs=2e-3)


def test_pruned_weights_stay_pruned():
    model, optimizer = trained(10)
    report = optimizer.sparsify(0.8)
    trained(5, 10, model, optimizer)
    assert sum(int(p.count_nonzero()) for p in weights(model)) == sum(layer.kept for layer in report.tensors)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"Invalid importance_dtype: torch.float16; choose torch.float32 or"):
        ImpactSGD(network(), lr=0.1, importance_dtype=torch.float16)
