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


@settings(deadline=None, max_examples=12)
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
