"""torch.distributed.checkpoint: all state comes back, nested and flattened, in memory and through a folder."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import FACES, MUON, Face, assert_same, every_face, run, two_layers
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

SETTINGS = [
    {"importance": "saliency"},
    {"importance": "fisher", "sampling": "exact"},
    {"importance": "magnitude"},
    {"importance": "hypergradient"},
    {"importance": "lookahead"},
    {"importance": "uniform"},
]
settings = pytest.mark.parametrize("options", SETTINGS, ids=lambda options: options["importance"])
four_faces = pytest.mark.parametrize("face", [*FACES, MUON], ids=lambda face: face.name)
flattened = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
sparsified = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One gloo process."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def new(face: Face, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = two_layers(bias=face is not MUON)
    return model, *face(model, **{"drop_rate": 0.3, "importance_lr": 0.05, "kl_weight": 0.3, **options})


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    run(model, optimizer, steps, closure=optimizer.param_groups[0]["importance"] == "lookahead")


def half_way(face: Face, sparse: bool, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    model, engine, optimizer = new(face, **options)
    go_on(model, optimizer, range(4))
    if sparse:
        engine.sparsify(0.5, by="magnitude")
        optimizer.param_groups[0]["drop_rate"] = 0.4
        go_on(model, optimizer, range(4, 6))
    return model, optimizer


def check_resumed(first: tuple[nn.Module, Any], second: tuple[nn.Module, Any]) -> None:
    """All state is the same, and so are the next steps."""
    for _ in range(2):
        assert_same([second[0].state_dict(), second[1].state_dict()], [first[0].state_dict(), first[1].state_dict()])
        for each in (first, second):
            go_on(*each, range(10, 14))


@settings
@flattened
@four_faces
def test_a_new_optimizer_is_filled_in_memory(face, flat, options):
    model, optimizer = half_way(face, True, options)
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    # The options of the signal are those of the run: the new optimizer tells by them which state there is.
    other, _, again = new(face, importance=options["importance"])
    set_optimizer_state_dict(other, again, state, options=how)
    other.load_state_dict(model.state_dict())
    check_resumed((model, optimizer), (other, again))


@settings
@flattened
@four_faces
def test_a_new_optimizer_is_filled_from_a_folder(process_group, tmp_path, face, flat, options):
    model, optimizer = half_way(face, False, options)
    check_through_folder(tmp_path, (model, optimizer), new(face, importance=options["importance"])[::2], flat)


def check_through_folder(folder: Path, first: tuple[nn.Module, Any], second: tuple[nn.Module, Any], flat: bool) -> None:
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(*first, options=how)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    weights, state = get_state_dict(*second, options=how)
    found = {"model": weights, "optimizer": state}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(*second, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=how)
    check_resumed(first, second)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Muon], ids=lambda b: b.__name__)
@sparsified
@flattened
def test_with_and_without_momentum(process_group, tmp_path, base, momentum, sparse, flat):
    face = next(face for face in [*FACES, MUON] if face.base is base)
    first = half_way(face, sparse, {"momentum": momentum})
    check_through_folder(tmp_path, first, new(face, momentum=momentum)[::2], flat)


@flattened
@every_face
def test_groups_and_frozen_parameters(process_group, tmp_path, face, flat):
    def build() -> tuple[nn.Module, Any]:
        model = two_layers()
        model[2].bias.requires_grad_(False)
        groups = [{"params": [model[0].weight, model[2].bias]}, {"params": [model[0].bias, model[2].weight]}]
        engine, optimizer = face(groups, drop_rate=0.3)
        engine.attach(model)
        return model, optimizer

    first = build()
    first[1].param_groups[1]["drop_rate"] = 0.5
    first[1].param_groups[0]["lr"] /= 2
    go_on(*first, range(3))
    check_through_folder(tmp_path, first, build(), flat)


@flattened
@every_face
def test_half_precision_keeps_float32_importances(process_group, tmp_path, face, flat):
    def build() -> tuple[nn.Module, Any]:
        model = two_layers(torch.bfloat16)
        return model, face(model, drop_rate=0.3, importance_lr=0.05)[1]

    first, second = build(), build()
    go_on(*first, range(4))
    check_through_folder(tmp_path, first, second, flat)
    for p in second[0].parameters():
        assert second[1].state[p]["log_importance"].dtype == torch.float32


@four_faces
@flattened
def test_what_is_zero_for_good_stays_so(process_group, tmp_path, face, flat):
    first = half_way(face, True, {})
    second = new(face)[::2]
    held = [p == 0 for p in first[0].parameters() if p.dim() > 1]
    check_through_folder(tmp_path, first, second, flat)
    assert_same([p == 0 for p in second[0].parameters() if p.dim() > 1], held)
    assert second[1].param_groups[0]["hold_zeros"] is True
    second[0](torch.ones(2, 12)).sum().backward()
    for p, zero in zip([p for p in second[0].parameters() if p.dim() > 1], held, strict=True):
        assert not p.grad[zero].any()


@every_face
def test_the_step_that_makes_the_state_changes_no_weight(face):
    """A new optimizer takes a step of its own, with gradients and a learning rate of zero."""
    model, engine, optimizer = new(face)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert_same(model.state_dict(), before)
    assert (engine.importance(model[0].weight) == 1).all()
    assert all(p.grad is None for p in model.parameters())


@every_face
def test_a_checkpoint_of_the_base_fills_its_face(process_group, tmp_path, face):
    twin = two_layers()
    plain = face.plain(twin)
    run(twin, plain, range(3))
    weights, state = get_state_dict(twin, plain)
    model, _, optimizer = new(face)
    set_state_dict(model, optimizer, model_state_dict=copy.deepcopy(weights), optim_state_dict=copy.deepcopy(state))
    assert optimizer.param_groups[0]["drop_rate"] == 0.3
    optimizer.param_groups[0]["drop_rate"] = 0.0
    for each in ((twin, plain), (model, optimizer)):
        run(*each, range(3, 6))
    assert_same(model.state_dict(), twin.state_dict())


@every_face
@flattened
def test_a_damaged_checkpoint_is_refused(face, flat):
    model, optimizer = half_way(face, False, {})
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    entry = state if flat else state["state"]["0.weight"]
    entry["state.0.weight.log_importance" if flat else "log_importance"].fill_(float("nan"))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"log_importance of 0\.weight is not finite"):
        set_optimizer_state_dict(model, optimizer, state, options=how)
    assert_same(optimizer.state_dict(), before)
