"""Masks that cannot leak: what the forward pass sees, and what everything else sees."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import FACES, assert_same, clones, every_face, train
from torch import nn
from torch.func import functional_call

from impact_optim import Impact, ImpactSGD, simplex
from impact_optim.masking import MaskedWeight


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def build(drop_rate=0.4, **options):
    model = network()
    return model, ImpactSGD(model, lr=0.05, momentum=0.9, drop_rate=drop_rate, **options)


def assert_dense(model, dense):
    for name, p in model.named_parameters():
        assert torch.equal(p, dense[name]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, dense[name]), name
    for module in model.modules():
        for name, p in dict(module._parameters).items():
            assert getattr(module, name) is p, f"{name} is still masked"
            assert module._parameters[name] is p


def masked_weights(model):
    """What a training forward pass of the model uses, caught where the layers read it."""
    caught, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hook = lambda m, _, name=name: caught.__setitem__(f"{name}.weight", m.weight.detach().clone())  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    model(x)
    for handle in handles:
        handle.remove()
    return caught


x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@every_face
def test_training_passes_see_masked_weights_and_everything_else_the_dense_ones(face):
    model = network()
    _impact, _ = face(model, drop_rate=0.4)  # masks end with it
    dense = clones(model)
    seen = masked_weights(model)
    for name, z in seen.items():
        dropped = z == 0
        assert 0.2 < dropped.float().mean() < 0.6
        torch.testing.assert_close(z[~dropped], dense[name][~dropped] / 0.6)
    assert_dense(model, dense)


@every_face
def test_the_gradient_is_dense_and_taken_at_the_masked_weights(face):
    model = network()
    _impact, _ = face(model, drop_rate=0.4)  # masks end with it
    seen = masked_weights(model)
    model(x).square().sum().backward()
    weights = {**clones(model), **seen}
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    copy.deepcopy(model)  # not attached; only its structure is used
    functional_call(nn.Sequential(*model), weights, (x,)).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad)
    assert (model[2].weight.grad[seen["2.weight"] == 0] != 0).any()


@every_face
def test_the_base_steps_with_the_masked_gradient_and_gives_back_the_dense_one(face):
    """So a dropped weight moves by what the base remembers, and by decay, only."""
    model = network()
    _, optimizer = face(model, drop_rate=0.4)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    plain = face.plain(weights)
    for _ in range(4):
        seen = masked_weights(model)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        for (name, p), q in zip(model.named_parameters(), weights, strict=True):
            factor = torch.where(seen[name] == 0, 0.0, seen[name] / p.detach()) if name in seen else 1.0
            q.grad = p.grad * factor
        optimizer.step()
        plain.step()
        for p, q, grad in zip(model.parameters(), weights, grads, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
            assert torch.equal(p.grad, grad)


@every_face
@pytest.mark.parametrize("attached", [True, False])
def test_without_a_drop_rate_it_is_the_base_bit_for_bit(face, attached):
    model, twin = network(), network()
    _, optimizer = face(model if attached else model.parameters(), drop_rate=0.0)
    plain = face.plain(twin)
    losses = [train(o, lambda m=m: m(x).square().mean()) for m, o in ((model, optimizer), (twin, plain))]
    assert_same(losses[0], losses[1])
    assert_same(model, twin)


@every_face
def test_the_mask_lasts_until_the_step(face):
    model = network()
    _, optimizer = face(model, drop_rate=0.4)
    first = masked_weights(model)
    again = masked_weights(model)
    model(x).sum().backward()
    optimizer.zero_grad()
    third = masked_weights(model)
    model(x).sum().backward()
    optimizer.step()
    after = masked_weights(model)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], third[name])
        assert not torch.equal(first[name] == 0, after[name] == 0)


@every_face
@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode"])
def test_evaluation_is_dense_also_in_the_middle_of_a_step(mode, face):
    model = network()
    _impact, _ = face(model, drop_rate=0.4)  # masks end with it
    expected = functional_call(copy.deepcopy(model).eval(), clones(model), (x,))
    loss = model(x).sum()
    if mode == "eval":
        model.eval()
        torch.testing.assert_close(model(x), expected)
        model.train()
    else:
        with getattr(torch, mode)():
            torch.testing.assert_close(model(x), expected)
    loss.backward()  # the graph of the masked pass is whole
    masked = masked_weights(model)
    assert (masked["2.weight"] == 0).any()


@every_face
@pytest.mark.parametrize("where", ["forward", "hook", "backward"])
def test_an_exception_leaves_the_weights_dense(where, face):
    model = network()
    _, optimizer = face(model, drop_rate=0.4)
    dense = clones(model)

    def fail(*_):
        raise ValueError("on purpose")

    if where == "forward":
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 9))
    elif where == "hook":
        handle = model[2].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            model(x)
        handle.remove()
    else:
        out = model(x)
        out.register_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            out.sum().backward()
    assert_dense(model, dense)
    model(x).sum().backward()
    optimizer.step()


def interrupt_forward(model):
    """Ctrl-C in the middle of a forward pass, which torch's hooks do not get to see."""

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()


