"""Settings in which a face must be something known, and the budget along a whole training run."""

import copy
import gc
import math

import pytest
import torch
import torchvision
from helpers import assert_same, clones, every_face
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from impact_optim import SIGNALS, ImpactSGD, simplex
from impact_optim.sampling import ROW, as_uniform, bits

LEARNT = sorted(set(SIGNALS) - {"lookahead"})


def net(width=32, dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)]
    return nn.Sequential(*layers).to(dtype)


def weights(model):
    return [p for p in model.parameters() if p.dim() > 1]


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 12, generator=generator).to(dtype)
    return x, x[:, :4].abs().argmax(1)


def run(model, optimizer, steps, after_step=lambda: None, batch=64):
    """An epoch or a part of it, with a closure, which ``"lookahead"`` needs."""
    x, y = data(next(model.parameters()).dtype)
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(x)

        def closure(rows=rows):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            return loss

        optimizer.step(closure)
        after_step()


def step_with(impact, optimizer, *pairs):
    """One step with these very gradients, given as pairs of a parameter and its gradient."""
    with impact.masked():
        for p, grad in pairs:
            p.grad = grad
    optimizer.step()


def flat(read, params):
    return torch.cat([read(p).flatten() for p in params])


# -- what is known --


@every_face
@pytest.mark.parametrize("importance", LEARNT)
def test_infinite_regularisation_is_uniform_dropconnect(face, importance):
    found = []
    for options in ({"importance": "uniform"}, {"importance": importance, "kl_weight": 1e30}):
        model = net(dtype=torch.float64)
        run(model, face(model, drop_rate=0.3, **options)[1], 10)
        found.append(clones(model))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-5)


