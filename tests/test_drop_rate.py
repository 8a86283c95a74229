"""Schedules of the drop rate: their formula, groups, resuming, what they refuse."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import FACES, assert_same, every_face, run, two_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from impact_optim import DropRateScheduler, Impact, ImpactSGD


@settings(max_examples=50, deadline=None)
@given(
    start=st.floats(0, 0.9),
    target=st.floats(0, 0.9),
    total=st.integers(1, 12),
    begin=st.integers(0, 5),
    shape=st.sampled_from(["constant", "linear", "cubic"]),
    face=st.sampled_from(FACES),
)
def test_a_schedule_follows_its_formula(start, target, total, begin, shape, face):
    _, optimizer = face(two_layers())
    schedule = DropRateScheduler(optimizer, target, total, start=start, begin=begin, shape=shape)
    rates = []
    for _ in range(begin + total + 3):
        rates.append(optimizer.param_groups[0]["drop_rate"])
        assert schedule.get_last_drop_rate() == [rates[-1]]
        schedule.step()
    for t, rate in enumerate(rates):
        way = min(max((t - begin) / total, 0), 1)
        left = {"constant": 0 if way == 1 else 1, "linear": 1 - way, "cubic": (1 - way) ** 3}[shape]
        assert rate == pytest.approx(target + (start - target) * left)
    assert rates[begin] == pytest.approx(start)
    assert rates[begin + total] == pytest.approx(target)


@every_face
def test_masks_follow_the_schedule(face):
    model = two_layers()
    engine, optimizer = face(model)
    schedule = DropRateScheduler(optimizer, 0.6, 6, start=0.0)
    for step in range(6):
        run(model, optimizer, range(step, step + 1))
        schedule.step()
        kept = torch.cat([engine.keep_probability(p).flatten() for p in model.parameters() if p.dim() > 1])
        assert kept.mean().item() == pytest.approx(1 - 0.1 * (step + 1), abs=1e-3)


@every_face
def test_groups_have_rates_of_their_own(face):
    model = two_layers()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    if face.built_in:
        groups[0]["drop_rate"], groups[1]["drop_rate"] = 0.2, 0.0
    _, optimizer = face(groups, drop_rate=0.2)
    optimizer.param_groups[1]["drop_rate"] = 0.0
    schedule = DropRateScheduler(optimizer, [0.4, 0.0], 2)
    seen = []
    for _ in range(3):
        seen.append([group["drop_rate"] for group in optimizer.param_groups])
        schedule.step()
    assert seen == [[0.2, 0.0], [pytest.approx(0.3), 0.0], [pytest.approx(0.4), 0.0]]


def test_a_group_that_is_added_later_keeps_its_rate():
    model = two_layers()
    optimizer = ImpactSGD(model[0].parameters(), lr=0.1, drop_rate=0.1)
    schedule = DropRateScheduler(optimizer, 0.5, 2)
    optimizer.add_param_group({"params": model[2].parameters(), "drop_rate": 0.25})
    for _ in range(3):
        schedule.step()
    assert [group["drop_rate"] for group in optimizer.param_groups] == [0.5, 0.25]


@every_face
def test_a_schedule_resumes_exactly(face):
    def trajectory(is_interrupted: bool) -> list[object]:
        model = two_layers()
        _, optimizer = face(model, drop_rate=0.1)
        schedule = DropRateScheduler(optimizer, 0.8, 10, start=0.0, shape="cubic")
        rates = []
        for epoch in range(12):
            if is_interrupted and epoch == 6:
                file = io.BytesIO()
                torch.save([optimizer.state_dict(), schedule.state_dict()], file)
                file.seek(0)
                states = torch.load(file, weights_only=True)
                _, optimizer = face(model, drop_rate=0.1)
                schedule = DropRateScheduler(optimizer, 0.8, 10, start=0.0, shape="cubic")
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
            run(model, optimizer, range(epoch, epoch + 1))
            schedule.step()
            rates.append(optimizer.param_groups[0]["drop_rate"])
        return [rates, model.state_dict(), optimizer.state_dict()]

    assert_same(trajectory(True), trajectory(False))


@every_face
def test_a_ramp_ends_in_a_sparse_network(face):
    model = two_layers()
    engine, optimizer = face(model)
    schedule = DropRateScheduler(optimizer, 0.8, 4, start=0.0, shape="cubic")
    for step in range(4):
        run(model, optimizer, range(step, step + 1))
        schedule.step()
    assert optimizer.param_groups[0]["drop_rate"] == 0.8
    assert engine.sparsify(0.8).sparsity == pytest.approx(0.8, abs=0.01)
    assert optimizer.param_groups[0]["drop_rate"] == 0.0
    assert schedule.get_last_drop_rate() == [0.8]  # what it has set last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.0}, "a drop rate must lie in"),
        ({"target": float("nan")}, "a drop rate must lie in"),
        ({"target": "fast"}, "target has 4 drop rates"),
        ({"target": ["x"]}, "Invalid target: x"),
        ({"target": True}, "a drop rate must lie in"),
        ({"start": -0.1}, "a drop rate must lie in"),
        ({"target": 0.995}, "less than the keep_floor=0.01"),
        ({"target": [0.1, 0.2]}, "target has 2 drop rates, but the optimizer 1 parameter groups"),
        ({"total_steps": 0}, "Invalid total_steps: 0"),
        ({"total_steps": 2.5}, r"Invalid total_steps: 2\.5"),
        ({"total_steps": True}, "Invalid total_steps: True"),
        ({"begin": -1}, "Invalid begin: -1"),
        ({"shape": "square"}, "Invalid shape: 'square'; choose from"),
    ],
)
def test_bad_schedules_are_refused_and_set_nothing(arguments, message):
    optimizer = ImpactSGD(two_layers(), lr=0.1, drop_rate=0.2)
    with pytest.raises(ValueError, match=message):
        DropRateScheduler(optimizer, **{"target": 0.5, "total_steps": 3, **arguments})
    assert optimizer.param_groups[0]["drop_rate"] == 0.2


def test_a_schedule_wants_an_optimizer_with_a_drop_rate():
    model = two_layers()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="SGD has no drop rate"):
        DropRateScheduler(plain, 0.5, 3)
    with pytest.raises(TypeError, match="Sequential has no drop rate"):
        DropRateScheduler(model, 0.5, 3)
    Impact(model, plain)
    DropRateScheduler(plain, 0.5, 3, start=0.25)
    assert plain.param_groups[0]["drop_rate"] == 0.25


def test_counts_and_rates_of_numpy_are_taken():
    optimizer = ImpactSGD(nn.Linear(3, 3), seed=np.random.default_rng(0).integers(100), drop_rate=np.float32(0.25))
    schedule = DropRateScheduler(optimizer, np.float64(0.5), np.int64(5), begin=np.int32(1), start=np.float32(0.125))
    for _ in range(7):
        schedule.step()
    assert optimizer.param_groups[0]["drop_rate"] == 0.5
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], file)  # no pickle needs NumPy
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), [optimizer.state_dict(), schedule.state_dict()])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", "x"),
        ("shape", None),
        ("shape", ["linear"]),
        ("total_steps", 0),
        ("total_steps", 2.5),
        ("total_steps", None),
        ("targets", "ab"),
        ("targets", 0.5),
        ("targets", [1.5, 0.1]),
        ("targets", [0.995, 0.1]),
        ("targets", [None, 0.1]),
        ("starts", [0.1, 0.2, 0.3]),
        ("starts", [float("nan")] * 2),
        ("starts", {}),
        ("begin", 1e30),
        ("begin", -1),
        ("last_epoch", None),
        ("last_epoch", -2),
        ("last_epoch", True),
    ],
)
def test_a_damaged_schedule_is_refused_and_nothing_changes(key, value):
    layer = nn.Linear(4, 4)
    optimizer = ImpactSGD([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=0.1)
    schedule = DropRateScheduler(optimizer, 0.5, 4)
    before = copy.deepcopy([schedule.state_dict(), optimizer.state_dict()])
    with pytest.raises((TypeError, ValueError), match=key):
        schedule.load_state_dict({**schedule.state_dict(), key: value})
    assert_same([schedule.state_dict(), optimizer.state_dict()], before)


@pytest.mark.parametrize("change", [lambda state: state.pop("begin"), lambda state: state.update(extra=1)])
def test_a_state_dict_of_something_else_is_refused(change):
    schedule = DropRateScheduler(ImpactSGD(two_layers(), lr=0.1), 0.5, 3)
    state = schedule.state_dict()
    change(state)
    with pytest.raises(ValueError, match="not one of a DropRateScheduler"):
        schedule.load_state_dict(state)


def test_a_state_dict_does_not_change_with_its_schedule():
    schedule = DropRateScheduler(ImpactSGD(two_layers(), lr=0.1), 0.5, 3, start=0.1)
    state = schedule.state_dict()
    before = copy.deepcopy(state)
    schedule.step()
    schedule.targets[0] = 0.25
    assert_same(state, before)
    schedule.load_state_dict(state)
    schedule.targets[0] = 0.25
    assert_same(state, before)
