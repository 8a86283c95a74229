"""The compiled step: the same trajectory as the for-loop's, in one pass, compiled once."""

import copy
import functools
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from impact_optim import SIGNALS, ActivationPruner, ImpactSGD, fused
from impact_optim.sampling import ROW

# Sizes: full rows with a rest, full rows only, a single row, less than a row, one element; and what has no mask.
SHAPES = [(3, ROW + 50), (2, ROW), (64, 64), (7, 5), (1, 1), (9,)]


class Stack(nn.Module):
    """Parameters that a forward pass reads one by one."""

    def __init__(self, dtype=torch.float32, shapes=SHAPES):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.params = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    def forward(self, targets):
        return sum(((p - t) ** 2).sum() for p, t in zip(self.params, targets, strict=True))


def targets(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def train(model, optimizer, steps, start=0, dtype=torch.float32):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(targets(step, dtype)).backward()
        optimizer.step()


def pair(dtype=torch.float32, **options):
    """A model with the for-loop, and a copy of it with the fused step."""
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3, "drop_rate": 0.3, **options}
    models = [Stack(dtype), Stack(dtype)]
    return models, [ImpactSGD(models[0], **options, foreach=False), ImpactSGD(models[1], **options, fused=True)]


def masked_weights(optimizer, model):
    with optimizer.masked():
        return [p.detach().clone() for p in model.parameters()]


SETTINGS = {
    "default": {},
    "saliency, Nesterov, scaled steps": {
        "importance": "saliency",
        "nesterov": True,
        "scale_steps": True,
        "kl_weight": 1.0,
    },
    "uniform, important": {"importance": "uniform", "drop": "important"},
    "no masks": {"drop_rate": 0.0, "scale_steps": True},
    # These share what the others have compiled, but for the first.
    "hypergradient without momentum": {"importance": "hypergradient", "momentum": 0.0},
    "drop important, maximize": {"drop": "important", "maximize": True},
    "no rescaling, dampening": {"rescale": "none", "dampening": 0.3},
    "one simplex per tensor": {"simplex": "tensor"},
    "capturable": {"capturable": True, "lr": torch.tensor(0.01)},
}
SLOW = ["hypergradient without momentum"]


@pytest.mark.parametrize(
    "options", [pytest.param(v, id=k, marks=[pytest.mark.slow] if k in SLOW else []) for k, v in SETTINGS.items()]
)
def test_equals_the_for_loop(options):
    """Weights and importances up to the rounding of sums in another order: 1e-6 of their size a step."""
    models, (loop, compiled) = pair(**options)
    for step in range(6):
        train(models[0], loop, 1, step)
        train(models[1], compiled, 1, step)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(compiled.importance(q), loop.importance(p), rtol=2e-5, atol=0)
    assert loop.param_groups[0]["step"] == compiled.param_groups[0]["step"] == 6
    if options.get("importance") != "uniform":
        assert loop.importance(next(models[0].parameters())).std() > 1e-3


@pytest.mark.parametrize("options", [{}, {"importance": "uniform"}], ids=["fisher", "uniform"])
def test_masks_are_those_of_the_for_loop_to_the_bit(options):
    """From the same state; on the way a weight in about 1e7 may fall on the other side of its probability."""
    models, (loop, compiled) = pair(**options)
    for step in range(4):
        train(models[1], compiled, 1, step)
        loop.load_state_dict(compiled.state_dict())
        models[0].load_state_dict(models[1].state_dict())
        expected, actual = masked_weights(loop, models[0]), masked_weights(compiled, models[1])
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a != 0, b != 0)
            torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
        assert any((a == 0).any() for a in actual)


def test_sixteen_bits_and_double():
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float64, 1e-5)):
        models, optimizers = pair(dtype)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 4, dtype=dtype)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert q.dtype == dtype
            # The for-loop rounds every operation to 16 bits: some weights fall on the other side of their draw.
            off = (q - p).abs() > tolerance * (1 + p.abs())
            assert off.double().mean() < 2e-3
        first = next(models[1].parameters())
        assert optimizers[1].state[first]["log_importance"].dtype == torch.float32