@every_face
def test_uniform_is_dropconnect_as_users_write_it(face):
    """The same run with the weights masked by hand from the stream, and the base on top."""
    ours, theirs = net(), net()
    run(ours, face(ours, importance="uniform", drop_rate=0.3, seed=7)[1], 10)
    plain = face.plain(theirs)
    x, y = data()
    sizes = [p.numel() for p in weights(theirs)]
    for step in range(10):
        rows = torch.arange(step * 64, (step + 1) * 64) % len(x)
        u = as_uniform(bits(range(-(-sum(sizes) // ROW)), seed=7, step=step, group=0))[: sum(sizes)]
        drawn = iter(u.split(sizes))
        masked = {}
        for name, p in theirs.named_parameters():
            masked[name] = p * (next(drawn).view(p.shape) < 0.7) / 0.7 if p.dim() >= 2 else p
        plain.zero_grad()
        nn.functional.cross_entropy(torch.func.functional_call(theirs, masked, (x[rows],)), y[rows]).backward()
        plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_without_regularisation_a_constant_signal_leaves_one_weight():
    p = nn.Parameter(torch.linspace(1, 2, 50).view(5, 10))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.5, importance="magnitude", importance_lr=5.0, kl_weight=0.0)
    for _ in range(2000):
        step_with(optimizer, optimizer, (p, torch.zeros_like(p)))
        if optimizer.importance_summary()[0].perplexity < 1.0001:
            break
    w = optimizer.importance(p)
    assert torch.isfinite(w).all()
    assert w.max().item() == pytest.approx(50, rel=1e-3)
    assert w.argmax().item() == 49
    keep = optimizer.keep_probability(p)
    assert keep.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert keep.view(-1)[49].item() == pytest.approx(1.0)


def test_a_spread_signal_meets_its_gibbs_distribution():
    """The stationary importances are exp(-u/λ), with u in units of the mean signal."""
    p = nn.Parameter(torch.linspace(0.1, 2, 40).view(4, 10))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.1, importance="magnitude", importance_lr=1.0, kl_weight=0.5)
    for _ in range(60):
        step_with(optimizer, optimizer, (p, torch.zeros_like(p)))
    u = -p.detach() / p.detach().mean()
    expected = torch.softmax(-u.view(-1) / 0.5, 0).view_as(p) * 40
    torch.testing.assert_close(optimizer.importance(p), expected, rtol=1e-3, atol=0)


def quadratic(optimizer, x, a, sign=1.0):
    def closure():
        optimizer.zero_grad()
        loss = sign * 0.5 * (a * x**2).sum()
        loss.backward()
        return loss

    return closure


def test_lookahead_and_the_online_signal_on_a_quadratic(monkeypatch):
    """f(x) = ½ Σ a x². Lookahead judges a step by the gradient where it leads, a (x - γd); online, one step later."""
    a = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    start, lr = torch.tensor([[1.0, -2.0], [0.5, 1.5]]), 0.1
    seen = {}
    for name in ("lookahead", "hypergradient"):
        signal = SIGNALS[name]

        def spy(weight, grad, step, signal=signal, name=name):
            h = signal(weight, grad, step)
            seen.setdefault(name, []).append(h.clone().view(2, 2))
            return h

        monkeypatch.setitem(SIGNALS, name, spy)
        x = nn.Parameter(start.clone())
        optimizer = ImpactSGD([x], lr=lr, drop_rate=0.0, importance=name)
        for _ in range(2):
            optimizer.step(quadratic(optimizer, x, a))
    d = a * start
    closed_form = -lr * d * (a * (start - lr * d))
    torch.testing.assert_close(seen["lookahead"][0], closed_form)
    assert len(seen["hypergradient"]) == 1  # before the second step none has been taken that could be judged
    torch.testing.assert_close(seen["hypergradient"][0], closed_form)


def test_the_hypergradient_is_the_derivative_of_the_problem():
    """h against autograd through L(x - w ⊙ γd)."""
    torch.manual_seed(1)
    x, step, y = torch.randn(6, 4), 0.3 * torch.randn(6, 4), torch.randn(5, 6)
    w = torch.ones(6, 4, requires_grad=True)
    (y @ (x - w * step)).tanh().square().sum().backward()
    moved = (x - step).requires_grad_()
    (y @ moved).tanh().square().sum().backward()
    torch.testing.assert_close(SIGNALS["hypergradient"](x, moved.grad, step), w.grad)


@every_face
@pytest.mark.parametrize("importance", ["hypergradient", "lookahead", "saliency"])
def test_maximising_is_minimising_the_negative(face, importance):
    a = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    found = []
    for sign in (1.0, -1.0):
        x = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 1.5]]))
        impact, optimizer = face([x], drop_rate=0.0, importance=importance, importance_lr=0.3, maximize=sign < 0)
        for _ in range(4):
            optimizer.step(quadratic(optimizer, x, a, sign))
        found.append((x.detach(), impact.importance(x)))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].std() > 0.01


@pytest.mark.parametrize("importance", [name for name in LEARNT if name != "magnitude"])
def test_the_scale_of_the_gradient_does_not_matter(importance):
    """η and λ are unitless: a loss 1024 times as large, at a rate as much smaller, learns the same importances."""
    learnt = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(10, 10))
        optimizer = ImpactSGD([p], lr=0.01 / scale, drop_rate=0.3, importance=importance, importance_lr=0.1)
        for _ in range(20):
            step_with(optimizer, optimizer, (p, (p.detach() + torch.randn(10, 10)) * scale))
        learnt.append(optimizer.importance(p))
    assert learnt[0].std() > 0.05
    torch.testing.assert_close(learnt[0], learnt[1], rtol=1e-3, atol=1e-4)


def test_dropping_the_important_drops_them():
    p = nn.Parameter(torch.linspace(0.1, 2, 100).view(10, 10))
    options = {"importance": "magnitude", "importance_lr": 0.5, "kl_weight": 0.5, "drop": "important"}
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.3, **options)
    for _ in range(20):
        step_with(optimizer, optimizer, (p, torch.zeros_like(p)))
    keep = optimizer.keep_probability(p).view(-1)
    assert (keep.diff() <= 1e-6).all()
    assert keep[0] > 0.9
    assert keep[-1] == pytest.approx(0.01, abs=1e-4)


