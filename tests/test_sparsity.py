"""Zeros for good: which weights go, that zeros stay under everything, what trains on, what is refused."""

import copy
import inspect
import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import FACES, MUON, Face, assert_same, clones, every_face, run, slow, train, two_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from impact_optim import ActivationPruner, Impact, ImpactAdamW, ImpactSGD, erdos_renyi, load_pruned, save_pruned
from impact_optim.sparsity import choose, keep_largest, keep_pattern, parse_pattern

OPTIONS = {"drop_rate": 0.3, "importance_lr": 0.05, "kl_weight": 0.3}
STEPPED_BY_THE_BASE = {None: {}, ImpactSGD: {"fused": False}, ImpactAdamW: {"fused": False}}  # and not by a kernel


def all_bases() -> list[Face]:
    """Every optimizer of torch whose steps are those of dense gradients, with weight decay and momentum."""
    faces = []
    for cls in vars(torch.optim).values():
        if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
            continue
        if cls in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam):
            continue
        known = inspect.signature(cls).parameters
        wanted = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
        faces.append(Face(cls, None, {name: value for name, value in wanted.items() if name in known}))
    return faces


every_base = pytest.mark.parametrize("face", all_bases(), ids=lambda face: face.base.__name__)
with_muon = pytest.mark.parametrize("face", [*FACES, MUON], ids=lambda face: face.name)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.dim() >= 2]


def zeros(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() == 0 for p in weights(model)]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[object]:
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()])


def assert_held(model: nn.Module, optimizer: torch.optim.Optimizer, held: list[torch.Tensor]) -> None:
    """The zeros are the same, with all state of their shape."""
    assert_same(zeros(model), held)
    for p, zero in zip(weights(model), held, strict=True):
        for value in optimizer.state[p].values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                assert not value[zero].any()


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


@settings(max_examples=50)
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


@with_muon
@pytest.mark.parametrize("by", ["importance", "expected", "magnitude"])
@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_the_number_of_zeros_is_what_was_asked_and_the_best_are_left(face, by, floor, sparsity):
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(5))
    score = {
        "importance": engine.importance,
        "expected": lambda p: p.detach().abs() * engine.keep_probability(p),
        "magnitude": lambda p: p.detach().abs(),
    }[by]
    scores = [score(p) for p in weights(model)]
    before = clones(weights(model))
    report = engine.sparsify(sparsity, by=by, floor=floor)
    masks = list(report.masks.values())
    assert list(report.masks) == ["0.weight", "2.weight"]
    for p, old, mask in zip(weights(model), before, masks, strict=True):
        assert torch.equal(p, old * mask)  # rescale="inverse": the others as they were
    numels = [mask.numel() for mask in masks]
    assert sum(int(mask.sum()) for mask in masks) == round((1 - sparsity) * sum(numels))
    least = [floor * (1 - sparsity) * numel - 1 for numel in numels]  # what is rounded is shared out
    kept = [int(mask.sum()) for mask in masks]
    if floor == 1.0:
        assert all(abs(k - (1 - sparsity) * numel) <= 1 for k, numel in zip(kept, numels, strict=True))
    for s, mask, number, at_least in zip(scores, masks, kept, least, strict=True):
        assert number >= at_least
        assert s[mask].min() >= s[~mask].max()
    for above, s in enumerate(scores):  # who keeps more than the floor keeps nothing that others would rather have
        for below, other in enumerate(scores):
            if kept[above] > least[above] + 2:
                assert s[masks[above]].min() >= other[~masks[below]].max()
    assert report.sparsity == pytest.approx(sparsity, abs=0.01)
    assert optimizer.param_groups[0]["drop_rate"] == 0.0
    assert optimizer.param_groups[0]["hold_zeros"] is True
    for tensor in report.tensors:
        assert tensor.kept == tensor.mask.sum()
        assert tensor.name in str(report)
    assert "total" in str(report)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    sparsity=st.floats(0, 0.95),
    floor=st.floats(1e-3, 1),
    scale=st.integers(-3, 3),
)
def test_no_tensor_keeps_less_than_its_floor_and_all_together_what_was_asked(sizes, sparsity, floor, scale):
    scores = {torch.empty(0): torch.rand(size) * 10.0 ** (scale * i) for i, size in enumerate(sizes)}
    count = round((1 - sparsity) * sum(sizes))
    if len(sizes) > count:
        with pytest.raises(ValueError, match="cannot keep a weight each"):
            choose(scores, sparsity, floor, lambda p: "one")
        return
    kept = [int(mask.sum()) for mask in choose(scores, sparsity, floor, lambda p: "one").values()]
    assert sum(kept) == count
    share = floor * (1 - sparsity)
    tiny = sum(share * size < 1 for size in sizes)  # they keep one, which others do without
    for number, size in zip(kept, sizes, strict=True):
        assert number >= max(1, share * size - 1 - tiny - 1e-6)


