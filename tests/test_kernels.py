"""The kernels against the tensor code, whatever the options, shapes and layouts; when which of the two is taken."""

import platform
import shutil
import tempfile
import warnings
from copy import deepcopy

import pytest
import torch
from helpers import FACES, assert_same, clones, every_face, run, two_layers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from impact_optim import SIGNALS, Impact, ImpactAdamW, ImpactSGD
from impact_optim.kernels import cpu
from impact_optim.sampling import ROW, as_uniform, bits
from impact_optim.signals import READS_STEP
from impact_optim.simplex import fill_level

pytestmark = pytest.mark.skipif(
    cpu.library() is None and not torch.cuda.is_available(), reason="there is no C++ compiler"
)

ROUNDING = 1e-6  # a draw may differ where its random number lies this close to π
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 2e-2}

options = st.fixed_dictionaries(
    {
        "drop_rate": st.sampled_from([0.0, 0.001, 0.1, 0.3, 0.6]),
        "importance": st.sampled_from([*SIGNALS, "uniform"]),
        "importance_lr": st.sampled_from([0.0, 0.01, 0.1]),
        "kl_weight": st.sampled_from([0.0, 0.1, 10.0]),
        "drop": st.sampled_from(["unimportant", "important"]),
        "rescale": st.sampled_from(["inverse", "none"]),
        "keep_floor": st.sampled_from([0.0, 0.01, 0.4]),
        "hold_zeros": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
        "maximize": st.booleans(),
    }
)
PLAIN = {
    "drop_rate": 0.0,
    "kl_weight": 0.0,
    "drop": "unimportant",
    "rescale": "inverse",
    "keep_floor": 0.0,
    "seed": 0,
    "maximize": False,
}
bases = st.one_of(
    st.fixed_dictionaries(
        {
            "lr": st.floats(1e-3, 0.1),
            "momentum": st.sampled_from([0.0, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.01]),
            "nesterov": st.booleans(),
            "dampening": st.sampled_from([0.0, 0.3]),
        }
    ).map(lambda o: (ImpactSGD, {**o, "nesterov": o["nesterov"] and o["momentum"] > 0 and o["dampening"] == 0})),
    st.fixed_dictionaries(
        {
            "lr": st.floats(1e-3, 0.1),
            "eps": st.just(1e-2),  # what divides by a gradient near 0 would enlarge its rounding without bound
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "amsgrad": st.booleans(),
        }
    ).map(lambda o: (ImpactAdamW, o)),
    st.just((None, {"lr": 0.01})),  # Impact around RMSprop: the kernel makes the masked gradients
)
shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(2, 9), st.integers(2, 40)),
        st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(1, 3), st.integers(2, 3)),
        st.just((90, 100)),  # more than a row of random bits, and than a sample
        st.just((7,)),
    ),
    min_size=1,
    max_size=5,
).filter(lambda given: any(len(shape) > 1 for shape in given))


class Net(nn.Module):
    def __init__(self, shapes, dtype, channels_last, zeros):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i, shape in enumerate(shapes):
            p = torch.randn(shape, generator=generator)
            if zeros:
                p[torch.rand(shape, generator=generator) < 0.2] = 0.0
            p = p.to(dtype)
            if channels_last and len(shape) == 4:
                p = p.to(memory_format=torch.channels_last)
            self.register_parameter(f"weight{i}", nn.Parameter(p))

    def forward(self, targets):
        """A loss whose gradient is the distance of what the pass reads to a target."""
        read = [getattr(self, f"weight{i}") for i in range(len(targets))]
        return sum(0.5 * (w.float() - t).square().sum() for w, t in zip(read, targets, strict=True))


def build(base, base_options, net, options, fused):
    if base is not None:
        optimizer = base(net, **base_options, **options, fused=fused)
        return optimizer, optimizer
    options = {name: value for name, value in options.items() if name != "maximize"}
    optimizer = torch.optim.RMSprop(net.parameters(), **base_options)
    impact = Impact(net, optimizer, **options)
    optimizer.param_groups[0]["fused"] = fused
    return impact, optimizer