def test_keep_floor_keeps_every_weight_reachable():
    p = nn.Parameter(torch.linspace(1e-4, 2, 100).view(10, 10))
    options = {"importance": "magnitude", "importance_lr": 1.0, "kl_weight": 0.05, "keep_floor": 0.2}
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.5, **options)
    for _ in range(100):
        step_with(optimizer, optimizer, (p, torch.zeros_like(p)))
    assert optimizer.keep_probability(p).min().item() == pytest.approx(0.2, abs=1e-3)


# -- the budget --


def assert_on_budget(keep, drop_rate):
    """To 1e-3 of the mean and to 5% of the rate itself, but for the rounding of π to float32."""
    assert (1 - keep.double()).mean().item() == pytest.approx(drop_rate, abs=min(1e-3, 0.05 * drop_rate) + 6e-8)


@every_face
@pytest.mark.parametrize("importance", [*LEARNT, "lookahead", "uniform"])
@pytest.mark.parametrize("width", [16, 80], ids=["sorted", "too large to be sorted"])
def test_the_budget_holds_at_every_step(face, importance, width):
    for drop_rate, importance_lr, kl_weight in ((0.001, 0.5, 0.0), (0.1, 0.01, 0.3), (0.5, 0.1, 0.1)):
        model = net(width)
        options = {"drop_rate": drop_rate, "importance_lr": importance_lr, "kl_weight": kl_weight}
        impact, optimizer = face(model, importance=importance, **options)
        after = lambda i=impact, m=model, d=drop_rate: assert_on_budget(flat(i.keep_probability, weights(m)), d)  # noqa: E731
        run(model, optimizer, 12, after)


@settings(deadline=None, max_examples=15)
@given(
    rates=st.lists(
        st.sampled_from([0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.7, 0.9, 0.99]), min_size=2, max_size=6
    ),
    kl_weight=st.sampled_from([0.0, 0.3, 10.0]),
    width=st.sampled_from([16, 80]),
    zeros=st.booleans(),
)
def test_the_budget_holds_when_the_drop_rate_jumps(rates, kl_weight, width, zeros):
    """Up, down, to 0 and back, dense and with two thirds of the weights held at zero."""
    model = net(width)
    optimizer = ImpactSGD(model, lr=0.05, drop_rate=0.1, kl_weight=kl_weight, importance_lr=0.1, keep_floor=0.0)
    run(model, optimizer, 2)
    if zeros:
        optimizer.sparsify(0.66)
    for drop_rate in rates:
        optimizer.param_groups[0]["drop_rate"] = drop_rate
        run(model, optimizer, 2)
        keep = flat(optimizer.keep_probability, weights(model))
        alive = torch.cat([p.detach().flatten() != 0 for p in weights(model)]) if zeros else slice(None)
        assert_on_budget(keep[alive], drop_rate)
        if zeros:
            assert not keep[~alive].any() or drop_rate == 0


