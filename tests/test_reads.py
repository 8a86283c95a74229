"""Forward passes that read or write their weights in ways of their own: masked, dense, or refused by name."""

import asyncio
import copy
import io
import pickle
import threading
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
from helpers import FACES, assert_same, clones, every_face, train
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from impact_optim import Impact, ImpactSGD

x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def dense_output(layer, h):
    return F.linear(h, layer.weight.detach(), layer.bias.detach())


def factors(model, optimizer):
    """What the masks of this step multiply every parameter with."""
    dense = clones(model)
    with torch.no_grad(), optimizer.masked():
        return {name: p.detach() / dense[name] for name, p in model.named_parameters()}


def assert_step_is_masked(model, optimizer, by):
    """With plain SGD of rate 1."""
    before = clones(model)
    optimizer.step()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.detach(), before[name] - p.grad * by.get(name, 1.0))


# ------------------------------------------------------------------------------------------ edits between passes

EDITS = {
    "data in place": lambda p: p.data.mul_(3),
    "data replaced": lambda p: setattr(p, "data", p.data * 3),
    "under no_grad": lambda p: torch.no_grad()(p.mul_)(3),
    "through detach": lambda p: p.detach().mul_(3),
    "through numpy": lambda p: p.detach().numpy().__imul__(3),
}


@every_face
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_between_passes_are_seen_by_the_next(edit, face):
    """Clipping of a WGAN critic, adversarial weights, exponential averages put in."""
    model = nn.Linear(8, 8, bias=False)
    _, optimizer = face(model, drop_rate=0.3)
    for _ in range(2):
        first = model(x)
        edit(model.weight)
        torch.testing.assert_close(model(x), 3 * first)
        model(x).sum().backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(x), x @ model.weight.t())


# ------------------------------------------------------------------------------------------ writes in forward


class Initialised(nn.Module):
    """Its first training pass sets the weights from the data, as ActNorm does."""

    def __init__(self, how):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(1, 8))
        self.how, self.is_new = how, True

    def forward(self, h):
        if self.is_new:
            self.is_new = False
            if self.how == "data":
                self.weight.data.fill_(5.0)
                self.scale.data.fill_(5.0)
            elif self.how == "data replaced":
                self.weight.data = torch.full((8, 8), 5.0)
                self.scale.data = torch.full((1, 8), 5.0)
            else:
                with torch.no_grad():
                    nn.init.constant_(self.weight, 5.0)
                    self.scale.copy_(torch.full((1, 8), 5.0))
        return h @ self.weight * self.scale


@every_face
@pytest.mark.parametrize("how", ["data", "data replaced", "no_grad"])
def test_what_a_forward_pass_writes_reaches_the_parameter_and_the_pass(how, face):
    model = Initialised(how)
    _impact, _ = face(model, drop_rate=0.3)
    first = model(x)
    assert (model.weight == 5).all()
    assert (model.scale == 5).all()
    torch.testing.assert_close(model(x), first)


@pytest.mark.parametrize("how", ["mul_", "init", "detach", "slice"])
def test_a_write_that_would_be_lost_is_refused_by_name(how):
    class Writing(nn.Linear):
        def forward(self, h):
            if how == "mul_":
                self.weight.mul_(2)
            elif how == "init":
                nn.init.ones_(self.weight)
            elif how == "detach":
                self.weight.detach().clamp_(-0.1, 0.1)
            else:
                self.weight[0] = 0
            return super().forward(h)

    model = nn.Sequential(Writing(8, 8))
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3)
    before = clones(model)
    with pytest.raises(RuntimeError, match=r"has written to 0\.weight in place.*no_grad.*drop_rate=0"):
        model(x)
    assert_same(clones(model), before)
    optimizer.param_groups[0]["drop_rate"] = 0.0
    optimizer.step()  # ends the mask that was read


