"""The training loops that people write, with one line changed, against the same training written out by hand."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FACES, Face, assert_same, clones, every_face, slow
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_, parametrizations, prune
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from impact_optim import ImpactSGD

# ------------------------------------------------------------------------------------------ helpers


def factors(module: nn.Module, impact: Any) -> dict[str, Tensor]:
    """What the masks of this step multiply every parameter with, read off parameters that are all ones."""
    dense = clones(module)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(1.0)
        with impact.masked():
            result = clones(module)
        for name, p in module.named_parameters():
            p.copy_(dense[name])
    return result


def masked_weights(module: nn.Module, impact: Any) -> dict[str, Tensor]:
    """What a training forward pass is to see: leaves of their own, to be differentiated."""
    by = factors(module, impact)
    return {name: (p.detach() * by[name]).requires_grad_() for name, p in module.named_parameters()}


class ByHand:
    """The training of a module by an optimizer of torch through ``weight * factor``, whose gradient autograd masks."""

    def __init__(self, module: nn.Module, make: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        self.module = copy.deepcopy(module)
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        self.base = make(self.weights.values(), **options)

    def __call__(self, by: dict[str, Tensor], *args: Any) -> Any:
        return functional_call(self.module, {name: w * by[name] for name, w in self.weights.items()}, args)

    def dense(self, *args: Any) -> Any:
        self.module.eval()
        try:
            with torch.no_grad():
                return functional_call(self.module, self.weights, args)
        finally:
            self.module.train()

    def step(self) -> None:
        self.base.step()
        self.base.zero_grad()

    def assert_equals(self, module: nn.Module, **tolerance: float) -> None:
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.detach(), self.weights[name].detach(), **tolerance)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(n: int, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(n)]


def numbers(output: Any) -> Tensor:
    """A scalar of a nested output, in which every element has another derivative."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    return sum((t * torch.linspace(-1, 2, t.numel()).view(t.shape)).sum() for t in tensors)


def detached(output: Any) -> Any:
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output)


# ------------------------------------------------------------------------------------------ plain loops