def test_a_network_of_several_blocks_is_on_budget():
    """More than 65,536 weights, in two groups, one of them above, of several tensors."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 20), nn.Tanh(), nn.Linear(20, 70))
    groups = [{"params": [*model[0].parameters(), model[2].weight]}, {"params": model[4].weight, "drop_rate": 0.6}]
    optimizer = ImpactSGD(groups, lr=0.1, drop_rate=0.001, importance_lr=1.0, kl_weight=0.1)
    optimizer.attach(model)
    x = torch.randn(16, 300)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert_on_budget(flat(optimizer.keep_probability, [model[0].weight, model[2].weight]), 0.001)
        assert_on_budget(optimizer.keep_probability(model[4].weight), 0.6)


@pytest.mark.parametrize("kl_weight", [0.3, 10.0])
def test_the_budget_holds_when_the_signal_moves_all_at_once(kl_weight):
    """A tenth of the weights carries all gradient, and every 20 steps it is another tenth."""
    p = nn.Parameter(torch.randn(100, 100))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.5, importance="fisher", importance_lr=0.1, kl_weight=kl_weight)
    for step in range(80):
        if step % 20 == 0:
            active = (torch.rand(100, 100) < 0.1).float()
        assert_on_budget(optimizer.keep_probability(p), 0.5)
        step_with(optimizer, optimizer, (p, torch.randn(100, 100) * active))


def test_idle_weights_far_below_the_others_still_count():
    """What has no gradient sinks with the others' normaliser: not so far that a float32 takes it for a held zero."""
    p, idle = nn.Parameter(torch.randn(40, 30)), nn.Parameter(torch.randn(20, 30))
    options = {"importance": "fisher", "importance_lr": 5.0, "kl_weight": 0.0, "keep_floor": 0.0}
    optimizer = ImpactSGD([p, idle], lr=0.0, drop_rate=0.3, **options)
    for step in range(40):
        peak = torch.zeros(40, 30)
        peak[0, 0] = 1.0
        step_with(optimizer, optimizer, (p, peak), (idle, 0.1 * torch.randn(20, 30) if step < 20 else None))
        assert_on_budget(flat(optimizer.keep_probability, [p, idle]), 0.3)
        assert flat(optimizer.importance, [p, idle]).mean().item() == pytest.approx(1, abs=1e-4)


@every_face
@pytest.mark.parametrize("importance", ["saliency", "uniform"])
def test_exact_sampling_drops_the_exact_number(face, importance):
    model = net()
    impact, optimizer = face(model, drop_rate=0.3, sampling="exact", importance=importance)
    x, y = data()
    for _ in range(10):
        with impact.masked():
            dropped = sum((p == 0).sum().item() for p in weights(model))
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert dropped == round(0.3 * sum(p.numel() for p in weights(model)))


def test_exact_masks_of_a_tiny_tensor_enlarge_by_what_they_drop():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = ImpactSGD([p], lr=0.1, drop_rate=0.1, sampling="exact")
    with optimizer.masked():  # a tenth of four weights is none
        assert not (p == 0).any()
        torch.testing.assert_close(p.detach(), torch.ones(2, 2))


@every_face
def test_the_arms_of_the_study_drop_the_same_number(face):
    n = 12 * 32 + 32 * 32 + 32 * 4
    for options in (
        {"importance": "uniform"},
        {"importance": "lookahead", "kl_weight": 0.0},
        {"importance": "saliency"},
    ):
        model = net()
        impact, optimizer = face(model, drop_rate=0.4, importance_lr=0.1, **options)
        run(model, optimizer, 20)
        with impact.masked():
            dropped = sum((p == 0).sum().item() for p in weights(model))
        assert dropped / n == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / n))


def test_the_expected_network_knows_about_the_cap():
    p = nn.Parameter(torch.linspace(0.1, 2, 100).view(10, 10))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.3, importance="magnitude", importance_lr=1.0, kl_weight=0.05)
    for _ in range(60):
        step_with(optimizer, optimizer, (p, torch.zeros_like(p)))
    optimizer.param_groups[0]["importance_lr"] = 0.0
    keep, total = optimizer.keep_probability(p), torch.zeros_like(p)
    assert keep.min() < 0.05
    for _ in range(2000):
        with torch.no_grad(), optimizer.masked():
            total += p
        optimizer.param_groups[0]["mask_step"] += 1
    with optimizer.expected():
        error = (total / 2000 - p.detach()) / p.detach()
    assert error.abs().mean() < 0.1