def test_a_keyboard_interrupt_in_a_forward_pass_does_not_reach_checkpoints_or_evaluation():
    model, optimizer = build()
    dense = clones(model)
    expected = functional_call(copy.deepcopy(model).eval(), dense, (x,))
    interrupt_forward(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, dense[name])
    model.eval()
    torch.testing.assert_close(model(x), expected)
    assert_dense(model, dense)
    model.train()
    model(x).sum().backward()
    optimizer.step()
    assert_dense(model, clones(model))


def test_a_module_that_calls_itself_is_masked_once():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, h, depth=2):
            h = self.layer(h)
            return h if depth == 0 else self(h, depth - 1)

    model = Recursive()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    seen = []
    model.layer.register_forward_pre_hook(lambda m, _: seen.append(m.weight))
    model(torch.randn(2, 4))
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]
    assert (seen[0] == 0).any()
    assert model.layer.weight is model.layer._parameters["weight"]
    assert list(optimizer._masking.attached()) == [model]


def test_a_part_that_is_called_by_itself_is_masked_too():
    model, optimizer = build()
    model[0](x).sum().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert (model[0].weight == before).any()  # dropped, and so left where it was
    assert not torch.equal(model[0].weight, before)


def test_parts_in_eval_mode_stay_dense():
    model, optimizer = build()
    model[2].eval()
    seen = masked_weights(model)
    assert torch.equal(seen["2.weight"], model[2].weight)
    assert (seen["0.weight"] == 0).any()
    model(x).sum().backward()
    before, grad = model[2].weight.detach().clone(), model[2].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model[2].weight, before - 0.05 * grad)


def test_copies_and_pickles_are_plain_modules():
    model, optimizer = build()
    loss = model(x).sum()
    dense = clones(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert_dense(other, dense)
        torch.testing.assert_close(other.train()(x), other.eval()(x))
    loss.backward()
    optimizer.step()
    for other in copies:
        assert_dense(other, dense)


@pytest.mark.parametrize("face", FACES[:2], ids=lambda face: face.name)
def test_copies_of_the_optimizer_are_attached_to_nothing(face):
    model = network()
    _, optimizer = face(model, drop_rate=0.4)
    model(x).sum().backward()
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert list(other._masking.attached()) == []
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="attach"):
            other.step()


@pytest.mark.parametrize("face", FACES[:2], ids=lambda face: face.name)
def test_a_copied_pair_trains_like_the_original(face):
    model = network()
    _, optimizer = face(model, drop_rate=0.4)
    model(x).sum().backward()
    optimizer.step()
    other_model, other = copy.deepcopy((model, optimizer))
    other.attach(other_model)
    for m, o in ((model, optimizer), (other_model, other)):
        for _ in range(3):
            o.zero_grad()
            m(x).square().sum().backward()
            o.step()
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)


@every_face
def test_weight_averages_hold_dense_weights(face):
    model = network()
    _, optimizer = face(model, drop_rate=0.4)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, p, n: p)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).sum()
        average.update_parameters(model)  # even between forward and backward
        for p, q in zip(average.module.parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q)
        loss.backward()
        optimizer.step()
    average.update_parameters(model)
    torch.testing.assert_close(average.train()(x), model.eval()(x))


