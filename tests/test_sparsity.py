"""Sparse for good: the number of zeros, that they stay, what trains on, and the schedules that lead there."""

import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from impact_optim import ActivationPruner, DropRateScheduler, ImpactSGD
from impact_optim.fused import compiler_works
from impact_optim.sparsity import keep_largest, keep_pattern, parse_pattern

OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "importance_lr": 0.05, "kl_weight": 0.3}
FUSED = pytest.param(
    {"fused": True}, marks=pytest.mark.skipif(not compiler_works("cpu"), reason="needs a compiler"), id="fused"
)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()


def zeros(model: nn.Module) -> list[torch.Tensor]:
    return [p == 0 for p in model.parameters() if p.dim() >= 2]


def everything(model: nn.Module, optimizer: ImpactSGD) -> list[object]:
    state = copy.deepcopy(optimizer.state_dict())
    tensors = [t for s in state["state"].values() for t in s.values() if isinstance(t, torch.Tensor)]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return [groups, *(p.detach().clone() for p in model.parameters()), *tensors]


def assert_same(a: list[object], b: list[object]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# ------------------------------------------------------------------------------- which weights


@given(
    st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=9), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_the_largest_are_kept_and_of_equals_the_first(values, share):
    scores = [torch.tensor(v, dtype=torch.float32) for v in values]
    flat = list(itertools.chain.from_iterable(values))
    count = round(share * len(flat))
    kept = torch.cat(keep_largest(scores, count)).tolist()
    best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count]
    assert [i for i, is_kept in enumerate(kept) if is_kept] == sorted(best)


@given(st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]), st.integers(1, 3), st.integers(0, 2), st.integers(0, 99))
def test_a_pattern_keeps_n_of_every_m_along_the_inputs(pattern, blocks, spatial, seed):
    n, m = pattern
    score = torch.rand(3, blocks * m, *[2] * spatial, generator=torch.Generator().manual_seed(seed))
    mask = keep_pattern(score, n, m)
    assert mask is not None
    assert mask.shape == score.shape
    columns = score.movedim(1, -1).reshape(-1, m).tolist()
    for scores, kept in zip(columns, mask.movedim(1, -1).reshape(-1, m).tolist(), strict=True):
        assert sum(kept) == n
        assert min(s for s, k in zip(scores, kept, strict=True) if k) >= max(
            s for s, k in zip(scores, kept, strict=True) if not k
        )
    assert keep_pattern(torch.rand(2, m + 1), n, m) is None


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "4:4", "2/4", "", "2:4 "])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern such as '2:4'"):
        parse_pattern(pattern)


# ------------------------------------------------------------------------------- sparsify


@pytest.mark.parametrize("by", ["importance", "expected", "magnitude"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_the_number_of_zeros_is_what_was_asked_and_the_best_are_left(by, scope, sparsity):
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3, importance="saliency")
    train(model, optimizer, 10)
    weights = [model[0].weight, model[2].weight]
    score = {
        "importance": optimizer.importance,
        "expected": lambda p: p.detach().abs() * optimizer.keep_probability(p),
        "magnitude": lambda p: p.detach().abs(),
    }[by]
    scores = [score(p) for p in weights]
    before = [p.detach().clone() for p in weights]
    report = optimizer.sparsify(sparsity, by=by, scope=scope)
    masks = list(report.masks.values())
    assert list(report.masks) == ["0.weight", "2.weight"]
    for p, old, mask in zip(weights, before, masks, strict=True):
        assert torch.equal(p, old * mask)  # rescale="inverse": the others as they were
    ranked = [(torch.cat([s.flatten() for s in scores]), torch.cat([m.flatten() for m in masks]))]
    if scope == "tensor":
        ranked = list(zip(scores, masks, strict=True))
    for s, mask in ranked:
        assert mask.sum() == round((1 - sparsity) * mask.numel())
        assert s[mask].min() >= s[~mask].max()
    assert report.sparsity == pytest.approx(sparsity, abs=0.01)
    assert optimizer.param_groups[0]["drop_rate"] == 0.0
    for tensor in report.tensors:
        assert tensor.kept == tensor.mask.sum()
        assert f"{tensor.name}" in str(report)
    assert "total" in str(report)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"foreach": False}, id="for-loop"),
        pytest.param({"foreach": True}, id="foreach"),
        FUSED,
        {"nesterov": True},
        {"momentum": 0.0, "importance": "hypergradient"},
    ],
)
@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_zeros_stay_and_the_others_train(options, drop_rate):
    model = make_model()
    optimizer = ImpactSGD(model, **{**OPTIONS, "drop_rate": 0.3, **options})
    train(model, optimizer)
    optimizer.sparsify(0.6)
    optimizer.param_groups[0]["drop_rate"] = drop_rate
    pruned, before = zeros(model), [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 20)
    for old, new in zip(pruned, zeros(model), strict=True):
        assert torch.equal(old, new)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for p in (model[0].weight, model[2].weight):
        for value in (v for k, v in optimizer.state[p].items() if k in ("momentum_buffer", "direction")):
            assert not value[optimizer.state[p]["pruned"]].any()
    w = torch.cat([optimizer.importance(p).flatten() for p in (model[0].weight, model[2].weight)])
    assert w.mean() == pytest.approx(1.0, abs=1e-4)
    assert w[torch.cat([mask.flatten() for mask in pruned])].max() < 1e-6