# -- gradients of any size --


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("importance", LEARNT)
def test_importances_are_finite_under_any_gradient(scale, importance):
    p = nn.Parameter(torch.randn(10, 10))
    optimizer = ImpactSGD([p], lr=1e-6 / scale, momentum=0.9, drop_rate=0.3, importance=importance, importance_lr=0.5)
    for _ in range(10):
        step_with(optimizer, optimizer, (p, torch.randn(10, 10) * scale))
        w = optimizer.importance(p)
        assert torch.isfinite(w).all()
        assert (w >= 0).all()
        assert w.double().mean().item() == pytest.approx(1, abs=1e-5)


@every_face
@settings(deadline=None, max_examples=30)
@given(
    importance=st.sampled_from(LEARNT),
    bad=st.lists(st.sampled_from([0.0, 1.0, 1e-38, 1e38, math.nan, math.inf, -math.inf]), min_size=12, max_size=12),
    at=st.integers(0, 4),
    zeros=st.booleans(),
)
def test_non_finite_gradients_do_not_poison_the_importances(face, importance, bad, at, zeros):
    p, q = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 5))
    impact, optimizer = face([p, q], lr=0.0, drop_rate=0.3, importance=importance, importance_lr=0.1)
    if zeros:
        impact.sparsify(0.3, by="magnitude")
        optimizer.param_groups[0]["drop_rate"] = 0.3
    for step in range(6):
        grad = torch.tensor(bad).view(4, 3) if step == at else torch.randn(4, 3)
        step_with(impact, optimizer, (p, grad), (q, torch.randn(3, 5)))
        with torch.no_grad():  # what the base makes of it is the base's own
            for each in (p, q):
                each.copy_(torch.where(each == 0, 0.0, torch.randn_like(each)))
        w, keep = flat(impact.importance, [p, q]), flat(impact.keep_probability, [p, q])
        assert torch.isfinite(w).all()
        alive = flat(lambda t: t.detach() != 0, [p, q])
        if not zeros:
            assert w.double().mean().item() == pytest.approx(1, abs=1e-5)
            assert_on_budget(keep, 0.3)
        else:
            assert w[alive].double().mean().item() == pytest.approx(1, abs=1e-5)
            assert_on_budget(keep[alive], 0.3)
    assert torch.isfinite(torch.as_tensor(optimizer.param_groups[0]["signal_scale"]))


@pytest.mark.parametrize("size", [1e6, 1e15, 1e25])
def test_one_wild_batch_does_not_mute_the_next_ones(size):
    """It counts as ten means, also where float32 cannot hold what it sums up to."""
    p = nn.Parameter(torch.randn(10, 10))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.1, importance="fisher", importance_lr=0.1)
    scales = []
    for step in range(8):
        step_with(optimizer, optimizer, (p, torch.randn(10, 10) * (size if step == 4 else 1.0)))
        scales.append(float(optimizer.param_groups[0]["signal_scale"]))
        assert torch.isfinite(optimizer.importance(p)).all()
    assert max(scales) < 3 * scales[3]


def test_importances_are_bounded_in_the_log_domain():
    p = nn.Parameter(torch.linspace(0.1, 2, 40).view(4, 10))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.1, importance="magnitude", importance_lr=5.0, kl_weight=0.0)
    for _ in range(60):
        step_with(optimizer, optimizer, (p, torch.zeros_like(p)))
    assert optimizer.state[p]["log_importance"].abs().max() <= 60
    assert optimizer.importance(p).min() > 0