def test_nothing_compiles_anew_when_a_number_changes():
    model = Stack()
    compiled = ImpactSGD(model, lr=0.1, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=True)
    train(model, compiled, 6)
    other = Stack(shapes=[(5, ROW), (2, 300), (11, ROW - 1), (4, 4), (2, 2), (3,)])
    optimizer = ImpactSGD(other, lr=0.1, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=True)
    compiled.param_groups[0]["drop_rate"] = 0.25  # after a change: a pass for the masks, and one that draws none
    train(model, compiled, 2)
    before = counters["stats"]["unique_graphs"]
    changes = {"lr": 0.03, "drop_rate": 0.2, "momentum": 0.8, "weight_decay": 0.0, "importance_lr": 0.005}
    changes.update(kl_weight=3.0, seed=5, keep_floor=0.05, drop="important", rescale="none", dampening=0.1)
    for step, (name, value) in enumerate(changes.items()):
        compiled.param_groups[0][name] = value
        train(model, compiled, 2, start=2 * step)
    for _ in range(3):
        optimizer.zero_grad()
        other([torch.zeros_like(p) for p in other.params]).backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == before > 0


def test_many_tensors_take_one_compilation():
    shapes = [(3, ROW + k) for k in range(40)]
    model = Stack(shapes=shapes)
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=True)
    fused.compiled.cache_clear()
    before = counters["stats"]["unique_graphs"]
    for _ in range(3):
        optimizer.zero_grad()
        model([torch.zeros(shape) for shape in shapes]).backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] - before <= 2  # full rows, and what is left of a tensor


def test_no_transient_of_the_size_of_a_parameter():
    shapes = [(400, ROW), (3, 5)]
    model = Stack(shapes=shapes)
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.3, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=False)
        model([torch.zeros(shape) for shape in shapes]).backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            optimizer.step()
        events = profiler.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    for _ in range(2):
        step()
    assert 0 < step() < 400 * ROW * 4 / 8


class _NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{}, {"simplex": "tensor"}, {"importance": "uniform"}, {"capturable": True, "lr": torch.tensor(0.01)}],
    ids=str,
)
def test_no_step_and_no_masked_pass_waits_for_a_device(options, monkeypatch):
    # A compiled function does not run under a dispatch mode.
    monkeypatch.setattr(fused, "compiled", lambda function, plan: functools.partial(function, plan=plan))
    if "lr" in options:  # which stands for one on a device, of which the checks do not read the value
        monkeypatch.setattr("impact_optim.impact_sgd._check_options", lambda options: None)
    model = Stack()
    options = {"lr": 0.01, **options}
    optimizer = ImpactSGD(model, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=True, **options)
    for step in range(3):
        optimizer.zero_grad()
        inputs = targets(step)
        with _NoWaiting():
            loss = model(inputs)
        loss.backward()
        with _NoWaiting():
            optimizer.step()


def test_state_and_masked_weights_are_all_the_memory_it_keeps():
    """Per weight: 4 bytes of momentum, 4 of importance, 4 of masked weights."""
    model = Stack(shapes=[(100, ROW)])
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.3, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model([torch.zeros(100, ROW)]).backward()
        optimizer.step()
    param = next(model.parameters())
    held = [t for t in optimizer.state[param].values() if isinstance(t, torch.Tensor)]
    held += [optimizer._prepared[param].weights, optimizer._rows[param]._numbers]
    assert sum(t.numel() * t.element_size() for t in held) < 12.2 * param.numel()


def test_resumes_to_the_bit():
    model = Stack()
    optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=True)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, start=3)
    other = Stack()
    resumed = ImpactSGD(other, lr=0.5, drop_rate=0.1, fused=True)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, 3, start=3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if "log_importance" in optimizer.state[p]:
            assert torch.equal(optimizer.state[p]["log_importance"], resumed.state[q]["log_importance"])