def test_a_floor_saves_the_layer_that_would_be_lost():
    model = two_layers()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    optimizer = ImpactSGD(model, lr=0.1)
    with pytest.raises(ValueError, match=r"nothing of 2\.weight, .* set a floor such as floor=0\.1"):
        optimizer.sparsify(0.9, by="magnitude")
    report = optimizer.sparsify(0.9, by="magnitude", floor=0.1)
    assert [tensor.kept for tensor in report.tensors] == [49, 2]
    assert report.sparsity == pytest.approx(0.9, abs=1e-2)


@pytest.mark.parametrize("size", [100, 1000])
def test_with_the_whole_floor_all_keep_the_same_share(size):
    scores = {torch.empty(0): torch.rand(size) * 10.0**i for i in range(20)}
    masks = choose(scores, 0.9, 1.0, lambda p: "one")
    assert [int(mask.sum()) for mask in masks.values()] == [size // 10] * 20


@with_muon
def test_masks_of_ones_own_by_name_or_by_parameter(face):
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(2))
    before = clones(weights(model))
    by_name = {"0.weight": torch.rand(32, 12) < 0.4}
    report = engine.sparsify(masks=by_name)
    assert_same(report.masks, by_name)
    assert torch.equal(model[0].weight, before[0] * by_name["0.weight"])
    assert torch.equal(model[2].weight, before[1])
    by_param = {model[2].weight: (torch.rand(4, 32) < 0.4).float()}  # as torch.nn.utils.prune has them
    report = engine.sparsify(masks=by_param)
    assert_same(report.masks, {"2.weight": by_param[model[2].weight].bool()})
    held = zeros(model)
    assert_same(held, [~by_name["0.weight"], ~report.masks["2.weight"]])
    run(model, optimizer, range(2, 6))
    assert_held(model, optimizer, held)


def test_masks_do_not_bring_back_what_is_held_and_the_report_says_so():
    model = two_layers()
    engine, _ = FACES[0](model, **OPTIONS)
    engine.sparsify(0.5, by="magnitude")
    held = zeros(model)
    report = engine.sparsify(masks={name: torch.ones_like(p) for name, p in model.named_parameters() if p.dim() > 1})
    assert_same(zeros(model), held)
    assert_same(list(report.masks.values()), [~zero for zero in held])
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"foreach": False},
        {"foreach": True},
        {"fused": True},
        {"maximize": True},
        {"sampling": "exact"},
        {"rescale": "none"},
        {"importance": "hypergradient"},
        {"importance": "uniform"},
        {"lr": torch.tensor(0.01)},
    ],
    ids=str,
)
@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("face", FACES[:2], ids=lambda face: face.name)
def test_zeros_stay_and_the_others_train(face, options, drop_rate):
    model = two_layers()
    engine, optimizer = face(model, **{**OPTIONS, **options})
    run(model, optimizer, range(3))
    engine.sparsify(0.6, by="magnitude")
    optimizer.param_groups[0]["drop_rate"] = drop_rate
    held, before = zeros(model), clones(list(model.parameters()))
    run(model, optimizer, range(3, 10))
    assert_held(model, optimizer, held)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    if options.get("importance") != "uniform":
        w = torch.cat([engine.importance(p).flatten() for p in weights(model)])
        zero = torch.cat([zero.flatten() for zero in held])
        assert w[~zero].mean().item() == pytest.approx(1.0, abs=1e-4)
        assert not w[zero].any()


def test_autograd_through_the_step_sees_the_zeros():
    leaf = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = leaf.clone()
    optimizer = ImpactSGD([weight], lr=0.1, momentum=0.9, drop_rate=0.0, importance="uniform", differentiable=True)
    report = optimizer.sparsify(0.5, by="magnitude")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    (gradient,) = torch.autograd.grad(weight.sum(), leaf)
    assert torch.equal(gradient, report.tensors[0].mask.double())


@every_base
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
def test_it_trains_to_the_bit_like_a_network_that_torch_has_pruned(face, clip):
    ours = two_layers(bias=face.base is not torch.optim.Muon)
    engine, optimizer = face(ours, drop_rate=0.0, importance="uniform")
    run(ours, optimizer, range(3))
    report = engine.sparsify(0.7, by="magnitude")
    theirs = two_layers(bias=face.base is not torch.optim.Muon)
    theirs.load_state_dict(ours.state_dict())
    params = list(theirs.parameters())  # in the order of ours, which the norm of all gradients depends on
    plain = face.plain(params)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, mask in report.masks.items():
        prune.custom_from_mask(theirs.get_submodule(name.removesuffix(".weight")), "weight", mask)
    for step in range(8):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        norms = []
        for model, each, parameters in ((ours, optimizer, list(ours.parameters())), (theirs, plain, params)):
            each.zero_grad()
            (model(x) - x[:, :4]).square().mean().backward()
            if clip:
                norms.append(clip_grad_norm_(parameters, 0.1))
            each.step()
        assert not clip or torch.equal(*norms)
    for i in (0, 2):
        mask = report.masks[f"{i}.weight"]
        assert torch.equal(ours[i].weight, theirs[i].weight_orig * mask)
        assert torch.equal(ours[i].weight == 0, ~mask)
        if ours[i].bias is not None:
            assert torch.equal(ours[i].bias, theirs[i].bias)