@pytest.mark.parametrize(
    ("sgd", "ours"),
    [
        ({"lr": 0.1}, {"drop_rate": 0.2}),
        ({"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}, {"drop_rate": 0.2}),
        ({"lr": 0.1, "momentum": 0.9}, {"drop_rate": 0.5, "importance": "fisher", "drop": "important"}),
        ({"lr": 0.1, "weight_decay": 0.1}, {"drop_rate": 0.5, "rescale": "none", "importance_lr": 0.3}),
        ({"lr": 0.1}, {"drop_rate": 0.3, "drop": "important", "sampling": "exact", "importance_lr": 0.3}),
        ({"lr": 0.1, "momentum": 0.9}, {"drop_rate": 0.3, "importance": "uniform", "foreach": True}),
    ],
    ids=str,
)
def test_plain(sgd, ours):
    check_plain(Face(torch.optim.SGD, ImpactSGD), sgd, ours)


@every_face
@pytest.mark.parametrize("ours", [{"drop_rate": 0.2}, {"drop_rate": 0.5, "importance_lr": 0.3}], ids=str)
def test_plain_with_every_face(face, ours):
    check_plain(face, {}, ours)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
        (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "foreach": True}),
        (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
        (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
        (torch.optim.NAdam, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.1}),
        (torch.optim.Adadelta, {"lr": 1.0}),
        (torch.optim.Rprop, {"lr": 0.01}),
        (torch.optim.ASGD, {"lr": 0.1}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_plain_with_other_bases(base, options):
    check_plain(Face(base), options, {"drop_rate": 0.2})


def check_plain(face: Face, options: dict[str, Any], ours: dict[str, Any]) -> None:
    model = mlp()
    impact, optimizer = face(model, **options, **ours)
    by_hand = ByHand(model, face.plain, **options)
    test_input = torch.randn(5, 6)
    previous = None
    for x, y in batches(8):
        by = factors(model, impact)
        assert previous is None or not torch.equal(by["0.weight"], previous["0.weight"])
        previous = by

        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

        expected = F.cross_entropy(by_hand(by, x), y)
        expected.backward()
        by_hand.step()
        torch.testing.assert_close(loss, expected)
        by_hand.assert_equals(model)

        model.eval()
        torch.testing.assert_close(model(test_input).detach(), by_hand.dense(test_input))
        model.train()


@every_face
def test_masked_scope_instead_of_attaching(face):
    model = mlp()
    impact, optimizer = face(model.parameters(), drop_rate=0.3)
    by_hand = ByHand(model, face.plain)
    for x, y in batches(4):
        by = factors(model, impact)
        with impact.masked():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(by_hand(by, x), y).backward()
        by_hand.step()
        by_hand.assert_equals(model)


@every_face
def test_closure(face):
    model = mlp()
    impact, optimizer = face(model, drop_rate=0.3)
    by_hand = ByHand(model, face.plain)
    for x, y in batches(4):
        by = factors(model, impact)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        expected = F.cross_entropy(by_hand(by, x), y)
        expected.backward()
        by_hand.step()
        torch.testing.assert_close(loss, expected)
        by_hand.assert_equals(model)


def test_lookahead_tries_the_step_of_all_groups_at_once():
    torch.manual_seed(0)
    model = mlp()
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = ImpactSGD(groups, lr=0.1, momentum=0.9, importance="lookahead", importance_lr=0.5, kl_weight=0.1)
    optimizer.attach(model)
    weights = [p for p in model.parameters() if p.dim() == 2]
    for x, y in batches(5):
        seen = []

        def closure(x: Tensor = x, y: Tensor = y, seen: list = seen) -> Tensor:
            optimizer.zero_grad()
            seen.append([p.detach().clone() for p in weights])
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        importances = [optimizer.importance(p) for p in weights]
        optimizer.step(closure)
        old, tried = seen
        expected = [x - w * 0.1 * p.grad for x, w, p in zip(old, importances, weights, strict=True)]
        torch.testing.assert_close(tried, expected)
    assert any((optimizer.importance(p) - 1).abs().max() > 0.1 for p in weights)  # else it would show nothing


@every_face
def test_a_closure_that_zeroes_gradients_in_place_does_not_lose_those_of_the_step(face):
    def trained(set_to_none: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp()
        _, optimizer = face(model, drop_rate=0.3, importance="lookahead")
        for x, y in batches(3):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad(set_to_none=set_to_none)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        return clones(model.parameters())

    assert_same(trained(False), trained(True))


def test_lookahead_sees_the_same_batch_under_the_same_masks_again():
    """Its h is - lr * g * (gradient on the same batch, under the same masks, at x - w * lr * g)."""
    model = mlp()
    optimizer = ImpactSGD(
        model, lr=0.1, momentum=0.9, drop_rate=0.3, importance="lookahead", importance_lr=0.5, kl_weight=1.0
    )
    by_hand = ByHand(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(batches(2)):
        by = factors(model, optimizer)
        losses = []

        def closure(x: Tensor = x, y: Tensor = y, losses: list = losses) -> Tensor:
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
            return losses[-1]

        before = [optimizer.importance(p).log() for p in model.parameters() if p.dim() == 2]
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert optimizer.step(closure) is losses[0]
        F.cross_entropy(by_hand(by, x), y).backward()
        by_hand.step()
        by_hand.assert_equals(model)
        # The step that is tried is that of the dense gradient; the importances are 1, still.
        taken = {name: 0.1 * p.grad if p.dim() == 2 else 0.0 for name, p in model.named_parameters()}
        again = {name: ((x - taken[name]) * by[name]).requires_grad_() for name, x in old.items()}
        expected = F.cross_entropy(functional_call(by_hand.module, again, x), y)
        expected.backward()
        torch.testing.assert_close(losses[1], expected)
        assert len(losses) == 2

        h = [-taken[name] * again[name].grad for name, p in model.named_parameters() if p.dim() == 2]
        mean = sum(t.abs().sum() for t in h) / sum(t.numel() for t in h)
        if step == 0:
            scale = mean  # the first signal only sets its scale
            continue
        log_w = [(b - 0.5 * (t / scale).clamp(-10, 10)) / 1.5 for b, t in zip(before, h, strict=True)]
        normalizer = torch.cat([t.flatten() for t in log_w]).exp().mean().log()
        importances = [optimizer.importance(p).log() for p in model.parameters() if p.dim() == 2]
        for actual, t in zip(importances, log_w, strict=True):
            torch.testing.assert_close(actual, t - normalizer, rtol=1e-4, atol=1e-4)


@every_face
def test_gradient_accumulation_is_the_full_batch_under_one_mask(face):
    model = mlp()
    impact, optimizer = face(model, weight_decay=0.01, drop_rate=0.3)
    by_hand = ByHand(model, face.plain, weight_decay=0.01)
    for x, y in batches(4, size=16):
        by = factors(model, impact)
        for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
            (F.cross_entropy(model(part), target) / 4).backward()
            assert_same(factors(model, impact), by)
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(factors(model, impact)["2.weight"], by["2.weight"])

        F.cross_entropy(by_hand(by, x), y).backward()
        by_hand.step()
        by_hand.assert_equals(model)


def test_two_backwards_through_one_graph_add_up():
    model = mlp()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3)
    weights = masked_weights(model, optimizer)
    x, y = batches(1)[0]
    output = model(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    output.square().mean().backward()
    expected = functional_call(model, weights, x)
    (F.cross_entropy(expected, y) + expected.square().mean()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad)


@every_face
def test_clip_grad_norm(face):
    """It sees the dense gradient, as it does with every other optimizer."""
    model = mlp()
    impact, optimizer = face(model, drop_rate=0.3)
    by_hand = ByHand(model, face.plain)
    for x, y in batches(4):
        by, weights = factors(model, impact), masked_weights(model, impact)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        norm = clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

        F.cross_entropy(functional_call(model, weights, x), y).backward()
        expected_norm = torch.cat([w.grad.flatten() for w in weights.values()]).norm()
        torch.testing.assert_close(norm, expected_norm)
        assert norm > 0.1
        F.cross_entropy(by_hand(by, x), y).backward()
        for w in by_hand.weights.values():
            w.grad.mul_(0.1 / (expected_norm + 1e-6))
        by_hand.step()
        by_hand.assert_equals(model)


@every_face
def test_amp_with_a_skipped_step(face):
    model = mlp()
    impact, optimizer = face(model, drop_rate=0.3)
    by_hand = ByHand(model, face.plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, (x, y) in enumerate(batches(6)):
        skipped = i in (0, 3)
        by, before = factors(model, impact), clones(model)
        steps = optimizer.param_groups[0]["mask_step"]
        importances = impact.importance(model[0].weight)

        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * float("inf") if skipped else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.autocast("cpu", torch.bfloat16):
            expected = F.cross_entropy(by_hand(by, x), y)
        torch.testing.assert_close(loss, expected)
        assert optimizer.param_groups[0]["mask_step"] == steps + (not skipped)
        if skipped:
            assert_same(clones(model), before)
            assert_same(factors(model, impact), by)
            assert torch.equal(impact.importance(model[0].weight), importances)
        else:
            expected.backward()
            by_hand.step()
            by_hand.assert_equals(model)
            assert not torch.equal(factors(model, impact)["0.weight"], by["0.weight"])
    assert scaler.get_scale() == 256.0


@pytest.mark.parametrize("scope", ["masked", "expected"])
def test_scope_inside_autocast_is_not_hidden_by_its_cache(scope):
    """Autocast keeps the bfloat16 copy of a weight, which a scope changes in place."""
    model = nn.Linear(6, 4)
    optimizer = ImpactSGD(model.parameters(), drop_rate=0.5, rescale="none")
    x = torch.randn(3, 6)
    with getattr(optimizer, scope)(), torch.autocast("cpu", torch.bfloat16):
        inside = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(x)
    assert not torch.equal(inside, dense)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), dense)
        with getattr(optimizer, scope)():
            assert torch.equal(model(x), inside)
        assert torch.equal(model(x), dense)


# ------------------------------------------------------------------------------------------ schedulers, averages

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=3),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=12),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=13),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.2, step_size_up=3),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.8)], milestones=[3]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.8)]
    ),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.003, anneal_epochs=5),
}