def test_autograd_through_the_step_sees_the_zeros():
    leaf = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = leaf.clone()
    optimizer = ImpactSGD([weight], lr=0.1, momentum=0.9, drop_rate=0.0, importance="uniform", differentiable=True)
    report = optimizer.sparsify(0.5, by="magnitude")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    (gradient,) = torch.autograd.grad(weight.sum(), leaf)
    assert torch.equal(gradient, report.tensors[0].mask.double())


def test_what_is_left_trains_like_a_network_that_torch_has_pruned():
    ours, theirs = make_model(), make_model()
    sgd_options = {k: OPTIONS[k] for k in ("lr", "momentum", "weight_decay")}
    optimizer = ImpactSGD(ours, **sgd_options, importance="uniform", drop_rate=0.0, foreach=False)
    report = optimizer.sparsify(0.7, by="magnitude")
    for name, mask in report.masks.items():
        prune.custom_from_mask(theirs.get_submodule(name.removesuffix(".weight")), "weight", mask)
    train(ours, optimizer, 20)
    train(theirs, torch.optim.SGD(theirs.parameters(), **sgd_options, foreach=False), 20)
    for i in (0, 2):
        mask = report.masks[f"{i}.weight"]
        assert torch.equal(ours[i].weight, theirs[i].weight_orig * mask)  # not even the last bit differs
        assert torch.equal(ours[i].bias, theirs[i].bias)


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_unscaled_masks_leave_the_expected_network(rate):
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=rate, rescale="none")
    train(model, optimizer, 10)
    with optimizer.expected():
        expected = [p.detach().clone() for p in model.parameters()]
    optimizer.sparsify(0.5)
    for p, mean in zip(model.parameters(), expected, strict=True):
        left = p != 0
        torch.testing.assert_close(p[left], mean[left])
    with optimizer.expected():  # nothing is dropped any more
        assert all((p == 0).sum() in (0, p.numel() - (p != 0).sum()) for p in model.parameters())


def test_unscaled_weights_that_are_not_chosen_become_the_expected_ones_too():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.5, rescale="none")
    train(model, optimizer, 10)
    with optimizer.expected():
        expected = model[0].weight.detach().clone()
    optimizer.sparsify(0.5, params=[model[2].weight])
    torch.testing.assert_close(model[0].weight, expected)


def test_a_ramp_of_the_drop_rate_loses_nothing_at_the_cut():
    """Where π has come to 0 and 1, the network that is kept is the one that was trained."""
    model = make_model()
    options = {**OPTIONS, "importance": "fisher", "importance_lr": 0.5, "kl_weight": 0.0}  # soon at their bounds
    optimizer = ImpactSGD(model, **options, rescale="none", keep_floor=0.0, drop_rate=0.8)
    train(model, optimizer, 60)
    x = torch.randn(50, 12)
    model.eval()
    with optimizer.expected():
        before = model(x)
    optimizer.sparsify(0.8)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0.1 * before.std().item())


def test_a_second_call_keeps_what_is_pruned():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    optimizer.sparsify(0.4)
    first = zeros(model)
    train(model, optimizer)
    optimizer.sparsify(0.8, by="magnitude")
    for a, b in zip(first, zeros(model), strict=True):
        assert (a <= b).all()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="pruned weights do not come back"):
        optimizer.sparsify(0.5)
    assert_same(before, everything(model, optimizer))


