"""What PyTorch asks of its optimizers, asked of ImpactSGD and ImpactAdamW by an OptimizerInfo each,
as torch describes its own."""

import copy
import inspect
import io
import math
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FACES, assert_same, clones, every_face
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from impact_optim import ImpactAdamW, ImpactSGD
from impact_optim.options import DEFAULTS, OPTIONS

# The import above forbids the whole process to set torch.backends flags; tests in other files may want to.
torch.backends.__allow_nonbracketed_mutation_flag = True  # type: ignore[attr-defined]

CPU_AND_CUDA = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


# ------------------------------------------------------------------------------------------ description


SHARED = {
    "default": {},
    "no masks": {"drop_rate": 0.0, "lr": 0.01},
    "base": {"drop_rate": 0.0, "importance": "uniform", "weight_decay": 0.1},
    "lr": {"lr": 0.01, "drop_rate": 0.3},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "weight_decay": {"weight_decay": 0.5},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "hypergradient": {"importance": "hypergradient", "importance_lr": 0.1, "drop_rate": 0.3},
    "hypergradient maximize": {"importance": "hypergradient", "maximize": True},
    "lookahead": {"importance": "lookahead", "importance_lr": 0.1},
    "lookahead maximize": {"importance": "lookahead", "maximize": True},
    "fisher": {"importance": "fisher", "importance_lr": 0.1, "drop_rate": 0.3},
    "magnitude": {"importance": "magnitude", "kl_weight": 0.3},
    "uniform": {"importance": "uniform", "drop_rate": 0.3},
    "no temperature": {"kl_weight": 0.0, "importance_lr": 0.1},
    "drop important": {"drop": "important", "importance_lr": 0.1, "drop_rate": 0.3},
    "rescale none": {"rescale": "none", "drop_rate": 0.3},
    "exact": {"sampling": "exact", "importance_lr": 0.1, "drop_rate": 0.3},
    "hold zeros": {"hold_zeros": True, "drop_rate": 0.3},
    "seed": {"seed": 2**40 + 3, "keep_floor": 0.2, "drop_rate": 0.5},
}
OWN = {
    ImpactSGD: {
        "momentum": {"momentum": 0.9, "drop_rate": 0.3, "importance_lr": 0.1},
        "dampening": {"momentum": 0.9, "dampening": 0.5},
        "weight_decay with momentum": {"momentum": 0.9, "weight_decay": 0.1},
        "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "hypergradient with momentum": {"momentum": 0.9, "importance": "hypergradient", "importance_lr": 0.1},
    },
    ImpactAdamW: {
        "betas": {"betas": (0.5, 0.9), "drop_rate": 0.3, "importance_lr": 0.1},
        "amsgrad": {"amsgrad": True, "drop_rate": 0.3, "weight_decay": 0.1},
        "hypergradient with amsgrad": {"amsgrad": True, "importance": "hypergradient", "importance_lr": 0.1},
    },
}
# torch.optim.AdamW takes that only with capturable=True, which a CPU does not have.
NOT_WITH_FOREACH = [(ImpactAdamW, "tensor lr")]


def optim_inputs(build: type) -> list[OptimizerInput]:
    """Options without ``foreach``, ``fused`` and ``differentiable``, which are the tests' to set."""
    inputs = {**SHARED, **OWN[build]}
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in inputs.items()]


def optim_error_inputs(build: type, device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    def with_grad(grad: Tensor) -> nn.Parameter:
        param = nn.Parameter(torch.ones(2, 3, device=device, dtype=dtype))
        param.grad = grad.to(device, dtype)
        return param

    own = {
        ImpactSGD: [
            ("negative momentum", {"lr": 1e-2, "momentum": -0.5}, "Invalid momentum value: -0.5"),
            (
                "nesterov without momentum",
                {"nesterov": True},
                "Nesterov momentum requires a momentum and zero dampening",
            ),
        ],
        ImpactAdamW: [
            ("beta of one", {"lr": 1e-2, "betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
            ("negative eps", {"eps": -0.5}, "Invalid epsilon value: -0.5"),
        ],
    }
    construction = [
        *own[build],
        ("negative lr", {"lr": -1e-2}, "Invalid learning rate: -0.01"),
        ("negative weight_decay", {"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ("drop_rate of one", {"drop_rate": 1.0}, "Invalid drop_rate: 1.0"),
        ("no such signal", {"importance": "luck"}, "Invalid importance: 'luck'"),
    ]
    step = [
        (
            "masks that nobody sees",
            {"drop_rate": 0.1},
            torch.ones(2, 3),
            r"pass the module.*attach\(module\).*masked\(\)",
        ),
        ("lookahead without closure", {"importance": "lookahead"}, torch.ones(2, 3), r"step\(closure\)"),
        ("sparse gradient", {"drop_rate": 0.1}, torch.eye(2, 3).to_sparse(), "is sparse, and masks need a dense one"),
    ]
    return [
        *get_error_inputs_for_all_optims(device, dtype),
        *(
            ErrorOptimizerInput(OptimizerInput(None, kwargs, desc), error_type=ValueError, error_regex=regex)
            for desc, kwargs, regex in construction
        ),
        ErrorOptimizerInput(
            OptimizerInput([nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))], {}, "complex parameter"),
            error_type=ValueError,
            error_regex="does not support complex parameters",
        ),
        *(
            ErrorOptimizerInput(
                OptimizerInput([with_grad(grad)], kwargs, desc),
                error_on=OptimizerErrorEnum.STEP_ERROR,
                error_type=RuntimeError,
                error_regex=regex,
            )
            for desc, kwargs, grad, regex in step
        ),
    ]


def info(build: type) -> OptimizerInfo:
    return OptimizerInfo(
        build,
        optim_inputs_func=lambda device, dtype=None: optim_inputs(build),
        optim_error_inputs_func=lambda device, dtype: optim_error_inputs(build, device, dtype),
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4)],
            [lambda opt: StepLR(opt, gamma=0.99, step_size=10), lambda opt: ExponentialLR(opt, gamma=0.99)],
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
            [lambda opt: ConstantLR(opt, factor=0.4, total_iters=4)],
            [lambda opt: PolynomialLR(opt, power=0.9, total_iters=30)],
            [lambda opt: OneCycleLR(opt, max_lr=0.01, total_steps=40)],
            [lambda opt: SequentialLR(opt, [ConstantLR(opt, 0.1, 5), ExponentialLR(opt, 0.9)], milestones=[5])],
        ),
        supported_impls=("foreach", "differentiable", "fused"),
        not_og_supported_flags=(),
        supports_sparse=False,
        has_capturable_arg=build is ImpactAdamW,
        supports_complex=False,
        step_requires_closure=False,
        supports_param_groups=True,
        supports_multiple_devices=True,
    )