@every_face
def test_clipping_does_not_count_what_is_pruned(face):
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(3))
    engine.sparsify(0.9)
    optimizer.param_groups[0]["drop_rate"] = 0.2
    for _ in range(2):  # passes of one step
        model(torch.ones(4, 12)).square().sum().backward()
        for p, zero in zip(weights(model), zeros(model), strict=True):
            assert not p.grad[zero].any()
            assert p.grad[~zero].any()


@with_muon
@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_unscaled_masks_leave_the_expected_network(face, rate):
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **{**OPTIONS, "drop_rate": rate, "rescale": "none"})
    run(model, optimizer, range(5))
    with engine.expected():
        expected = clones(model)
    report = engine.sparsify(0.5)
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name] * report.masks[name] if name in report.masks else expected[name])
    with engine.expected():  # nothing is dropped any more
        for name, p in model.named_parameters():
            assert torch.equal(p, expected[name] * report.masks.get(name, torch.tensor(1.0)))


def test_unscaled_weights_that_are_not_chosen_become_the_expected_ones_too():
    model = two_layers()
    engine, optimizer = FACES[0](model, **{**OPTIONS, "rescale": "none"})
    run(model, optimizer, range(5))
    with engine.expected():
        expected = model[0].weight.detach().clone()
    engine.sparsify(0.5, params=[model[2].weight])
    assert torch.equal(model[0].weight, expected)


@with_muon
def test_where_keep_probabilities_have_come_to_0_and_1_nothing_is_lost(face):
    """The network that is kept is the one that was trained."""
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **{**OPTIONS, "rescale": "none", "keep_floor": 0.0, "drop_rate": 0.75})
    run(model, optimizer, range(3))
    most = torch.rand(512, generator=torch.Generator().manual_seed(0)).argsort() < 128
    for p, is_high in zip(weights(model), most.split([384, 128]), strict=True):
        optimizer.state[p]["log_importance"].copy_(torch.where(is_high.view_as(p), 30.0, -30.0))
    x = torch.randn(50, 12)
    model.eval()
    with engine.expected():
        before = model(x)
    report = engine.sparsify(0.75)
    assert_same([mask.flatten() for mask in report.masks.values()], list(most.split([384, 128])))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


@with_muon
def test_a_second_call_keeps_what_is_pruned(face):
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(3))
    engine.sparsify(0.4)
    first = zeros(model)
    run(model, optimizer, range(3, 6))
    engine.sparsify(0.8, by="magnitude")
    for a, b in zip(first, zeros(model), strict=True):
        assert (a <= b).all()
    assert sum(int(zero.sum()) for zero in zeros(model)) == round(0.8 * 512)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="do not come back"):
        engine.sparsify(0.5)
    assert_same(everything(model, optimizer), before)