def test_what_a_forward_pass_notes_on_its_weight_is_on_the_parameter():
    """BinaryNet keeps the real weights in an attribute of the parameter, which the loop clamps."""

    class Binarised(nn.Linear):
        def forward(self, h):
            if not hasattr(self.weight, "org"):
                self.weight.org = self.weight.data.clone()
            self.weight.data = self.weight.org.sign()
            assert isinstance(self.weight, nn.Parameter)
            assert self.weight.requires_grad
            return F.linear(h, self.weight, self.bias)

    model = nn.Sequential(Binarised(8, 8))
    optimizer = ImpactSGD(model, lr=1.0, drop_rate=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        out = model(x)
        assert set(model[0].weight.unique().tolist()) == {-1.0, 1.0}
        (out - 9 * x).square().mean().backward()
        model[0].weight.data.copy_(model[0].weight.org)
        optimizer.step()
        model[0].weight.org.copy_(model[0].weight.data.clamp_(-1, 1))
    assert model[0].weight.abs().max() <= 1


def test_hooks_that_a_forward_pass_registers_on_its_weight_are_on_the_parameter():
    class Hooked(nn.Linear):
        def forward(self, h):
            if not seen:
                self.weight.register_hook(lambda grad: seen.append(("gradient", grad.clone())))
                self.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("parameter", p)))
            return super().forward(h)

    seen = []
    model = nn.Sequential(Hooked(8, 8))
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, _ in seen] == ["gradient", "parameter"] * 2
    assert (seen[0][1] != 0).all()
    assert seen[1][1] is model[0].weight


def test_a_forward_pass_may_look_at_its_weight_in_any_way():
    class Looking(nn.Linear):
        def forward(self, h):
            assert self.weight in {self.weight}
            assert isinstance(self.weight, nn.Parameter)
            assert self.weight.shape == (8, 8)
            assert self.weight.grad is None or self.weight.grad.shape == (8, 8)
            assert repr(self.weight).startswith("Parameter")
            assert torch.equal(copy.copy(self.weight), self.weight.data)
            assert self.weight.detach().numpy().shape == (8, 8)
            assert str(self) == "Looking(in_features=8, out_features=8, bias=True)"
            return super().forward(h)

    model = Looking(8, 8)
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    for _ in range(2):
        assert not torch.allclose(model(x), dense_output(model, x))
        model(x).sum().backward()
    optimizer.step()


@every_face
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_keeps_to_its_max_norm(layer, face):
    torch.manual_seed(0)
    model, tokens = nn.Sequential(layer(10, 8, max_norm=1.0)), torch.arange(10).view(1, -1)
    _, optimizer = face(model, drop_rate=0.2)
    assert (model[0].weight.norm(dim=1) > 1.5).any()
    for _ in range(2):
        model(tokens).sum().backward()
        assert model[0].weight.norm(dim=1).max() <= 1 + 1e-5
        optimizer.step()


def test_copies_made_in_a_forward_pass_are_dense():
    """BYOL copies its online network for a target inside its first pass."""
    made = {}

    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = nn.Linear(8, 8)

        def forward(self, h):
            if not made:
                buffer = io.BytesIO()
                torch.save(self.online, buffer)
                buffer.seek(0)
                made.update(
                    copied=copy.deepcopy(self.online),
                    pickled=pickle.loads(pickle.dumps(self.online)),
                    saved=torch.load(buffer, weights_only=False),
                )
                made["weight alone"] = nn.Linear(8, 8)
                made["weight alone"].weight = nn.Parameter(copy.deepcopy(self.online.weight))
                made["state"] = nn.Linear(8, 8)
                made["state"].load_state_dict(self.online.state_dict())
            return self.online(h)

    model = Copying()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    out = model(x)
    assert not torch.allclose(out, dense_output(model.online, x))
    for how, copied in made.items():
        assert torch.equal(copied.weight, model.online.weight), how
        assert isinstance(copied.weight, nn.Parameter)
        assert type(vars(copied)["_parameters"]) is dict
        assert "weight" not in vars(copied)
    optimizer.detach()


def test_a_pickle_of_an_attached_module_does_not_need_the_package():
    model = network()
    optimizer = ImpactSGD(model, lr=0.1)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    with zipfile.ZipFile(buffer) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    assert all(b"impact_optim" not in part for part in [*contents, pickle.dumps(model)])
    optimizer.detach()


# ------------------------------------------------------------------------------------------ reads in forward

