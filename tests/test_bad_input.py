"""Bad input gets an error that names the argument, the value and the remedy, before anything changes."""

import copy
import math

import pytest
import torch
from torch import nn

from impact_optim import ImpactSGD

INVALID = [
    ({"lr": -0.1}, "Invalid learning rate: -0.1"),
    ({"lr": math.nan}, "Invalid learning rate: nan"),
    ({"lr": math.inf}, "Invalid learning rate: inf"),
    ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
    ({"dampening": math.nan}, "Invalid dampening value: nan"),
    ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ({"drop_rate": -0.1}, r"Invalid drop_rate: -0.1; it must lie in \[0, 1\)"),
    ({"drop_rate": 1.0}, "Invalid drop_rate: 1.0"),
    ({"drop_rate": math.nan}, "Invalid drop_rate: nan"),
    ({"drop_rate": "0.1"}, "Invalid drop_rate: 0.1"),
    ({"importance": "magic"}, "Invalid importance: 'magic'; choose from .*'saliency'"),
    ({"importance_lr": -1.0}, "Invalid importance_lr: -1.0"),
    ({"importance_lr": math.inf}, "Invalid importance_lr: inf"),
    ({"kl_weight": -1.0}, "Invalid kl_weight: -1.0"),
    ({"kl_weight": math.nan}, "Invalid kl_weight: nan"),
    ({"keep_floor": -0.1}, "Invalid keep_floor: -0.1"),
    ({"keep_floor": 0.8, "drop_rate": 0.5}, "keep_floor=0.8 is above the budget: drop_rate=0.5 keeps 0.5"),
    ({"simplex": "layer"}, "Invalid simplex: 'layer'; choose from"),
    ({"drop": "some"}, "Invalid drop: 'some'"),
    ({"rescale": True}, "Invalid rescale: True"),
    ({"sampling": "gumbel"}, "Invalid sampling: 'gumbel'"),
    ({"seed": -1}, "Invalid seed: -1"),
    ({"seed": 0.5}, "Invalid seed: 0.5"),
    ({"seed": 2**63}, "Invalid seed"),
]


def ids(case):
    return ",".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("options", "text"), INVALID, ids=ids)
def test_options_of_the_constructor(options, text):
    with pytest.raises(ValueError, match=text):
        ImpactSGD(nn.Linear(3, 3), **options)


@pytest.mark.parametrize(("options", "text"), INVALID, ids=ids)
def test_options_of_a_group(options, text):
    with pytest.raises(ValueError, match=text):
        ImpactSGD([{"params": nn.Linear(3, 3).parameters(), **options}])
    optimizer = ImpactSGD(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": nn.Linear(3, 3).parameters(), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("options", "text"), INVALID, ids=ids)
def test_options_changed_in_the_middle_of_training(options, text):
    model = nn.Linear(3, 3)
    optimizer = ImpactSGD(model, lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert optimizer.param_groups[0]["step"] == 0
    optimizer._masking.end_step()
    with pytest.raises(ValueError, match=text):
        model(torch.ones(1, 3))
    assert model.weight is model._parameters["weight"]


def test_parameters_of_the_wrong_kind():
    with pytest.raises(TypeError, match="iterable of Tensors"):
        ImpactSGD(torch.zeros(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        ImpactSGD([])
    with pytest.raises(ValueError, match="empty parameter list"):
        ImpactSGD(nn.ReLU())
    with pytest.raises(ValueError, match=r"complex.*view_as_real"):
        ImpactSGD([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    optimizer = ImpactSGD(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"complex.*view_as_real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = ImpactSGD(model, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients: that of 0\.weight .* sparse=False"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert len(optimizer.state) == 0 or all("momentum_buffer" not in s for s in optimizer.state.values())


def test_a_slip_in_the_options_of_a_group():
    with pytest.raises(ValueError, match=r"'droprate' is no option of a parameter group; did you mean 'drop_rate'\?"):
        ImpactSGD([{"params": nn.Linear(3, 3).parameters(), "droprate": 0.3}])
    for own in ("name", "initial_lr", "lr_scale", "max_momentum", "base_momentum", "swa_lr"):
        assert ImpactSGD([{"params": nn.Linear(3, 3).parameters(), own: 1}]).param_groups[0][own] == 1


def test_foreach_and_differentiable_exclude_each_other():
    with pytest.raises(RuntimeError, match=r"foreach.*differentiable"):
        ImpactSGD(nn.Linear(2, 2), foreach=True, differentiable=True)


def test_lookahead_without_a_closure():
    model = nn.Linear(3, 3)
    optimizer = ImpactSGD(model, lr=0.1, importance="lookahead")
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_step_whose_masks_nobody_can_see():
    model = nn.Linear(3, 3)
    optimizer = ImpactSGD(model.parameters(), lr=0.1, drop_rate=0.2)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"ImpactSGD\(model, \.\.\.\).*attach\(model\).*masked\(\).*drop_rate=0"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_attaching_what_does_not_belong():
    optimizer = ImpactSGD(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="got a Conv2d none of whose parameters"):
        optimizer.attach(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        optimizer.attach([nn.Linear(3, 3)])


def test_reading_what_does_not_belong():
    optimizer = ImpactSGD(nn.Linear(3, 3))
    for read in (optimizer.importance, optimizer.keep_probability):
        with pytest.raises(TypeError, match=r"the parameter itself, .* not '0\.weight'"):
            read("0.weight")
        with pytest.raises(ValueError, match=r"shape \(4, 4\) is no parameter"):
            read(torch.zeros(4, 4))