def test_a_copy_goes_its_own_way():
    model = Stack()
    optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=True)
    train(model, optimizer, 3)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    other_optimizer.attach(other)
    before = [p.detach().clone() for p in model.parameters()]
    train(other, other_optimizer, 2, start=3)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    train(model, optimizer, 2, start=3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_masked_weights_follow_a_change_of_the_weights():
    models, (loop, compiled) = pair()
    train(models[1], compiled, 3)
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(2)
    models[0].load_state_dict(models[1].state_dict())
    loop.load_state_dict(compiled.state_dict())
    for a, b in zip(masked_weights(compiled, models[1]), masked_weights(loop, models[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=0)


@pytest.mark.parametrize("change", ["load_state_dict", "in place"])
def test_weights_that_change_between_two_forward_passes_are_seen(change):
    """A pass before a checkpoint is loaded, and no step in between: the masked weights are not those of before."""
    models, optimizers = pair()
    other = Stack()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(3.0)
    losses = []
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
        model(targets(2))
        if change == "in place":
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(2.0)
        else:
            model.load_state_dict(other.state_dict())
        losses.append(model(targets(2)))
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fused_first", [True, False])
def test_an_option_that_changes_between_the_passes_of_a_step_does_not_lose_the_masks(fused_first):
    results = []
    for changes in (False, True):
        model = Stack()
        optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=fused_first)
        train(model, optimizer, 2)
        model(targets(2)).backward()
        if changes:
            optimizer.param_groups[0]["fused"] = not fused_first
        model(targets(3)).backward()
        optimizer.step()
        results.append(list(model.parameters()))
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_dense_at_rest():
    model = Stack()
    optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, weight_decay=1e-3, drop_rate=0.5, fused=True)
    train(model, optimizer, 3)
    model(targets(3))
    assert all((p != 0).all() for p in model.parameters())
    assert all((value != 0).all() for value in model.state_dict().values())


def test_a_backward_pass_after_the_step_is_an_error():
    """The masked weights that it needs are those of the next step by then."""
    model = nn.Linear(64, 64)
    optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=True)
    loss = model(torch.randn(3, 64, requires_grad=True)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified inplace"):
        loss.backward()


def test_grad_scaler_unscales_in_the_pass_and_skips_what_is_not_finite():
    models, (loop, compiled) = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        train(models[0], loop, 1, step)
        compiled.zero_grad()
        scaler.scale(models[1](targets(step))).backward()
        scaler.step(compiled)
        scaler.update()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-6)
    before = [(p.detach().clone(), compiled.importance(p)) for p in models[1].parameters()]
    momenta = [compiled.state[p]["momentum_buffer"].clone() for p in models[1].parameters()]
    compiled.zero_grad()
    scaler.scale(models[1](targets(4)) * torch.inf).backward()
    scaler.step(compiled)
    scaler.update()
    assert scaler.get_scale() == 512.0
    for p, (old, importance), momentum in zip(models[1].parameters(), before, momenta, strict=True):
        assert torch.equal(p, old)
        assert torch.equal(compiled.state[p]["momentum_buffer"], momentum)
        torch.testing.assert_close(compiled.importance(p), importance, rtol=1e-6, atol=0)
    train(models[1], compiled, 1, 5)
    assert all(p.isfinite().all() for p in models[1].parameters())


def test_gradients_that_are_not_finite_do_not_reach_the_importances():
    model = Stack()
    optimizer = ImpactSGD(model, lr=0.0, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, fused=True)
    train(model, optimizer, 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    model(targets(2))
    optimizer.step()
    for p in model.parameters():
        assert optimizer.importance(p).isfinite().all()
    assert optimizer.keep_probability(model.params[0]).isfinite().all()


@pytest.mark.parametrize("size", [1e9, 1e15, 1e25])
def test_a_gradient_that_explodes_counts_as_ten_means(size):
    """Signals far above their mean, up to what float32 cannot hold, are clipped as by the for-loop."""
    models, optimizers = pair(importance="saliency")
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
        optimizer.zero_grad()
        model(targets(3)).backward()
        for p in model.parameters():
            p.grad[0] *= size
        optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if p.dim() >= 2:
            ours, truth = (o.state[t]["log_importance"] for o, t in zip(optimizers[::-1], (q, p), strict=True))
            level = optimizers[1].state[q]["log_normalizer"] - optimizers[0].state[p]["log_normalizer"]
            torch.testing.assert_close(ours - level, truth, rtol=1e-4, atol=1e-4)
            assert torch.isfinite(optimizers[1].importance(q)).all()


def test_channels_last_and_gradients_laid_out_otherwise():
    models = [nn.Conv2d(32, 64, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3, "drop_rate": 0.3}
    optimizers = [
        ImpactSGD(models[0], **options, foreach=False),
        ImpactSGD(models[1], **options, fused=True),
    ]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randn(64, 32, 3, 3, generator=generator)  # contiguous, unlike the weight
        for model, optimizer in zip(models, optimizers, strict=True):
            with optimizer.masked():
                model.weight.grad, model.bias.grad = grad.clone(), torch.ones(64)
            optimizer.step()
    torch.testing.assert_close(models[1].weight, models[0].weight, rtol=2e-5, atol=2e-6)
    assert models[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_default_is_fused_where_that_pays(monkeypatch):
    def implementation(**options):
        model = Stack()
        optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, **options)
        train(model, optimizer, 1)
        return "fused" if optimizer._rows else "eager"

    assert implementation() == "eager"
    monkeypatch.setattr("impact_optim.impact_sgd._PAYS_TO_COMPILE", 1000)
    assert implementation() == "fused"
    assert implementation(fused=False) == "eager"
    assert implementation(foreach=False) == "eager"
    assert implementation(sampling="exact") == "eager"


def test_parameters_with_gaps_are_refused():
    p = nn.Parameter(torch.randn(4, 8)[:, ::2])
    optimizer = ImpactSGD([{"params": [p], "param_names": ["head.weight"]}], fused=True)
    with pytest.raises(RuntimeError, match=r"fused=True needs.*\.contiguous\(\)"), optimizer.masked():
        pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("foreach", True),
        ("differentiable", True),
        ("per_rank_masks", True),
        ("sampling", "exact"),
        ("importance", "lookahead"),
    ],
)
def test_what_it_does_not_support_is_an_error(name, value):
    with pytest.raises(RuntimeError, match=f"`fused` does not support {name}"):
        ImpactSGD(nn.Linear(2, 2), fused=True, **{name: value})