INFOS = [info(ImpactSGD), info(ImpactAdamW)]
BASE = {face.built_in: face.base for face in FACES if face.built_in}
BUILT_IN = pytest.mark.parametrize("build", list(BASE), ids=lambda build: build.__name__)
INPUTS = [(i.optim_cls, o) for i in INFOS for o in i.optim_inputs_func(device="cpu")]
ALL_INPUTS = pytest.mark.parametrize(
    ("build", "kwargs"), [pytest.param(build, o.kwargs, id=f"{build.__name__}-{o.desc}") for build, o in INPUTS]
)
IMPLEMENTATIONS_IN_TURN = pytest.mark.parametrize(
    ("build", "kwargs", "foreach"),
    [
        pytest.param(build, o.kwargs, foreach, id=f"{build.__name__}-{o.desc}-{'foreach' if foreach else 'forloop'}")
        for i, (build, o) in enumerate(INPUTS)
        for foreach in [i % 2 == 0 and (build, o.desc) not in NOT_WITH_FOREACH]
    ],
)
MAXIMIZE = {"maximize": True}

# ------------------------------------------------------------------------------------------ helpers


def make(build: Any, params: Any, kwargs: dict[str, Any], **more: Any) -> Any:
    return build(params, **{**copy.deepcopy(kwargs), **more})


def run_of(build: type, kwargs: dict[str, Any], **more: Any) -> tuple[tuple[nn.Parameter, ...], Any]:
    params = parameters()
    return params, make(build, params, kwargs, **more)


