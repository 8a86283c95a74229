"""Any optimizer as the base: without masks it is itself to the last bit, with them it trains; and what is refused."""

import copy
import inspect

import pytest
import torch
from helpers import FACES, Face, assert_same, clones, every_face, train
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from impact_optim import Impact, ImpactAdamW, ImpactSGD

REFUSED = {"LBFGS", "SparseAdam"}
BASES = sorted(
    (c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer) and c is not Optimizer),
    key=lambda c: c.__name__,
)
BASES = [c for c in BASES if c.__name__ not in REFUSED]
MATRICES_ONLY = {"Muon"}
SIGNALS = ["saliency", "fisher", "magnitude", "hypergradient", "lookahead", "uniform"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
RATES = {"SGD": 0.5, "ASGD": 0.5, "Adadelta": 5.0, "Adafactor": 0.05, "Adagrad": 0.1}
EVERY = FACES[:2] + [Face(base, options={"lr": RATES.get(base.__name__, 0.01)}) for base in BASES]

every_base = pytest.mark.parametrize("face", EVERY, ids=lambda face: face.name)


def net(dtype=torch.float32, bias=True, width=16):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width, bias=bias), nn.Tanh(), nn.Linear(width, width, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3, bias=bias)).to(dtype)


def net_for(face, **options):
    return net(bias=face.base.__name__ not in MATRICES_ONLY, **options)


def problem(model):
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator).to(dtype)
    y = x[:, :3].abs().argmax(1)
    return lambda: nn.functional.cross_entropy(model(x), y)


def implementations(face):
    """For-loop, foreach and fused, as far as a base has them."""
    known = inspect.signature(face.base.__init__).parameters
    if "foreach" not in known:
        return {"only": {}}
    fused = {"fused": {"fused": True}} if "fused" in known else {}
    return {"forloop": {"foreach": False}, "foreach": {"foreach": True}, **fused}


def own_state(optimizer):
    """Less what is the engine's."""
    return [
        {key: value for key, value in optimizer.state[p].items() if key not in ("log_importance", "last_step")}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


# -- without masks: the base, bit for bit --

CASES = [
    pytest.param(face, implementation, id=f"{face.name}-{name}")
    for face in EVERY
    for name, implementation in implementations(face).items()
]


@pytest.mark.parametrize(("face", "implementation"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("importance", ["saliency", "hypergradient", "lookahead"])
def test_without_masks_it_is_its_base(face, implementation, dtype, importance):
    """Weights and state, while the importances learn."""
    ours, theirs = net_for(face, dtype=dtype), net_for(face, dtype=dtype)
    impact, optimizer = face(ours, **implementation, drop_rate=0.0, importance=importance, importance_lr=0.1)
    plain = face.plain(theirs, **implementation)
    for _ in range(4):
        assert train(optimizer, problem(ours), 1, closure=True) == train(plain, problem(theirs), 1, closure=True)
        assert_same(ours, theirs)
    assert_same(own_state(optimizer), own_state(plain))
    assert any(impact.importance(p).std() > 1e-4 for p in ours.parameters())


arguments = {
    "SGD": st.fixed_dictionaries(
        {
            "lr": st.floats(0, 2),
            "momentum": st.sampled_from([0, 0.5, 0.9, 1.0, 1.5]),
            "weight_decay": st.sampled_from([0, 5e-4, 0.1, 3.0]),
            "dampening": st.sampled_from([0, 0.3, 1.0, -0.5]),
            "nesterov": st.booleans(),
        }
    ).map(lambda o: {**o, "nesterov": o["nesterov"] and o["momentum"] > 0 and o["dampening"] == 0}),
    "AdamW": st.fixed_dictionaries(
        {
            "lr": st.floats(0, 1),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)]),
            "eps": st.sampled_from([1e-8, 1e-3]),
            "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
            "amsgrad": st.booleans(),
        }
    ),
    "RMSprop": st.fixed_dictionaries(
        {"lr": st.floats(0, 1), "momentum": st.sampled_from([0, 0.9]), "centered": st.booleans()}
    ),
}
SHAPES = [(4, 3), (3,), (), (2, 3, 2, 2), (1, 5), (0, 2)]