READS = {
    "attribute": lambda m: m.weight,
    "getattr": lambda m: getattr(m, "weight"),  # noqa: B009
    "get_parameter": lambda m: m.get_parameter("weight"),
    "_parameters": lambda m: m._parameters["weight"],
    "named_parameters": lambda m: dict(m.named_parameters())["weight"],
    "parameters": lambda m: next(iter(m.parameters())),
    "parameters of the root": lambda m: next(iter(m.parameters(recurse=False))),
    "_parameters.items": lambda m: dict(m._parameters.items())["weight"],
    "_parameters.values": lambda m: next(iter(m._parameters.values())),
    "_parameters.get": lambda m: m._parameters.get("weight"),
    "cached": lambda m: m.cached[0],
    "state_dict": lambda m: m.state_dict(keep_vars=True)["weight"],
}
MASKED_READS = {"attribute", "getattr", "get_parameter", "_parameters", "named_parameters", "parameters"}


@pytest.mark.parametrize("read", READS)
def test_a_forward_pass_that_reads_its_weights_in_another_way_is_masked_or_refused(read):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.cached = [self.weight]

        def forward(self, h):
            return F.linear(h, READS[read](self))

    model = nn.Sequential(nn.Linear(8, 8), Reading())  # one masked layer does not excuse the other
    optimizer = ImpactSGD(model, lr=1.0, drop_rate=0.5)
    by = factors(model, optimizer)
    optimizer.zero_grad()
    h = model[0](x).detach()
    is_masked = not torch.allclose(model[1](h), F.linear(h, model[1].weight.detach()))
    model(x).square().sum().backward()
    if read in MASKED_READS:
        assert is_masked
    if is_masked:
        assert_step_is_masked(model, optimizer, by)
    else:
        with pytest.raises(RuntimeError, match=r"gradient of 1\.weight has come by a path") as caught:
            optimizer.step()
        for remedy in ("module.forward", "attach()", "optimizer.masked()", "drop_rate=0"):
            assert remedy in str(caught.value)


def test_a_layer_that_takes_its_weights_from_a_dict_uses_those_of_its_caller():
    class Meta(nn.Linear):
        def forward(self, h, params=None):
            params = dict(self.named_parameters()) if params is None else params
            return F.linear(h, params["weight"], params["bias"])

    model = nn.Sequential(Meta(8, 8))
    optimizer = ImpactSGD(model, lr=1.0, drop_rate=0.5)
    by = factors(model, optimizer)["0.weight"]
    out = model(x)
    torch.testing.assert_close(out, F.linear(x, model[0].weight * by, model[0].bias))
    inner = torch.autograd.grad(out.square().mean(), list(model.parameters()), create_graph=True)
    names = ("weight", "bias")
    fast = {name: p - 0.1 * g for name, p, g in zip(names, model[0].parameters(), inner, strict=True)}
    torch.testing.assert_close(model[0](x, fast), F.linear(x, fast["weight"], fast["bias"]))
    model[0](x, fast).square().mean().backward()
    assert_step_is_masked(model, optimizer, {"0.weight": by})


def test_names_and_counts_in_a_forward_pass_are_those_of_the_parameters():
    class Asking(nn.Linear):
        def forward(self, h):
            self.seen = [(name, p.shape, p.requires_grad, p.dtype, p.is_leaf) for name, p in self.named_parameters()]
            self.first = next(self.parameters()).device
            return super().forward(h)

    model = Asking(8, 8)
    model(x)
    plain = model.seen
    optimizer = ImpactSGD(model, drop_rate=0.5)
    model(x)
    assert [row[:4] for row in model.seen] == [row[:4] for row in plain]
    optimizer.detach()


# ------------------------------------------------------------------------------------------ refused paths


def fail_at_the_step(optimizer, name):
    with pytest.raises(RuntimeError, match=rf"gradient of {name} has come by a path.*Call the module itself"):
        optimizer.step()


@every_face
def test_forward_called_by_hand_is_refused(face):
    model = nn.Linear(8, 8)
    _, optimizer = face(model, drop_rate=0.5)
    model.forward(x).sum().backward()
    fail_at_the_step(optimizer, "weight")


@every_face
def test_one_masked_layer_does_not_excuse_the_others(face):
    model = network()
    impact, optimizer = face(model, drop_rate=0.5)
    dense = clones(model)
    F.linear(torch.tanh(model[0](x)), model[2].weight).sum().backward()
    fail_at_the_step(optimizer, r"2\.weight")
    assert_same(clones(model), dense)
    optimizer.zero_grad()
    with impact.masked():
        F.linear(torch.tanh(model[0](x)), model[2].weight).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "drop_rate": 0.0})