@every_face
@pytest.mark.parametrize("constructor", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(constructor, face):
    """They set what they set for the base, nothing else, and go on from a checkpoint."""
    data = batches(12)

    def rate(optimizer: torch.optim.Optimizer) -> list[Any]:
        return [optimizer.param_groups[0].get(name) for name in ("lr", "momentum", "betas")]

    def advance(scheduler: Any, step: int) -> None:
        is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([float(step // 5)] if is_plateau else []))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> list[Any]:
        rates = []
        for step in steps:
            x, y = data[step]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            group = optimizer.param_groups[0]
            before = dict(group)
            advance(scheduler, step)
            assert {name for name in group if group[name] != before[name]} <= {"lr", "momentum", "betas"}
            rates.append(rate(optimizer))
        return rates

    plain = face.plain(mlp())
    plain_scheduler = constructor(plain)
    expected = []
    for step in range(12):
        plain.step()
        advance(plain_scheduler, step)
        expected.append(rate(plain))
    assert len(set(map(str, expected))) > 1

    model = mlp()
    _impact, optimizer = face(model, drop_rate=0.2)
    scheduler = constructor(optimizer)
    assert train(model, optimizer, scheduler, range(6)) == expected[:6]
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    assert train(model, optimizer, scheduler, range(6, 12)) == expected[6:]

    resumed = mlp()
    _resumed_impact, resumed_optimizer = face(resumed, drop_rate=0.2)
    resumed_scheduler = constructor(resumed_optimizer)
    for target, state_dict in zip((resumed, resumed_optimizer, resumed_scheduler), saved, strict=True):
        target.load_state_dict(state_dict)
    assert train(resumed, resumed_optimizer, resumed_scheduler, range(6, 12)) == expected[6:]
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize(("importance_lr", "kl_weight"), [(0.01, 1.0), (0.1, 1.0), (0.1, 0.3), (0.1, 0.1)])
@pytest.mark.parametrize("ramp", [True, False], ids=["ramp", "constant"])
def test_drop_rate_is_met_at_every_step(importance_lr, kl_weight, ramp):
    """Also with the fast and cold importances of a sparse finish."""
    model = nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 3))
    optimizer = ImpactSGD(
        model, lr=0.05, momentum=0.9, importance_lr=importance_lr, kl_weight=kl_weight, rescale="none"
    )
    group = optimizer.param_groups[0]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    for step, (x, y) in enumerate(batches(60, size=50)):
        group["drop_rate"] = min(0.9, 0.9 * (step + 1) / 45) if ramp else 0.5
        keep = torch.cat([optimizer.keep_probability(p).flatten() for p in matrices])
        assert keep.mean().item() == pytest.approx(1 - group["drop_rate"], abs=1e-3), f"step {step}"
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@every_face
def test_sharpness_aware_minimization(face):
    """The second pass, at the weights moved up the dense gradient, is under the masks of the first."""
    model = mlp()
    impact, optimizer = face(model, drop_rate=0.3)
    by_hand = ByHand(model, face.plain)
    for x, y in batches(4):
        by = factors(model, impact)
        F.cross_entropy(model(x), y).backward()
        up = {name: 0.05 * p.grad for name, p in model.named_parameters()}
        for sign in (1, -1):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.add_(sign * up[name])
            if sign == 1:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

        moved = {name: (w.detach() + up[name]).requires_grad_() for name, w in by_hand.weights.items()}
        masked = {name: w * by[name] for name, w in moved.items()}
        F.cross_entropy(functional_call(by_hand.module, masked, (x,)), y).backward()
        for name, w in by_hand.weights.items():
            w.grad = moved[name].grad
        by_hand.step()
        by_hand.assert_equals(model, rtol=1e-4, atol=1e-5)


@every_face
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_model_averages_dense_weights_and_is_not_masked(average, face):
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    _impact, optimizer = face(model, drop_rate=0.3)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if average == "ema" else None)
    expected: dict[str, Tensor] = {}
    data = batches(6)
    for i, (x, y) in enumerate(data):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        averaged.update_parameters(model)
        for name, w in clones(model).items():
            weight = 0.0 if i == 0 else 0.9 if average == "ema" else i / (i + 1)
            expected[name] = expected.get(name, torch.zeros(())) * weight + w * (1 - weight)
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])

    plain = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    plain.load_state_dict(averaged.module.state_dict())
    loader = [x for x, _ in data]
    update_bn(loader, averaged)
    update_bn(loader, plain)
    assert_same(averaged.module.state_dict(), plain.state_dict())
    assert torch.equal(averaged(data[0][0]), plain(data[0][0]))