@every_face
def test_a_grad_scaler_unscales_before_the_signal_and_skips_what_overflows(face):
    models = [net(), net()]
    faces = [face(model, drop_rate=0.3, importance_lr=0.1) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = data()

    def loss(model):
        return nn.functional.cross_entropy(model(x), y)

    for _ in range(4):
        for _, optimizer in faces:
            optimizer.zero_grad()
        loss(models[0]).backward()
        faces[0][1].step()
        scaler.scale(loss(models[1])).backward()
        scaler.step(faces[1][1])
        scaler.update()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(faces[1][0].importance(q), faces[0][0].importance(p), rtol=1e-4, atol=1e-5)
    optimizer = faces[1][1]
    before = clones(models[1]), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    scaler.scale(loss(models[1]) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same((clones(models[1]), optimizer.state_dict()), before)


# -- members that come and go --


@every_face
def test_a_parameter_that_is_frozen_and_thawed_finds_its_place_again(face):
    model = net()
    impact, optimizer = face(model, drop_rate=0.3, importance_lr=0.1)
    run(model, optimizer, 5)
    first = model[0].weight
    ratio = impact.importance(first) / impact.importance(first).mean()
    for frozen in (True, False):
        first.requires_grad_(not frozen)
        first.grad = None
        members = [p for p in weights(model) if p.requires_grad]
        for _ in range(5):
            run(model, optimizer, 1)
            assert flat(impact.importance, members).double().mean().item() == pytest.approx(1, abs=1e-5)
            assert_on_budget(flat(impact.keep_probability, members), 0.3)
        if frozen:
            stored = optimizer.state[first]["log_importance"].exp()
            torch.testing.assert_close(stored / stored.mean(), ratio, rtol=1e-3, atol=1e-4)
            assert (impact.keep_probability(first) == 1).all()


@every_face
def test_the_scale_of_the_signal_survives_a_change_of_members(face):
    model = net()
    _, optimizer = face(model, drop_rate=0.3)
    run(model, optimizer, 5)
    scale = float(optimizer.param_groups[0]["signal_scale"])
    model[2].weight.requires_grad_(False)
    model[2].weight.grad = None
    run(model, optimizer, 1)
    assert 0.3 * scale < float(optimizer.param_groups[0]["signal_scale"]) < 3 * scale


@every_face
@pytest.mark.parametrize("importance", ["fisher", "saliency", "magnitude"])
def test_a_tensor_without_gradients_keeps_its_importances(face, importance):
    """An idle head or expert: nothing is known against it."""
    p, idle = nn.Parameter(torch.randn(20, 20)), nn.Parameter(torch.randn(5, 5))
    options = {"importance": importance, "kl_weight": 0.0, "importance_lr": 0.1}
    impact, optimizer = face([p, idle], drop_rate=0.1, **{**options, "lr": 0.0})
    for step in range(100):
        grad = torch.randn(5, 5) if step < 3 else None
        step_with(impact, optimizer, (p, torch.randn(20, 20)), (idle, grad))
        if step == 2:
            before = impact.importance(idle)
    torch.testing.assert_close(impact.importance(idle), before, rtol=1e-3, atol=0)
    assert flat(impact.importance, [p, idle]).double().sum().item() == pytest.approx(425, rel=1e-4)
    assert impact.importance(p).std() > 0.1


def test_the_summary_reads_the_importances():
    model = net()
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.3, importance_lr=0.1)
    rows = optimizer.importance_summary()
    assert [row.name for row in rows] == ["0.weight", "2.weight", "4.weight"]
    assert all(row.perplexity == pytest.approx(row.numel) and row.max == 1 and row.share_above_1_5 == 0 for row in rows)
    assert all(row.drop_rate == pytest.approx(0.3) for row in rows)
    run(model, optimizer, 20)
    rows = optimizer.importance_summary()
    for row, p in zip(rows, weights(model), strict=True):
        w = optimizer.importance(p)
        assert row.max == w.max()
        assert row.share_above_1_5 == pytest.approx((w > 1.5).float().mean().item())
        share = w.double() / w.double().sum()
        assert row.perplexity == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-4)
    total = sum(row.numel for row in rows)
    assert sum(row.numel * row.drop_rate for row in rows) / total == pytest.approx(0.3, abs=1e-3)