@with_muon
def test_two_of_four(face):
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(3))
    report = engine.sparsify("2:4")
    assert report.sparsity == 0.5
    run(model, optimizer, range(3, 6))
    for p in weights(model):
        assert (p.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()


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


def test_chosen_tensors_alone():
    model = two_layers()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = ImpactAdamW(groups, lr=0.01, **OPTIONS)
    optimizer.attach(model)
    run(model, optimizer, range(3))
    report = optimizer.sparsify(0.5, params=[model[2].weight])
    assert list(report.masks) == ["2.weight"]
    assert not zeros(model)[0].any()
    assert [group["drop_rate"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [group["hold_zeros"] for group in optimizer.param_groups] == [False, True]
    run(model, optimizer, range(3, 6))
    assert zeros(model)[1].sum() == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_face
def test_what_is_kept_lives_even_if_it_is_zero_now(face, dtype):
    """A layer that begins at zero is no pruned one."""
    model = two_layers(dtype)
    nn.init.zeros_(model[2].weight)
    precise = {} if face.base is torch.optim.SGD else {"eps": 1e-3}
    engine, optimizer = face(model, **OPTIONS, **precise)
    report = engine.sparsify(0.5, by="magnitude", params=[model[0].weight])
    report = engine.sparsify(masks={"2.weight": torch.rand(4, 32) < 0.5})
    run(model, optimizer, range(3))
    mask = report.masks["2.weight"]
    assert mask.any()
    assert torch.equal(model[2].weight != 0, mask)
    assert (model[2].weight[mask].abs() > 1e-4).float().mean() > 0.9  # they train


@with_muon
def test_with_several_optimizers(face):
    """Muon for the matrices of one layer, another for the rest: one engine, one network, all of it pruned."""
    model = two_layers()
    first = torch.optim.Muon([model[0].weight], lr=0.02)
    rest = [model[0].bias, *([] if face is MUON else [model[2].bias])]
    second = torch.optim.AdamW(rest, lr=0.01)
    third = face.plain([model[2].weight])
    engine = Impact(model, [first, second, third], **OPTIONS)

    def loss() -> torch.Tensor:
        x = torch.randn(16, 12)
        return (model(x) - x[:, :4]).square().mean()

    for _ in range(3):
        for each in engine.optimizers:
            each.zero_grad()
        loss().backward()
        for each in engine.optimizers:
            each.step()
    report = engine.sparsify(0.6)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    held = zeros(model)
    for _ in range(4):
        for each in engine.optimizers:
            each.zero_grad()
        loss().backward()
        for each in engine.optimizers:
            each.step()
    assert_same(zeros(model), held)


# ------------------------------------------------------------------------------- a drop rate set anew


@with_muon
@pytest.mark.parametrize("sampling", ["bernoulli", "exact"])
@pytest.mark.parametrize("importance", ["saliency", "uniform"])
def test_a_drop_rate_set_anew_is_a_share_of_what_is_left(face, sampling, importance):
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **{**OPTIONS, "sampling": sampling, "importance": importance})
    run(model, optimizer, range(3))
    engine.sparsify(0.6, by="magnitude")
    held = torch.cat([zero.flatten() for zero in zeros(model)])
    optimizer.param_groups[0]["drop_rate"] = 0.25
    run(model, optimizer, range(3, 8))
    keep = torch.cat([engine.keep_probability(p).flatten() for p in weights(model)])
    assert not keep[held].any()
    n = int((~held).sum())
    share = 1 - round(0.25 * n) / n if sampling == "exact" else 0.75
    assert keep[~held].mean().item() == pytest.approx(share, abs=1e-3)
    with engine.masked():
        kept = torch.cat([p.detach().flatten() != 0 for p in weights(model)])
    assert not kept[held].any()
    if sampling == "exact":
        assert kept.sum() == n - round(0.25 * n)
    else:
        assert kept[~held].float().mean().item() == pytest.approx(0.75, abs=0.1)


# ------------------------------------------------------------------------------- zeros stay, whatever happens


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_zeros_from_elsewhere_stay_through_all_that_a_loop_does(face, dtype):
    """Zeros of torch.nn.utils.prune, held by the flag, through decay, momentum, accumulation, clipping, SAM and EMA."""
    model = two_layers(dtype, bias=face.base is not torch.optim.Muon)
    for i, amount in ((0, 0.6), (2, 0.4)):
        prune.l1_unstructured(model[i], "weight", amount)
        prune.remove(model[i], "weight")
    held = zeros(model)
    _, optimizer = face(model, drop_rate=0.0, hold_zeros=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    before = clones(list(model.parameters()))
    for step in range(6):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        for part in x.split(8):  # accumulation
            (model(part) - part[:, :4]).square().mean().div(2).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        with torch.no_grad():  # SAM: to where it is worse, and back
            moves = [(p, 0.05 * p.grad / p.grad.norm()) for p in model.parameters()]
            for p, move in moves:
                p.add_(move)
        assert all((zero <= now).all() for zero, now in zip(held, zeros(model), strict=True))
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        with torch.no_grad():
            for p, move in moves:
                p.sub_(move)
        optimizer.step()
        ema.update_parameters(model)
    if dtype is torch.float32:
        assert_held(model, optimizer, held)
    else:  # a weight may come to zero between two steps, by what is no step
        assert all((zero <= now).all() for zero, now in zip(held, zeros(model), strict=True))
    assert all((zero <= now).all() for zero, now in zip(held, zeros(ema.module), strict=True))
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@with_muon
def test_sam_sees_the_sparse_network_in_both_passes(face):
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(3))
    engine.sparsify(0.9, floor=1.0)
    seen = []
    model[0].register_forward_pre_hook(lambda layer, _: seen.append((layer.weight == 0).clone()))
    optimizer.zero_grad()
    model(torch.ones(2, 12)).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.grad / p.grad.norm())
    model(torch.ones(2, 12))
    assert torch.equal(*seen)


@with_muon
def test_a_grad_scaler_and_a_step_that_it_skips(face):
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(3))
    engine.sparsify(0.5)
    held = zeros(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(5):
        before = everything(model, optimizer)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(8, 12)).square().mean()
        scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert_held(model, optimizer, held)
        if step == 2:
            assert_same(everything(model, optimizer), before)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@every_face