@every_face
@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    options=st.fixed_dictionaries(
        {
            "importance": st.sampled_from(SIGNALS),
            "importance_lr": st.sampled_from([0.0, 0.01, 1.0]),
            "kl_weight": st.sampled_from([0.0, 1.0]),
            "maximize": st.booleans(),
            "foreach": st.booleans(),
        }
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    kinds=st.lists(
        st.lists(
            st.sampled_from(["normal", "normal", "normal", "none", "zero", "tiny", "huge", "nan", "inf"]),
            min_size=len(SHAPES),
            max_size=len(SHAPES),
        ),
        min_size=1,
        max_size=5,
    ),
    tensor_lr=st.booleans(),
)
def test_missing_and_broken_gradients_change_nothing_of_that(face, data, options, dtype, kinds, tensor_lr):
    base = data.draw(arguments[face.base.__name__])
    # In 16 bits torch's foreach rounds as its for-loop does while a gradient is missing, and else otherwise.
    assume(not options["foreach"] or dtype.itemsize > 2)
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    params, reference = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    rate = (lambda: torch.tensor(base["lr"])) if tensor_lr and not options["foreach"] else (lambda: base["lr"])
    _, optimizer = face(params, **{**base, "lr": rate()}, **options, drop_rate=0.0)
    plain = face.plain(reference, **{**base, "lr": rate()}, **options)
    for step_kinds in kinds:
        grads = []
        for kind, value in zip(step_kinds, values, strict=True):
            grad = torch.randn(value.shape, generator=generator)
            if kind in ("nan", "inf") and grad.numel() > 0:
                grad.view(-1)[0] = float(kind)
            scale = {"zero": 0.0, "tiny": 1e-30, "huge": 1e4}.get(kind, 1.0)
            grads.append(None if kind == "none" else (grad * scale).to(dtype))
        for p, q, grad in zip(params, reference, grads, strict=True):
            p.grad, q.grad = (None, None) if grad is None else (grad.clone(), grad.clone())
        optimizer.step(lambda: 0.0)
        plain.step()
        assert_same(clones(params), clones(reference))
        assert_same([p.grad for p in params], [p.grad for p in reference])
        assert_same(own_state(optimizer), own_state(plain))
        for w in [value["log_importance"] for value in optimizer.state.values() if "log_importance" in value]:
            assert torch.isfinite(w).all()


@every_face
@pytest.mark.parametrize("foreach", [False, True])
def test_without_masks_it_is_its_base_also_while_options_change(face, foreach):
    changes = [{"lr": 0.3}, {"weight_decay": 0.1}, {"lr": 0.02, "maximize": True}, {"maximize": False}]
    ours, theirs = net(), net()
    (_, optimizer), plain = face(ours, drop_rate=0.0, foreach=foreach), face.plain(theirs, foreach=foreach)
    for change in changes:
        for each in (optimizer, plain):
            each.param_groups[0].update(change)
        assert train(optimizer, problem(ours), 2) == train(plain, problem(theirs), 2)
        assert_same(ours, theirs)


def muon_and_adamw(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01),
    ]


def test_two_optimizers_under_one_engine_are_themselves_without_masks():
    ours, theirs = net(), net()
    optimizers, plain = muon_and_adamw(ours), muon_and_adamw(theirs)
    Impact(ours, optimizers, drop_rate=0.0)
    for _ in range(5):
        for model, several in ((ours, optimizers), (theirs, plain)):
            model.zero_grad()
            problem(model)().backward()
            for each in several:
                each.step()
        assert_same(ours, theirs)
    for a, b in zip(optimizers, plain, strict=True):
        assert_same(own_state(a), own_state(b))


# -- with masks --


def masked_weight(impact, param):
    with torch.no_grad(), impact.masked():
        return param.detach().clone()


@every_base
@pytest.mark.parametrize("importance", ["saliency", "hypergradient"])
def test_with_masks_it_trains(face, importance):
    model = net_for(face)
    impact, optimizer = face(model, drop_rate=0.2, importance=importance, importance_lr=0.05)
    start = problem(model)().item()
    for _ in range(40):
        seen = masked_weight(impact, model[2].weight)
        assert 0.02 < (seen == 0).float().mean() < 0.5
        train(optimizer, problem(model), 1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert impact.importance(model[2].weight).std() > 1e-3
    model.eval()
    assert problem(model)().item() < start
    assert optimizer.param_groups[0]["mask_step"] == 40


@every_base
@pytest.mark.parametrize("rescale", ["inverse", "none"])
def test_the_base_steps_with_masked_gradients(face, rescale):
    """Uniform masks around a base are DropConnect as users write it by hand."""
    ours, theirs = net_for(face), net_for(face)
    impact, optimizer = face(ours, drop_rate=0.3, importance="uniform", rescale=rescale)
    plain = face.plain(theirs)
    for _ in range(4):
        with torch.no_grad():
            factors = {}
            dense = clones(ours)
            for p in ours.parameters():
                p.fill_(1.0)
            with impact.masked():
                factors = clones(ours)
            for name, p in ours.named_parameters():
                p.copy_(dense[name])
        train(optimizer, problem(ours), 1)
        weights = {name: p * factors[name] for name, p in theirs.named_parameters()}
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
        plain.zero_grad()
        loss = nn.functional.cross_entropy(torch.func.functional_call(theirs, weights, (x,)), x[:, :3].abs().argmax(1))
        loss.backward()
        plain.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_two_optimizers_under_one_engine_have_masks_of_their_own():
    model = net()
    optimizers = [
        torch.optim.Muon([model[0].weight], lr=0.02),
        torch.optim.AdamW([*model[2:].parameters(), model[0].bias]),
    ]
    impact = Impact(model, optimizers, drop_rate=0.3, importance_lr=0.1)
    optimizers[1].param_groups[0]["drop_rate"] = 0.6
    for _ in range(5):
        for each in optimizers:
            each.zero_grad()
        problem(model)().backward()
        for each in optimizers:
            each.step()
    assert [g["mask_step"] for each in optimizers for g in each.param_groups] == [5, 5]
    for layers, rate in (([model[0]], 0.3), ([model[2], model[4]], 0.6)):
        keep = torch.cat([impact.keep_probability(layer.weight).flatten() for layer in layers])
        w = torch.cat([impact.importance(layer.weight).flatten() for layer in layers])
        assert 1 - keep.double().mean().item() == pytest.approx(rate, abs=1e-3)
        assert w.double().mean().item() == pytest.approx(1, abs=1e-5)
        assert w.std() > 1e-3


# -- optimizers of others --


def lion(params, lr=1e-3):
    return pytest.importorskip("lion_pytorch").Lion(params, lr=lr, weight_decay=0.01)


def schedule_free(params):
    return pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=0.01, warmup_steps=2)


