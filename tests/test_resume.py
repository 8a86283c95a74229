"""A run that is saved and resumed gives the same bits, and a state dict that does not fit changes nothing."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from impact_optim import ImpactSGD

OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "drop_rate": 0.3, "importance_lr": 0.01}

SCRIPT = """
import sys, torch
from torch import nn
from impact_optim import ImpactSGD

def train(start, stop, dtype, load, save, options):
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(20, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 3)).to(dtype)
    optimizer = ImpactSGD(model, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    if load:
        state = torch.load(load, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for step in range(start, stop):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()
    torch.save({
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
        "masked": model(torch.ones(1, 20, dtype=dtype)).detach(),  # by the next mask
    }, save)
"""


def train(*arguments):
    namespace = {}
    exec(SCRIPT, namespace)
    namespace["train"](*arguments)


def train_in_a_new_process(*arguments):
    subprocess.run([sys.executable, "-c", f"{SCRIPT}\ntrain(*{arguments!r})"], check=True, timeout=300)


def assert_same(a, b, path="state"):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (u, v) in enumerate(zip(a, b, strict=True)):
            assert_same(u, v, f"{path}[{i}]")
    else:
        assert a == b, path


@pytest.mark.parametrize(
    ("dtype", "extra"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("float32", {"importance": "hypergradient", "simplex": "tensor", "sampling": "exact", "kl_weight": 0.1}),
        ("bfloat16", {"importance": "fisher", "rescale": "none", "scale_steps": True, "foreach": True, "seed": 3}),
    ],
)
def test_resumed_in_a_new_process_it_gives_the_same_bits(tmp_path, dtype, extra):
    options = {**OPTIONS, **extra}
    whole, half, resumed = (str(tmp_path / name) for name in ("whole", "half", "resumed"))
    train(0, 14, dtype, None, whole, options)
    train(0, 7, dtype, None, half, options)
    train_in_a_new_process(7, 14, dtype, half, resumed, options)
    whole, resumed = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert_same(whole, resumed)


def test_a_save_between_forward_and_step_resumes_with_the_same_mask():
    runs = []
    for resume in (False, True):
        model, optimizer = trained(3)
        x = torch.ones(2, 8)
        first = model(x).detach()
        if resume:
            model_state, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
            model, optimizer = build()
            model.load_state_dict(model_state)
            optimizer.load_state_dict(state)
            assert torch.equal(model(x), first)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        runs.append((model.state_dict(), optimizer.state_dict()))
    assert_same(list(runs[0]), list(runs[1]))


def build(**extra):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 2))
    return model, ImpactSGD(model, **{**OPTIONS, **extra})


def trained(steps=3, **extra):
    model, optimizer = build(**extra)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_importances_stay_float32_for_half_precision_parameters():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        p = nn.Parameter(torch.randn(9, 9, dtype=dtype))
        optimizer = ImpactSGD([p], **OPTIONS)
        for _ in range(3):
            with optimizer.masked():
                p.grad = torch.randn(9, 9).to(dtype)
            optimizer.step()
        other = ImpactSGD([nn.Parameter(p.detach().clone())], **OPTIONS)
        other.load_state_dict(optimizer.state_dict())
        assert_same(optimizer.state_dict(), other.state_dict())
        state = other.state[other.param_groups[0]["params"][0]]
        assert state["log_importance"].dtype == torch.float32
        assert state["momentum_buffer"].dtype == dtype


def test_user_hooks_still_see_and_change_the_state_dict():
    _, optimizer = trained()
    _, other = build()
    seen = []

    def before(o, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.125
        state_dict["state"][0]["log_importance"].zero_()
        return state_dict

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[o.param_groups[0]["params"][0]]))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.125
    assert (seen[0]["log_importance"] == 0).all()
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


def test_a_state_dict_without_later_options_and_one_of_sgd_load():
    model, optimizer = trained()
    old = copy.deepcopy(optimizer.state_dict())
    for name in ("keep_floor", "sampling", "per_rank_masks", "scale_steps", "foreach"):
        del old["param_groups"][0][name]
    other_model, other = build(keep_floor=0.05)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(old)
    assert other.param_groups[0]["keep_floor"] == 0.05
    assert other.param_groups[0]["sampling"] == "bernoulli"

    plain = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    model(torch.ones(1, 8)).sum().backward()
    plain.step()
    other.load_state_dict(plain.state_dict())
    assert other.param_groups[0]["lr"] == 0.3
    assert other.param_groups[0]["step"] == 0
    other_model(torch.ones(1, 8)).sum().backward()
    other.step()


def set_in(*path):
    def change(state_dict, value):
        for key in path[:-1]:
            state_dict = state_dict[key]
        state_dict[path[-1]] = value

    return change


def remove(*path):
    def change(state_dict, _):
        for key in path[:-1]:
            state_dict = state_dict[key]
        del state_dict[path[-1]]

    return change


NAN = torch.full((80, 8), float("nan"))
BAD_STATES = {
    "no state": (remove("state"), None, TypeError, "state"),
    "no groups": (remove("param_groups"), None, TypeError, "param_groups"),
    "state of another kind": (set_in("state"), [1], TypeError, "state"),
    "group without params": (remove("param_groups", 0, "params"), None, ValueError, "groups"),
    "another number of parameters": (set_in("param_groups", 0, "params"), [0, 1], ValueError, "sizes"),
    "another shape": (set_in("state", 0, "log_importance"), torch.zeros(8, 80), ValueError, r"0\.weight.*shape"),
    "another momentum shape": (set_in("state", 2, "momentum_buffer"), torch.zeros(3), ValueError, r"2\.weight.*shape"),
    "not finite": (set_in("state", 0, "log_importance"), NAN, ValueError, r"0\.weight is not finite"),
    "scale not finite": (set_in("state", 0, "signal_scale"), torch.tensor(float("inf")), ValueError, "not finite"),
    "integers": (set_in("state", 0, "log_importance"), torch.zeros(80, 8, dtype=torch.int64), TypeError, "floating"),
    "not a tensor": (set_in("state", 0, "log_importance"), 1.0, TypeError, "floating"),
    "a number that is a tensor": (set_in("state", 0, "water_target"), torch.zeros(()), TypeError, "water_target"),
    "a scalar is missing": (remove("state", 0, "log_normalizer"), None, ValueError, "log_normalizer"),
    "an option out of range": (set_in("param_groups", 0, "drop_rate"), 1.5, ValueError, "drop_rate"),
    "an unknown signal": (set_in("param_groups", 0, "importance"), "magic", ValueError, "magic"),
    "a step that is no integer": (set_in("param_groups", 0, "step"), -1, ValueError, "step"),
    "state of one parameter of another kind": (set_in("state", 0), [], TypeError, r"0\.weight"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_dict_that_does_not_fit_changes_nothing(case):
    change, value, error, text = BAD_STATES[case]
    _, optimizer = trained()
    bad = copy.deepcopy(trained(5)[1].state_dict())
    change(bad, value)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(bad)
    assert_same(before, optimizer.state_dict())
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 0