def test_a_loaded_network_whose_zeros_are_the_mask(face):
    """Fine-tuning a sparse network: from its weights alone, without any state."""
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(3))
    engine.sparsify(0.7)
    held, saved = zeros(model), clones(model)
    other = two_layers()
    other.load_state_dict(saved)
    engine, optimizer = face(other, **{**OPTIONS, "drop_rate": 0.0, "hold_zeros": True})
    run(other, optimizer, range(5))
    assert_held(other, optimizer, held)
    dense = two_layers()
    other.load_state_dict(dense.state_dict())  # a dense network has no zeros
    run(other, optimizer, range(2))
    assert not any(zero.any() for zero in zeros(other))


@every_face
def test_held_zeros_can_be_let_go(face):
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    engine.sparsify(0.5, by="magnitude")
    optimizer.param_groups[0]["hold_zeros"] = False
    run(model, optimizer, range(3))
    assert not any(zero.any() for zero in zeros(model))


@every_face
def test_a_state_that_holds_no_zeros_lets_their_gradients_pass_again(face):
    model = two_layers()
    nn.init.zeros_(model[2].weight)  # a layer that begins at zero
    engine, optimizer = face(model, **OPTIONS)
    before = everything(model, optimizer)
    engine.sparsify(0.5, by="magnitude", params=[model[0].weight])
    run(model, optimizer, range(1))
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    model(torch.ones(2, 12)).sum().backward()
    assert model[2].weight.grad.all()


@every_face
@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_gradients_that_are_not_finite_do_not_revive_a_weight(face, kind):
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(3))
    engine.sparsify(0.5)
    held = zeros(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float(kind))
    optimizer.step()
    assert_held(model, optimizer, held)
    for p in weights(model):
        assert torch.isfinite(engine.importance(p)).all()


@every_face
def test_values_that_are_not_finite_are_pruned_like_others(face):
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(2))
    with torch.no_grad():
        model[0].weight[0, :4] = math.inf
        model[0].weight[1, :4] = math.nan
    mask = torch.ones(32, 12)
    mask[:2, :4] = 0
    engine.sparsify(masks={"0.weight": mask})
    assert torch.equal(model[0].weight == 0, mask == 0)


@contextmanager
def optimizer_that_goes_to(optimizer: torch.optim.Optimizer, param: torch.Tensor, value: float) -> Iterator[None]:
    """The step of the base takes a parameter to this value, between the two hooks of the engine."""
    handle = optimizer.register_step_post_hook(lambda *_: param.detach().fill_(value))
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    yield
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_face
def test_weights_that_come_to_zero_by_chance_live_on(face, dtype):
    """With few bits a step often lands on exactly zero; such a weight is not one that was pruned."""
    model = two_layers(dtype)
    precise = {} if face.base is torch.optim.SGD else {"eps": 1e-3}
    engine, optimizer = face(model, **{**OPTIONS, "drop_rate": 0.0, **precise}, **STEPPED_BY_THE_BASE[face.built_in])
    engine.sparsify(0.5, by="magnitude")
    held = zeros(model)
    run(model, optimizer, range(2))
    with optimizer_that_goes_to(optimizer, model[2].weight, 0.0):
        run(model, optimizer, range(2, 3))
    assert_held(model, optimizer, held)
    assert model[2].weight.abs().max() < 1e-4
    run(model, optimizer, range(3, 9))
    assert_held(model, optimizer, held)
    assert (model[2].weight[~held[1]].abs() > 1e-3).float().mean() > 0.9


@every_face
def test_a_later_cut_of_units_keeps_the_zeros(face):
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    pruner = ActivationPruner(model, torch.randn(2, 12), {1: 0.5}, criterion="l1", optimizer=optimizer, round_to=1)
    run(model, optimizer, range(3))
    engine.sparsify(0.6)
    old = clones(list(model.parameters()))
    report = pruner.step()
    kept = next(record.kept for record in report.records if record.name == "0.weight")
    assert len(kept) == 16
    held = zeros(model)
    assert_same(held, [old[0][kept] == 0, old[2][:, kept] == 0])
    run(model, optimizer, range(3, 8))
    assert_held(model, optimizer, held)


def test_a_cut_network_that_is_kept_without_pickle_is_held_by_the_flag(tmp_path):
    model = two_layers()
    optimizer = ImpactSGD(model, lr=0.05, **OPTIONS)
    pruner = ActivationPruner(model, torch.randn(2, 12), {1: 0.5}, criterion="l1", optimizer=optimizer, round_to=1)
    run(model, optimizer, range(3))
    optimizer.sparsify(0.6)
    pruner.step()
    save_pruned(model, tmp_path)
    other = load_pruned(two_layers(), tmp_path)
    held = zeros(model)
    assert_same(zeros(other), held)
    again = ImpactAdamW(other, lr=0.01, drop_rate=0.0, hold_zeros=True)
    run(other, again, range(4))
    assert_held(other, again, held)