@every_face
def test_detach_ends_it_and_attach_begins_it_again(face):
    model = network()
    impact, optimizer = face(model, drop_rate=0.4)
    impact.detach(model)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all(type(vars(m)["_parameters"]) is dict for m in model.modules())
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"no forward pass can see the masks of .*: pass the module"):
        optimizer.step()
    impact.attach(model)
    impact.attach(model)  # twice is once
    assert all(len(m._forward_pre_hooks) == 1 for m in model.modules())
    model(x).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="not attached"):
        impact.detach(nn.Linear(2, 2))


@pytest.mark.parametrize("backward", [False, True])
def test_gradients_of_passes_in_eval_mode_are_dense_and_so_is_the_step(backward):
    model, optimizer = build()
    loss = model(x).sum()  # masked, and thrown away: the loss, or its gradients
    if backward:
        loss.backward()
        optimizer.zero_grad()
    model.eval()
    model(x).sum().backward()
    before = clones(model)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.05 * p.grad)


def test_two_optimizers_on_disjoint_parts_of_one_model():
    model, _ = build()
    first = ImpactSGD(model[0].parameters(), drop_rate=0.5)
    second = ImpactSGD(model[2].parameters(), drop_rate=0.5, seed=1)
    first.attach(model)
    second.attach(model)
    seen = masked_weights(model)
    assert (seen["0.weight"] == 0).any()
    assert (seen["2.weight"] == 0).any()
    assert (seen["4.weight"] != 0).all()
    model(x).sum().backward()
    first.step()
    still = masked_weights(model)
    assert torch.equal(still["2.weight"] == 0, seen["2.weight"] == 0)  # the other's step does not end its mask
    second.step()


def test_of_two_optimizers_that_share_parameters_the_last_one_attached_counts():
    model, first = build()
    second = ImpactSGD(model, lr=0.05, drop_rate=0.4, rescale="none")
    dense = clones(model)
    seen = masked_weights(model)
    for name, z in seen.items():
        assert torch.equal(z[z != 0], dense[name][z != 0])
    model(x).sum().backward()
    second.step()
    with pytest.raises(RuntimeError, match="another optimizer with masks has since been attached"):
        first.step()


def test_one_optimizer_on_two_models():
    one, _ = build()
    two, _ = build()
    optimizer = ImpactSGD([*one.parameters(), *two.parameters()], drop_rate=0.5)
    optimizer.attach(one)
    optimizer.attach(two)
    for model in (one, two):
        assert (masked_weights(model)["0.weight"] == 0).any()
    (one(x) + two(x)).sum().backward()
    optimizer.step()
    optimizer.detach()
    assert torch.equal(masked_weights(two)["0.weight"], two[0].weight)


@every_face
def test_an_optimizer_that_is_gone_masks_nothing(face):
    model = network()
    impact, optimizer = face(model, drop_rate=0.4)
    gone = [weakref.ref(impact), weakref.ref(optimizer)]
    del impact, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    torch.testing.assert_close(model.train()(x), copy.deepcopy(model).eval()(x))


def test_layers_added_later_are_plain_until_the_optimizer_has_them():
    model, optimizer = build()
    model.append(nn.Linear(3, 3))
    model(x).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": model[5].parameters(), "drop_rate": 0.7})
    seen = masked_weights(model)
    assert (seen["5.weight"] == 0).any()


def test_one_engine_around_several_optimizers_masks_for_each():
    """As people pair Muon for the matrices with AdamW for the rest."""
    model = network()
    optimizers = [
        torch.optim.Muon([model[2].weight], lr=0.02),
        torch.optim.AdamW([p for p in model.parameters() if p is not model[2].weight], lr=0.01),
    ]
    impact = Impact(model, optimizers, drop_rate=0.4)
    for _ in range(3):
        dense, seen = clones(model), masked_weights(model)
        assert all((z == 0).any() for z in seen.values())
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(not torch.equal(p, dense[name]) for name, p in model.named_parameters())
    assert impact.importance(model[2].weight).std() > 0


@every_face
def test_dropping_the_name_of_the_engine_does_not_end_it(face):
    model = network()
    _, optimizer = face(model, drop_rate=0.4)
    gc.collect()
    seen = masked_weights(model)
    model(x).sum().backward()
    optimizer.step()
    assert (seen["0.weight"] == 0).any()