@every_face
def test_vectors_of_any_shape_are_never_masked(face):
    params = [nn.Parameter(torch.randn(shape)) for shape in ((7,), (), (1, 7), (7, 1, 1), (1, 1), (0, 3), (3, 7))]
    impact, optimizer = face(params, drop_rate=0.5, importance_lr=1.0)
    for _ in range(5):
        with impact.masked():
            assert all((p != 0).all() for p in params[:-1])
            assert (params[-1] == 0).any()
        step_with(impact, optimizer, *((p, torch.randn_like(p)) for p in params))
    assert all((impact.importance(p) == 1).all() and (impact.keep_probability(p) == 1).all() for p in params[:-1])


# -- signals of one's own --


@every_face
def test_a_signal_of_ones_own(face, monkeypatch):
    monkeypatch.setitem(SIGNALS, "mine", lambda weight, grad, step: -weight.square() * grad.square())
    p = nn.Parameter(torch.randn(5, 5))
    impact, optimizer = face([p], drop_rate=0.2, importance="mine", importance_lr=0.1, lr=0.0)
    grad = torch.ones(5, 5)
    grad[:, 0] = 100.0
    for _ in range(10):
        step_with(impact, optimizer, (p, grad.clone()))
    w = impact.importance(p)
    assert w[:, 0].mean() > 1.2
    assert (w[:, 1:] < 1).all()


def test_a_signal_that_returns_its_argument_leaves_it_alone(monkeypatch):
    monkeypatch.setitem(SIGNALS, "itself", lambda weight, grad, step: grad)
    monkeypatch.setitem(SIGNALS, "weight", lambda weight, grad, step: weight)
    for name in ("itself", "weight"):
        p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
        ours, plain = ImpactSGD([p], lr=0.1, drop_rate=0.0, importance=name), torch.optim.SGD([q], lr=0.1)
        for _ in range(3):
            p.grad = torch.randn(3, 3)
            q.grad = p.grad.clone()
            ours.step()
            assert torch.equal(p.grad, q.grad)
            plain.step()
        assert torch.equal(p, q)


# -- memory and waiting --


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("importance", ["saliency", "hypergradient", "uniform"])
def test_no_step_and_no_masked_pass_waits_for_a_device(importance):
    """A simplex that is sorted, so that a CPU behaves as any device does."""
    model = net()
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.3, importance=importance, foreach=True)
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad()
        with NoWaiting():
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        with NoWaiting():
            optimizer.step()