@every_face
def test_lookahead_judges_the_sparse_network(face):
    model = two_layers()
    engine, optimizer = face(model, **{**OPTIONS, "importance": "lookahead"})
    run(model, optimizer, range(2), closure=True)
    engine.sparsify(0.5, floor=1.0)
    seen = []

    def loss() -> torch.Tensor:
        seen.append((model[0].weight == 0).sum().item())
        return model(torch.ones(4, 12)).square().mean()

    train(optimizer, loss, 2, closure=True)
    assert seen == [192] * 4


@every_face
def test_nothing_but_zeros_stays_finite(face):
    model = two_layers()
    for p in weights(model):
        nn.init.zeros_(p)
    engine, optimizer = face(model, **{**OPTIONS, "hold_zeros": True})
    run(model, optimizer, range(3))
    assert all(zero.all() for zero in zeros(model))
    for p in weights(model):
        assert not engine.importance(p).any()
        assert not engine.keep_probability(p).any()
    copied = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copied)
    model.load_state_dict(two_layers().state_dict())
    optimizer.param_groups[0]["drop_rate"] = 0.3
    run(model, optimizer, range(2))
    w = torch.cat([engine.importance(p).flatten() for p in weights(model)])
    assert w.mean().item() == pytest.approx(1.0, abs=1e-4)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ------------------------------------------------------------------------------- weights that are divided by a norm


def normed(kind: str, inner: int = 6) -> nn.Module:
    torch.manual_seed(0)
    wrap = nn.utils.weight_norm if kind == "hook" else nn.utils.parametrizations.weight_norm
    return nn.Sequential(wrap(nn.Linear(12, inner)), nn.Tanh(), wrap(nn.Linear(inner, 4)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
@every_face
def test_weights_with_a_norm_never_lose_a_whole_row(face, kind):
    model = normed(kind)
    engine, optimizer = face(model, **{**OPTIONS, "drop_rate": 0.9})
    run(model, optimizer, range(10))
    report = engine.sparsify(0.9)
    assert report.sparsity > 0.6
    for mask in report.masks.values():
        assert mask.any(0).all()
        assert mask.any(1).all()
    optimizer.param_groups[0]["drop_rate"] = 0.8
    run(model, optimizer, range(10, 20))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.equal(p != 0, report.masks[name]) for name, p in model.named_parameters() if name in report.masks)
    assert torch.isfinite(model(torch.ones(1, 12))).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_a_pattern_holds_for_weights_with_a_norm(kind):
    model = normed(kind, inner=4)  # so few rows that columns come out empty
    optimizer = ImpactSGD(model, lr=0.1, **OPTIONS)
    for mask in optimizer.sparsify("2:4", by="magnitude").masks.values():
        assert mask.unflatten(1, (-1, 4)).sum(-1).eq(2).all()
    run(model, optimizer, range(3))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_masks_that_would_empty_a_row_of_a_weight_with_a_norm_are_refused(kind):
    model = normed(kind)
    optimizer = ImpactSGD(model, lr=0.1, **OPTIONS)
    name = next(name for name, p in model.named_parameters() if p.shape == (6, 12))
    mask = torch.ones(6, 12)
    mask[2] = 0
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=name):
        optimizer.sparsify(masks={name: mask})
    assert_same(everything(model, optimizer), before)


# ------------------------------------------------------------------------------- what is refused


@every_face
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"must lie in \[0, 1\)"),
        ({"sparsity": -0.1}, r"must lie in \[0, 1\)"),
        ({"sparsity": math.nan}, r"must lie in \[0, 1\)"),
        ({"sparsity": True}, r"must lie in \[0, 1\)"),
        ({"sparsity": "half"}, "pattern such as"),
        ({"sparsity": 0.5, "by": "size"}, "Invalid by: 'size'; choose from"),
        ({"sparsity": 0.5, "by": None}, "Invalid by: None; choose from"),
        ({"sparsity": 0.5, "floor": 1.5}, r"Invalid floor: 1\.5; it must lie in \[0, 1\]"),
        ({"sparsity": 0.999}, r"would leave nothing of (0|2)\.weight"),
        ({"sparsity": 0.998, "floor": 1.0}, "2 tensors cannot keep a weight each where 1 are left"),
        ({"sparsity": "1:5"}, "none of the tensors can be divided by 5"),
        ({"sparsity": 0.5, "params": "bias"}, r"0\.bias is never masked"),
        ({"sparsity": 0.5, "params": []}, "nothing to make sparse"),
        ({}, "either a sparsity or masks"),
        ({"sparsity": 0.5, "masks": {}}, "either a sparsity or masks"),
        ({"masks": {}}, "masks"),
        ({"masks": {"1.weight": torch.ones(32, 12)}}, "'1.weight', which is no weight of this optimizer"),
        ({"masks": {"0.bias": torch.ones(32)}}, "'0.bias', which is no weight of this optimizer"),
        ({"masks": {"0.weight": torch.ones(12, 32)}}, r"the mask of 0\.weight has shape \(12, 32\), not \(32, 12\)"),
        ({"masks": {"0.weight": torch.zeros(32, 12)}}, r"the mask of 0\.weight would leave nothing of it"),
    ],
)
def test_bad_input_changes_nothing(face, arguments, message):
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(2))
    if arguments.get("params"):
        arguments = {**arguments, "params": [model[0].bias]}
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        engine.sparsify(**arguments)
    assert_same(everything(model, optimizer), before)


