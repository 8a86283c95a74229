"""A run that is saved and resumed gives the same bits, and a state dict that does not fit changes nothing."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FACES, MUON, Face, assert_same, clones, every_face, run, train, two_layers
from torch import nn

from impact_optim import Impact, ImpactAdamW, ImpactSGD
from impact_optim.options import OPTIONS

FOUR = [*FACES, MUON]
four_faces = pytest.mark.parametrize("face", FOUR, ids=lambda face: face.name)
SETTINGS = [
    {"importance": "saliency", "sampling": "exact", "seed": 3},
    {"importance": "fisher", "rescale": "none"},
    {"importance": "magnitude", "drop": "important"},
    {"importance": "hypergradient"},
    {"importance": "lookahead"},
    {"importance": "uniform"},
]


def new(face: Face, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = two_layers(dtype, bias=face is not MUON)
    precise = {"eps": 1e-4} if face.base in (torch.optim.AdamW, torch.optim.RMSprop) else {}
    return model, *face(model, **{"drop_rate": 0.3, "importance_lr": 0.05, "kl_weight": 0.3, **precise, **options})


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    run(model, optimizer, steps, closure=optimizer.param_groups[0]["importance"] == "lookahead")


def saved(*objects: Any) -> Any:
    """What torch.save and torch.load(weights_only=True) make of state dicts."""
    file = io.BytesIO()
    torch.save([each.state_dict() for each in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(face: Face, dtype: torch.dtype, state: Any, **options: Any) -> tuple[nn.Module, Any, Any]:
    """A new network and optimizer with the defaults of the package, into which all has been loaded."""
    model, engine, optimizer = new(face, dtype, drop_rate=0.9, **options)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    return model, engine, optimizer


def half_way(face: Face, dtype: torch.dtype, sparse: bool, options: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    model, engine, optimizer = new(face, dtype, **options)
    go_on(model, optimizer, range(4))
    if sparse:
        engine.sparsify(0.5, by="magnitude")
        optimizer.param_groups[0]["drop_rate"] = 0.4  # masks among what is left, too
        go_on(model, optimizer, range(4, 6))
    return model, engine, optimizer


# ------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: options["importance"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@four_faces
def test_saved_or_copied_it_goes_on_with_the_same_bits(face, dtype, sparse, options):
    model, engine, optimizer = half_way(face, dtype, sparse, options)
    state = saved(model, optimizer)
    runs = [(model, engine, optimizer), resumed(face, dtype, state)]
    twin, copied = copy.deepcopy((model, optimizer))
    if face.built_in is None:
        runs.append((twin, Impact(twin, copied), copied))
    else:
        copied.attach(twin)
        runs.append((twin, copied, copied))
    ends = []
    for model, engine, optimizer in runs:
        go_on(model, optimizer, range(6, 10))
        masked = model(torch.ones(1, 12, dtype=dtype)).detach()  # by the next mask
        w = [engine.importance(p) for p in model.parameters()]
        ends.append([model.state_dict(), optimizer.state_dict(), masked, w])
    assert_same(ends[1], ends[0])
    assert_same(ends[2], ends[0])
    for p in model.parameters():
        assert torch.isfinite(p).all()
        assert not sparse or p.dim() < 2 or (p == 0).any()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}], ids=["momentum", "no momentum"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Muon], ids=lambda b: b.__name__)
def test_with_and_without_momentum(base, options):
    face = next(face for face in FOUR if face.base is base)
    model, _, optimizer = half_way(face, torch.float32, False, options)
    other, _, again = resumed(face, torch.float32, saved(model, optimizer))
    for each in ((model, optimizer), (other, again)):
        go_on(*each, range(4, 8))
    assert_same([other.state_dict(), again.state_dict()], [model.state_dict(), optimizer.state_dict()])


def all_cases() -> list[tuple[str, Face, torch.dtype, bool, dict[str, Any]]]:
    """Every face with every signal, and every second one in half precision and sparse."""
    cases = []
    for i, face in enumerate(FOUR):
        for j, options in enumerate(SETTINGS):
            dtype, is_sparse = (torch.float32, torch.bfloat16)[(i + j) % 2], (i + j) // 2 % 2 == 1
            cases.append((f"{face.name}-{options['importance']}", face, dtype, is_sparse, options))
    return cases


def resume_in_this_process(folder: Path) -> None:
    """Goes on from all checkpoints of a folder: what the new process does."""
    torch.set_num_threads(1)
    for name, face, dtype, _, _ in all_cases():
        model, _, optimizer = resumed(face, dtype, torch.load(folder / name, weights_only=True))
        go_on(model, optimizer, range(6, 10))
        torch.save([model.state_dict(), optimizer.state_dict()], folder / f"{name}.resumed")


def test_resumed_in_a_new_process_it_gives_the_same_bits(tmp_path):
    expected = {}
    for name, face, dtype, sparse, options in all_cases():
        model, _, optimizer = half_way(face, dtype, sparse, options)
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / name)
        go_on(model, optimizer, range(6, 10))
        expected[name] = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    code = "import sys, pathlib, test_resume; test_resume.resume_in_this_process(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300, env={**os.environ, "PYTHONPATH": path}
    )
    for name, end in expected.items():
        assert_same(torch.load(tmp_path / f"{name}.resumed", weights_only=True), end)


@four_faces
@pytest.mark.parametrize("sampling", ["bernoulli", "exact"])
def test_a_save_between_forward_and_step_resumes_with_the_same_mask(face, sampling):
    ends = []
    for is_resumed in (False, True):
        model, _, optimizer = new(face, sampling=sampling)
        go_on(model, optimizer, range(3))
        optimizer.zero_grad()
        x = torch.ones(2, 12)
        first = model(x).detach()
        if is_resumed:
            model, _, optimizer = resumed(face, torch.float32, saved(model, optimizer))
            assert torch.equal(model(x), first)
        model(x).sum().backward()
        optimizer.step()
        ends.append([model.state_dict(), optimizer.state_dict()])
    assert_same(ends[1], ends[0])


@four_faces
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_between_the_passes_of_accumulation(face, sparse):
    """The gradients of the first pass are saved by the loop, and the mask goes on with the second."""
    ends = []
    for is_resumed in (False, True):
        model, _, optimizer = half_way(face, torch.float32, sparse, {"sampling": "exact"})
        optimizer.zero_grad()
        first, second = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1))
        model(first).square().mean().backward()
        if is_resumed:
            grads = [p.grad.clone() for p in model.parameters()]
            model, _, optimizer = resumed(face, torch.float32, saved(model, optimizer))
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad
        model(second).square().mean().backward()
        optimizer.step()
        go_on(model, optimizer, range(6, 8))
        ends.append([model.state_dict(), optimizer.state_dict()])
    assert_same(ends[1], ends[0])


@every_face
def test_after_an_interrupted_forward_pass_copies_and_files_hold_dense_weights(face):
    model, _, optimizer = new(face, drop_rate=0.5)
    go_on(model, optimizer, range(2))
    dense = clones(model)

    def interrupt(_):
        raise KeyboardInterrupt

    model[1].forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 12))
    del model[1].forward
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, dense["0.weight"])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other[0].weight, dense["0.weight"])
        assert_same(clones(other), dense)
    again = new(face, drop_rate=0.5)
    again[0].load_state_dict(dense)
    again[2].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer), again[::2]):
        go_on(*each, range(2, 5))
    assert_same(clones(again[0]), clones(model))


@every_face
def test_before_the_first_step(face):
    model, _, optimizer = new(face)
    other, _, again = resumed(face, torch.float32, saved(model, optimizer))
    for each in ((model, optimizer), (other, again)):
        go_on(*each, range(3))
    assert_same([other.state_dict(), again.state_dict()], [model.state_dict(), optimizer.state_dict()])


@every_face
def test_a_parameter_without_gradients_so_far(face):
    ends = []
    for is_resumed in (False, True):
        model, _, optimizer = new(face)
        model[0].weight.requires_grad_(False)
        go_on(model, optimizer, range(3))
        if is_resumed:
            model, _, optimizer = resumed(face, torch.float32, saved(model, optimizer))
        model[0].weight.requires_grad_(True)
        go_on(model, optimizer, range(3, 7))
        ends.append([model.state_dict(), optimizer.state_dict()])
    assert_same(ends[1], ends[0])


def test_several_groups_and_several_optimizers():
    ends = []
    for is_resumed in (False, True):

        def build():
            model = two_layers()
            first = torch.optim.Muon([model[0].weight], lr=0.02)
            second = ImpactAdamW(
                [{"params": [model[2].weight], "drop_rate": 0.4}, {"params": [model[0].bias, model[2].bias]}], lr=0.01
            )
            Impact(model, [first, second], drop_rate=0.2, seed=5)
            return model, [first, second]

        def steps(model, optimizers, numbers):
            for number in numbers:
                x = torch.randn(8, 12, generator=torch.Generator().manual_seed(number))
                model.zero_grad()
                (model(x) - x[:, :4]).square().mean().backward()
                for optimizer in optimizers:
                    optimizer.step()

        model, optimizers = build()
        steps(model, optimizers, range(3))
        if is_resumed:
            states = saved(model, *optimizers)
            model, optimizers = build()
            for each, state in zip([model, *optimizers], states, strict=True):
                each.load_state_dict(state)
        steps(model, optimizers, range(3, 7))
        ends.append([each.state_dict() for each in (model, *optimizers)])
    assert_same(ends[1], ends[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_face
def test_importances_stay_float32_whatever_the_parameters_are(face, dtype):
    model, _, optimizer = new(face, dtype)
    go_on(model, optimizer, range(3))
    other, _, again = resumed(face, dtype, saved(model, optimizer))
    assert_same(again.state_dict(), optimizer.state_dict())
    for p in other.parameters():
        state = again.state[p]
        assert state["log_importance"].dtype == torch.float32
        assert any(value.dtype == dtype for key, value in state.items() if key != "step")


def test_two_float32_importances_of_a_bfloat16_weight_that_are_neighbours_stay_apart():
    model, _, optimizer = new(FACES[0], torch.bfloat16)
    go_on(model, optimizer, range(3))
    optimizer.state[model[0].weight]["log_importance"][0, :2] = torch.tensor([0.5, 0.5000001])
    other, _, again = resumed(FACES[0], torch.bfloat16, saved(model, optimizer))
    assert again.state[other[0].weight]["log_importance"][0, 0] != again.state[other[0].weight]["log_importance"][0, 1]


# ------------------------------------------------------------------------------- what a state dict holds


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: options["importance"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@four_faces
def test_states_are_tensors_of_the_shape_of_the_parameter_and_groups_hold_plain_values(face, sparse, options):
    model, _, optimizer = half_way(face, torch.float32, sparse, {**options, "seed": np.int64(7)})
    kinds = (torch.Tensor, int, float, str, bool, type(None))
    plain = face.plain(two_layers(bias=face is not MUON))
    for group in optimizer.param_groups:
        assert group.keys() == {*plain.param_groups[0], *OPTIONS, "mask_step", "signal_scale"}
        for key, value in group.items():
            assert key == "params" or type(value) in kinds or value == plain.param_groups[0][key], key
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            assert isinstance(value, torch.Tensor), key
            assert key == "step" or value.shape == p.shape, key
    keys = [set(optimizer.state[p]) for p in model.parameters() if p.dim() > 1]
    assert keys[0] == keys[1]
    has_importances = options["importance"] != "uniform"
    assert ("log_importance" in keys[0]) is has_importances
    assert ("last_step" in keys[0]) is (options["importance"] == "hypergradient")


@pytest.mark.parametrize("tool", ["densify", "prune", "reset"])
@pytest.mark.parametrize("importance", ["saliency", "hypergradient"])
@every_face
def test_a_tool_edits_the_state_of_every_entry_but_the_step(face, importance, tool):
    """Densification (3DGS, gsplat, fvdb): all entries are taken for tensors of the shape of the parameter."""
    p = nn.Parameter(torch.randn(10, 3))
    engine, optimizer = face([p], drop_rate=0.2, importance=importance)

    def step(param):
        optimizer.zero_grad()
        with engine.masked():
            (param - 1).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step(p)
    edit = {
        "densify": lambda t, fill: torch.cat([t, fill]),
        "prune": lambda t, fill: t[torch.tensor([0, 2, 5, 6])],
        "reset": lambda t, fill: torch.zeros_like(t),
    }[tool]
    state = optimizer.state.pop(p)
    for key in state:
        if key != "step":
            state[key] = edit(state[key], torch.zeros(4, *state[key].shape[1:]))
    q = nn.Parameter(edit(p.detach(), torch.randn(4, 3)) if tool != "reset" else p.detach().clone())
    old = engine.importance  # of the tensors that are left, if all are edited alike
    optimizer.param_groups[0]["params"][0] = q
    optimizer.state[q] = state
    assert old(q).mean().item() == pytest.approx(1.0, abs=1e-5)
    for _ in range(3):
        step(q)
    assert torch.isfinite(q).all()
    assert engine.importance(q).mean().item() == pytest.approx(1.0, abs=1e-4)
    assert engine.keep_probability(q).mean().item() == pytest.approx(0.8, abs=1e-3)
    assert {value.shape for key, value in optimizer.state[q].items() if key != "step"} == {q.shape}
    assert p not in optimizer.state


# ------------------------------------------------------------------------------- other state dicts


@every_face
def test_a_state_dict_of_the_base_loads_into_its_face_and_back(face):
    model, engine, optimizer = new(face)
    go_on(model, optimizer, range(3))
    twin = two_layers()
    plain = face.plain(twin, lr=0.125)
    run(twin, plain, range(3))
    steps = optimizer.param_groups[0]["mask_step"]
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[0]["drop_rate"] == 0.3  # what the base does not know stays as it was
    assert optimizer.param_groups[0]["mask_step"] == steps
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(dict(optimizer.state[p]), dict(plain.state[q]))
    assert (engine.importance(model[0].weight) == 1).all()  # and what it has no importances of starts anew
    model.load_state_dict(twin.state_dict())
    optimizer.param_groups[0]["drop_rate"] = 0.0
    for each in ((model, optimizer), (twin, plain)):
        run(*each, range(3, 6))
    assert_same(clones(model), clones(twin))

    back = face.plain(twin)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # more than the base asks for, which it leaves alone
    run(twin, back, range(6, 9))
    run(model, optimizer, range(6, 9))
    assert_same(clones(twin), clones(model))


@every_face
def test_a_state_dict_without_later_options_takes_those_of_the_optimizer(face):
    model, _, optimizer = new(face)
    go_on(model, optimizer, range(3))
    old = copy.deepcopy(optimizer.state_dict())
    for name in ("keep_floor", "sampling", "hold_zeros", "signal_scale"):
        del old["param_groups"][0][name]
    _, _, again = new(face, keep_floor=0.05, sampling="exact")
    again.load_state_dict(old)
    group = again.param_groups[0]
    assert (group["keep_floor"], group["sampling"], group["hold_zeros"]) == (0.05, "exact", False)
    assert group["drop_rate"] == 0.3


@pytest.mark.parametrize("face", FACES[:2], ids=lambda face: face.name)
def test_which_kernel_runs_is_no_matter_of_fitting(face):
    """A run with foreach=None goes on with foreach=True, and the other way round."""
    for first, second in ((None, True), (True, None), (None, False)):
        model, _, optimizer = new(face, foreach=first)
        go_on(model, optimizer, range(2))
        other, _, again = new(face, foreach=second)
        other.load_state_dict(model.state_dict())
        again.load_state_dict(saved(optimizer)[0])
        go_on(other, again, range(2, 4))
        assert again.param_groups[0]["foreach"] is first  # as everywhere in torch


@every_face
def test_hooks_of_the_user_see_and_change_the_state_dict(face):
    model, _, optimizer = new(face)
    go_on(model, optimizer, range(3))
    other, _, again = new(face)
    seen = []

    def before(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.125
        state_dict["state"][0]["log_importance"].zero_()
        return state_dict

    hooks = len(again._optimizer_load_state_dict_pre_hooks), len(again._optimizer_load_state_dict_post_hooks)
    again.register_load_state_dict_pre_hook(before)
    again.register_load_state_dict_post_hook(lambda each: seen.append(dict(each.state[other[0].weight])))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.125
    assert (seen[0]["log_importance"] == 0).all()
    found = len(again._optimizer_load_state_dict_pre_hooks), len(again._optimizer_load_state_dict_post_hooks)
    assert found == (hooks[0] + 1, hooks[1] + 1)


@every_face
def test_loading_into_a_trained_optimizer_is_the_same_as_into_a_new_one(face):
    model, _, optimizer = half_way(face, torch.float32, False, {})
    state = saved(model, optimizer)
    go_on(model, optimizer, range(6, 9))
    expected = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    model, _, optimizer = half_way(face, torch.float32, True, {"importance": "hypergradient"})  # something else
    model(torch.ones(1, 12))  # and a mask that has been read
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    go_on(model, optimizer, range(6, 9))
    assert_same([model.state_dict(), optimizer.state_dict()], expected)


# ------------------------------------------------------------------------------- state dicts that do not fit


def put(*path: Any) -> Any:
    """Sets what lies at a path to the value of the case."""

    def change(state_dict: Any, value: Any) -> None:
        for key in path[:-1]:
            state_dict = state_dict[key]
        state_dict[path[-1]] = value

    return change


def drop(*path: Any) -> Any:
    def change(state_dict: Any, _: Any) -> None:
        for key in path[:-1]:
            state_dict = state_dict[key]
        del state_dict[path[-1]]

    return change


def full(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape or (32, 12), value)


def sparse(state_dict: Any, _: Any) -> None:
    state_dict["state"][0]["log_importance"] = state_dict["state"][0]["log_importance"].to_sparse()


def unknown(state_dict: Any, _: Any) -> None:
    state_dict["state"][99] = copy.deepcopy(state_dict["state"][0])


GROUP, FIRST = ("param_groups", 0), ("state", 0)
ANY = (TypeError, ValueError)
BAD_STATES: dict[str, tuple[Any, Any, Any, str]] = {
    "no state": (drop("state"), None, TypeError, "state"),
    "no groups": (drop("param_groups"), None, TypeError, "param_groups"),
    "state of another kind": (put("state"), [1], TypeError, "state"),
    "groups of another kind": (put("param_groups"), {}, TypeError, "param_groups"),
    "a group of another kind": (put("param_groups"), [None], ValueError, "groups"),
    "group without params": (drop(*GROUP, "params"), None, ValueError, "groups"),
    "another number of parameters": (put(*GROUP, "params"), [0, 1], ValueError, "sizes"),
    "another number of groups": (put("param_groups"), [], ValueError, "sizes"),
    "another shape": (put(*FIRST, "log_importance"), full(0.0, 12, 32), ValueError, r"0\.weight.*shape"),
    "a vector": (put(*FIRST, "log_importance"), full(0.0, 384), ValueError, r"0\.weight.*shape"),
    "not finite": (put(*FIRST, "log_importance"), full(float("nan")), ValueError, r"0\.weight is not finite"),
    "infinite": (put(*FIRST, "log_importance"), full(float("inf")), ValueError, r"0\.weight is not finite"),
    "out of range": (put(*FIRST, "log_importance"), full(1e38), ValueError, r"0\.weight is out of range"),
    "integers": (put(*FIRST, "log_importance"), torch.zeros(32, 12, dtype=torch.int64), TypeError, "floating"),
    "a number": (put(*FIRST, "log_importance"), 1.0, TypeError, "log_importance"),
    "none": (put(*FIRST, "log_importance"), None, TypeError, "log_importance"),
    "a text": (put(*FIRST, "log_importance"), "all", TypeError, "log_importance"),
    "a sparse tensor": (sparse, None, TypeError, "dense"),
    "importances of one are missing": (drop(*FIRST, "log_importance"), None, ValueError, r"0\.weight lacks"),
    "last step of another shape": (put(*FIRST, "last_step"), full(0.0, 3), ValueError, r"0\.weight.*shape"),
    "last step not finite": (put(*FIRST, "last_step"), full(float("nan")), ValueError, "not finite"),
    "last step none": (put(*FIRST, "last_step"), None, TypeError, "last_step"),
    "state of one parameter of another kind": (put(*FIRST), [], TypeError, r"0\.weight"),
    "state of one parameter none": (put(*FIRST), None, TypeError, r"0\.weight"),
    "state of an unknown parameter": (unknown, None, ValueError, "99"),
    "an option out of range": (put(*GROUP, "drop_rate"), 1.5, ValueError, "drop_rate"),
    "an option that is none": (put(*GROUP, "drop_rate"), None, ValueError, "drop_rate"),
    "an unknown signal": (put(*GROUP, "importance"), "magic", ValueError, "magic"),
    "a signal of another kind": (put(*GROUP, "importance"), ["saliency"], ValueError, "importance"),
    "a flag that is none": (put(*GROUP, "hold_zeros"), torch.ones(2), ValueError, "hold_zeros"),
    "a step that is negative": (put(*GROUP, "mask_step"), -1, ValueError, "mask_step"),
    "a step that is no integer": (put(*GROUP, "mask_step"), 0.5, ValueError, "mask_step"),
    "a step that is none": (put(*GROUP, "mask_step"), None, ValueError, "mask_step"),
    "a scale that is none": (put(*GROUP, "signal_scale"), None, ValueError, "signal_scale"),
    "a scale that is no number": (put(*GROUP, "signal_scale"), full(1.0, 2), ValueError, "signal_scale"),
    "a scale that is not finite": (put(*GROUP, "signal_scale"), torch.tensor(float("inf")), ValueError, "signal_scale"),
    "a learning rate that is none": (put(*GROUP, "lr"), None, TypeError, "lr"),
    "a learning rate that is a text": (put(*GROUP, "lr"), "fast", TypeError, "lr"),
    "a learning rate that is not finite": (put(*GROUP, "lr"), float("nan"), ValueError, "lr"),
    "learning rates": (put(*GROUP, "lr"), full(0.1, 2), ValueError, "lr"),
    "a flag that is a tensor": (put(*GROUP, "maximize"), torch.ones(2), TypeError, "maximize"),
    "keep_floor above the budget": (put(*GROUP, "keep_floor"), 0.9, ValueError, "keep_floor"),
}


def check_refused(model, optimizer, bad, error, text):
    """Nothing changes, and it trains on as if nothing had been."""
    twin, other = copy.deepcopy((model, optimizer))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    groups, states = optimizer.param_groups, dict(optimizer.state)
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(bad)
    assert_same([model.state_dict(), optimizer.state_dict()], before)
    assert optimizer.param_groups is groups
    assert all(optimizer.state[p] is state for p, state in states.items())
    if isinstance(other, Impact):
        other.attach(twin)
    else:
        Impact(twin, other)
    for each in ((model, optimizer), (twin, other)):
        go_on(*each, range(20, 22))
    assert_same([model.state_dict(), optimizer.state_dict()], [twin.state_dict(), other.state_dict()])


@every_face
@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_dict_that_does_not_fit_changes_nothing(face, case):
    change, value, error, text = BAD_STATES[case]
    options = {"importance": "hypergradient"}
    model, _, optimizer = half_way(face, torch.float32, False, options)
    other, _, again = half_way(face, torch.float32, True, options)
    bad = copy.deepcopy(again.state_dict())
    bad["param_groups"][0]["lr"] = 0.7
    change(bad, value)
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    check_refused(model, optimizer, bad, error, text)
    assert not seen
    del other


@every_face
@pytest.mark.parametrize("kind", ["none", "shape", "nan", "text", "sparse"])
def test_damaged_state_of_the_base_changes_nothing(face, kind):
    """Whatever entries the base has: momentum, averages of squares."""
    model, _, optimizer = half_way(face, torch.float32, False, {})
    keys = [key for key, value in optimizer.state[model[0].weight].items() if value.dim() and key != "log_importance"]
    assert keys
    for key in keys:
        bad = copy.deepcopy(optimizer.state_dict())
        good = bad["state"][0][key]
        bad["state"][0][key] = {
            "none": None,
            "shape": torch.zeros(3),
            "nan": torch.full_like(good, float("nan")),
            "text": "x",
            "sparse": good.to_sparse(),
        }[kind]
        check_refused(model, optimizer, bad, ANY, f"{key} of 0.weight")


@pytest.mark.parametrize("value", [None, "x", 0.9, (0.9,), (0.9, 0.99, 0.999)])
def test_betas_that_are_not_two_numbers_change_nothing(value):
    model, _, optimizer = half_way(FACES[1], torch.float32, False, {})
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["betas"] = value
    check_refused(model, optimizer, bad, TypeError, "betas")


@every_face
def test_keys_of_the_users_own_may_hold_anything(face):
    optimizer = half_way(face, torch.float32, False, {})[2]
    optimizer.param_groups[0]["tag"] = 1.0
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["tag"] = "first"
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["tag"] == "first"


@pytest.mark.parametrize("first", FOUR, ids=lambda face: face.name)
@pytest.mark.parametrize("second", FOUR, ids=lambda face: face.name)
def test_a_state_dict_of_another_network_is_refused(first, second):
    model, _, optimizer = half_way(first, torch.float32, False, {})
    wide = nn.Sequential(*(nn.Linear(12, 40, second is not MUON), nn.Tanh(), nn.Linear(40, 4, second is not MUON)))
    _, other = second(wide, drop_rate=0.3)
    x = torch.randn(4, 12)
    train(other, lambda: wide(x).square().mean(), 2)
    check_refused(model, optimizer, copy.deepcopy(other.state_dict()), ValueError, "shape|sizes")


def test_an_engine_of_its_own_module_is_found_in_errors_by_name():
    model = two_layers()
    optimizer = ImpactSGD(model.named_parameters(), lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][2] = {"log_importance": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"2\.weight has shape"):
        optimizer.load_state_dict(state)