class Launches(TorchDispatchMode):
    """Counts what works on memory, and not what only makes a view."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.namespace == "profiler")
        return func(*args, **(kwargs or {}))


def launches_of_a_step(copies, **options):
    """Those of masks, of a pass that reads all weights, and of a step, for the list of a ResNet-50; small tensors."""
    with torch.device("meta"):
        shapes = [[min(size, 7) for size in p.shape] for p in torchvision.models.resnet50().parameters()] * copies
    model = nn.Module()
    for i, shape in enumerate(shapes):
        model.register_parameter(f"weight{i}", nn.Parameter(torch.randn(shape)))
    names = [name for name, _ in model.named_parameters()]
    model.forward = lambda: [getattr(model, name) for name in names]
    optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, weight_decay=1e-4, drop_rate=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        with Launches() as launches:
            read = model()
        torch.autograd.backward(read, [torch.ones_like(weight) for weight in read])
        with launches:
            optimizer.step()
    return launches.count, len(shapes)


def test_launches_of_a_step_are_few_and_do_not_grow_with_the_number_of_tensors(monkeypatch):
    """As on a GPU; there a kernel makes them fewer still."""
    monkeypatch.setattr(simplex, "_may_wait", lambda tensors: False)
    monkeypatch.setattr(simplex, "LARGEST_SAMPLE", 1000)  # so that Newton steps follow
    few, tensors = launches_of_a_step(1, foreach=True)
    assert tensors == 161
    assert few <= 200
    assert launches_of_a_step(2, foreach=True)[0] <= few


def peak_of_a_step(optimizer, model):
    gc.collect()  # what other tests have left must not be freed meanwhile
    x = torch.randn(2, ROW)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            optimizer.step()
    return memory(profiler)[1]


def memory(profiler):
    """The bytes that are left at the end, and that there were at most."""
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return now, most


@every_face
def test_a_step_makes_few_transients(face):
    """Blocks that fit the cache; and the masked gradients, where the kernel does not take the step of the base."""
    ours, theirs = (nn.Linear(ROW, 200, bias=False) for _ in range(2))
    excess = peak_of_a_step(face(ours, drop_rate=0.3)[1], ours) - peak_of_a_step(face.plain(theirs), theirs)
    assert excess < (0.05 if face.built_in else 1.5) * 4 * ours.weight.numel()
    assert face.built_in or excess > 0


@every_face
def test_a_masked_pass_holds_the_masked_weights_and_nothing_else(face):
    gc.collect()
    model = nn.Linear(ROW, 200, bias=False)
    _, optimizer = face(model, drop_rate=0.3)
    x = torch.randn(2, ROW, requires_grad=True)  # so that autograd keeps the weight
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now, most = memory(profiler)
    weights_size = 4 * model.weight.numel()
    assert weights_size <= now <= most < 1.05 * weights_size


@every_face
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_state_takes_four_bytes_a_weight(face, dtype):
    model = net(dtype=dtype)
    impact, optimizer = face(model, drop_rate=0.3)
    plain = net(dtype=dtype)
    run(model, optimizer, 2)
    run(plain, base := face.plain(plain), 2)

    def size(which):
        tensors = {id(t): t for state in which.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    n = sum(p.numel() for p in model.parameters())
    assert size(optimizer) - size(base) == 4 * n
    members = weights(model)
    storages = {optimizer.state[p]["log_importance"].untyped_storage().data_ptr() for p in members}
    assert len(storages) == 1  # of one group, one buffer
    assert impact.importance(members[0]).dtype == torch.float32


# -- memory formats --


@every_face
def test_channels_last_and_gradients_laid_out_otherwise(face):
    """A weight in another memory format has the same importances, and gives the format back."""
    models = [nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)]
    models[1].load_state_dict(models[0].state_dict())
    faces = [face(model, drop_rate=0.0, importance_lr=0.1) for model in models]
    for step in range(4):
        grad = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(step))
        for model, (impact, optimizer) in zip(models, faces, strict=True):
            step_with(impact, optimizer, (model.weight, grad.clone()), (model.bias, torch.ones(16)))
    torch.testing.assert_close(models[1].weight, models[0].weight)
    w = [impact.importance(model.weight) for model, (impact, _) in zip(models, faces, strict=True)]
    torch.testing.assert_close(w[1], w[0], rtol=1e-4, atol=1e-5)
    assert w[0].std() > 0.05
    assert models[1].weight.is_contiguous(memory_format=torch.channels_last)
    impact, optimizer = faces[1]
    optimizer.param_groups[0]["drop_rate"] = 0.3
    run_masked = impact.masked()
    with run_masked:
        assert 0.1 < (models[1].weight == 0).float().mean() < 0.5


def test_a_step_counter_set_by_hand_draws_other_masks():
    model = nn.Linear(64, 200)
    optimizer = ImpactSGD(model, lr=0.0, drop_rate=0.5)
    seen = []
    for step in (7, 100, 7):
        optimizer.param_groups[0]["mask_step"] = step
        optimizer.zero_grad()
        out = model(torch.eye(64)) - model.bias
        seen.append(out.detach() == 0)
        out.square().sum().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["mask_step"] == step + 1
        optimizer.param_groups[0]["importance_lr"] = 0.0
    assert 0.3 < seen[0].float().mean() < 0.7
    assert torch.equal(seen[0], seen[2])
    assert 0.3 < (seen[0] != seen[1]).float().mean() < 0.7