def test_masks_and_params_of_another_kind_are_refused():
    model = two_layers()
    optimizer = ImpactSGD(model, lr=0.1, **OPTIONS)
    run(model, optimizer, range(1))
    before = everything(model, optimizer)
    for arguments in (
        {"masks": {"0.weight": [[True]]}},
        {"masks": [torch.ones(32, 12)]},
        {"sparsity": 0.5, "params": ["0.weight"]},
    ):
        with pytest.raises(TypeError):
            optimizer.sparsify(**arguments)
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        optimizer.sparsify(0.5, params=[torch.ones(3, 3)])
    assert_same(everything(model, optimizer), before)


@every_face
def test_importances_must_be_there(face):
    model = two_layers()
    engine, optimizer = face(model)
    with pytest.raises(ValueError, match=r"0\.weight has no importances before the first step"):
        engine.sparsify(0.5)
    run(model, optimizer, range(1))  # it sets the scale of the signal, and leaves all importances equal
    with pytest.raises(ValueError, match=r"0\.weight has no importances yet"):
        engine.sparsify(0.5)
    engine, _ = face(model, importance="uniform")
    with pytest.raises(ValueError, match="has no importances with importance='uniform'; choose by='magnitude'"):
        engine.sparsify(0.5)
    engine, _ = face([model[0].bias])
    with pytest.raises(ValueError, match="nothing to make sparse"):
        engine.sparsify(0.5)


@every_face
@pytest.mark.parametrize("scope", ["masked", "expected"])
def test_not_inside_a_scope(face, scope):
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(1))
    with getattr(engine, scope)(), pytest.raises(RuntimeError, match="leave the scope"):
        engine.sparsify(0.5)


@every_face
def test_masks_that_a_pass_has_seen_are_forgotten(face):
    model = two_layers()
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(2))
    x = torch.randn(4, 12)
    model(x)
    engine.sparsify(0.5)
    saved = clones(model)
    assert torch.equal(model(x), model.eval()(x))  # nothing is dropped
    assert_same(clones(model), saved)


def freeze(model, optimizer):
    model[0].weight.requires_grad_(False)


def unfreeze(model, optimizer):
    model[2].weight.requires_grad_(True)


def cut(model, optimizer):
    ActivationPruner(model, torch.randn(2, 12), {1: 0.5}, criterion="l1", optimizer=optimizer).step()


@every_face
@pytest.mark.parametrize("change", [freeze, unfreeze, cut])
def test_right_after_the_members_of_a_group_have_changed(face, change):
    model = two_layers()
    model[2].weight.requires_grad_(change is not unfreeze)
    engine, optimizer = face(model, **OPTIONS)
    run(model, optimizer, range(3))
    change(model, optimizer)
    report = engine.sparsify(0.5)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    held = zeros(model)
    run(model, optimizer, range(3, 6))
    assert_same(zeros(model), held)


# ------------------------------------------------------------------------------- interruptions


class Interrupted(BaseException):
    """What Ctrl-C raises, but that nothing else raises it."""


def prepared(face: Face) -> tuple[nn.Module, Impact, torch.optim.Optimizer]:
    """Unscaled masks: sparsify() multiplies weights, so that to do it twice would show."""
    model = two_layers()
    engine, optimizer = face(model, **{**OPTIONS, "drop_rate": 0.5, "rescale": "none", "importance": "hypergradient"})
    run(model, optimizer, range(3))
    return model, engine, optimizer


def check_interrupted(face, interrupt, before, after) -> bool:
    """Whether the call came to its end; if not it has changed nothing or all, and calling again does what is right."""
    model, engine, optimizer = prepared(face)
    with interrupt() as is_over:
        engine.sparsify(0.5)
    if is_over():
        return True
    found = everything(model, optimizer)
    groups = found[1]["param_groups"][0]
    assert_same(found, after if groups["hold_zeros"] else before)
    engine.sparsify(0.5)
    assert_same(everything(model, optimizer), after)
    run(model, optimizer, range(3, 4))
    return False