def test_two_of_four():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    report = optimizer.sparsify("2:4")
    assert report.sparsity == 0.5
    train(model, optimizer)
    for i in (0, 2):
        assert (model[i].weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_two_of_four_is_what_the_hardware_takes():
    linear = nn.Linear(128, 128, bias=False).half().cuda()
    optimizer = ImpactSGD(linear, lr=0.1, drop_rate=0.0, importance="uniform")
    optimizer.sparsify("2:4", by="magnitude")
    dense = linear.weight.detach().clone()
    x = torch.randn(128, 128, dtype=torch.float16, device="cuda")
    sparse = torch.sparse.to_sparse_semi_structured(dense)
    torch.testing.assert_close(sparse @ x, dense @ x, rtol=1e-2, atol=1e-2)


def test_tensors_that_a_pattern_does_not_divide_stay_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.0, importance="uniform")
    report = optimizer.sparsify("2:4", by="magnitude")
    assert list(report.masks) == ["1.weight"]
    assert not (model[0].weight == 0).any()
    assert (model[1].weight.unflatten(1, (-1, 4)) != 0).sum(2).eq(2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_the_zeros_and_resumes_bit_for_bit(dtype):
    def resumed(fresh: bool) -> nn.Module:
        model = make_model(dtype)
        optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
        train(model, optimizer)
        optimizer.sparsify(0.5)
        optimizer.param_groups[0]["drop_rate"] = 0.7  # masks among what is left, too
        train(model, optimizer, start=5)
        if fresh:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], file)
            file.seek(0)
            weights, state = torch.load(file, weights_only=True)
            model = make_model(dtype)
            model.load_state_dict(weights)
            optimizer = ImpactSGD(model, **OPTIONS)
            optimizer.load_state_dict(state)
            assert optimizer.state[model[0].weight]["pruned"].dtype == torch.bool
        train(model, optimizer, start=10)
        return model

    for a, b in zip(resumed(False).parameters(), resumed(True).parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or (a == 0).any()


@pytest.mark.parametrize(
    ("pruned", "error", "message"),
    [
        (torch.zeros(32, 12), TypeError, "must be a bool tensor"),
        (torch.zeros(32, 11, dtype=torch.bool), ValueError, "has shape"),
        ("all", TypeError, "must be a bool tensor"),
    ],
)
def test_a_damaged_checkpoint_is_refused(pruned, error, message):
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["pruned"] = pruned
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    assert_same(before, everything(model, optimizer))


def test_a_later_cut_of_units_keeps_the_zeros():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    pruner = ActivationPruner(model, torch.randn(2, 12), {1: 0.5}, criterion="l1", optimizer=optimizer, round_to=1)
    train(model, optimizer)
    optimizer.sparsify(0.6)
    old = [p.detach().clone() for p in model.parameters()]
    report = pruner.step()
    assert report.records
    kept = next(record.kept for record in report.records if record.name == "0.weight")
    assert len(kept) == 16
    assert torch.equal(optimizer.state[model[0].weight]["pruned"], old[0][kept] == 0)
    assert torch.equal(optimizer.state[model[2].weight]["pruned"], old[2][:, kept] == 0)
    pruned = zeros(model)
    train(model, optimizer)
    for a, b in zip(pruned, zeros(model), strict=True):
        assert torch.equal(a, b)


def test_pruned_weights_go_first_when_masks_come_back():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3, keep_floor=0.0)
    train(model, optimizer)
    optimizer.sparsify(0.6)
    pruned = zeros(model)
    optimizer.param_groups[0]["drop_rate"] = 0.7  # the pruned 0.6, and a quarter of what is left
    train(model, optimizer, 3)
    keep = [optimizer.keep_probability(p) for p in (model[0].weight, model[2].weight)]
    assert torch.cat([k[mask] for k, mask in zip(keep, pruned, strict=True)]).max() < 1e-4
    assert torch.cat([k[~mask] for k, mask in zip(keep, pruned, strict=True)]).mean() == pytest.approx(0.75, abs=0.01)


