"""The kernels for GPUs, run by Triton's interpreter on a CPU, against the tensor code."""

import os
from importlib.util import find_spec

import pytest
import torch
from test_kernels import bases, compare, options, shapes

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton and its interpreter, which conftest.py asks for", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from impact_optim.kernels import fused, gpu


@pytest.fixture(autouse=True)
def kernels_for_gpus(monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda members, is_wanted=False: gpu if fused.fits(members) else None)


@settings(deadline=None, max_examples=8)
@given(
    base=bases,
    options=options,
    shapes=shapes,
    dtype=st.sampled_from([torch.float32, torch.float64]),  # bfloat16 is cut off by the interpreter, not rounded
    channels_last=st.booleans(),
)
def test_kernels_and_tensor_code_take_the_same_steps(base, options, shapes, dtype, channels_last):
    if options["drop_rate"] and options["keep_floor"] > 1 - options["drop_rate"]:
        options = {**options, "keep_floor": 0.0}
    compare(*base, options, shapes, dtype, channels_last, steps=2)


@pytest.mark.parametrize("n", [3000, 80_000])
@pytest.mark.parametrize("spread", [0.02, 1.0, 3.0])
@pytest.mark.parametrize("mean", [0.5, 0.9, 0.99])
def test_levels_are_on_budget_where_most_is_zero(n, spread, mean):
    """What is held counts neither in the sample nor in the sums."""
    generator = torch.Generator().manual_seed(0)
    log_w, x = torch.randn(n, generator=generator) * spread - 2, torch.rand(n, generator=generator)
    x[torch.rand(n, generator=generator) < 0.9] = 0.0
    log_w[x == 0] = 0.0
    weights = gpu.Weights([x[:1000], x[1000:]], [0, 1000])
    weights.set_importances(log_w)
    group = weights.group(holds_zeros=True)
    weights.set_level(group, mean)
    alive = log_w.exp()[x != 0].double()
    filled = (alive * float(group.level)).clamp(max=1.0).mean().item()
    assert filled == pytest.approx(mean, abs=2e-3 * (1 - mean))