class at_call:
    """Raises in the k-th call of a function."""

    def __init__(self, owner, name, k):
        self.owner, self.name, self.k = owner, name, k

    def __enter__(self):
        self.true, self.calls = getattr(self.owner, self.name), 0

        def replaced(*args, **kwargs):
            self.calls += 1
            if self.calls == self.k:
                raise Interrupted
            return self.true(*args, **kwargs)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(self.owner, self.name, replaced)
        return lambda: self.calls < self.k

    def __exit__(self, kind, *_):
        self.patch.undo()
        return kind is Interrupted


class at_line:
    """Raises at the k-th line of the package, as Ctrl-C may."""

    def __init__(self, k):
        self.k = k

    def __enter__(self):
        self.lines, self.outer = 0, sys.gettrace()

        def trace(frame, event, _):
            if "impact_optim" not in frame.f_code.co_filename:
                return None
            if event == "line":
                self.lines += 1
                if self.lines == self.k:
                    raise Interrupted
            return trace

        sys.settrace(trace)
        return lambda: self.lines < self.k

    def __exit__(self, kind, *_):
        sys.settrace(self.outer)
        return kind is Interrupted


@pytest.mark.parametrize(
    ("owner", "name"),
    [(torch.Tensor, "copy_"), (torch.Tensor, "clone"), (Impact, "_hold_pruned"), (Impact, "_refresh")],
    ids=lambda value: getattr(value, "__name__", value),
)
@every_face
def test_interrupted_inside_a_function_it_has_changed_nothing(face, owner, name):
    model, engine, optimizer = prepared(face)
    before = everything(model, optimizer)
    engine.sparsify(0.5)
    after = everything(model, optimizer)
    count = 0
    for k in range(1, 100):
        if check_interrupted(face, lambda k=k: at_call(owner, name, k), before, after):
            break
        count += 1
    assert count >= 1


@pytest.mark.parametrize("stride", [29, slow(1)])
@every_face
def test_interrupted_at_any_line_it_has_changed_nothing_or_all(face, stride):
    model, engine, optimizer = prepared(face)
    before = everything(model, optimizer)
    engine.sparsify(0.5)
    after = everything(model, optimizer)
    for k in range(1, 100_000, stride):
        if check_interrupted(face, lambda k=k: at_line(k), before, after):
            break
    assert k > 100


@with_muon
def test_a_step_that_is_interrupted_revives_nothing(face):
    """Muon moves zeros too, and the engine does not come to make them zero again."""
    model = two_layers(bias=face is not MUON)
    engine, optimizer = face(model, **OPTIONS, **STEPPED_BY_THE_BASE[face.built_in])
    run(model, optimizer, range(3))
    engine.sparsify(0.5)
    held = zeros(model)

    def interrupt(*_):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        raise Interrupted

    handle = optimizer.register_step_post_hook(interrupt)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    with pytest.raises(Interrupted):
        run(model, optimizer, range(3, 4))
    handle.remove()
    run(model, optimizer, range(3, 6))
    assert_held(model, optimizer, held)


@every_face
def test_a_step_of_the_base_that_fails_leaves_dense_gradients(face, monkeypatch):
    model = two_layers()
    _, optimizer = face(model, **{**OPTIONS, "drop_rate": 0.5}, **STEPPED_BY_THE_BASE[face.built_in])
    run(model, optimizer, range(2))
    optimizer.zero_grad()
    model(torch.ones(4, 12)).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    seen = []

    def fail(*_):
        raise Interrupted

    def look(*_):
        seen.extend(p.grad.clone() for p in model.parameters())

    for action in (fail, look):
        with monkeypatch.context() as patch:
            handle = None
            if face.built_in:
                patch.setattr(type(optimizer), "_base", SimpleNamespace(step=action))
            else:
                handle = optimizer.register_step_pre_hook(action)
            with pytest.raises(Interrupted) if action is fail else nullcontext():
                optimizer.step()
            if handle is not None:
                handle.remove()
    assert_same([p.grad for p in model.parameters()], grads)
    dropped = torch.cat([g.flatten() == 0 for g in seen if g.dim() > 1]).float().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.1)
    for masked, dense in zip(seen, grads, strict=True):
        factor = (masked / dense)[masked != 0]
        assert factor.max() <= 1 / 0.05 + 1e-3


def test_densities_go_with_the_sizes_of_layers_and_meet_the_total():
    shapes = [(100, 100), (10, 100), (3, 2), (25, 25, 3)]
    sizes = [10_000, 1000, 6, 1875]
    densities = erdos_renyi(shapes, 0.3)
    assert max(densities) <= 1
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx(0.3 * sum(sizes))
    assert densities[3] / densities[0] == pytest.approx((50 / 625) / (200 / 10_000))  # a kernel counts as one
    most = [10_000, 1000, 6, 200]  # the others take over what a tensor has no room for
    densities = erdos_renyi(shapes, 0.3, most)
    assert densities[3] == 200 / 1875
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx(0.3 * sum(sizes))
