"""Bad input gets an error that names the argument, the value and the remedy, before anything changes."""

import copy
import math

import pytest
import torch
from helpers import assert_same, clones, every_face
from torch import nn

from impact_optim import ImpactAdamW, ImpactSGD

OF_THE_BASE = [
    (ImpactSGD, {"lr": -0.1}, "Invalid learning rate: -0.1"),
    (ImpactSGD, {"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    (ImpactSGD, {"momentum": -0.5}, "Invalid momentum value: -0.5"),
    (ImpactSGD, {"weight_decay": -1}, "Invalid weight_decay value: -1"),
    (ImpactSGD, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    (ImpactAdamW, {"lr": -0.1}, "Invalid learning rate: -0.1"),
    (ImpactAdamW, {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    (ImpactAdamW, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
]
INVALID = [
    ({"drop_rate": -0.1}, r"Invalid drop_rate: -0.1; it must lie in \[0, 1\)"),
    ({"drop_rate": 1.0}, "Invalid drop_rate: 1.0"),
    ({"drop_rate": math.nan}, "Invalid drop_rate: nan"),
    ({"drop_rate": "0.1"}, "Invalid drop_rate: '0.1'"),
    ({"drop_rate": True}, "Invalid drop_rate: True"),
    ({"importance": "magic"}, "Invalid importance: 'magic'; .*'uniform' or a name in impact_optim.SIGNALS"),
    ({"importance": None}, "Invalid importance: None"),
    ({"importance_lr": -1.0}, "Invalid importance_lr: -1.0"),
    ({"importance_lr": math.inf}, "Invalid importance_lr: inf"),
    ({"kl_weight": -1.0}, "Invalid kl_weight: -1.0"),
    ({"kl_weight": math.nan}, "Invalid kl_weight: nan"),
    ({"keep_floor": -0.1}, "Invalid keep_floor: -0.1"),
    ({"keep_floor": 1.0}, "Invalid keep_floor: 1.0"),
    ({"keep_floor": 0.8, "drop_rate": 0.5}, "keep_floor=0.8 is above the budget: drop_rate=0.5 keeps 0.5"),
    ({"drop": "some"}, r"Invalid drop: 'some'; it must be one of \['unimportant', 'important'\]"),
    ({"rescale": True}, "Invalid rescale: True"),
    ({"sampling": "gumbel"}, "Invalid sampling: 'gumbel'"),
    ({"hold_zeros": 1}, "Invalid hold_zeros: 1; it must be True or False"),
    ({"hold_zeros": None}, "Invalid hold_zeros: None"),
    ({"seed": -1}, "Invalid seed: -1"),
    ({"seed": 0.5}, "Invalid seed: 0.5"),
    ({"seed": 2**63}, "Invalid seed"),
]
BUILT_IN = pytest.mark.parametrize("build", [ImpactSGD, ImpactAdamW], ids=lambda build: build.__name__)


def ids(case):
    return ",".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("build", "options", "text"), OF_THE_BASE, ids=ids)
def test_options_of_the_base(build, options, text):
    with pytest.raises(ValueError, match=text):
        build(nn.Linear(3, 3), **options)


@every_face
@pytest.mark.parametrize(("options", "text"), INVALID, ids=ids)
def test_options_of_the_constructor(face, options, text):
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=text):
        face(model, **options)
    assert type(model._parameters) is dict


@BUILT_IN
@pytest.mark.parametrize(("options", "text"), INVALID, ids=ids)
def test_options_of_a_group(build, options, text):
    with pytest.raises(ValueError, match=text):
        build([{"params": nn.Linear(3, 3).parameters(), **options}])
    optimizer = build(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": nn.Linear(3, 3).parameters(), **options})
    assert len(optimizer.param_groups) == 1


@every_face
@pytest.mark.parametrize(("options", "text"), INVALID, ids=ids)
def test_options_changed_in_the_middle_of_training(face, options, text):
    model = nn.Linear(3, 3)
    _, optimizer = face(model)
    model(torch.ones(1, 3)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    good = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert_same(model.state_dict(), before)
    assert optimizer.param_groups[0]["mask_step"] == 0
    assert not optimizer.state
    assert model.weight is model._parameters["weight"]
    optimizer.param_groups[0].update(good)
    optimizer.step()
    assert optimizer.param_groups[0]["mask_step"] == 1
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=text):  # so does the pass that comes next
        model(torch.ones(1, 3))
    assert dict.__getitem__(model._parameters, "weight") is next(model.parameters())


@BUILT_IN
def test_parameters_of_the_wrong_kind(build):
    with pytest.raises(TypeError, match="iterable of Tensors"):
        build(torch.zeros(3))
    for empty in ([], nn.ReLU()):
        with pytest.raises(ValueError, match="empty parameter list"):
            build(empty)
    optimizer = build(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"complex.*view_as_real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@BUILT_IN
def test_an_unknown_option(build):
    with pytest.raises(TypeError, match="unexpected option 'droprate'; did you mean 'drop_rate'"):
        build(nn.Linear(3, 3), droprate=0.1)
    for gone in ("simplex", "scale_steps", "importance_dtype", "per_rank_masks"):
        with pytest.raises(TypeError, match=f"unexpected option '{gone}'"):
            build(nn.Linear(3, 3), **{gone: True})


@BUILT_IN
def test_a_slip_in_the_options_of_a_group(build):
    with pytest.raises(ValueError, match=r"'droprate' is no option of a parameter group; did you mean 'drop_rate'\?"):
        build([{"params": nn.Linear(3, 3).parameters(), "droprate": 0.3}])
    for own in ("name", "initial_lr", "lr_scale", "max_momentum", "base_momentum", "swa_lr"):
        assert build([{"params": nn.Linear(3, 3).parameters(), own: 1}]).param_groups[0][own] == 1


@every_face
def test_sparse_gradients(face):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    _, optimizer = face(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of 0\.weight is sparse.* sparse=False.*drop_rate=0"):
        optimizer.step()
    assert_same(model.state_dict(), before)
    assert not optimizer.state


def test_sparse_gradients_train_without_masks_where_the_base_takes_them():
    models = [nn.Embedding(5, 3, sparse=True) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [ImpactSGD(models[0], lr=0.1, drop_rate=0.0), torch.optim.SGD(models[1].parameters(), lr=0.1)]
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 2])).sum().backward()
            optimizer.step()
    assert_same(*models)


@every_face
def test_lookahead_without_a_closure(face):
    model = nn.Linear(3, 3)
    _, optimizer = face(model, importance="lookahead")
    model(torch.ones(1, 3)).sum().backward()
    before = clones(model)
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step()
    assert_same(clones(model), before)


@every_face
def test_a_step_whose_masks_nobody_can_see(face):
    model = nn.Linear(3, 3)
    _, optimizer = face(model.parameters(), drop_rate=0.2)
    model(torch.ones(1, 3)).sum().backward()
    before = clones(model)
    with pytest.raises(RuntimeError, match=r"pass the module.*attach\(module\).*masked\(\).*drop_rate=0"):
        optimizer.step()
    assert_same(clones(model), before)
    assert not optimizer.state


@every_face
def test_attaching_and_detaching_what_does_not_belong(face):
    impact, _ = face(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="got a Conv2d none of whose parameters"):
        impact.attach(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        impact.attach([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match=r"got a Linear that is not attached"):
        impact.detach(nn.Linear(3, 3))


@every_face
def test_reading_what_does_not_belong(face):
    impact, _ = face(nn.Linear(3, 3))
    for read in (impact.importance, impact.keep_probability):
        with pytest.raises(TypeError, match=r"the parameter itself, .* not '0\.weight'"):
            read("0.weight")
        with pytest.raises(ValueError, match=r"shape \(4, 4\) is no parameter"):
            read(torch.zeros(4, 4))


@every_face
def test_nothing_to_mask_is_told(face):
    model = nn.LayerNorm(4)
    with pytest.warns(UserWarning, match="nothing to mask"):
        face(model, drop_rate=0.1)