@every_face
def test_update_bn_of_the_attached_model_gathers_dense_statistics(face):
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    _impact, optimizer = face(model, drop_rate=0.5)
    data = batches(4)
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    plain = copy.deepcopy(model)
    masked_statistics = model[1].running_mean.clone()
    update_bn([x for x, _ in data], model)
    update_bn([x for x, _ in data], plain)
    assert_same(model.state_dict(), plain.state_dict())
    assert not torch.equal(model[1].running_mean, masked_statistics)


@every_face
def test_statistics_that_a_loop_renews_by_training_passes_are_those_of_the_dense_network(face):
    model, data = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), torch.randn(4, 16, 8)
    face(model, drop_rate=0.5)
    plain = copy.deepcopy(model)
    for network in (model, plain):
        network[1].momentum = None  # the mean over all batches, as Lightning's weight averaging takes it
        network[1].reset_running_stats()
        for x in data:
            network(x)
    assert_same(model, plain)


@every_face
def test_training_while_statistics_are_renewed_is_an_error(face):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    _, optimizer = face(model, drop_rate=0.5)
    model[1].momentum = None
    model(torch.randn(16, 8)).square().sum().backward()
    with pytest.raises(RuntimeError, match="set momentum=None before the module is attached"):
        optimizer.step()


@every_face
def test_batch_norm_that_never_had_a_momentum_trains_with_masks(face):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)), torch.randn(16, 8)
    _, optimizer = face(model, drop_rate=0.5)
    dense = copy.deepcopy(model)
    assert not torch.equal(model(x), dense(x))
    model(x).square().sum().backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------ architectures


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.emb(tokens))), self.emb.weight)


class TiedModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.emb(tokens)))


class Shared(nn.Module):
    """One layer called twice, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.randn(6, 5), torch.randn(5, 4)])
        self.named = nn.ParameterDict({"left": torch.randn(4, 3), "bias": torch.randn(3)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.listed:
            x = torch.tanh(x @ weight)
        return (
            x @ self.named["left"] + self.named["bias"] + x @ self.listed[1].t() @ self.listed[1] @ self.named["left"]
        )


class Bare(nn.Module):
    """Weights that the root itself reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.weight) * self.scale) + (x @ self.weight).sum()


class Experts(nn.Module):
    """Modules that are reached by index, and a part whose gradient is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 4) for _ in range(2)])
        self.by_name = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        mixed = sum(share[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.by_name["used"](mixed)


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(6, 5), nn.GRUCell(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lstm(x)
        return self.gru(self.lstm(x, hidden)[0])


class KeywordAttention(nn.Module):
    """Keys and values of other sizes than the queries: three projections instead of one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True, add_bias_kv=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(query, key, value, need_weights=True)


class PairedBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x.flip(0))


def conv_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 2, 2)
    )
    return net.to(memory_format=torch.channels_last)


def hooked_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))


def pruned_by_torch() -> nn.Module:
    net = mlp()
    prune.random_unstructured(net[0], "weight", 0.5)
    return net


def vector() -> tuple[Tensor]:
    return (torch.randn(7, 6),)


def tokens() -> tuple[Tensor]:
    return (torch.randint(11, (4, 5)),)


def sequence() -> tuple[Tensor]:
    return (torch.randn(4, 5, 8),)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "mlp": (mlp, vector),
    "root is a layer": (lambda: nn.Linear(6, 3), vector),
    "conv channels_last": (
        conv_net,
        lambda: (torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),),
    ),
    "lstm": (lambda: nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True, proj_size=3), sequence),
    "lstm inside": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 6, batch_first=True)), sequence),
    "gru": (lambda: nn.GRU(8, 6, 2, batch_first=True), sequence),
    "rnn cells": (Cells, vector),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: sequence() * 3,
    ),
    "attention of other sizes": (
        KeywordAttention,
        lambda: (torch.randn(2, 5, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 5)),
    ),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True),
        sequence,
    ),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        ),
        sequence,
    ),
    "tied embedding": (Tied, tokens),
    "tied modules": (TiedModules, tokens),
    "embedding bag": (lambda: nn.EmbeddingBag(11, 8), tokens),
    "shared": (Shared, vector),
    "parameter containers": (Containers, vector),
    "bare parameter": (Bare, vector),
    "experts": (Experts, vector),
    "bilinear": (PairedBilinear, vector),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3)), vector),
    "weight_norm by hook": (hooked_weight_norm, vector),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 3)), vector),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 5)), nn.Linear(5, 3)), vector),
    "torch prune": (pruned_by_torch, vector),
}