def test_without_a_compiler_it_warns_once_and_takes_the_for_loop(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    fused._problem.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizers = [ImpactSGD(model := Stack(), lr=0.01, drop_rate=0.3, fused=True) for _ in range(2)]
        assert len([w for w in caught if "no C++ compiler" in str(w.message)]) == 1
        assert optimizers[1].param_groups[0]["fused"] is False
        train(model, optimizers[1], 2)
    finally:
        fused._problem.cache_clear()
        fused._warned.clear()


def test_a_signal_of_the_users_own():
    SIGNALS["cube"] = lambda weight, grad, direction, lr: -((weight * grad).abs() ** 1.5)
    try:
        models, optimizers = pair(importance="cube")
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 3)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-6)
    finally:
        del SIGNALS["cube"]


def test_importances_as_far_apart_as_their_bounds():
    """Without KL: exponentials beyond the range of the compiled one must not wrap around."""
    models, optimizers = pair(importance="saliency", kl_weight=0.0, importance_lr=5.0, lr=0.001)
    for step in range(12):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, step)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
    first = next(models[1].parameters())
    spread = optimizers[1].state[first]["log_importance"]
    assert spread.max() - spread.min() > 100
    weights = masked_weights(optimizers[1], models[1])[0]
    assert (weights == 0).float().mean() < 0.9
    assert weights.isfinite().all()


def test_groups_and_added_groups():
    models = [Stack(), Stack()]
    optimizers = []
    for model, implementation in zip(models, ({"foreach": False}, {"fused": True}), strict=True):
        params = list(model.parameters())
        groups = [{"params": params[:2]}, {"params": params[2:5], "drop_rate": 0.0}]
        optimizer = ImpactSGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, **implementation)
        optimizer.attach(model)
        optimizers.append(optimizer)
    for step in itertools.count():
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, step)
            if step == 1:
                optimizer.add_param_group({"params": [model.params[5]], "lr": 0.1})
        if step == 4:
            break
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-6)


def test_goes_on_after_a_cut():
    """The pruner gives parameters and state other memory; rows and masked weights of before must not be used."""
    results = []
    for implementation in ({"foreach": False}, {"fused": True}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8))
        optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, weight_decay=1e-3, drop_rate=0.3, **implementation)
        inputs = torch.randn(32, 40)
        pruner = ActivationPruner(model, inputs, {1: 0.5}, criterion="l1", optimizer=optimizer)
        for step in range(6):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            if step == 2:
                assert pruner.step().records
        assert model[0].weight.shape[0] < 256
        results.append((model, optimizer))
    for p, q in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(results[1][1].importance(q), results[0][1].importance(p), rtol=2e-5, atol=0)


@pytest.mark.cuda
def test_on_a_gpu():
    models, optimizers = pair()
    for model, optimizer in zip(models, optimizers, strict=True):
        model.cuda()
        for step in range(4):
            optimizer.zero_grad()
            model([t.cuda() for t in targets(step)]).backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-6)


def test_a_step_counter_set_by_hand_draws_other_masks():
    shown = []
    for options in ({"fused": True}, {"fused": False, "foreach": False}):
        torch.manual_seed(0)
        model = nn.Linear(64, 200)
        optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5, **options)
        for step in (1, 2, 100):
            optimizer.param_groups[0]["step"] = step
            optimizer.zero_grad()
            model(torch.eye(64)).square().sum().backward()
            optimizer.step()
        optimizer.param_groups[0]["step"] = 7
        shown.append((model(torch.eye(64)) - model.bias).detach() == 0)
    assert 0.3 < shown[0].float().mean() < 0.7
    assert (shown[0] != shown[1]).float().mean() < 1e-3