def test_a_weight_in_a_group_without_masks_may_be_read_anyhow():
    model = network()
    optimizer = ImpactSGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "drop_rate": 0.0}], lr=1.0, drop_rate=0.5
    )
    optimizer.attach(model)
    by = factors(model, optimizer)
    F.linear(torch.tanh(model[0](x)), model[2].weight).sum().backward()
    assert_step_is_masked(model, optimizer, {"0.weight": by["0.weight"]})


def test_replicas_of_data_parallel_are_refused():
    """DataParallel calls replicas, whose weights are tensors of their own; without a GPU they are made by hand."""
    model = network()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, p in module._parameters.items():
            setattr(replica, name, p.clone())
    replicas[model](x).sum().backward()
    fail_at_the_step(optimizer, r"0\.weight")
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()


def test_a_generator_that_reads_after_the_call_is_refused():
    class Generating(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, h):
            for _ in range(3):
                h = torch.tanh(h @ self.weight)
                yield h

    model = Generating()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    sum(h.sum() for h in model(x)).backward()
    fail_at_the_step(optimizer, "weight")


def test_an_async_forward_is_refused():
    class Async(nn.Linear):
        async def forward(self, h):
            return super().forward(h)

    model = Async(8, 8)
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    asyncio.run(model(x)).sum().backward()
    fail_at_the_step(optimizer, "weight")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_part_is_refused_unless_it_is_trained_without_masks():
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)))
    optimizer = ImpactSGD(model, lr=1.0, drop_rate=0.5)
    model(x).sum().backward()
    fail_at_the_step(optimizer, r"1\.weight")
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "drop_rate": 0.0}]
    optimizer = ImpactSGD(groups, lr=1.0, drop_rate=0.5)
    optimizer.attach(model)
    by = factors(model, optimizer)
    optimizer.zero_grad()
    model(x).sum().backward()
    assert_step_is_masked(model, optimizer, {"0.weight": by["0.weight"]})


def test_a_parametrization_registered_later_is_refused_until_it_is_attached():
    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    model = network()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    model(x).sum().backward()
    fail_at_the_step(optimizer, r"0\.parametrizations\.weight\.original")
    optimizer.attach(model)
    optimizer.zero_grad()
    by = factors(model, optimizer)
    assert (by["0.parametrizations.weight.original"] == 0).any()
    model(x).sum().backward()
    optimizer.step()


def test_a_hidden_state_that_was_not_detached_is_refused():
    torch.manual_seed(0)
    cell = nn.RNNCell(4, 8)
    optimizer = ImpactSGD(cell, lr=0.1, drop_rate=0.3)
    h = cell(torch.randn(2, 4), torch.zeros(2, 8))
    h.sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="detach what is carried"):
        cell(torch.randn(2, 4), h).sum().backward()
    optimizer.zero_grad()
    cell(torch.randn(2, 4), h.detach()).sum().backward()
    optimizer.step()