def check_draws(impacts, nets, seed, step):
    """The draws of both, where they differ, and how many there are; they may where u lies within rounding of π."""
    theirs, ours = (impact._simplexes[impact.optimizers[0]][0] for impact in impacts)
    doubtful, differ = 0, []
    u = as_uniform(bits(range(-(-ours.numel // ROW)), seed=seed, step=step, group=0)[: ours.numel]).to(
        ours.members[0].device
    )
    for p, q in zip(theirs.members, ours.members, strict=True):
        _, start, stop = ours._places[q]
        kept = [s.current_mask().factor(t) != 0 for s, t in ((theirs, p), (ours, q))]
        alive = torch.ones_like(q, dtype=torch.bool) if not ours.group["hold_zeros"] else q.detach() != 0
        other = (kept[0] != kept[1]) & alive
        keep = impacts[1].keep_probability(q)
        near = torch.empty_like(keep)
        near.copy_(impacts[1]._home[q]._places.split({q.device: u.float()})[q])
        assert stop - start == q.numel()
        assert ((near - keep).abs()[other] < ROUNDING).all()
        doubtful += int(other.sum())
        differ.append(other)
    return doubtful, differ


def compare(base, base_options, options, shapes, dtype, channels_last, steps=3, device="cpu"):
    """Both take every step from the same state; returns how many draws were doubtful, and how many there were."""
    if dtype is torch.bfloat16 and options["importance"] in (*READS_STEP, "lookahead"):
        # The difference of two rounded weights is mostly rounding, and so is what a trial at rounded weights finds.
        options = {**options, "importance": "saliency"}
    nets = [Net(shapes, dtype, channels_last, options["hold_zeros"]).to(device) for _ in range(2)]
    made = [build(base, base_options, net, options, fused) for net, fused in zip(nets, (False, None), strict=True)]
    impacts, optimizers = [impact for impact, _ in made], [optimizer for _, optimizer in made]
    assert impacts[0]._simplexes[optimizers[0]][0].weights() is None
    assert impacts[1]._simplexes[optimizers[1]][0].weights() is not None
    generator = torch.Generator().manual_seed(1)
    doubtful = draws = 0
    for step in range(steps):
        targets = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        differ = {}
        if options["drop_rate"] > 0:
            for impact in impacts:
                impact._refresh()
            found, where = check_draws(impacts, nets, options["seed"], step)
            differ = dict(zip(impacts[1]._simplexes[optimizers[1]][0].members, where, strict=True))
            doubtful, draws = doubtful + found, draws + sum(w.numel() for w in where)
        for net, optimizer in zip(nets, optimizers, strict=True):

            def closure(net=net, optimizer=optimizer, targets=targets):
                optimizer.zero_grad()
                loss = net(targets)
                loss.backward()
                return loss

            optimizer.step(closure)
        tolerance = TOLERANCE[dtype]
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            same = ~differ[q] if q in differ else torch.ones_like(q, dtype=torch.bool)
            torch.testing.assert_close(q[same], p[same], rtol=tolerance, atol=tolerance)
            theirs, ours = optimizers[0].state[p], optimizers[1].state[q]
            assert theirs.keys() == ours.keys()
            for key, value in theirs.items():
                atol = max(tolerance, 1e-4) if key == "log_importance" else tolerance
                if value.dim():
                    atol *= max(1.0, float(value.abs().max()))  # sums of large terms may be small
                    torch.testing.assert_close(ours[key][same], value[same], rtol=max(tolerance, 1e-3), atol=atol)
                else:  # how many steps; the kernels of a GPU have it there
                    assert_same(ours[key].cpu(), value.cpu())
            if options["hold_zeros"] and q.dim() > 1:
                assert torch.equal(p == 0, q == 0)
        torch.testing.assert_close(
            torch.as_tensor(optimizers[1].param_groups[0]["signal_scale"]),
            torch.as_tensor(optimizers[0].param_groups[0]["signal_scale"]),
            rtol=0.3 if dtype is torch.bfloat16 else 1e-4,
            atol=1e-9,
        )
        with torch.no_grad():  # the next step from the same point
            for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
                q.copy_(p)
        optimizers[1].load_state_dict({**deepcopy(optimizers[0].state_dict()), "param_groups": _groups(optimizers)})
    return doubtful, draws


def _groups(optimizers):
    theirs, ours = (optimizer.state_dict()["param_groups"] for optimizer in optimizers)
    return [{**group, "fused": own.get("fused")} for group, own in zip(theirs, ours, strict=True)]


@settings(deadline=None, max_examples=40)
@example(  # the mirror step by tensor code, the base's by the kernel
    base=(ImpactAdamW, {"lr": 0.01, "eps": 1e-2}),
    options={"importance": "lookahead", "hold_zeros": True, "importance_lr": 0.01, **PLAIN},
    shapes=[(90, 100)],
    dtype=torch.float64,
    channels_last=False,
)
@given(
    base=bases,
    options=options,
    shapes=shapes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    channels_last=st.booleans(),
)
def test_kernels_and_tensor_code_take_the_same_steps(base, options, shapes, dtype, channels_last):
    if options["drop_rate"] and options["keep_floor"] > 1 - options["drop_rate"]:
        options = {**options, "keep_floor": 0.0}
    compare(*base, options, shapes, dtype, channels_last)


def test_draws_within_rounding_are_rare():
    settings = {"drop_rate": 0.3, "importance": "saliency", "importance_lr": 0.1, "kl_weight": 0.1, "seed": 5}
    settings |= {
        "drop": "unimportant",
        "rescale": "inverse",
        "keep_floor": 0.01,
        "hold_zeros": False,
        "maximize": False,
    }
    base = ImpactSGD, {"lr": 0.01, "momentum": 0.9}
    doubtful, draws = compare(*base, settings, [(300, 400), (200, 100)], torch.float32, False, steps=8)
    assert draws > 1_000_000
    assert doubtful <= 3 + 1e-5 * draws


@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64-v3", "-O1"])
def test_other_instruction_sets_agree_too(flags, monkeypatch, tmp_path):
    if platform.machine() not in ("x86_64", "AMD64") and "x86" in flags:
        pytest.skip("not an x86 processor")
    monkeypatch.setenv("CXXFLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = cpu.library.__wrapped__()
    monkeypatch.setattr(cpu, "library", lambda: built)
    test_draws_within_rounding_are_rare()


@settings(deadline=None, max_examples=40)
@given(
    n=st.sampled_from([2, 100, 4096, 4097, 50_000]),
    spread=st.sampled_from([0.0, 1e-3, 0.3, 3.0, 15.0]),
    share=st.floats(1e-9, 0.5),
    is_low=st.booleans(),
    zeros=st.booleans(),
)
def test_levels_are_those_of_the_tensor_code(n, spread, share, is_low, zeros):
    mean = share if is_low else 1 - share
    generator = torch.Generator().manual_seed(n)
    log_w = (torch.randn(n, generator=generator) * spread).clamp(-60, 60)
    x = torch.rand(n, generator=generator)
    x[1::3] = 0.0
    weights = cpu.Weights([x], [0])
    weights.set_importances(log_w)
    group = weights.group(holds_zeros=zeros)
    weights.set_level(group, mean)
    found = group.level
    w = log_w.exp() * (x != 0) if zeros else log_w.exp()
    expected = fill_level([w], mean, (w > 0).sum() if zeros else None)

    def filled(level):
        return float((w.double() * float(torch.tensor(level, dtype=torch.float32))).clamp(max=1.0).sum())

    budget = (w > 0).sum().item() * mean if zeros else n * mean
    bound = 2e-3 * min(budget, budget / mean - budget) + 1e-6 * budget
    assert abs(filled(found) - budget) <= bound
    assert abs(filled(found) - filled(float(expected))) <= 1e-3 * bound + 1e-6 * budget


@every_face
def test_results_do_not_depend_on_the_number_of_threads(face):
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            model = nn.Linear(300, 200, bias=False)
            impact, optimizer = face(model, drop_rate=0.3, importance_lr=0.1)
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                with impact.masked():
                    model.weight.grad = torch.randn(200, 300, generator=generator)
                optimizer.step()
            found.append(
                (clones(model), dict(optimizer.state[model.weight]), optimizer.param_groups[0]["signal_scale"])
            )
    finally:
        torch.set_num_threads(before)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


# -- which of the two --


def is_fused(impact):
    return [simplex.weights() is not None for simplex in impact._all()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"foreach": False}, True),
        ({"foreach": True}, False),
        ({"differentiable": True}, False),
    ],
)
def test_kernels_are_taken_unless_something_else_is_asked_for(options, expected):
    assert is_fused(ImpactSGD(two_layers(), lr=0.1, **options)) == [expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_that_kernels_know(dtype):
    assert is_fused(ImpactSGD(two_layers(dtype), lr=0.1)) == [dtype is not torch.float16]


def test_weights_with_gaps_in_memory_are_left_to_the_tensor_code():
    p = nn.Parameter(torch.randn(8, 20)[:, ::2])
    optimizer = ImpactSGD([p], lr=0.1, drop_rate=0.3)
    assert is_fused(optimizer) == [False]
    with optimizer.masked():
        p.grad = torch.ones(8, 10)
    optimizer.step()


def test_a_signal_of_ones_own_is_taken_by_the_tensor_code(monkeypatch):
    monkeypatch.setitem(SIGNALS, "cube", lambda weight, grad, step: -((weight * grad).abs() ** 3))
    models = [two_layers(), two_layers()]
    for model, fused in zip(models, (None, False), strict=True):
        run(model, ImpactSGD(model, lr=0.05, drop_rate=0.3, importance="cube", fused=fused), range(3))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


def test_without_a_compiler_there_is_one_warning_and_the_tensor_code(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="there is no C\\+\\+ compiler"):
        assert cpu.library.__wrapped__() is None
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert is_fused(ImpactSGD(two_layers(), lr=0.1)) == [False]
    model = two_layers()
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        run(model, ImpactSGD(model, lr=0.1, fused=True), range(1))


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", "--no-such-option")
    with pytest.warns(UserWarning, match="failed: .*no-such-option"):
        assert cpu.library.__wrapped__() is None
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiled_library_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert cpu.library.__wrapped__() is not None
    (made,) = tmp_path.rglob("*.so")
    before = made.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.library.__wrapped__() is not None
    assert [path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")] == [before]


def test_without_a_home_the_library_lies_in_the_folder_for_temporary_files(monkeypatch, tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.write_text("no folder")
    temporary.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setenv("CXXFLAGS", "-O0")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert cpu.library.__wrapped__() is not None
    assert len(list(temporary.rglob("*.so"))) == 1


# -- the base's part --


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_weight_that_comes_to_zero_by_chance_lives_on_in_16_bits(dtype):
    """In more bits that is as good as impossible, and it is taken for pruned."""
    p = nn.Parameter(torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.25, 4.0]]).to(dtype))
    optimizer = ImpactSGD([p], lr=1.0, drop_rate=0.0, hold_zeros=True)
    p.grad = p.detach().clone()
    optimizer.step()
    assert p.abs().max() < 1e-30
    assert (p != 0).sum() == (5 if dtype is torch.bfloat16 else 0)
    assert p[0, 2] == 0


@pytest.mark.parametrize("face", FACES[:2], ids=lambda face: face.name)
def test_hooks_run_once_and_see_the_gradient(face):
    """Also where the base was made before, whose method torch has wrapped then."""
    torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    model = two_layers()
    _, optimizer = face(model, drop_rate=0.3)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(all(p.grad is not None for p in model.parameters())))
    optimizer.register_step_post_hook(lambda *_: seen.append(all(p.grad is not None for p in model.parameters())))
    run(model, optimizer, range(1))
    assert seen == [True, True]