@pytest.mark.parametrize(("build", "inputs"), ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_training_sees_masked_weights_and_gets_the_dense_gradient(build, inputs):
    model, plain = build(), build()
    optimizer = ImpactSGD(model, lr=0.05, momentum=0.9, drop_rate=0.3, importance_lr=0.1)
    for _ in range(3):
        args = inputs()
        before = clones(model)
        plain.load_state_dict(model.state_dict())
        weights = masked_weights(model, optimizer)
        assert any(not torch.equal(weights[name], before[name]) for name in before)

        output = model(*args)
        expected = functional_call(plain, weights, args)
        torch.testing.assert_close(output, expected)
        numbers(output).backward()
        numbers(expected).backward()
        for name, p in model.named_parameters():
            assert (p.grad is None) == (weights[name].grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, weights[name].grad)

        assert_same(clones(model), before)
        assert_same(model.state_dict(), plain.state_dict())  # buffers have moved alike, weights not at all
        with torch.no_grad():  # where attention takes its fast path
            dense = plain(*args), plain.eval()(*args)
            torch.testing.assert_close(model(*args), dense[0])
            torch.testing.assert_close(model.eval()(*args), dense[1])
        torch.testing.assert_close(detached(model(*args)), detached(plain(*args)))
        model.train()
        plain.train()
        strides = [p.stride() for p in model.parameters()]
        optimizer.step()
        assert strides == [p.stride() for p in model.parameters()]
        for name, p in model.named_parameters():
            assert not torch.equal(p, before[name]) or p.grad is None or not p.grad.any()
        optimizer.zero_grad()


@pytest.mark.parametrize("trained", [True, False])
def test_submodule_in_eval_mode_stays_dense(trained):
    """As a frozen backbone does: under a training root it computes with its dense weights and takes the plain step."""

    def build() -> nn.Sequential:
        model = nn.Sequential(mlp(), nn.Linear(3, 3))
        model[0].requires_grad_(trained)
        model[0].eval()
        return model

    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    # Read off a twin, for the masks that factors() has shown are those the next step counts with.
    by = factors(twin, ImpactSGD(twin, lr=0.1, drop_rate=0.5))["1.weight"]
    before = clones(model)
    weights = clones(model)
    weights["1.weight"] = weights["1.weight"] * by
    weights = {name: w.requires_grad_() for name, w in weights.items()}

    x, y = batches(1)[0]
    loss = F.cross_entropy(model(x), y)
    expected = F.cross_entropy(functional_call(twin, weights, x), y)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    optimizer.step()
    assert not by.all()
    for name, p in model.named_parameters():
        gradient = weights[name].grad * (by if name == "1.weight" else 1.0)
        moves = trained or name.startswith("1.")
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * gradient if moves else before[name])


def test_freezing_and_unfreezing_on_the_way():
    """A frozen tensor rests bit for bit, is not masked, and the others have the budget for themselves."""
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 6))
    optimizer = ImpactSGD(model, lr=0.1, momentum=0.9, drop_rate=0.3, importance_lr=0.1, kl_weight=0.3)
    matrices = [model[0].weight, model[2].weight, model[4].weight]

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(20, 30)).square().mean().backward()
            optimizer.step()

    def assert_budget(active: list[Tensor]) -> None:
        keep = torch.cat([optimizer.keep_probability(p).flatten() for p in active])
        importances = torch.cat([optimizer.importance(p).flatten() for p in active])
        assert keep.mean().item() == pytest.approx(0.7, abs=1e-3)
        assert importances.mean().item() == pytest.approx(1.0, abs=1e-3)
        assert importances.std() > 0.1

    train(6)
    assert_budget(matrices)
    for frozen in (0, 4):
        model[frozen].requires_grad_(False)
        rest = [p for p in matrices if p.requires_grad]
        before = clones(model[frozen])
        ratios = optimizer.importance(model[frozen].weight).log()
        assert_budget(rest)
        for _ in range(4):
            assert torch.equal(factors(model, optimizer)[f"{frozen}.weight"], torch.ones_like(model[frozen].weight))
            train(1)
            assert_budget(rest)
        assert_same(clones(model[frozen]), before)

        model[frozen].requires_grad_(True)
        assert_budget(matrices)
        change = optimizer.importance(model[frozen].weight).log() - ratios
        torch.testing.assert_close(change, change.mean().expand_as(change), rtol=0, atol=1e-4)
        assert (factors(model, optimizer)[f"{frozen}.weight"] == 0).any()
        for _ in range(4):
            train(1)
            assert_budget(matrices)
        assert not torch.equal(model[frozen].weight, before["weight"])


# ------------------------------------------------------------------------------------------ networks


def resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=4), (torch.randn(4, 3, 32, 32),)


def vit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # begins at zero
    return model, (torch.randn(4, 3, 16, 16),)