def switch(optimizer, mode):
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()


others = pytest.mark.parametrize("build", [lion, schedule_free])


@others
def test_optimizers_of_others_are_themselves_without_masks(build):
    ours, theirs = net(), net()
    optimizer, plain = build(ours.parameters()), build(theirs.parameters())
    Impact(ours, optimizer, drop_rate=0.0)
    for each in (optimizer, plain):
        switch(each, "train")
    for _ in range(5):
        assert train(optimizer, problem(ours), 1) == train(plain, problem(theirs), 1)
        assert_same(ours, theirs)
    for each in (optimizer, plain):
        switch(each, "eval")
    assert_same(ours, theirs)
    assert_same(own_state(optimizer), own_state(plain))


@others
def test_optimizers_of_others_train_with_masks(build):
    model = net()
    optimizer = build(model.parameters())
    impact = Impact(model, optimizer, drop_rate=0.2, importance_lr=0.05)
    switch(optimizer, "train")
    start = problem(model)().item()
    for _ in range(60):
        assert 0.02 < (masked_weight(impact, model[2].weight) == 0).float().mean() < 0.5
        train(optimizer, problem(model), 1)
    switch(optimizer, "eval")
    model.eval()
    assert problem(model)().item() < start
    assert impact.importance(model[2].weight).std() > 1e-3
    # Zeros are held, also by an optimizer that exchanges the weights for others when it is switched.
    switch(optimizer, "train")
    report = impact.sparsify(0.5)
    train(optimizer, problem(model), 5)
    for tensor in report.tensors:
        assert not model.get_parameter(tensor.name)[~tensor.mask].any()