def parameters(
    device: str = "cpu", dtype: torch.dtype = torch.float32, contiguous: bool = True
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Two matrices, which share a simplex, and a bias."""
    generator = torch.Generator().manual_seed(1)
    params = []
    for shape in (6, 5), (3, 6), (3,):
        value = torch.randn(*shape, generator=generator, dtype=torch.float32).to(device, dtype)
        if not contiguous:
            value = torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]
        params.append(nn.Parameter(value))
        assert params[-1].is_contiguous() == contiguous
    return tuple(params)


def loss_of(params: tuple[nn.Parameter, nn.Parameter, nn.Parameter]) -> Tensor:
    first, second, bias = params
    x = torch.linspace(-1, 2, 5, device=first.device, dtype=first.dtype)
    return (second @ torch.tanh(first @ x) + bias.to(second.device) - 1).square().sum()


def closure_for(optimizer: Any, params: tuple[nn.Parameter, ...], base: Any = None) -> Callable[[], Tensor]:
    """A closure that masks what it reads; ``base`` is the optimizer that steps, if that is another."""

    def closure() -> Tensor:
        (optimizer if base is None else base).zero_grad()
        with optimizer.masked():
            loss = loss_of(params)
            loss.backward()
        return loss

    return closure


def train(optimizer: Any, params: tuple[nn.Parameter, ...], steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.step(closure_for(optimizer, params))


def gradients_for(optimizer: Any, params: Any, grads: Any) -> Callable[[], float]:
    """A closure that puts these very tensors into ``grad``."""

    def closure() -> float:
        with optimizer.masked():
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        return 0.0

    return closure


def masks(optimizer: Any, params: Any) -> list[Tensor]:
    with optimizer.masked():
        return [p.detach() != 0 for p in params]


def saved_and_loaded(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------ construction


def test_inputs_leave_implementation_flags_to_the_tests():
    assert not any({"foreach", "fused", "differentiable"} & set(o.kwargs) for _, o in INPUTS)


@BUILT_IN
def test_arguments_have_the_names_order_and_defaults_of_the_base(build):
    ours, base = (inspect.signature(cls.__init__).parameters for cls in (build, BASE[build]))
    positional = [name for name, p in base.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert [name for name, p in ours.items() if p.kind is not p.VAR_KEYWORD] == list(base)
    for name in base:
        assert ours[name].default == base[name].default, name
    assert {"drop_rate", "mask_step"} <= set(build([nn.Parameter(torch.ones(2, 2))]).defaults)


@pytest.mark.parametrize(
    ("build", "error_input"),
    [
        pytest.param(i.optim_cls, e, id=f"{i.optim_cls.__name__}-{e.optimizer_error_input.desc}")
        for i in INFOS
        for e in i.optim_error_inputs_func("cpu", torch.float32)
    ],
)
def test_errors(build, error_input):
    optim_input = error_input.optimizer_error_input
    params = optim_input.params if optim_input.params is not None else [nn.Parameter(torch.randn(2, 3))]
    if error_input.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error_input.error_regex):
            make(build, params, optim_input.kwargs)
    elif error_input.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error_input.error_type, match=error_input.error_regex):
            make(build, params, optim_input.kwargs)
    else:
        optimizer = make(build, params, optim_input.kwargs)
        before, state = clones(params), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(error_input.error_type, match=error_input.error_regex):
            optimizer.step()
        assert_same(clones(params), before)
        assert_same(optimizer.state_dict(), state)


@BUILT_IN
def test_can_not_optimize_a_non_leaf(build):
    leaf = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        build([leaf * 2])


@BUILT_IN
def test_takes_a_generator_and_named_parameters(build):
    model = nn.Linear(3, 2)
    assert build(p for p in model.parameters()).param_groups[0]["params"] == list(model.parameters())
    assert build(model.named_parameters()).param_groups[0]["param_names"] == ["weight", "bias"]
    assert build(OrderedDict(w=model.weight).items()).param_groups[0]["param_names"] == ["w"]


@BUILT_IN
def test_defaults_are_those_of_a_later_group(build):
    optimizer = build([nn.Parameter(torch.randn(2, 3))], lr=0.5, drop_rate=0.25)
    optimizer.defaults["drop_rate"] = 0.75
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2, 3))], "importance": "fisher"})
    assert [g["drop_rate"] for g in optimizer.param_groups] == [0.25, 0.75]
    assert [g["importance"] for g in optimizer.param_groups] == ["saliency", "fisher"]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]


@BUILT_IN
def test_docstring_has_its_backslashes(build):
    assert all(c == "\n" or c.isprintable() for c in build.__doc__)


@ALL_INPUTS
def test_can_be_printed(build, kwargs):
    text = repr(make(build, parameters(), kwargs))
    assert text.startswith(f"{build.__name__} (\nParameter Group 0\n")
    for name, value in kwargs.items():
        assert f"    {name}: {value}\n" in text


# ------------------------------------------------------------------------------------------ steps


@IMPLEMENTATIONS_IN_TURN
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_goes_in_the_right_direction(build, kwargs, foreach, contiguous):
    params = parameters(contiguous=contiguous)
    optimizer = make(build, params, kwargs, foreach=foreach)
    start = loss_of(params)
    train(optimizer, params, steps=20)
    assert (loss_of(params) > start) if kwargs.get("maximize") else (loss_of(params) < start)


SCHEDULERS = pytest.mark.parametrize("schedulers", INFOS[0].scheduler_inputs, ids=range(len(INFOS[0].scheduler_inputs)))


@BUILT_IN
@pytest.mark.parametrize("kwargs", [{"drop_rate": 0.3}, {**MAXIMIZE, "importance": "lookahead"}], ids=str)
@SCHEDULERS
def test_goes_in_the_right_direction_with_schedulers(build, kwargs, schedulers):
    params = parameters()
    optimizer = make(build, params, kwargs, lr=0.001)
    start = loss_of(params)
    created = [constructor(optimizer) for constructor in schedulers]
    for _ in range(30):  # masks and warm-ups make the first steps a lottery
        loss = optimizer.step(closure_for(optimizer, params))
        for scheduler in created:
            scheduler.step(*([loss.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert (loss_of(params) > start) if kwargs.get("maximize") else (loss_of(params) < start)


@ALL_INPUTS
@CPU_AND_CUDA
def test_foreach_equals_forloop(build, kwargs, device):
    """To rounding, and masks as far as a probability is not within rounding of its draw."""
    if build is ImpactAdamW and isinstance(kwargs.get("lr"), Tensor):
        pytest.skip("torch.optim.AdamW takes that only with capturable=True")
    all_params = [parameters(device) for _ in range(2)]
    optimizers = [make(build, p, kwargs, foreach=f) for p, f in zip(all_params, (False, True), strict=True)]
    for _ in range(5):
        assert_same(masks(optimizers[1], all_params[1]), masks(optimizers[0], all_params[0]))
        for optimizer, params in zip(optimizers, all_params, strict=True):
            optimizer.step(closure_for(optimizer, params))
        for forloop, other in zip(*all_params, strict=True):
            torch.testing.assert_close(other, forloop, rtol=1e-4, atol=1e-5)
            assert list(optimizers[1].state[other]) == list(optimizers[0].state[forloop])


@BUILT_IN
def test_an_implementation_is_chosen_as_by_the_base(build):
    param = nn.Parameter(torch.randn(2, 3))
    for kwargs in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"differentiable": True}):
        ours, base = build([param], **kwargs).param_groups[0], BASE[build]([param], **kwargs).param_groups[0]
        assert {key: ours[key] for key in base} == dict(base)


@ALL_INPUTS
@CPU_AND_CUDA
def test_dtypes_and_devices_mix_in_one_group(build, kwargs, device):
    """One simplex over all of them, and every tensor keeps its dtype and device."""
    places = [
        (dtype, place)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for place in dict.fromkeys(("cpu", device))
    ]
    params = [nn.Parameter(torch.randn(3, 4).to(place, dtype)) for dtype, place in places]
    optimizer = make(build, params, kwargs)
    for _ in range(3):
        optimizer.step(gradients_for(optimizer, params, [torch.randn(3, 4).to(p) for p in params]))
    for p, (dtype, place) in zip(params, places, strict=True):
        assert (p.dtype, p.device.type) == (dtype, place)
        assert p.isfinite().all() or dtype == torch.float16  # in which the second moment of AdamW underflows
        state = optimizer.state.get(p, {})
        assert state.get("momentum_buffer", p).dtype == dtype
        assert state.get("log_importance", torch.zeros(())).dtype == torch.float32
        assert state.get("log_importance", p).device.type == place
    n = sum(p.numel() for p in params)
    assert sum(optimizer.importance(p).sum().item() for p in params) == pytest.approx(n, rel=1e-5)


@IMPLEMENTATIONS_IN_TURN
def test_gradients_are_never_written(build, kwargs, foreach):
    params = parameters()
    optimizer = make(build, params, kwargs, foreach=foreach)
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        before = clones(grads)
        optimizer.step(gradients_for(optimizer, params, grads))
        assert_same(grads, before)
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))


@IMPLEMENTATIONS_IN_TURN
def test_parameters_without_gradient_are_skipped(build, kwargs, foreach):
    params = parameters()
    optimizer = make(build, params, kwargs, foreach=foreach)
    before = clones(params)
    optimizer.step(lambda: None)
    assert_same(clones(params), before)
    assert not optimizer.state_dict()["state"]

    optimizer.step(gradients_for(optimizer, params, [torch.ones_like(params[0]), None, None]))
    assert not torch.equal(params[0], before[0])
    assert_same(clones(params[1:]), before[1:])
    assert not any("momentum_buffer" in optimizer.state.get(p, {}) for p in params[1:])


@IMPLEMENTATIONS_IN_TURN
def test_empty_and_scalar_parameters(build, kwargs, foreach):
    """Empty ones change nothing for the others, and a scalar takes the step of the base."""
    shapes = [(0,), (0, 3), (3, 4), (), (1,), (2, 0, 2)]
    values = [torch.randn(s) for s in shapes]
    grads = [[torch.randn(s) for s in shapes] for _ in range(3)]

    def run(indices: list[int], optimizer_class: Any) -> list[Tensor]:
        params = [nn.Parameter(values[i].clone()) for i in indices]
        own = kwargs if optimizer_class is build else {k: v for k, v in kwargs.items() if k not in OPTIONS}
        optimizer = make(optimizer_class, params, own, foreach=foreach)
        for step_grads in grads:
            these = [step_grads[i].clone() for i in indices]
            if optimizer_class is build:
                optimizer.step(gradients_for(optimizer, params, these))
            else:
                for p, g in zip(params, these, strict=True):
                    p.grad = g
                optimizer.step()
        return clones(params)

    with_empty = run([2, 0, 1, 3, 4, 5], build)
    without = run([2, 3, 4], build)
    assert_same([with_empty[0], *with_empty[3:5]], without)
    assert not torch.equal(with_empty[0], values[2])
    assert_same(without[1:], run([3, 4], BASE[build]))


@IMPLEMENTATIONS_IN_TURN
def test_zero_gradient_moves_no_weight(build, kwargs, foreach):
    params = parameters()
    optimizer = make(build, params, {**kwargs, "weight_decay": 0.0}, foreach=foreach)
    before = clones(params)
    for _ in range(3):
        optimizer.step(gradients_for(optimizer, params, [torch.zeros_like(p) for p in params]))
    assert_same(clones(params), before)
    if kwargs.get("importance") != "magnitude":  # the one signal that does not come from the gradient
        assert all(torch.equal(optimizer.importance(p), torch.ones_like(p)) for p in params)


@every_face
@pytest.mark.parametrize("closure_calls", [0, 1, 2])
def test_closure_runs_with_gradients_and_its_loss_is_returned(face, closure_calls):
    param = nn.Parameter(torch.ones(2, 3))
    importance = "lookahead" if closure_calls == 2 else "saliency"
    _, optimizer = face([param], drop_rate=0.0, importance=importance)
    param.grad = torch.ones_like(param)
    calls = []

    def closure() -> str:
        assert torch.is_grad_enabled()
        calls.append(1)
        return f"loss {len(calls)}"

    assert optimizer.step(closure if closure_calls else None) == ("loss 1" if closure_calls else None)
    assert len(calls) == closure_calls


@ALL_INPUTS
def test_default_dtype_does_not_matter(build, kwargs):
    def run() -> list[Tensor]:
        params = parameters()
        optimizer = make(build, params, kwargs)
        train(optimizer, params)
        return (
            clones(params) + [optimizer.importance(p) for p in params] + [m.float() for m in masks(optimizer, params)]
        )

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        actual = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(actual, expected)


@BUILT_IN
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(build, set_to_none):
    params = parameters()
    optimizer = build(params)
    closure_for(optimizer, params)()
    grads = [p.grad for p in params]
    assert all(g.abs().sum() > 0 for g in grads)
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in params)
    else:
        assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))


# ------------------------------------------------------------------------------------------ learning rates, groups


@ALL_INPUTS
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
def test_tensor_lr_equals_float_lr(build, kwargs, shape):
    lr = float(kwargs.get("lr", 0.01))
    tensor_lr = torch.full(shape, lr, dtype=torch.float64)
    (float_params, with_float), (tensor_params, with_tensor) = (
        run_of(build, kwargs, foreach=False, lr=rate) for rate in (lr, tensor_lr)
    )
    train(with_float, float_params)
    train(with_tensor, tensor_params)
    torch.testing.assert_close(clones(tensor_params), clones(float_params), rtol=1e-4, atol=1e-6)
    assert torch.equal(tensor_lr, torch.full(shape, lr, dtype=torch.float64))


@BUILT_IN
@SCHEDULERS
def test_tensor_lr_stays_a_tensor_under_schedulers(build, schedulers):
    def run(lr: float | Tensor) -> tuple[list[Tensor], list[float], Any]:
        params = parameters()
        optimizer = build(params, lr=lr, drop_rate=0.2)
        created = [constructor(optimizer) for constructor in schedulers]
        rates = []
        for step in range(20):
            optimizer.step(closure_for(optimizer, params))
            for scheduler in created:
                # a loss that does not fall, for ReduceLROnPlateau to act on
                scheduler.step(*([float(step)] if isinstance(scheduler, ReduceLROnPlateau) else []))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return clones(params), rates, optimizer

    expected, rates, _ = run(0.01)
    assert len(set(rates)) > 1
    tensor_lr = torch.tensor(0.01, dtype=torch.float64)
    actual, tensor_rates, optimizer = run(tensor_lr)
    assert optimizer.param_groups[0]["lr"] is tensor_lr
    assert tensor_rates == pytest.approx(rates)
    torch.testing.assert_close(actual, expected)


def trained_dense(build: Any, scheduler: Any = None, **kwargs: Any) -> list[Tensor]:
    params = parameters()
    optimizer = build(params, **kwargs)
    schedule = None if scheduler is None else scheduler(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return clones(params)


@BUILT_IN
def test_lr_that_is_a_numpy_number(build):
    """As the base takes it; NumPy 2 makes it of a LambdaLR whose factors are float32."""
    numpy = pytest.importorskip("numpy")

    def scheduler(optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: numpy.float32(0.5) ** step)

    expected = trained_dense(BASE[build], scheduler, lr=numpy.float32(0.1))
    assert_same(trained_dense(build, scheduler, lr=numpy.float32(0.1), drop_rate=numpy.float32(0)), expected)


def test_weight_decay_that_is_a_tensor():
    """As SGD takes it."""
    kwargs = {"lr": 0.1, "weight_decay": torch.tensor(0.25)}
    assert_same(trained_dense(ImpactSGD, **kwargs, drop_rate=0.0), trained_dense(torch.optim.SGD, **kwargs))


@pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])
@pytest.mark.parametrize("options_first", [True, False])
def test_groups_have_their_own_lr_and_weight_decay(foreach, options_first):
    def group(params: Any, **options: Any) -> dict[str, Any]:
        return {**options, "params": params} if options_first else {"params": params, **options}

    frozen, decayed, trained = (nn.Parameter(torch.full((4, 3), 2.0)) for _ in range(3))
    optimizer = ImpactSGD(
        [group(frozen, lr=0.0), group([decayed], weight_decay=0.5, drop_rate=0.5), group([trained], drop_rate=0.0)],
        lr=0.1,
        foreach=foreach,
    )
    for _ in range(4):
        zero, one = torch.zeros_like(frozen), torch.ones_like(frozen)
        optimizer.step(gradients_for(optimizer, (frozen, decayed, trained), (one, zero, one)))
    assert torch.equal(frozen, torch.full((4, 3), 2.0))
    torch.testing.assert_close(decayed, torch.full((4, 3), 2.0 * (1 - 0.1 * 0.5) ** 4))
    torch.testing.assert_close(trained, torch.full((4, 3), 2.0 - 4 * 0.1))


@BUILT_IN
def test_groups_train_as_separate_optimizers_would(build):
    """Every option counts per group, and every group is a simplex."""
    options = [
        {"lr": 0.1, "importance": "fisher", "drop_rate": 0.0},
        {"lr": 0.2, "importance": "saliency", "weight_decay": 0.1, "drop_rate": 0.0},
        {"lr": 0.3, "importance": "hypergradient", "maximize": True, "drop_rate": 0.0},
    ]
    values = [torch.randn(4, 3) for _ in options]
    together = [nn.Parameter(v.clone()) for v in values]
    groups = [{"params": [p], **o} for p, o in zip(together, options, strict=True)]
    optimizer = build(groups, importance_lr=0.3, kl_weight=1.0)
    alone = [nn.Parameter(v.clone()) for v in values]
    separate = [build([p], **o, importance_lr=0.3, kl_weight=1.0) for p, o in zip(alone, options, strict=True)]
    for _ in range(5):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(4, 3)
            q.grad = p.grad.clone()
        optimizer.step()
        for one in separate:
            one.step()
    assert_same(clones(together), clones(alone))
    for p, q, one in zip(together, alone, separate, strict=True):
        assert_same(optimizer.importance(p), one.importance(q))
        assert one.importance(q).std() > 0.1


@BUILT_IN
def test_added_group_trains_and_leaves_the_masks_of_the_others(build):
    params, reference = parameters(), parameters()
    optimizer, expected = build(params, lr=0.01, drop_rate=0.5), build(reference, lr=0.01, drop_rate=0.5)
    train(optimizer, params)
    train(expected, reference)
    added = nn.Parameter(torch.randn(40, 30))
    optimizer.add_param_group({"params": added, "drop_rate": 0.25, "lr": 0.5, "weight_decay": 0.0})
    before = clones([added])[0]
    optimizer.step(gradients_for(optimizer, (*params, added), [torch.ones_like(p) for p in (*params, added)]))
    expected.step(gradients_for(expected, reference, [torch.ones_like(p) for p in reference]))
    assert_same(clones(params), clones(reference))
    kept = added != before
    step = 0.5 if build is ImpactAdamW else 0.5 / 0.75
    torch.testing.assert_close(added.detach(), torch.where(kept, before - step, before))
    assert 0.7 < kept.float().mean() < 0.8
    assert [group["mask_step"] for group in optimizer.param_groups] == [6, 1]


# ------------------------------------------------------------------------------------------ state dict


@IMPLEMENTATIONS_IN_TURN
def test_loaded_optimizer_continues_the_same(build, kwargs, foreach):
    params = parameters()
    optimizer = make(build, params, kwargs, foreach=foreach)
    train(optimizer, params)
    # Copied, since torch's load_state_dict does not: the momentum would be one tensor in both optimizers.
    state_dict = copy.deepcopy(optimizer.state_dict())

    other_params = tuple(nn.Parameter(p.detach().clone()) for p in params)
    other = make(build, other_params, kwargs, foreach=foreach)
    other.load_state_dict(state_dict)
    assert_same(state_dict, optimizer.state_dict())
    assert_same(other.state_dict(), optimizer.state_dict())
    for _ in range(4):
        assert_same(masks(other, other_params), masks(optimizer, params))
        train(optimizer, params, steps=1)
        train(other, other_params, steps=1)
        assert_same(clones(other_params), clones(params))
    assert_same(other.state_dict(), optimizer.state_dict())


@ALL_INPUTS
def test_save_and_load_with_weights_only(build, kwargs):
    params = parameters()
    optimizer = make(build, params, kwargs)
    train(optimizer, params)
    assert_same(saved_and_loaded(optimizer.state_dict()), optimizer.state_dict())


@BUILT_IN
@pytest.mark.parametrize("saved_named", [True, False])
@pytest.mark.parametrize("loading_named", [True, False])
def test_state_dict_with_and_without_names(build, saved_named, loading_named):
    def named(params: tuple[nn.Parameter, ...], is_named: bool, names: str) -> Any:
        return build(list(zip(names, params, strict=True)) if is_named else params, importance_lr=0.1)

    params, other_params = parameters(), parameters()
    optimizer, other = named(params, saved_named, "abc"), named(other_params, loading_named, "xyz")
    train(optimizer, params)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for p, q in zip(params, other_params, strict=True):
        assert_same(dict(other.state[q]), dict(optimizer.state[p]))
        q.data.copy_(p)
    names = list("abc") if saved_named else list("xyz")  # as in torch: names that are saved replace one's own
    assert other.state_dict()["param_groups"][0].get("param_names") == (names if loading_named else None) or saved_named
    train(optimizer, params)
    train(other, other_params)
    assert_same(clones(other_params), clones(params))


@BUILT_IN
def test_names_are_kept_in_the_state_dict(build):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    with pytest.raises(ValueError, match="should be with/without names"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2, 3))]})


@BUILT_IN
@pytest.mark.parametrize("option", [name for name in DEFAULTS if name not in ("mask_step", "signal_scale")])
def test_state_dict_from_before_an_option_existed(build, option):
    kwargs = {"drop_rate": 0.3, "importance": "fisher", "importance_lr": 0.1, "seed": 3, "lr": 0.01}
    (params, optimizer), (other_params, other) = run_of(build, kwargs), run_of(build, kwargs)
    train(optimizer, params)
    for p, q in zip(params, other_params, strict=True):
        q.data.copy_(p)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        del group[option]
    other.load_state_dict(state_dict)
    train(optimizer, params)
    train(other, other_params)
    assert_same(clones(other_params), clones(params))


@every_face
@pytest.mark.parametrize("importance", ["saliency", "hypergradient"])
def test_state_dict_of_the_base_loads_and_continues_its_trajectory(face, importance):
    params, other_params = parameters(), parameters()
    plain = face.plain(params, lr=0.02, weight_decay=0.1)
    impact, optimizer = face(other_params, lr=0.5, drop_rate=0.0, importance=importance)

    def step(which: torch.optim.Optimizer, which_params: tuple[nn.Parameter, ...]) -> None:
        which.zero_grad()
        loss_of(which_params).backward()
        which.step()

    for _ in range(3):
        step(plain, params)
    for p, q in zip(params, other_params, strict=True):
        q.data.copy_(p)
    optimizer.load_state_dict(saved_and_loaded(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.02
    for _ in range(4):
        step(plain, params)
        step(optimizer, other_params)
        assert_same(clones(other_params), clones(params))
    assert impact.importance(other_params[0]).std() > 1e-3


@every_face
def test_a_state_dict_continues_in_the_base(face):
    """Who stops to mask goes on with torch's own optimizer."""
    params, other_params = parameters(), parameters()
    impact, optimizer = face(params, drop_rate=0.3)
    for _ in range(3):
        optimizer.step(closure_for(impact, params, optimizer))
    for p, q in zip(params, other_params, strict=True):
        q.data.copy_(p)
    plain = face.plain(other_params)
    plain.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    optimizer.param_groups[0]["drop_rate"] = 0.0
    for _ in range(3):
        for which, which_params in ((optimizer, params), (plain, other_params)):
            which.zero_grad()
            loss_of(which_params).backward()
            which.step()
        assert_same(clones(other_params), clones(params))


@BUILT_IN
def test_state_dict_of_the_base_leaves_every_group_its_own_new_options(build):
    """One who loads a checkpoint of SGD into ``{"params": head, "drop_rate": 0.0}`` wants no masks on the head."""
    body, head = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 3))
    plain = BASE[build]([{"params": [body]}, {"params": [head]}], lr=0.1)
    groups = [{"params": [body]}, {"params": [head], "drop_rate": 0.0, "importance": "fisher"}]
    optimizer = build(groups, drop_rate=0.3)
    optimizer.load_state_dict(plain.state_dict())
    assert [g["drop_rate"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert [g["importance"] for g in optimizer.param_groups] == ["saliency", "fisher"]


@BUILT_IN
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_importances_stay_float32_when_loaded(build, dtype):
    params, other_params = parameters(), parameters(dtype=dtype)
    kwargs = {"importance_lr": 0.1, "drop_rate": 0.3}
    optimizer, other = make(build, params, kwargs), make(build, other_params, kwargs)
    train(optimizer, params)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for p, q in zip(params[:2], other_params[:2], strict=True):
        assert_same(other.state[q]["log_importance"], optimizer.state[p]["log_importance"])
        assert other.state[q]["log_importance"].data_ptr() != optimizer.state[p]["log_importance"].data_ptr()
        assert_same(other.importance(q), optimizer.importance(p))
        assert optimizer.importance(p).std() > 1e-3
    assert_same(masks(other, other_params), masks(optimizer, params))


# ------------------------------------------------------------------------------------------ copies


@ALL_INPUTS
def test_deepcopy_keeps_public_attributes_and_continues_the_same(build, kwargs):
    params = parameters()
    optimizer = make(build, params, kwargs)
    train(optimizer, params)
    copied = copy.deepcopy(optimizer)

    assert [name for name in vars(copied) if name[0] != "_"] == [name for name in vars(optimizer) if name[0] != "_"]
    assert_same(copied.state_dict(), optimizer.state_dict())
    assert copied.defaults.keys() == optimizer.defaults.keys()
    copied_params = tuple(copied.param_groups[0]["params"])
    assert not any(p is q for p, q in zip(params, copied_params, strict=True))
    train(optimizer, params)
    train(copied, copied_params)
    assert_same(clones(copied_params), clones(params))
    assert_same(copied.state_dict(), optimizer.state_dict())


@ALL_INPUTS
def test_pickle_continues_the_same(build, kwargs):
    params = parameters()
    optimizer = make(build, params, kwargs)
    train(optimizer, params)
    copied = pickle.loads(pickle.dumps(optimizer))
    copied_params = tuple(copied.param_groups[0]["params"])
    train(optimizer, params)
    train(copied, copied_params)
    assert_same(clones(copied_params), clones(params))
    assert_same(copied.state_dict(), optimizer.state_dict())


@BUILT_IN
def test_model_and_optimizer_copied_together(build):
    """The copy is attached to nothing, says so, and once attached goes on as the original."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = build(model, lr=0.1, drop_rate=0.4, importance_lr=0.1)
    x = torch.randn(8, 5)

    def step(m: nn.Module, o: Any) -> float:
        o.zero_grad()
        loss = m(x).square().mean()
        loss.backward()
        o.step()
        return loss.item()

    for _ in range(3):
        step(model, optimizer)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    with pytest.raises(RuntimeError, match="attach"):
        step(model_copy, optimizer_copy)
    optimizer_copy.attach(model_copy)
    for _ in range(3):
        assert step(model_copy, optimizer_copy) == step(model, optimizer)


# ------------------------------------------------------------------------------------------ hooks


@BUILT_IN
def test_step_hooks_run_around_the_step_and_can_change_its_arguments(build):
    params = parameters()
    optimizer = build(params, lr=0.01, drop_rate=0.3)
    closure = closure_for(optimizer, params)
    before = clones(params)
    order = []

    def pre(opt: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert opt is optimizer
        assert_same(clones(params), before)
        order.append(("pre", args, kwargs))
        return (opt, closure), {}

    def post(opt: Any, args: tuple, kwargs: dict) -> None:
        assert not torch.equal(params[0], before[0])
        order.append(("post", args, kwargs))

    handles = [
        optimizer.register_step_pre_hook(pre),
        optimizer.register_step_post_hook(post),
        register_optimizer_step_pre_hook(lambda *a: order.append("global pre")),
        register_optimizer_step_post_hook(lambda *a: order.append("global post")),
    ]
    try:
        optimizer.step()
        assert order[0] == "global pre"
        assert order[1] == ("pre", (optimizer,), {})
        assert order[2] == ("post", (optimizer, closure), {})
        assert order[3:] == ["global post"]
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step(closure)
    assert len(order) == 4


@BUILT_IN
def test_profiler_sees_steps_and_zero_grad(build):
    params = parameters()
    optimizer = build(params, drop_rate=0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()
    names = [event.name for event in profile.events()]
    assert names.count(f"Optimizer.step#{build.__name__}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{build.__name__}.zero_grad") == 1


@BUILT_IN
def test_state_dict_hooks(build):
    params = parameters()
    optimizer = build(params, lr=0.5)
    order = []

    def append(name: str) -> Callable[..., None]:
        return lambda *args: order.append(name)

    optimizer.register_state_dict_pre_hook(append("pre"))
    optimizer.register_state_dict_pre_hook(append("first pre"), prepend=True)
    optimizer.register_state_dict_post_hook(append("post"))
    optimizer.register_state_dict_post_hook(append("first post"), prepend=True)
    handle = optimizer.register_state_dict_post_hook(lambda opt, state_dict: {**state_dict, "remark": "mine"})
    assert optimizer.state_dict()["remark"] == "mine"
    assert order == ["first pre", "pre", "first post", "post"]
    handle.remove()
    assert "remark" not in optimizer.state_dict()


@BUILT_IN
def test_load_state_dict_hooks(build):
    """They run in their order, what a pre-hook returns is loaded, and a post-hook finds everything in place."""
    params, other_params = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    optimizer = build(params, lr=0.5, importance_lr=0.1, drop_rate=0.3)
    train(optimizer, params)
    other = build(other_params)
    order = []

    def halve(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append("halve")
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] /= 2
        return changed

    def look(opt: Any) -> None:
        order.append("look")
        assert opt is other
        assert opt.param_groups[0]["lr"] == 0.125
        assert_same(opt.state[other_params[0]]["log_importance"], optimizer.state[params[0]]["log_importance"])

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_pre_hook(
        lambda opt, state_dict: order.append("first") or halve(opt, state_dict), prepend=True
    )
    other.register_load_state_dict_post_hook(look)
    other.register_load_state_dict_post_hook(lambda opt: order.append("first look"), prepend=True)
    for _ in range(2):  # a load leaves no hook of its own behind
        order.clear()
        other.load_state_dict(optimizer.state_dict())
        assert order == ["first", "halve", "halve", "first look", "look"]


@BUILT_IN
def test_failed_load_changes_nothing(build):
    params, optimizer = run_of(build, {"drop_rate": 0.3})
    train(optimizer, params)
    before = copy.deepcopy(optimizer.state_dict())
    for bad, error in (
        ({"state": {}, "param_groups": []}, ValueError),
        ({"state": {}}, TypeError),
        ({**before, "state": {7: {}}}, ValueError),
        ({**before, "param_groups": [{**before["param_groups"][0], "mask_step": 1.0}]}, ValueError),
        ({**before, "param_groups": [{**before["param_groups"][0], "drop_rate": 2.0}]}, ValueError),
        ({**before, "state": {**before["state"], 0: {"log_importance": torch.zeros(2, 2)}}}, ValueError),
        ({**before, "state": {**before["state"], 0: {"log_importance": torch.full((6, 5), math.nan)}}}, ValueError),
    ):
        with pytest.raises(error):
            optimizer.load_state_dict(bad)
        assert_same(optimizer.state_dict(), before)
    train(optimizer, params, steps=1)


# ------------------------------------------------------------------------------------------ differentiable


DIFFERENTIABLE_OPTIONS = pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"drop_rate": 0.3, "momentum": 0.9},
        {"drop_rate": 0.3, "rescale": "none"},
        {"importance": "hypergradient", "momentum": 0.9},
    ],
    ids=str,
)


def differentiable_steps(
    optimizer_class: Any, kwargs: dict[str, Any], lr: Tensor, param: Tensor, buffer: Tensor, *grads: Tensor
) -> tuple[Tensor, ...]:
    param = param.clone()
    optimizer = optimizer_class([param], **{"lr": lr, "differentiable": True, **kwargs})
    if "momentum" in kwargs:
        optimizer.state[param]["momentum_buffer"] = buffer.clone()
    for grad in grads:
        param.grad = grad
        if kwargs.get("drop_rate"):
            with optimizer.masked():
                pass
        optimizer.step()
    return (param, optimizer.state[param]["momentum_buffer"]) if "momentum" in kwargs else (param,)


@DIFFERENTIABLE_OPTIONS
def test_differentiable_step_has_the_right_derivatives(kwargs):
    """In the learning rate, the weights, the momentum and the gradients."""
    kwargs = {"drop_rate": 0.0, **kwargs}

    def draw() -> Tensor:
        return torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    # One step where masks follow the gradients, through which no derivative is taken, and where the next step writes
    # into the momentum that this one has saved for its derivatives, as that of torch.optim.SGD does.
    in_place = "momentum" in kwargs and not kwargs.get("nesterov")
    grads = (draw(),) if kwargs["drop_rate"] or in_place else (draw(), draw())
    assert torch.autograd.gradcheck(
        lambda *tensors: differentiable_steps(ImpactSGD, kwargs, *tensors), (lr, draw(), draw(), *grads)
    )


def test_differentiable_step_has_the_derivatives_of_sgd():
    tensors = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kwargs = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    ours = differentiable_steps(ImpactSGD, {**kwargs, "drop_rate": 0.0}, lr, *tensors)
    sgd = differentiable_steps(torch.optim.SGD, kwargs, lr, *tensors)
    assert_same(list(ours), list(sgd))
    derivatives = [torch.autograd.grad(sum(t.square().sum() for t in out), (lr, *tensors)) for out in (ours, sgd)]
    assert_same(list(derivatives[0]), list(derivatives[1]))


def test_an_import_brings_no_compiler():
    """And none of what takes long: half a second for torch.export, which only the pruner needs."""
    code = (
        "import sys, torch; before = set(sys.modules); import impact_optim; print(*sorted(set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "impact_optim.kernels.cpu" in found
    heavy = (
        "triton",
        "sympy",
        "torch.export",
        "torch._inductor",
        "torch._dynamo",
        "matplotlib",
        "impact_optim.pruning",
    )
    assert not [name for name in found if name.startswith(heavy)]