def test_a_penalty_on_the_weights_in_the_loss_adds_to_the_gradient():
    """It reads the dense weights; the step masks the sum."""
    model = network()
    optimizer = ImpactSGD(model, lr=1.0, drop_rate=0.5)
    model(x).sum().backward()
    expected = {name: p.grad + 0.2 * p.detach() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    by = factors(model, optimizer)
    (model(x).sum() + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    assert_step_is_masked(model, optimizer, by)


# ------------------------------------------------------------------------------------------ evaluation in a pass


@every_face
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_inside_a_training_pass_is_dense(context, face):
    """Self-critical training, distillation of oneself, a Lightning module under DDP."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, h):
            before = self.net(h)
            with context():
                target = self.net(h)
                self.net.eval()
                evaluated = self.net(h)
            with torch.enable_grad() if context is torch.no_grad else context():
                teacher = self.net(h)
            self.net.train()
            return before, target, evaluated, teacher, self.net(h)

    step = Step()
    _, optimizer = face(step, drop_rate=0.5)
    dense = step.eval().net(x).detach()
    before, target, evaluated, teacher, after = step.train()(x)
    for output in (target, evaluated, teacher):
        torch.testing.assert_close(output, dense)
    assert not torch.allclose(before, dense)
    assert torch.equal(before, after)
    (before - teacher.clone()).square().sum().backward()
    optimizer.step()


@every_face
def test_a_dense_gradient_stays_dense_after_a_masked_pass_that_is_thrown_away(face):
    model, twin = network(), network()
    _, optimizer = face(model, drop_rate=0.5)
    plain = face.plain(twin)
    for _ in range(3):
        model.train()(x)  # for a log
        model.eval()
        for m, o in ((model, optimizer), (twin, plain)):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
        assert_same(clones(model), clones(twin))


def test_adversarial_inputs_made_in_eval_mode_leave_the_step_masked():
    model = network()
    optimizer = ImpactSGD(model, lr=1.0, drop_rate=0.5)
    by = factors(model, optimizer)
    h = x.clone().requires_grad_()
    model.eval()(h).sum().backward()
    optimizer.zero_grad()
    model.train()(x + 0.1 * h.grad.sign()).sum().backward()
    assert_step_is_masked(model, optimizer, by)


def test_threads_do_not_see_each_others_passes():
    """One evaluates while another is in the middle of a training pass, and a third one trains too."""
    model = network()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    expected = functional_call(copy.deepcopy(model), clones(model), (x,)).detach()
    masked = model(x).detach()
    others, found = [], {}

    def evaluate():
        found["weight"] = model[2].weight
        with torch.no_grad():
            found["dense"] = model(x)
        found["masked"] = model(x).detach()

    def run_others(module, *_):
        if not others:
            others.append(threading.Thread(target=evaluate))
            others[0].start()
            others[0].join()

    handle = model[0].register_forward_hook(run_others)
    out = model(x)
    handle.remove()
    assert torch.equal(out, masked)
    assert torch.equal(found["dense"], expected)
    assert torch.equal(found["masked"], masked)
    assert found["weight"] is dict(model[2].named_parameters())["weight"]
    out.sum().backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------ left by an exception


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_all_reads_are_dense_after_a_pass_was_left(exception):
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8), nn.Identity())
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    dense = clones(model)

    def leave(*_):
        raise exception

    model[2].forward = leave
    with pytest.raises(exception):
        model(x)
    del model[2].forward
    assert model[0].weight is dict(model.named_parameters())["0.weight"]
    assert isinstance(model[1].weight_hh_l0, nn.Parameter)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(clones(other), dense)
        torch.testing.assert_close(other.train()(x)[0], copy.deepcopy(model).eval()(x)[0])
    model(x)[0].sum().backward()
    optimizer.step()
    assert all(w is p for w, p in zip(model[1]._flat_weights, model[1].parameters(), strict=True))


@every_face
def test_a_recurrent_layer_keeps_its_parameters_in_its_list(face):
    model = nn.LSTM(8, 8, 2)
    _, optimizer = face(model, drop_rate=0.5)
    for _ in range(2):
        dense = copy.deepcopy(model)
        assert not torch.allclose(model(x)[0], dense(x)[0])
        assert all(w is p for w, p in zip(model._flat_weights, model.parameters(), strict=True))
        with torch.no_grad():
            torch.testing.assert_close(model(x)[0], dense(x)[0])
        model(x)[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------ hooks and adjoints


def test_backward_hooks_find_the_parameters():
    """Opacus and BackPACK note gradients on the weights, monitors read ``.grad`` off them."""
    found = []
    for drop_rate in (None, 0.3):
        model, seen = network(), []
        optimizer = None if drop_rate is None else ImpactSGD(model, lr=0.1, drop_rate=drop_rate)

        def note(module, grad_input, grad_output, seen=seen):
            module.weight.grad_sample = grad_output[0]
            seen.append((module.weight.grad is not None, isinstance(module.weight, nn.Parameter)))

        for i in (0, 2):
            model[i].register_full_backward_hook(note)
        for _ in range(2):
            model(x.clone().requires_grad_()).sum().backward()
        assert all(p.grad_sample.shape == (5, 8) for p in (model[0].weight, model[2].weight))
        found.append(seen)
    assert found[1] == found[0]
    assert found[1][2:] == [(True, True)] * 2
    optimizer.step()


class Adjoint(torch.autograd.Function):
    """Runs a module without a graph, and again with one when the gradient is wanted."""

    @staticmethod
    def forward(ctx, module, h, *params):
        ctx.module, ctx.params = module, params
        ctx.save_for_backward(h)
        return module(h)

    @staticmethod
    def backward(ctx, grad):
        h = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.module(h), (h, *ctx.params), grad)


@every_face
@pytest.mark.parametrize("layer", ["linear", "rnn"])
def test_a_module_under_an_adjoint_function_is_masked(layer, face):
    """As torchdiffeq's odeint_adjoint, reversible blocks and checkpoints by hand are."""
    torch.manual_seed(0)
    inner = nn.Linear(8, 8) if layer == "linear" else nn.Sequential(nn.RNN(8, 8), First())
    model = nn.ModuleList([inner, nn.Linear(8, 2)])
    impact, optimizer = face(model, drop_rate=0.5)
    with impact.masked():
        expected = copy.deepcopy(model)
    h = Adjoint.apply(model[0], x, *model[0].parameters())
    torch.testing.assert_close(h, expected[0](x))
    model[1](h).sum().backward()
    expected[1](expected[0](x)).sum().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    before = clones(model)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


class First(nn.Module):
    def forward(self, outputs):
        return outputs[0]


# ------------------------------------------------------------------------------------------ functional


@every_face
def test_functional_call_with_the_parameters_of_the_module_is_a_call_of_the_module(face):
    model = network()
    _, optimizer = face(model, drop_rate=0.5)
    expected = model(x)
    out = functional_call(model, dict(model.named_parameters()), (x,))
    assert torch.equal(out, expected)
    out.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    expected.sum().backward()
    assert_same([p.grad for p in model.parameters()], grads)
    optimizer.step()


def test_gradients_by_torch_func_are_dense_and_refused_by_the_step():
    """A function of weights that are handed to it is that of those weights, to which no mask belongs."""
    model = network()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, module):
        return functional_call(module, params, (x,)).square().sum()

    grads = torch.func.grad(loss)(params, model)
    assert_same(grads, torch.func.grad(loss)(params, copy.deepcopy(model)))
    for name, p in model.named_parameters():
        p.grad = grads[name]
    fail_at_the_step(optimizer, r"0\.weight")


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_the_module_itself_see_its_masks(transform):
    model = network()
    optimizer = ImpactSGD(model, drop_rate=0.5)
    with optimizer.masked():
        masked = copy.deepcopy(model)

    def apply(module):
        if transform == "grad":
            return torch.func.grad(lambda h: module(h).square().sum())(x)
        if transform == "jvp":
            return torch.func.jvp(module, (x,), (torch.ones_like(x),))[1]
        return torch.vmap(module)(x)

    torch.testing.assert_close(apply(model), apply(masked))


def test_a_vmapped_pass_trains_under_its_masks():
    model = network()
    optimizer = ImpactSGD(model, lr=1.0, drop_rate=0.5)
    by = factors(model, optimizer)
    torch.vmap(model)(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)
    assert_step_is_masked(model, optimizer, by)


# ------------------------------------------------------------------------------------------ tracing


class Bare(nn.Module):
    """Reads its weight itself, which a tracer would take for a constant if it were no parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, h):
        return F.linear(h, self.weight)


@pytest.mark.parametrize("tracer", ["symbolic_trace", "feature extractor", "prepare_qat_fx"])
def test_traced_in_train_mode_it_is_the_dense_module(tracer):
    model = nn.Sequential(Bare(), nn.ReLU(), nn.Linear(8, 2))
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
    masked = model(x)
    if tracer == "symbolic_trace":
        traced = torch.fx.symbolic_trace(model)
    elif tracer == "feature extractor":
        extraction = pytest.importorskip("torchvision.models.feature_extraction")
        traced = extraction.create_feature_extractor(model, ["0"])
    else:
        quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
        qconfig = torch.ao.quantization.get_default_qat_qconfig_mapping()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = quantize_fx.prepare_qat_fx(copy.deepcopy(model), qconfig, (x,))
    names = {name for name, _ in [*traced.named_parameters(), *traced.named_buffers()]}
    assert not any("tensor_constant" in name for name in [*names, *vars(traced)])
    assert any(torch.equal(p, model[0].weight) for p in traced.parameters())
    if tracer == "symbolic_trace":
        assert torch.equal(traced.eval()(x), model.eval()(x))
        model.train()
    assert torch.equal(model(x), masked)
    masked.sum().backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------ what is left alone


def test_norms_and_biases_of_any_shape_are_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))
            self.flow = nn.Parameter(torch.ones(1, 8, 1, 1))
            self.heads = nn.Parameter(torch.ones(8, 1, 1))
            self.affine = nn.Parameter(torch.ones(1, 1, 8))
            self.norm = nn.LayerNorm((8, 8))
            self.position_bias = nn.Parameter(torch.ones(8, 8))

        def forward(self, h):
            return h

    model = Net()
    optimizer = ImpactSGD(model, drop_rate=0.5)
    dense = clones(model)
    with optimizer.masked():
        masked = {name for name, p in model.named_parameters() if not torch.equal(p, dense[name])}
    assert masked == {"weight"}
    assert [row.name for row in optimizer.importance_summary()] == ["weight"]


def test_the_biases_of_a_stacked_ensemble_are_left_alone():
    params, _ = torch.func.stack_module_state([nn.Linear(8, 16) for _ in range(5)])
    optimizer = ImpactSGD(params.values(), drop_rate=0.3)
    with optimizer.masked():
        assert (params["bias"] != 0).all()
        assert (params["weight"] == 0).any()


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("style", [nn.utils.parametrizations.weight_norm, old_weight_norm])
@pytest.mark.parametrize("kind", ["depthwise", "linear"])
@pytest.mark.parametrize("face", FACES[:2], ids=lambda face: face.name)
def test_no_mask_leaves_weight_norm_a_row_of_zeros(style, kind, face):
    torch.manual_seed(0)
    layer = nn.Linear(8, 32) if kind == "linear" else nn.Conv1d(32, 32, 3, groups=32)
    h = torch.randn(4, 8) if kind == "linear" else torch.randn(4, 32, 8)
    model = nn.Sequential(style(layer))
    _, optimizer = face(model, drop_rate=0.8)
    losses = train(optimizer, lambda: (model(h) - 1).square().mean(), 25)
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert all(p.isfinite().all() for p in model.parameters())


@every_face
def test_lazy_modules_get_their_masks_when_they_know_their_sizes(face):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 2))
        impact, optimizer = face(model, drop_rate=0.4)
        train(optimizer, lambda: model(x).square().sum(), 1)
    assert (factors(model, impact)["0.weight"] == 0).any()
    dense = copy.deepcopy(model)
    assert not torch.allclose(model(x), dense(x))
    train(optimizer, lambda: model(x).square().sum(), 2)


def test_training_on_with_another_optimizer_is_told_of():
    model = network()
    first = ImpactSGD(model, lr=0.1, drop_rate=0.3)
    model(x).sum().backward()
    first.step()
    second = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=r"another optimizer trains them now, call detach\(\)"):
        train(second, lambda: model(x).square().mean(), 20)
    first.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(second, lambda: model(x).square().mean(), 20)
    assert torch.equal(model(x), copy.deepcopy(model).eval()(x))


# ------------------------------------------------------------------------------------------ sampled


@every_face
@pytest.mark.parametrize("training", [True, False])
def test_every_pass_in_sampled_has_a_mask_of_its_own(training, face):
    model = network()
    impact, optimizer = face(model, drop_rate=0.3)
    train(optimizer, lambda: model(x).square().sum(), 3)
    dense = clones(model)
    masked = model(x).detach()
    model.train(training)
    seen = []
    handle = model[0].register_forward_pre_hook(lambda m, _: seen.append(m.weight.detach().clone()))
    with torch.no_grad(), impact.sampled():
        samples = torch.stack([model(x) for _ in range(20)])
    handle.remove()
    assert samples.std(0).min() > 0
    assert len({tuple((z == 0).flatten().tolist()) for z in seen}) == 20
    assert torch.stack([(z == 0).float().mean() for z in seen]).mean().item() == pytest.approx(0.3, abs=0.06)
    assert_same(clones(model), dense)
    torch.testing.assert_close(model.eval()(x), copy.deepcopy(model)(x))
    assert torch.equal(model.train()(x).detach(), masked)  # the mask of the step is the same as before


def test_sampling_changes_nothing_of_the_training():
    trained = []
    for sampling in (False, True):
        model = network()
        optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3)
        for _ in range(4):
            if sampling:
                with torch.no_grad(), optimizer.sampled():
                    model.eval()(x)
                model.train()
            train(optimizer, lambda model=model: model(x).square().sum(), 1)
        trained.append((clones(model), optimizer.state_dict()["state"]))
    assert_same(*trained)


def test_sampled_passes_give_no_gradient_and_refuse_to_nest():
    model = network()
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3)
    with optimizer.sampled():
        out = model(x)
        with pytest.raises(RuntimeError, match="nested"), optimizer.masked():
            pass
        with pytest.raises(RuntimeError, match="nested"), optimizer.sampled():
            pass
    out.sum().backward()
    assert model[0].weight.grad is None
    optimizer.detach()
    with pytest.raises(RuntimeError, match="attach"), optimizer.sampled():
        pass
    optimizer.attach(model)
    optimizer.param_groups[0]["drop_rate"] = 0.0
    with pytest.raises(RuntimeError, match="drop_rate"), optimizer.sampled():
        pass


# ------------------------------------------------------------------------------------------ compiled parts


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2)

    def encode(self, h):
        return self.encoder(h)


@pytest.mark.parametrize("how", ["eager", "wrapped part", "part in place", "method", "function"])
def test_a_compiled_part_that_the_loop_calls_is_masked(how):
    torch._dynamo.reset()
    model = AutoEncoder()
    optimizer = ImpactSGD(model, lr=1.0, drop_rate=0.5)
    by = factors(model, optimizer)
    encode = model.encoder
    if how == "wrapped part":
        encode = torch.compile(model.encoder, backend="aot_eager")
    elif how == "part in place":
        model.encoder.compile(backend="aot_eager")
    elif how == "method":
        encode = torch.compile(model.encode, backend="aot_eager")
    elif how == "function":
        encode = torch.compile(lambda h: model.encoder(h), backend="aot_eager")
    for _ in range(2):
        h = encode(x)
        first = model.encoder[0]
        expected = torch.tanh(F.linear(x, first.weight * by["encoder.0.weight"], first.bias))
        torch.testing.assert_close(h, expected)
    model.head(h).sum().backward()
    assert_step_is_masked(model, optimizer, by)
    with torch.no_grad():
        torch.testing.assert_close(encode(x), torch.tanh(dense_output(model.encoder[0], x)))
    torch._dynamo.reset()


class Writing(nn.Linear):
    def __init__(self, how):
        super().__init__(8, 8)
        self.how, self.is_new = how, True

    def forward(self, h):
        if self.how == "interrupt":
            torch._dynamo.graph_break()
            super().forward(h)
            torch._dynamo.graph_break()
            raise KeyboardInterrupt
        if self.how == "mul_":
            self.weight.mul_(2)
        elif self.is_new and self.how == "data":
            self.weight.data.fill_(5.0)
        elif self.is_new:
            with torch.no_grad():
                self.weight.fill_(5.0)
        self.is_new = False
        return super().forward(h)


@pytest.mark.parametrize("how", ["mul_", "data", "no_grad"])
def test_what_compiled_code_writes_reaches_the_parameter_or_is_refused(how):
    torch._dynamo.reset()
    model = nn.Sequential(Writing(how))
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3)
    called = torch.compile(model, backend="aot_eager")
    before = clones(model)
    try:
        called(x)
    except RuntimeError as error:
        assert "has written to 0.weight in place" in str(error)  # noqa: PT017
        assert_same(clones(model), before)
    else:
        assert how != "mul_"
        assert (model[0].weight == 5).all()
    optimizer.detach()
    torch._dynamo.reset()


def test_a_compiled_pass_that_a_keyboard_interrupt_has_left_leaves_the_weights_dense():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), Writing("interrupt"))
    optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.3)
    called = torch.compile(model, backend="aot_eager")
    dense = clones(model)
    with pytest.raises(KeyboardInterrupt):
        called(x)
    assert_same(clones(copy.deepcopy(model)), dense)
    assert_same({name: p.detach() for name, p in model.state_dict().items()}, dense)
    assert model[0].weight is next(model.parameters())
    assert model[1].weight is list(model.parameters())[2]
    model[1].how = "none"
    model[1].is_new = False
    called(x).sum().backward()
    optimizer.step()
    torch._dynamo.reset()


def test_impact_and_a_face_share_no_module():
    """Of two engines on one module, the one attached last masks; the other says so at its step."""
    model = network()
    first = ImpactSGD(model, lr=0.1, drop_rate=0.3)
    base = torch.optim.Adagrad(model.parameters())
    second = Impact(model, base, drop_rate=0.5)
    train(base, lambda: model(x).square().sum(), 1)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="another optimizer with masks has since been attached"):
        first.step()
    assert list(second._masking.attached()) == [model]