def test_chosen_tensors_alone():
    model = make_model()
    optimizer = ImpactSGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}], **OPTIONS, drop_rate=0.3
    )
    optimizer.attach(model)
    train(model, optimizer)
    report = optimizer.sparsify(0.5, params=[model[2].weight])
    assert list(report.masks) == ["2.weight"]
    assert not zeros(model)[0].any()
    assert [group["drop_rate"] for group in optimizer.param_groups] == [0.3, 0.0]
    train(model, optimizer)
    assert zeros(model)[1].sum() == 64


def test_gradients_that_are_not_finite_do_not_revive_a_weight():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    optimizer.sparsify(0.5)
    pruned = zeros(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    optimizer.step()
    for p, mask in zip((model[0].weight, model[2].weight), pruned, strict=True):
        assert not p[mask].any()
        assert torch.isfinite(optimizer.importance(p)).all()


def test_weights_that_are_loaded_are_zeroed_by_the_next_step():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    optimizer.sparsify(0.5)
    pruned = zeros(model)
    model.load_state_dict(make_model().state_dict())
    train(model, optimizer, 1)
    for a, b in zip(pruned, zeros(model), strict=True):
        assert torch.equal(a, b)


def test_a_copy_goes_on_alike():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    optimizer.sparsify(0.5)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    train(model, optimizer)
    train(model2, optimizer2)
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"must lie in \[0, 1\)"),
        ({"sparsity": -0.1}, r"must lie in \[0, 1\)"),
        ({"sparsity": math.nan}, r"must lie in \[0, 1\)"),
        ({"sparsity": "half"}, "pattern such as"),
        ({"sparsity": 0.5, "by": "size"}, "Invalid by: 'size'; choose from"),
        ({"sparsity": 0.5, "scope": "layer"}, "Invalid scope: 'layer'; choose from"),
        ({"sparsity": 0.999}, "would leave nothing of"),
        ({"sparsity": "1:5"}, "none of the tensors can be divided by 5"),
        ({"sparsity": 0.5, "params": "bias"}, "0.bias is never masked"),
    ],
)
def test_bad_input_changes_nothing(arguments, message):
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    if arguments.get("params"):
        arguments = {**arguments, "params": [model[0].bias]}
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.sparsify(**arguments)
    assert_same(before, everything(model, optimizer))


def test_scaled_steps_are_refused_before_and_after():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3, scale_steps=True)
    train(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="scale_steps and sparsify"):
        optimizer.sparsify(0.5)
    assert_same(before, everything(model, optimizer))
    optimizer.param_groups[0]["scale_steps"] = False
    optimizer.sparsify(0.5)
    optimizer.param_groups[0]["scale_steps"] = True
    with pytest.raises(RuntimeError, match="scale_steps and sparsify"):
        train(model, optimizer)


def freeze(model, optimizer):
    model[0].weight.requires_grad_(False)


def unfreeze(model, optimizer):
    model[2].weight.requires_grad_(True)


def cut(model, optimizer):
    ActivationPruner(model, torch.randn(2, 12), {1: 0.5}, criterion="l1", optimizer=optimizer).step()


@pytest.mark.parametrize("change", [freeze, unfreeze, cut])
@pytest.mark.parametrize("simplex", ["group", "tensor"])
def test_right_after_the_members_of_a_simplex_have_changed(change, simplex):
    model = make_model()
    model[2].weight.requires_grad_(change is not unfreeze)
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3, simplex=simplex)
    train(model, optimizer)
    change(model, optimizer)
    if change is unfreeze and simplex == "tensor":
        with pytest.raises(ValueError, match=r"2\.weight has no importances before the first step"):
            optimizer.sparsify(0.5)
        return
    report = optimizer.sparsify(0.5)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    train(model, optimizer)
    for p, mask in zip((model[0].weight, model[2].weight), zeros(model), strict=True):
        if "pruned" in optimizer.state[p]:
            assert torch.equal(mask, optimizer.state[p]["pruned"])