@every_face
def test_averages_see_the_dense_weights(face):
    model = net()
    _, optimizer = face(model, drop_rate=0.3)
    average, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
    weights = []
    for _ in range(4):
        train(optimizer, problem(model), 1)
        weights.append(model[0].weight.detach().clone())
        average.update_parameters(model)
        ema.update_parameters(model)
        schedule.step()
    torch.testing.assert_close(average.module[0].weight, torch.stack(weights).mean(0))
    expected = weights[0]
    for value in weights[1:]:
        expected = 0.5 * expected + 0.5 * value
    torch.testing.assert_close(ema.module[0].weight, expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert average.module.training
    assert_same(average(torch.ones(2, 6)), average.module(torch.ones(2, 6)))  # a copy has no masks: no draw differs


class SAM(Optimizer):
    """Sharpness-aware minimisation as it is usually written (Foret et al., 2021): around a base."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.detach().clone()
                    p.add_(p.grad * group["rho"] / (norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()


def sam_losses(model, sam, steps):
    losses = []
    for _ in range(steps):
        loss = problem(model)()
        loss.backward()
        sam.first_step()
        problem(model)().backward()
        sam.second_step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_sam_around_a_base(base):
    """The engine belongs on the base, which takes the step; both passes of one step see the same masks."""
    ours, theirs = net(), net()
    sam, plain = SAM(ours.parameters(), base, lr=0.01), SAM(theirs.parameters(), base, lr=0.01)
    Impact(ours, sam.base, drop_rate=0.0)
    assert sam_losses(ours, sam, 4) == sam_losses(theirs, plain, 4)
    assert_same(ours, theirs)

    model = net()
    sam = SAM(model.parameters(), base, lr=0.01)
    impact = Impact(model, sam.base, drop_rate=0.3, importance_lr=0.05)
    problem(model)().backward()
    dropped = masked_weight(impact, model[2].weight) == 0
    sam.first_step()
    assert_same(masked_weight(impact, model[2].weight) == 0, dropped)
    problem(model)().backward()
    sam.second_step()
    assert not torch.equal(masked_weight(impact, model[2].weight) == 0, dropped)
    sam_losses(model, sam, 40)
    assert impact.importance(model[2].weight).std() > 1e-3
    assert sam.base.param_groups[0]["mask_step"] == 41


def test_sam_with_a_face_as_its_base():
    model = net()
    sam = SAM(model.parameters(), ImpactSGD, lr=0.05)
    sam.base.attach(model)
    losses = sam_losses(model, sam, 40)
    assert losses[-1] < losses[0]
    assert sam.base.importance(model[2].weight).std() > 1e-3


# -- what is refused, with nothing touched --


def snapshot(model, optimizer):
    return (
        copy.deepcopy(model.state_dict()),
        [list(group) for group in optimizer.param_groups],
        list(optimizer.defaults),
        [len(optimizer.state)],
        [type(module._parameters) for module in model.modules()],
        list(optimizer._optimizer_step_pre_hooks) + list(optimizer._optimizer_step_post_hooks),
    )


def build_lbfgs(model):
    return torch.optim.LBFGS(model.parameters())


def build_sparse_adam(model):
    return torch.optim.SparseAdam(model.parameters())


def build_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("build", "options", "error", "text"),
    [
        (build_lbfgs, {}, TypeError, "does not support LBFGS"),
        (build_sparse_adam, {}, TypeError, "does not support SparseAdam"),
        (build_sgd, {"droprate": 0.1}, TypeError, "unexpected option 'droprate'; did you mean 'drop_rate'"),
        (build_sgd, {"simplex": "group"}, TypeError, "unexpected option 'simplex'"),
        (build_sgd, {"drop_rate": 1.0}, ValueError, r"Invalid drop_rate: 1\.0"),
        (build_sgd, {"keep_floor": 0.95}, ValueError, r"keep_floor=0\.95 is above the budget"),
    ],
    ids=["LBFGS", "SparseAdam", "a slip", "what is gone", "range", "floor"],
)
def test_what_is_refused_leaves_the_optimizer_and_the_model_alone(build, options, error, text):
    model = net()
    optimizer = build(model)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=text):
        Impact(model, optimizer, **options)
    after = snapshot(model, optimizer)
    assert_same(after[0], before[0])
    assert after[1:] == before[1:]


def test_a_module_that_is_not_the_optimizers_is_refused():
    model, other = net(), net()
    optimizer = build_sgd(model)
    before = snapshot(model, optimizer)
    for module, error, text in (
        (other, ValueError, "none of whose parameters belongs to this optimizer"),
        ([model], TypeError, r"takes a torch\.nn\.Module"),
    ):
        with pytest.raises(error, match=text):
            Impact(module, optimizer)
        assert snapshot(model, optimizer)[1:] == before[1:]


def test_what_is_no_optimizer_is_refused():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = build_sgd(net())
    for bad, error in ((Wrapper(optimizer), TypeError), ([optimizer, Wrapper(optimizer)], TypeError)):
        with pytest.raises(error):
            Impact(None, bad)
    for bad in ([], [optimizer, optimizer]):
        with pytest.raises(ValueError, match="one optimizer, or several different ones"):
            Impact(None, bad)


@every_face
def test_complex_parameters_are_refused(face):
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))]
    with pytest.raises(ValueError, match=r"complex.*number 1 .*view_as_real"):
        face(params)


@pytest.fixture
def one_process():
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_face
def test_sharded_parameters_are_refused(face, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"DTensors, cannot be masked: .*DistributedDataParallel"):
        face([param])


def test_of_two_engines_an_optimizer_belongs_to_the_last():
    model = net()
    optimizer = build_sgd(model)
    first = Impact(model, optimizer, drop_rate=0.5)
    second = Impact(model, optimizer, drop_rate=0.2)
    assert optimizer.param_groups[0]["drop_rate"] == 0.2
    train(optimizer, problem(model), 3)
    assert optimizer.param_groups[0]["mask_step"] == 3
    keep = torch.cat([second.keep_probability(layer.weight).flatten() for layer in (model[0], model[2], model[4])])
    assert keep.mean().item() == pytest.approx(0.8, abs=1e-5)
    del first


def test_the_faces_are_what_they_are_built_on():
    model = net()
    assert isinstance(ImpactSGD(model), torch.optim.SGD)
    assert isinstance(ImpactAdamW(model), torch.optim.AdamW)
    assert all(isinstance(each, Impact) for each in (ImpactSGD(model), ImpactAdamW(model)))