def gpt() -> tuple[nn.Module, tuple[Tensor, ...]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config), (torch.randint(13, (4, 8)),)


def logits(model: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    output = model(*args)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize(
    "context",
    [
        torch.autograd.graph.save_on_cpu,
        torch.autograd.detect_anomaly,
        torch.autograd.profiler.profile,
        lambda: FlopCounterMode(display=False),
    ],
    ids=["save_on_cpu", "detect_anomaly", "profile", "FlopCounterMode"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_tools_around_a_step_change_nothing(context):
    x, y = batches(1)[0]
    found = []
    for tool in (nullcontext, context):
        torch.manual_seed(1)
        model = mlp()
        optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3)
        for _ in range(2):
            optimizer.zero_grad()
            with tool():
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        found.append(clones(model))
    assert_same(found[1], found[0])


@every_face
@pytest.mark.parametrize("network", [resnet, vit, gpt])
def test_a_network_trains_in_a_loop_with_one_line_swapped(network, face):
    """Masked in training, wherever its layers read their weights; dense in evaluation; and the loss falls."""
    torch.manual_seed(0)
    model, args = network()
    target = args[0] if network is gpt else torch.arange(4)
    impact, optimizer = face(model, drop_rate=0.1, lr=0.02 if face is FACES[0] else 1e-3)

    def loss() -> Tensor:
        return F.cross_entropy(logits(model, args).flatten(0, -2), target.flatten())

    losses = []
    steps = 3 if network is resnet else 8
    for step in range(steps):
        before = clones(model)
        with torch.no_grad(), impact.masked():
            masked = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        model.train()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if step == steps - 1:
            plain = copy.deepcopy(model)
            expected = functional_call(plain, masked, args)
            expected = F.cross_entropy(
                (expected if isinstance(expected, Tensor) else expected.logits).flatten(0, -2), target.flatten()
            )
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
            expected.backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad, masked[name].grad, rtol=1e-3, atol=1e-4)
            assert not torch.isclose(value, F.cross_entropy(logits(plain, args).flatten(0, -2), target.flatten()))
        assert_same(clones(model), before)
        optimizer.step()
        losses.append(value.item())

    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, args), logits(copy.deepcopy(model), args), rtol=0, atol=0)
    assert losses[-1] < losses[0]
    untouched = {name for name, p in model.named_parameters() if torch.equal(masked[name], before[name])}
    assert all(p.dim() < 2 or sum(n > 1 for n in p.shape) < 2 for n, p in model.named_parameters() if n in untouched)
    assert len(untouched) < len(before)


# ------------------------------------------------------------------------------------------ functional, export


def test_functional_call_with_other_weights_uses_them():
    model = mlp()
    optimizer = ImpactSGD(model, drop_rate=0.5)
    plain = copy.deepcopy(model)
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(4, 6)
    assert torch.equal(functional_call(model, other, x), functional_call(plain, other, x))
    some = {"0.weight": other["0.weight"]}
    weights = {**masked_weights(model, optimizer), **some}
    torch.testing.assert_close(functional_call(model, some, x), functional_call(plain, weights, x))


def test_per_sample_gradients_with_torch_func():
    model = mlp()
    ImpactSGD(model, drop_rate=0.5)
    plain = copy.deepcopy(model)
    weights = clones(model)
    x, y = batches(1)[0]

    def per_sample(module: nn.Module) -> dict[str, Tensor]:
        def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(module, w, x[None]), y[None])

        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)

    assert_same(per_sample(model), per_sample(plain))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("transform", ["vmap", "jacrev", "jvp", "hessian"])