class TestMaskedScope:
    @every_face
    def test_masks_in_place_and_restores(self, face):
        p = nn.Parameter(torch.randn(20, 20))
        b = nn.Parameter(torch.randn(20))
        impact, optimizer = face([p, b], drop_rate=0.5)
        dense, bias = p.detach().clone(), b.detach().clone()
        with impact.masked():
            assert 0.3 < (p == 0).float().mean() < 0.7
            assert torch.equal(b, bias)
            (p.sum() + b.sum()).backward()
        assert torch.equal(p, dense)
        optimizer.step()
        assert not torch.equal(p, dense)

    def test_attach_and_scope_see_the_same_mask(self):
        model, optimizer = build()
        seen = masked_weights(model)
        with optimizer.masked():
            assert torch.equal(model[0].weight, seen["0.weight"])
            caught = masked_weights(model)  # not masked twice
        assert torch.equal(caught["0.weight"], seen["0.weight"])

    def test_an_exception_restores(self):
        model, optimizer = build()
        dense = clones(model)
        with pytest.raises(ValueError, match="on purpose"), optimizer.masked():
            raise ValueError("on purpose")
        assert_dense(model, dense)

    def test_a_backward_pass_outside_is_an_error_not_a_wrong_gradient(self):
        p = nn.Parameter(torch.randn(4, 4))
        optimizer = ImpactSGD([p], drop_rate=0.5)
        with optimizer.masked():
            loss = p.square().sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_a_step_inside_restores_first(self):
        p = nn.Parameter(torch.randn(4, 4))
        optimizer = ImpactSGD([p], lr=0.1, drop_rate=0.5)
        dense = p.detach().clone()
        with optimizer.masked():
            factor = p.detach() / dense
            p.sum().backward()
            optimizer.step()
            torch.testing.assert_close(p.detach(), dense - 0.1 * factor)
        torch.testing.assert_close(p.detach(), dense - 0.1 * factor)

    def test_nesting_is_an_error(self):
        model, optimizer = build()
        dense = clones(model)
        with pytest.raises(RuntimeError, match="nested"), optimizer.masked(), optimizer.masked():
            pass
        assert_dense(model, dense)


class TestExpected:
    def test_is_x_times_pi_without_rescaling(self):
        model, optimizer = build(rescale="none", importance_lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        dense = clones(model)
        keep = {name: optimizer.keep_probability(p) for name, p in model.named_parameters()}
        with optimizer.expected():
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.detach(), dense[name] * keep[name])
        assert_dense(model, dense)

    def test_is_the_dense_network_with_rescaling(self):
        model, optimizer = build()
        dense = clones(model)
        with optimizer.expected():
            assert_dense(model, dense)

    @pytest.mark.parametrize("rescale", ["inverse", "none"])
    def test_is_the_mean_of_the_masked_weights(self, rescale):
        p = nn.Parameter(torch.randn(30, 30))
        optimizer = ImpactSGD([p], lr=0.0, drop_rate=0.4, rescale=rescale, keep_floor=0.2, importance_lr=0.0)
        total = torch.zeros_like(p)
        for _ in range(400):
            with optimizer.masked():
                total += p.detach()
                p.grad = torch.zeros_like(p)
            optimizer.step()
        with optimizer.expected():
            torch.testing.assert_close(total / 400, p.detach(), atol=0.5, rtol=0)
            assert ((total / 400 - p.detach()).abs().mean() < 0.05).item()


def test_a_kept_loss_keeps_no_masked_weights():
    model, optimizer = build()
    losses, sizes = [], []
    for step in range(6):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        losses.append(loss)  # with its graph, as careless loops do
        loss.backward()
        optimizer.step()
        del loss
        if step in (1, 5):
            gc.collect()
            kinds = (torch.Tensor, MaskedWeight)
            sizes.append(sum(type(t) in kinds and t.shape == (16, 16) for t in gc.get_objects()))
    assert sizes[1] == sizes[0]


