"""Settings in which ImpactSGD must be something known, and the budget along a whole training run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from impact_optim import SIGNALS, ImpactSGD
from impact_optim.sampling import uniform

LEARNT = sorted(set(SIGNALS) - {"lookahead"})


def net(width=32, dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(12, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)]
    return nn.Sequential(*layers).to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 12, generator=generator).to(dtype)
    return x, x[:, :4].abs().argmax(1)


def train(model, optimizer, steps, after_step=lambda: None, batch=64):
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


sgd_options = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 0.5),
        "momentum": st.sampled_from([0.0, 0.3, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "foreach": st.booleans(),
    }
)


@settings(deadline=None, max_examples=50)
@given(
    options=sgd_options,
    extra=st.sampled_from([{}, {"nesterov": True}, {"dampening": 0.5}]),
    importance=st.sampled_from([*LEARNT, "uniform"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_without_drops_and_scaling_it_is_sgd_bit_for_bit(options, extra, importance, dtype):
    if options["momentum"] == 0:
        extra = {}
    models = [net(dtype=dtype), net(dtype=dtype)]
    optimizers = [
        torch.optim.SGD(models[0].parameters(), **options, **extra),
        ImpactSGD(models[1].parameters(), **options, **extra, drop_rate=0.0, importance=importance),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 5)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("importance", LEARNT)
@pytest.mark.parametrize("foreach", [False, True])
def test_infinite_regularisation_is_uniform_dropconnect(importance, foreach):
    runs = []
    for options in ({"importance": "uniform"}, {"importance": importance, "kl_weight": 1e30}):
        model = net()
        train(model, ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.3, foreach=foreach, **options), 30)
        runs.append(model)
    for p, q in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_uniform_is_dropconnect_as_users_write_it():
    """The same run with the weights masked by hand, and torch.optim.SGD on top."""
    ours, theirs = net(), net()
    optimizer = ImpactSGD(ours, lr=0.1, momentum=0.9, weight_decay=0.01, importance="uniform", drop_rate=0.3, seed=7)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train(ours, optimizer, 20)
    x, y = data()
    for step in range(20):
        rows = torch.arange(step * 64, (step + 1) * 64) % len(x)
        weights = {}
        for i, (name, p) in enumerate(theirs.named_parameters()):
            mask = uniform(p.numel(), seed=7, step=step, tensor=i).view(p.shape) < 0.7
            weights[name] = p * mask / 0.7 if p.dim() >= 2 else p
        plain.zero_grad()
        nn.functional.cross_entropy(torch.func.functional_call(theirs, weights, (x[rows],)), y[rows]).backward()
        plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_without_regularisation_a_constant_signal_leaves_one_weight():
    p = nn.Parameter(torch.linspace(1, 2, 50).view(5, 10))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.5, importance="magnitude", importance_lr=1.0, kl_weight=0.0)
    for _ in range(20_000):
        with optimizer.masked():
            p.grad = torch.zeros_like(p)
        optimizer.step()
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
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.1, importance="magnitude", importance_lr=0.1, kl_weight=0.5)
    for _ in range(400):
        with optimizer.masked():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    u = -p.detach() / p.detach().mean()
    torch.testing.assert_close(
        optimizer.importance(p), torch.softmax(-u.view(-1) / 0.5, 0).view_as(p) * 40, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("importance", [*LEARNT, "lookahead", "uniform"])
@pytest.mark.parametrize("drop_rate", [0.1, 0.5])
@pytest.mark.parametrize("simplex", ["group", "tensor"])
@pytest.mark.parametrize(("importance_lr", "kl_weight"), [(0.01, 0.3), (0.1, 0.1), (0.5, 0.0)])
def test_the_budget_holds_at_every_step(importance, drop_rate, simplex, importance_lr, kl_weight):
    model = net(width=80)  # the largest simplex is too large to be sorted, the smaller ones are not
    optimizer = ImpactSGD(
        model,
        lr=0.1,
        momentum=0.9,
        drop_rate=drop_rate,
        importance=importance,
        simplex=simplex,
        importance_lr=importance_lr,
        kl_weight=kl_weight,
    )
    errors = []

    def measure():
        weights = [p for p in model.parameters() if p.dim() > 1]
        keep = [optimizer.keep_probability(p).double() for p in weights]
        groups = [torch.cat([k.view(-1) for k in keep])] if simplex == "group" else keep
        errors.extend(abs(k.mean().item() - (1 - drop_rate)) for k in groups)

    train(model, optimizer, 100, measure)
    assert max(errors) < 1e-3
    for group in optimizer.param_groups:
        group["importance_lr"] = 0.0
    train(model, optimizer, 10)
    errors.clear()
    measure()
    assert max(errors) < 1e-5


def test_the_budget_holds_when_the_drop_rate_jumps():
    model = net(width=80)
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.1, kl_weight=0.3, importance_lr=0.01)
    for drop_rate in (0.1, 0.7, 0.0, 0.7, 0.05):
        optimizer.param_groups[0]["drop_rate"] = drop_rate
        train(model, optimizer, 15)
        keep = torch.cat([optimizer.keep_probability(p).view(-1) for p in model.parameters() if p.dim() > 1])
        assert keep.double().mean().item() == pytest.approx(1 - drop_rate, abs=1e-3)


@pytest.mark.parametrize("simplex", ["group", "tensor"])
@pytest.mark.parametrize("importance", ["saliency", "uniform"])
def test_exact_sampling_drops_the_exact_number(simplex, importance):
    model = net()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3, sampling="exact", simplex=simplex, importance=importance)
    weights = [p for p in model.parameters() if p.dim() > 1]
    x, y = data()
    for _ in range(10):
        with optimizer.masked():
            dropped = [(p == 0).sum().item() for p in weights]
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if simplex == "group":
            assert sum(dropped) == round(0.3 * sum(p.numel() for p in weights))
        else:
            assert dropped == [round(0.3 * p.numel()) for p in weights]


def test_the_arms_of_the_study_drop_the_same_number():
    n = 12 * 32 + 32 * 32 + 32 * 4
    for options in (
        {"importance": "uniform"},
        {"importance": "hypergradient", "kl_weight": 0.0},
        {"importance": "saliency"},
    ):
        model = net()
        optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.4, importance_lr=0.1, **options)
        train(model, optimizer, 40)
        with optimizer.masked():
            dropped = sum((p == 0).sum().item() for p in model.parameters() if p.dim() > 1)
        assert dropped / n == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / n))


def test_lookahead_and_the_online_signal_on_a_quadratic():
    """f(x) = ½ Σ a x². Lookahead judges a step by the gradient where it leads, a (x - γd); online, one step later."""
    a = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    start, lr = torch.tensor([[1.0, -2.0], [0.5, 1.5]]), 0.1
    seen = {}
    for name in ("lookahead", "hypergradient"):
        signal = SIGNALS[name]

        def spy(weight, grad, direction, lr, signal=signal, name=name):
            h = signal(weight, grad, direction, lr)
            seen.setdefault(name, []).append(h if h is None else h.clone())
            return h

        x = nn.Parameter(start.clone())
        optimizer = ImpactSGD([x], lr=lr, drop_rate=0.0, importance=name, scale_steps=True)

        def closure(x=x, optimizer=optimizer):
            optimizer.zero_grad()
            loss = 0.5 * (a * x**2).sum()
            loss.backward()
            return loss

        original = SIGNALS[name]
        SIGNALS[name] = spy
        try:
            for _ in range(2):
                optimizer.step(closure)
        finally:
            SIGNALS[name] = original
    d = a * start
    closed_form = -lr * d * (a * (start - lr * d))
    torch.testing.assert_close(seen["lookahead"][0], closed_form)
    assert seen["hypergradient"][0] is None  # no step has been taken that could be judged
    torch.testing.assert_close(seen["hypergradient"][1], closed_form)


def test_the_hypergradient_is_the_derivative_of_the_problem():
    """h against autograd through L(x - w ⊙ γd)."""
    torch.manual_seed(1)
    x, d, y = torch.randn(6, 4), torch.randn(6, 4), torch.randn(5, 6)
    lr = 0.3
    w = torch.ones(6, 4, requires_grad=True)
    (y @ (x - w * lr * d)).tanh().square().sum().backward()
    moved = (x - lr * d).requires_grad_()
    (y @ moved).tanh().square().sum().backward()
    torch.testing.assert_close(SIGNALS["hypergradient"](x, moved.grad, d, lr), w.grad)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("importance", LEARNT)
def test_importances_are_finite_under_any_gradient(scale, importance):
    p = nn.Parameter(torch.randn(10, 10))
    optimizer = ImpactSGD([p], lr=1e-6 / scale, momentum=0.9, drop_rate=0.3, importance=importance, importance_lr=0.5)
    for _ in range(10):
        with optimizer.masked():
            p.grad = torch.randn(10, 10) * scale
        optimizer.step()
        w = optimizer.importance(p)
        assert torch.isfinite(w).all()
        assert (w >= 0).all()
        assert w.double().mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("importance", [name for name in LEARNT if name != "magnitude"])
def test_the_scale_of_the_gradient_does_not_matter(importance):
    """η and λ are unitless: a loss 1024 times as large, at a rate as much smaller, learns the same importances."""
    learnt = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(10, 10))
        optimizer = ImpactSGD([p], lr=0.01 / scale, drop_rate=0.3, importance=importance, importance_lr=0.1)
        for _ in range(20):
            with optimizer.masked():
                p.grad = (p.detach() + torch.randn(10, 10)) * scale
            optimizer.step()
        learnt.append(optimizer.importance(p))
    assert learnt[0].std() > 0.05
    torch.testing.assert_close(learnt[0], learnt[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("importance", LEARNT)
@pytest.mark.parametrize("whole", [False, True])
def test_non_finite_gradients_do_not_poison_the_importances(bad, importance, whole):
    p = nn.Parameter(torch.randn(10, 10))
    q = nn.Parameter(p.detach().clone())
    optimizer = ImpactSGD([p], lr=0.1, momentum=0.9, drop_rate=0.3, importance=importance, importance_lr=0.1)
    plain = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for step in range(12):
        with optimizer.masked():
            factor = p.detach() / q.detach()
            p.grad = torch.randn(10, 10)
            if step == 5:
                p.grad[(slice(None) if whole else 3)] = bad
            q.grad = p.grad * factor
        scale_before = optimizer.state[p].get("signal_scale")
        optimizer.step()
        plain.step()
        if step == 5 and not whole and importance != "hypergradient":
            assert optimizer.state[p]["signal_scale"] < 3 * scale_before  # one bad batch does not mute the next ones
        w = optimizer.importance(p)
        assert torch.isfinite(w).all()
        assert w.double().mean().item() == pytest.approx(1, abs=1e-5)
        assert torch.equal(torch.isfinite(p), torch.isfinite(q))  # the weights do what SGD's do
        with torch.no_grad():
            q.copy_(p)


def test_scaled_steps_are_the_problems_own_update():
    p = nn.Parameter(torch.randn(6, 6))
    optimizer = ImpactSGD([p], lr=0.1, drop_rate=0.0, scale_steps=True, importance_lr=0.5)
    for _ in range(5):
        w, before = optimizer.importance(p), p.detach().clone()
        p.grad = torch.randn(6, 6)
        grad = p.grad.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach(), before - 0.1 * w * grad)
    assert optimizer.importance(p).std() > 0.1


def test_dropping_the_important_drops_them():
    p = nn.Parameter(torch.linspace(0.1, 2, 100).view(10, 10))
    optimizer = ImpactSGD(
        [p], lr=0.0, drop_rate=0.3, importance="magnitude", importance_lr=0.5, kl_weight=0.5, drop="important"
    )
    for _ in range(20):
        with optimizer.masked():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    keep = optimizer.keep_probability(p).view(-1)
    assert (keep.diff() <= 1e-6).all()
    assert keep[0] > 0.9
    assert keep[-1] == pytest.approx(0.01, abs=1e-4)


def test_keep_floor_keeps_every_weight_reachable():
    p = nn.Parameter(torch.linspace(1e-4, 2, 100).view(10, 10))
    optimizer = ImpactSGD(
        [p], lr=0.0, drop_rate=0.5, importance="magnitude", importance_lr=1.0, kl_weight=0.05, keep_floor=0.2
    )
    for _ in range(100):
        with optimizer.masked():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.keep_probability(p).min().item() == pytest.approx(0.2, abs=1e-3)


def test_a_signal_of_ones_own():
    SIGNALS["first_column"] = lambda weight, grad, direction, lr: (
        -(torch.arange(weight.shape[1]) == 0).float().expand_as(weight)
    )
    try:
        p = nn.Parameter(torch.randn(5, 5))
        optimizer = ImpactSGD([p], lr=0.1, drop_rate=0.2, importance="first_column", importance_lr=0.1)
        for _ in range(10):
            with optimizer.masked():
                p.grad = torch.randn(5, 5)
            optimizer.step()
        w = optimizer.importance(p)
        assert (w[:, 0] > 1.2).all()
        assert (w[:, 1:] < 1).all()
    finally:
        del SIGNALS["first_column"]


def test_a_parameter_that_is_frozen_and_thawed_finds_its_place_again():
    model = net()
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.3, importance_lr=0.1)
    train(model, optimizer, 10)
    ratio = optimizer.importance(model[0].weight) / optimizer.importance(model[0].weight).mean()
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None
    for frozen in (True, False):
        model[0].weight.requires_grad_(not frozen)
        members = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
        for _ in range(10):
            train(model, optimizer, 1)
            w = torch.cat([optimizer.importance(p).view(-1) for p in members])
            keep = torch.cat([optimizer.keep_probability(p).view(-1) for p in members])
            assert w.double().mean().item() == pytest.approx(1, abs=1e-5)
            assert keep.double().mean().item() == pytest.approx(0.7, abs=1e-3)
        if frozen:
            own = optimizer.importance(model[0].weight)
            torch.testing.assert_close(own / own.mean(), ratio, rtol=1e-3, atol=1e-4)
            assert (optimizer.keep_probability(model[0].weight) == 1).all()


def test_the_summary_reads_the_importances():
    model = net()
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.3, importance_lr=0.1)
    rows = optimizer.importance_summary()
    assert [row.name for row in rows] == ["0.weight", "2.weight", "4.weight"]
    assert all(row.perplexity == pytest.approx(row.numel) and row.max == 1 and row.share_above_1_5 == 0 for row in rows)
    assert all(row.drop_rate == pytest.approx(0.3) for row in rows)
    train(model, optimizer, 50)
    rows = optimizer.importance_summary()
    for row, layer in zip(rows, (model[0], model[2], model[4]), strict=True):
        w = optimizer.importance(layer.weight)
        assert row.max == w.max()
        assert row.share_above_1_5 == pytest.approx((w > 1.5).float().mean().item())
        p = w.double() / w.double().sum()
        assert row.perplexity == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-4)
    numel = torch.tensor([float(row.numel) for row in rows])
    rates = torch.tensor([row.drop_rate for row in rows])
    assert ((numel * rates).sum() / numel.sum()).item() == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("importance", ["fisher", "saliency", "magnitude"])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_tensor_without_gradients_keeps_its_importances(importance, foreach):
    """An idle head or expert: nothing is known against it."""
    p, idle = nn.Parameter(torch.randn(20, 20)), nn.Parameter(torch.randn(5, 5))
    optimizer = ImpactSGD(
        [p, idle], lr=0.0, drop_rate=0.1, importance=importance, kl_weight=0.0, importance_lr=0.1, foreach=foreach
    )
    with optimizer.masked():
        p.grad, idle.grad = torch.randn(20, 20), torch.randn(5, 5)
    optimizer.step()
    for step in range(400):
        with optimizer.masked():
            p.grad, idle.grad = torch.randn(20, 20), (torch.randn(5, 5) if step == 0 else None)
        optimizer.step()
        if step == 0:
            before = optimizer.importance(idle)
    torch.testing.assert_close(optimizer.importance(idle), before, rtol=1e-3, atol=0)
    total = optimizer.importance(p).double().sum() + optimizer.importance(idle).double().sum()
    assert total.item() == pytest.approx(425, rel=1e-4)
    assert optimizer.importance(p).std() > 0.1


def test_one_wild_batch_does_not_mute_the_next_ones():
    p = nn.Parameter(torch.randn(10, 10))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.1, importance="fisher", importance_lr=0.1)
    scales = []
    for step in range(8):
        with optimizer.masked():
            p.grad = torch.randn(10, 10) * (1e6 if step == 4 else 1.0)
        optimizer.step()
        scales.append(optimizer.state[p]["signal_scale"].item())
    assert max(scales) < 3 * scales[3]


def test_the_scale_of_the_signal_survives_a_change_of_members():
    model = net()
    optimizer = ImpactSGD(model, lr=0.01, momentum=0.9, drop_rate=0.3)
    train(model, optimizer, 5)
    scale = optimizer.state[model[0].weight]["signal_scale"].item()
    model[2].weight.requires_grad_(False)
    model[2].weight.grad = None
    train(model, optimizer, 1)
    assert 0.3 * scale < optimizer.state[model[0].weight]["signal_scale"].item() < 3 * scale


@pytest.mark.parametrize("importance", ["hypergradient", "lookahead"])
def test_maximising_is_minimising_the_negative(importance):
    a = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    runs = []
    for sign in (1.0, -1.0):
        x = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 1.5]]))
        optimizer = ImpactSGD(
            [x], lr=0.1, drop_rate=0.0, importance=importance, importance_lr=0.3, maximize=sign < 0, scale_steps=True
        )

        def closure(x=x, optimizer=optimizer, sign=sign):
            optimizer.zero_grad()
            loss = sign * 0.5 * (a * x**2).sum()
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        runs.append((x.detach(), optimizer.importance(x)))
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0][1].std() > 0.01


@pytest.mark.parametrize("foreach", [False, True])
def test_importances_are_bounded_in_the_log_domain(foreach):
    p = nn.Parameter(torch.linspace(0.1, 2, 40).view(4, 10))
    optimizer = ImpactSGD(
        [p], lr=0.0, drop_rate=0.1, importance="magnitude", importance_lr=1.0, kl_weight=0.0, foreach=foreach
    )
    for _ in range(200):
        with optimizer.masked():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.state[p]["log_importance"].abs().max() <= 60
    assert optimizer.importance(p).min() > 0


def test_a_signal_that_returns_its_argument_leaves_it_alone():
    SIGNALS["itself"] = lambda weight, grad, direction, lr: grad
    try:
        p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
        ours, plain = ImpactSGD([p], lr=0.1, drop_rate=0.0, importance="itself"), torch.optim.SGD([q], lr=0.1)
        for _ in range(3):
            p.grad = torch.randn(3, 3)
            q.grad = p.grad.clone()
            ours.step()
            assert torch.equal(p.grad, q.grad)
            plain.step()
        assert torch.equal(p, q)
    finally:
        del SIGNALS["itself"]


def test_exact_masks_of_a_tiny_tensor_enlarge_by_what_they_drop():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = ImpactSGD([p], lr=0.1, drop_rate=0.1, sampling="exact")
    with optimizer.masked():
        assert torch.equal(p, torch.ones(2, 2))  # a tenth of four weights is none


def test_the_expected_network_knows_about_the_cap():
    p = nn.Parameter(torch.linspace(0.1, 2, 100).view(10, 10))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.3, importance="magnitude", importance_lr=1.0, kl_weight=0.05)
    for _ in range(60):
        with optimizer.masked():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for group in optimizer.param_groups:
        group["importance_lr"] = 0.0
    keep, total = optimizer.keep_probability(p), torch.zeros_like(p)
    assert keep.min() < 0.05
    for _ in range(2000):
        with optimizer.masked():
            total += p.detach()
            p.grad = torch.zeros_like(p)
        optimizer.step()
    with optimizer.expected():
        error = (total / 2000 - p.detach()) / p.detach()
    assert error.abs().mean() < 0.1


@pytest.mark.parametrize("kl_weight", [0.3, 1.0, 10.0])
def test_the_budget_holds_when_the_signal_moves_all_at_once(kl_weight):
    """A tenth of the weights carries all gradient, and every 50 steps it is another tenth."""
    p = nn.Parameter(torch.randn(100, 100))
    optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.5, importance="fisher", importance_lr=0.01, kl_weight=kl_weight)
    for step in range(200):
        if step % 50 == 0:
            active = (torch.rand(100, 100) < 0.1).float()
        keep = optimizer.keep_probability(p)  # of the mask that is drawn next
        assert keep.double().mean().item() == pytest.approx(0.5, abs=5e-4)
        with optimizer.masked():
            p.grad = torch.randn(100, 100) * active
        optimizer.step()