def test_function_transforms_of_the_input(transform):
    """The module itself under torch.func: masked in training, like any call of it."""
    model = mlp()
    optimizer = ImpactSGD(model, drop_rate=0.5)
    plain = copy.deepcopy(model)
    weights = {name: w.detach() for name, w in masked_weights(model, optimizer).items()}
    x = torch.randn(4, 6)

    def apply(f: Callable[[Tensor], Tensor]) -> Any:
        if transform == "vmap":
            return torch.vmap(f)(x)
        if transform == "jvp":
            return torch.func.jvp(f, (x,), (torch.ones_like(x),))
        if transform == "jacrev":
            return torch.func.jacrev(f)(x)
        return torch.func.hessian(lambda x: f(x).sum())(x[0])

    torch.testing.assert_close(
        detached(apply(model)), detached(apply(lambda x: functional_call(plain, weights, x))), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("order", ["input", "weights"])
def test_double_backward(order):
    """A penalty on the gradient, as WGAN-GP has it on that of the input and sharpness terms on that of the weights."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 3))
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3)
    weights = masked_weights(model, optimizer)
    x, y = batches(1)[0]

    def penalty(output: Tensor, x: Tensor, leaves: list[Tensor]) -> Tensor:
        inputs = [x] if order == "input" else leaves
        gradients = torch.autograd.grad(F.cross_entropy(output, y), inputs, create_graph=True)
        return sum((g.norm() - 1).square() for g in gradients)

    x = x.requires_grad_()
    loss = penalty(model(x), x, list(model.parameters()))
    loss.backward()
    expected = penalty(functional_call(copy.deepcopy(model), weights, x), x, list(weights.values()))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        if weights[name].grad is not None:
            torch.testing.assert_close(p.grad, weights[name].grad)
    assert sum(w.grad is not None for w in weights.values()) >= 3


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_an_attached_model(strict):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    optimizer.step()
    model.eval()
    exported = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), model(x))
    assert_same({name: exported.state_dict[name].detach() for name in model.state_dict()}, dict(model.state_dict()))
    # and the optimizer goes on
    model.train()
    masked = model(x)
    assert not torch.allclose(masked, copy.deepcopy(model)(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_trace_of_an_attached_model():
    model = mlp()
    ImpactSGD(model, lr=0.1, drop_rate=0.5)
    x = torch.randn(2, 6)
    traced = torch.jit.trace(model.eval(), x)
    torch.testing.assert_close(traced(x + 1), copy.deepcopy(model)(x + 1))


# ------------------------------------------------------------------------------------------ checkpointing


class Checkpointed(nn.Module):
    """Blocks that the backward pass computes again; ``how`` says what is handed to checkpoint()."""

    def __init__(self, how: str, use_reentrant: bool | None) -> None:
        super().__init__()
        self.how, self.use_reentrant = how, use_reentrant
        self.stem = nn.Linear(6, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(2)])
        self.bare = nn.Parameter(torch.randn(16, 16) / 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            parts = {
                "block": block,
                "function of layers": lambda h, block=block: block[2](torch.tanh(block[0](h))),
                "function of a weight": lambda h, block=block: F.linear(torch.tanh(h @ self.bare), block[0].weight),
            }
            run = parts[self.how]
            x = x + (run(x) if self.use_reentrant is None else checkpoint(run, x, use_reentrant=self.use_reentrant))
        return self.head(x)


@every_face
@pytest.mark.parametrize("how", ["block", "function of layers", "function of a weight"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_has_the_gradients_of_the_plain_pass(how, use_reentrant, face):
    plain, checkpointed = Checkpointed(how, None), Checkpointed(how, use_reentrant)
    checkpointed.load_state_dict(plain.state_dict())
    engines = [face(model, drop_rate=0.3) for model in (plain, checkpointed)]
    optimizers = [optimizer for _, optimizer in engines]
    for x, y in batches(3):
        losses = []
        for model, optimizer in zip((plain, checkpointed), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0])
        for expected, p in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            assert (p.grad is None) == (expected.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, expected.grad)
        for optimizer in optimizers:
            optimizer.step()


# ------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):  # all blocks of "by block" count as one function
        yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def compiled(
    way: str, model: nn.Module, backend: Any, make: Callable[..., tuple[Any, Any]], **options: Any
) -> tuple[nn.Module, tuple[Any, Any]]:
    """What the loop calls; the engine and the optimizer."""
    if way == "wrapper":
        called = torch.compile(model, backend=backend, fullgraph=True)
        return called, make(called, **options)
    if way == "wrapped afterwards":
        made = make(model, **options)
        return torch.compile(model, backend=backend), made
    if way == "in place":
        model.compile(backend=backend)
        return model, make(model, **options)
    if way == "in place afterwards":
        made = make(model, **options)
        model.compile(backend=backend)
        return model, made
    assert way == "by block"
    for block in model.children():
        block.compile(backend=backend, fullgraph=True)
    return model, make(model, **options)


WAYS = pytest.mark.parametrize("way", ["wrapper", "wrapped afterwards", "in place", "in place afterwards", "by block"])


def check_compiled(
    way: str, build: Callable[[], nn.Module], inputs: list[tuple], backend: Any, face: Face = FACES[0]
) -> list[int]:
    """Trains a compiled model beside an eager one and returns the number of compilations after each step."""
    model = build()
    eager = copy.deepcopy(model)
    options = {"drop_rate": 0.3, "seed": 5}
    called, (_impact, optimizer) = compiled(way, model, backend, face, **options)
    _eager_impact, eager_optimizer = face(eager, **options)
    compilations = []
    for args in inputs:
        dense = numbers(copy.deepcopy(eager)(*args))
        losses = []
        for module, which in ((called, optimizer), (eager, eager_optimizer)):
            module.train()
            which.zero_grad()
            loss = numbers(module(*args))
            loss.backward()
            which.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
        assert not torch.isclose(losses[1], dense, rtol=1e-3)
        for expected, p in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)

        called.eval()
        with torch.no_grad():
            torch.testing.assert_close(called(*args), copy.deepcopy(eager).eval()(*args), rtol=1e-4, atol=1e-4)
        compilations.append(getattr(backend, "frame_count", 0))
    return compilations


@pytest.mark.parametrize(
    ("way", "face"),
    [*((way, FACES[0]) for way in WAYS.args[1]), ("wrapper", FACES[1]), ("in place", FACES[2])],
    ids=lambda value: getattr(value, "name", value),
)
def test_compiled_model_is_masked_in_training_and_dense_in_evaluation(way, face, counter):
    compilations = check_compiled(way, mlp, [(x,) for x, _ in batches(6)], counter, face)
    assert compilations[0] > 0
    assert compilations[1:] == [compilations[1]] * 5, "compiles again at later steps"


FAST = {("wrapper", "transformer layer"), ("by block", "tied embedding"), ("wrapped afterwards", "bare parameter")}


@pytest.mark.parametrize(
    ("way", "architecture"),
    [
        pytest.param(way, architecture, marks=[] if (way, architecture) in FAST else pytest.mark.slow)
        for way in WAYS.args[1]
        for architecture in ("conv channels_last", "tied embedding", "transformer layer", "bare parameter")
    ],
)
def test_compiled_architectures(way, architecture, counter):
    build, inputs = ARCHITECTURES[architecture]
    compilations = check_compiled(way, build, [inputs() for _ in range(4)], counter)
    assert compilations[1:] == [compilations[1]] * 3, "compiles again at later steps"


@WAYS
@pytest.mark.slow
@pytest.mark.usefixtures("counter")
def test_compiled_by_inductor(way):
    check_compiled(way, mlp, [(x,) for x, _ in batches(4)], "inductor")


@pytest.mark.parametrize("way", [way if way == "wrapper" else slow(way) for way in WAYS.args[1]])
def test_compiled_model_under_a_drop_rate_that_decays_to_zero(way, counter):
    model = mlp()
    eager = copy.deepcopy(model)
    called, (_, optimizer) = compiled(way, model, counter, Face(torch.optim.SGD, ImpactSGD), lr=0.1, drop_rate=0.4)
    eager_optimizer = ImpactSGD(eager, lr=0.1, drop_rate=0.4)
    counts = []
    for step, (x, y) in enumerate(batches(8)):
        for module, which in ((called, optimizer), (eager, eager_optimizer)):
            which.param_groups[0]["drop_rate"] = max(0.4 - 0.1 * step, 0.0)
            which.zero_grad()
            F.cross_entropy(module(x), y).backward()
            which.step()
        for expected, p in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert len(set(counts[:4])) == 1
    assert len(set(counts[4:])) == 1


# ------------------------------------------------------------------------------------------ several optimizers


def test_gan_with_two_optimizers():
    """Alternately trained, each masks its own network, keeps its own masks and moves nothing else."""
    generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6))
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(), nn.Linear(16, 1))
    options = {"lr": 0.05, "momentum": 0.5}
    optimizer_g = ImpactSGD(generator, **options, drop_rate=0.2, seed=1)
    optimizer_c = ImpactSGD(critic, **options, drop_rate=0.3, seed=2)
    hand_g, hand_c = ByHand(generator, torch.optim.SGD, **options), ByHand(critic, torch.optim.SGD, **options)

    for _ in range(4):
        z, real = torch.randn(8, 4), torch.randn(8, 6)
        by_g, by_c = factors(generator, optimizer_g), factors(critic, optimizer_c)
        before = clones(generator)
        optimizer_c.zero_grad()
        (critic(generator(z).detach()).mean() - critic(real).mean()).backward()
        optimizer_c.step()
        assert_same(clones(generator), before)
        assert_same(factors(generator, optimizer_g), by_g)

        (hand_c(by_c, hand_g(by_g, z).detach()).mean() - hand_c(by_c, real).mean()).backward()
        hand_c.step()
        hand_c.assert_equals(critic)

        by_c = factors(critic, optimizer_c)
        before = clones(critic)
        optimizer_g.zero_grad()
        (-critic(generator(z)).mean()).backward()
        optimizer_g.step()
        assert_same(clones(critic), before)
        assert_same(factors(critic, optimizer_c), by_c)

        (-hand_c(by_c, hand_g(by_g, z)).mean()).backward()
        hand_g.step()
        hand_c.base.zero_grad()
        hand_g.assert_equals(generator)


def test_another_optimizer_for_the_rest_of_the_model():
    model = mlp()
    optimizer = ImpactSGD(list(model[:3].parameters()), lr=0.1, drop_rate=0.3)
    optimizer.attach(model)
    adam = torch.optim.AdamW(model[4].parameters(), lr=0.01)
    by_hand = ByHand(model, torch.optim.SGD, lr=0.1)
    hand_adam = torch.optim.AdamW([by_hand.weights["4.weight"], by_hand.weights["4.bias"]], lr=0.01)
    by_hand.base = torch.optim.SGD([w for name, w in by_hand.weights.items() if name[0] != "4"], lr=0.1)
    for x, y in batches(4):
        by = factors(model, optimizer)
        assert torch.equal(by["4.weight"], torch.ones(3, 16))
        F.cross_entropy(model(x), y).backward()
        for which in (optimizer, adam):
            which.step()
            which.zero_grad()
        F.cross_entropy(by_hand(by, x), y).backward()
        for which in (by_hand.base, hand_adam):
            which.step()
            which.zero_grad()
        by_hand.assert_equals(model)


def test_optimizer_steps_inside_the_backward_pass():
    """One optimizer per parameter, stepped by a hook as soon as its gradient is there."""
    model = mlp()
    optimizers = {
        p: ImpactSGD([p], lr=0.1, momentum=0.9, drop_rate=0.3, seed=i) for i, p in enumerate(model.parameters())
    }
    for optimizer in optimizers.values():
        optimizer.attach(model)

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    by_hand = ByHand(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    for x, y in batches(4):
        by = {name: factors(model, optimizers[p])[name] for name, p in model.named_parameters()}
        assert sum((f == 0).any().item() for f in by.values()) == 3
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(by_hand(by, x), y).backward()
        by_hand.step()
        by_hand.assert_equals(model)