def test_a_module_that_stores_its_output_can_die():
    class Storing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, h):
            self.out = self.layer(h)
            return self.out

    model = Storing()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_weights_thawed_after_the_first_pass_get_their_masks_too():
    model, optimizer = build()
    model[2].weight.requires_grad_(False)
    first = masked_weights(model)
    assert (first["2.weight"] != 0).all()
    model[2].weight.requires_grad_(True)
    second = masked_weights(model)
    assert torch.equal(first["0.weight"], second["0.weight"])
    assert (second["2.weight"] == 0).any()
    model[2].weight.requires_grad_(False)
    assert torch.equal(masked_weights(model)["2.weight"], model[2].weight)
    model(x).sum().backward()
    optimizer.step()


def test_a_model_that_was_frozen_for_one_pass_trains_again():
    model, optimizer = build()
    model.requires_grad_(False)
    model(x.clone().requires_grad_())
    model.requires_grad_(True)
    model(x).sum().backward()
    optimizer.step()


def test_parameters_that_nobody_attached_are_named():
    model, _ = build()
    other = nn.Linear(8, 3)
    optimizer = ImpactSGD([*model.parameters(), *other.parameters()], lr=0.1, drop_rate=0.4)
    optimizer.attach(model)
    (model(x) + other(x)).sum().backward()
    with pytest.raises(RuntimeError, match=r"can see the masks of param_groups\[0\]\['params'\]\[6\]"):
        optimizer.step()


@pytest.mark.parametrize("call", ["root without gradients", "part in eval", "root again"])
def test_after_a_keyboard_interrupt_every_call_finds_its_own_masks(call):
    model, _optimizer = build()
    dense = clones(model)
    interrupt_forward(model)
    if call == "root without gradients":
        with torch.no_grad():
            torch.testing.assert_close(model(x), functional_call(copy.deepcopy(model), dense, (x,)))
    elif call == "part in eval":
        model[0].eval()
        torch.testing.assert_close(model[0](x), nn.functional.linear(x, dense["0.weight"], dense["0.bias"]))
    else:
        assert (masked_weights(model)["2.weight"] == 0).any()
    assert_dense(model, dense)


def test_reading_out_changes_nothing():
    states = []
    for read in (False, True):
        model, optimizer = build()
        for step in range(6):
            if read:
                with torch.inference_mode():  # a sanity check before and during training
                    optimizer.importance_summary()
                    optimizer.importance(model[2].weight)
                    optimizer.keep_probability(model[0].weight)
                with optimizer.expected():
                    pass
            model[2].weight.requires_grad_(step not in (2, 3))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        states.append(optimizer.state_dict()["state"])
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])), name


class _NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"drop": "important"}, {"importance_lr": 0.1}, {"importance": "hypergradient"}, {"hold_zeros": True}],
)
def test_no_step_and_no_masked_pass_waits_for_a_device(foreach, options, monkeypatch):
    monkeypatch.setattr(simplex, "_may_wait", lambda tensors: False)  # as on a GPU
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 3))
    optimizer = ImpactSGD(model, lr=0.05, momentum=0.9, drop_rate=0.4, foreach=foreach, fused=False, **options)
    for _ in range(3):
        optimizer.zero_grad()
        with _NoWaiting():
            loss = model(x).square().sum()
        loss.backward()
        with _NoWaiting():
            optimizer.step()


def test_a_scope_that_cannot_be_entered_leaves_the_weights_dense(monkeypatch):
    model, optimizer = build()
    dense, multiply, calls = clones(model), torch.Tensor.mul_, []

    def fail_the_second_time(self, other):
        if self is model[2].weight:
            raise MemoryError("injected")
        calls.append(self)
        return multiply(self, other)

    with optimizer.masked():
        pass  # draws the masks
    monkeypatch.setattr(torch.Tensor, "mul_", fail_the_second_time)
    with pytest.raises(MemoryError), optimizer.masked():
        pass
    assert calls
    assert_dense(model, dense)


def test_expected_weights_are_bitwise_dense_where_nothing_is_capped():
    model, optimizer = build(importance_lr=0.1, kl_weight=3.0)
    for _ in range(10):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    dense = clones(model)
    assert optimizer.keep_probability(model[0].weight).min() > 0.06  # the cap is at (1 - 0.4) / 10
    assert optimizer.keep_probability(model[0].weight).std() > 0.01
    with optimizer.expected():
        assert_dense(model, dense)