@pytest.mark.parametrize("face", FACES[:2], ids=lambda face: face.name)
def test_gradients_that_a_hook_changes_before_the_step_count(face):
    models = [two_layers(), two_layers()]
    for model, by_hook in zip(models, (True, False), strict=True):
        _, optimizer = face(model, drop_rate=0.3)

        def halve(*_, model=model):
            for p in model.parameters():
                p.grad = p.grad * 0.5

        if by_hook:
            optimizer.register_step_pre_hook(halve)
        for step in range(3):
            x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if not by_hook:
                halve()
            optimizer.step()
    assert_same(models[0], models[1])


@every_face
def test_a_change_of_memory_format_keeps_the_importances_at_their_weights(face):
    torch.manual_seed(0)
    model = nn.Conv2d(8, 16, 3)
    impact, optimizer = face(model, drop_rate=0.3, importance_lr=0.3)
    x = torch.randn(4, 8, 9, 9)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        before = impact.importance(model.weight)
        model.to(memory_format=memory_format)
        torch.testing.assert_close(impact.importance(model.weight), before, rtol=1e-5, atol=1e-6)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert impact.importance(model.weight).std() > 0.01


@every_face
@pytest.mark.parametrize("when", ["between steps", "before the backward pass", "before the step"])
def test_a_change_of_dtype_is_noticed(face, when):
    """A kernel goes by addresses, and must not take two bytes for four."""
    found = []
    for fused in (None, False):
        model = two_layers()
        impact, optimizer = face(model, drop_rate=0.3, importance_lr=0.1)
        optimizer.param_groups[0]["fused"] = fused
        run(model, optimizer, range(3))
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(9))
        optimizer.zero_grad()
        if when == "between steps":
            model.double()
        loss = model(x.to(model[0].weight.dtype)).square().mean()
        if when == "before the backward pass":
            model.double()
            loss = model(x.double()).square().mean()
        loss.backward()
        if when == "before the step":
            model.double()
        for state in optimizer.state.values():
            for key, value in state.items():
                if key not in ("log_importance", "step"):
                    state[key] = value.double()
        optimizer.step()
        run(model, optimizer, range(3, 6))
        found.append(clones(model))
        assert is_fused(impact) == [fused is None]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("face", FACES[:2], ids=lambda face: face.name)
def test_state_of_another_shape_is_left_to_the_base(face):
    """Which refuses it; a kernel would read past its end."""
    model = two_layers()
    _, optimizer = face(model, drop_rate=0.3)
    run(model, optimizer, range(2))
    state = optimizer.state[model[0].weight]
    key = "momentum_buffer" if "momentum_buffer" in state else "exp_avg"
    state[key] = state[key][:3]
    with pytest.raises(RuntimeError, match=r"size|shape"):
        run(model, optimizer, range(2, 3))