def test_lookahead_judges_the_sparse_network():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3, importance="lookahead")
    seen = []

    def closure():
        seen.append((model[0].weight == 0).sum().item())
        optimizer.zero_grad()
        loss = model(torch.ones(4, 12)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.sparsify(0.5, scope="tensor")
    del seen[:]
    for _ in range(2):
        optimizer.step(closure)
    assert seen == [192] * 4


def test_importances_must_be_there():
    model = make_model()
    with pytest.raises(ValueError, match=r"0\.weight has no importances before the first step"):
        ImpactSGD(model, lr=0.1).sparsify(0.5)
    with pytest.raises(ValueError, match="has no importances with importance='uniform'; choose by='magnitude'"):
        ImpactSGD(model, lr=0.1, importance="uniform").sparsify(0.5)
    with pytest.raises(ValueError, match="nothing to make sparse"):
        ImpactSGD([model[0].bias], lr=0.1).sparsify(0.5)


@pytest.mark.parametrize("scope", ["masked", "expected"])
def test_not_inside_a_scope(scope):
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    with getattr(optimizer, scope)(), pytest.raises(RuntimeError, match="leave the scope"):
        optimizer.sparsify(0.5)


def test_masks_that_a_pass_has_seen_are_forgotten():
    model = make_model()
    optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.3)
    train(model, optimizer)
    x = torch.randn(4, 12)
    model(x)
    optimizer.sparsify(0.5)
    weights = [p.detach().clone() for p in model.parameters()]
    train_pass, eval_pass = model(x), model.eval()(x)
    assert torch.equal(train_pass, eval_pass)  # nothing is dropped
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


# ------------------------------------------------------------------------------- schedules


@given(
    start=st.floats(0, 0.9),
    target=st.floats(0, 0.9),
    total=st.integers(1, 12),
    begin=st.integers(0, 5),
    shape=st.sampled_from(["constant", "linear", "cubic"]),
)
def test_a_schedule_follows_its_formula(start, target, total, begin, shape):
    optimizer = ImpactSGD(make_model(), lr=0.1)
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


def test_groups_have_rates_of_their_own():
    model = make_model()
    groups = [{"params": model[0].parameters(), "drop_rate": 0.2}, {"params": model[2].parameters(), "drop_rate": 0.0}]
    optimizer = ImpactSGD(groups, lr=0.1)
    schedule = DropRateScheduler(optimizer, [0.4, 0.0], 2)
    seen = []
    for _ in range(3):
        seen.append([group["drop_rate"] for group in optimizer.param_groups])
        schedule.step()
    assert seen == [[0.2, 0.0], [pytest.approx(0.3), 0.0], [pytest.approx(0.4), 0.0]]


def test_a_schedule_resumes_exactly():
    def rates(interrupted: bool) -> list[float]:
        model = make_model()
        optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.1)
        schedule = DropRateScheduler(optimizer, 0.8, 10, start=0.0, shape="cubic")
        found = []
        for epoch in range(12):
            if interrupted and epoch == 6:
                states = copy.deepcopy([optimizer.state_dict(), schedule.state_dict()])
                optimizer = ImpactSGD(model, **OPTIONS, drop_rate=0.1)
                schedule = DropRateScheduler(optimizer, 0.8, 10, start=0.0, shape="cubic")
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
            train(model, optimizer, 1)
            schedule.step()
            found.append(optimizer.param_groups[0]["drop_rate"])
        return [*found, *model[0].weight.flatten().tolist()]

    assert rates(False) == rates(True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.0}, "a drop rate must lie in"),
        ({"start": -0.1}, "a drop rate must lie in"),
        ({"target": 0.995}, "less than the keep_floor=0.01"),
        ({"target": [0.1, 0.2]}, "target has 2 drop rates, but the optimizer 1 parameter groups"),
        ({"total_steps": 0}, "Invalid total_steps: 0"),
        ({"total_steps": 2.5}, "Invalid total_steps: 2.5"),
        ({"begin": -1}, "Invalid begin: -1"),
        ({"shape": "square"}, "Invalid shape: 'square'; choose from"),
    ],
)
def test_bad_schedules_are_refused_and_set_nothing(arguments, message):
    optimizer = ImpactSGD(make_model(), lr=0.1, drop_rate=0.2)
    with pytest.raises(ValueError, match=message):
        DropRateScheduler(optimizer, **{"target": 0.5, "total_steps": 3, **arguments})
    assert optimizer.param_groups[0]["drop_rate"] == 0.2


def test_a_schedule_wants_an_optimizer_with_a_drop_rate_and_its_own_state():
    model = make_model()
    with pytest.raises(TypeError, match="SGD has no drop rate"):
        DropRateScheduler(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, 3)
    schedule = DropRateScheduler(ImpactSGD(model, lr=0.1), 0.5, 3)
    with pytest.raises(ValueError, match="not one of a DropRateScheduler"):
        schedule.load_state_dict({"last_epoch": 2})
