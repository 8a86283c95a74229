"""Captured in a graph, a training step replays what an eager one does.

Where there is no CUDA, a replay is played by hand: every operation of a step is recorded and run once more, each into
the memory of its recorded result. What Python has baked into the step goes as wrong there as in a CUDA graph.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from impact_optim import ImpactSGD, fused, impact_sgd, layout
from impact_optim.simplex import SAMPLE

MODULE = inspect.getmodule(impact_sgd)
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "drop_rate": 0.3, "importance_lr": 0.01}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ALL_IMPLEMENTATIONS = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no momentum": {"momentum": 0.0},
    "hypergradient": {"importance": "hypergradient"},
    "hypergradient without momentum": {"importance": "hypergradient", "momentum": 0.0},
    "Nesterov, scaled steps": {"nesterov": True, "scale_steps": True},
    "uniform": {"importance": "uniform"},
    "a level solved for": {"importance_lr": 0.1},
    "a simplex per tensor": {"simplex": "tensor"},
    "drop important, maximize": {"drop": "important", "maximize": True, "lr": 0.001},
    "no rescaling, dampening": {"rescale": "none", "dampening": 0.3},
    "no masks": {"drop_rate": 0.0, "scale_steps": True},
    "tensor lr": {"lr": torch.tensor(0.05)},
    "bfloat16 importances": {"importance_dtype": torch.bfloat16},
    "exact": {"sampling": "exact"},
    "lookahead": {"importance": "lookahead"},
    "masks per rank": {"per_rank_masks": True},
}
NOT_FUSED = ("exact", "lookahead", "masks per rank")
CASES = [
    pytest.param(implementation, options, id=f"{name}-{setting}")
    for setting, options in SETTINGS.items()
    for name, implementation in IMPLEMENTATIONS.items()
    if name != "fused" or setting not in NOT_FUSED
]


# Operations that run nothing on a device, but say where a tensor is.
IN_NAME_ONLY = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.set_}


# ------------------------------------------------------------------------------------------ helpers


class Tape(TorchDispatchMode):
    """What a CUDA graph is: the operations of a scope, to be run again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._found: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        for storage in storages((args, kwargs)):
            if storage._cdata not in self._made and storage._cdata not in self._found:
                self._found[storage._cdata] = (storage, storage.clone())
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage._cdata not in self._found:
                self._made[storage._cdata] = storage
        if func.overloadpacket not in IN_NAME_ONLY:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def undo(self) -> None:
        """A capture runs nothing: memory is as it was, and what is new holds no values yet."""
        for storage, before in self._found.values():
            storage.copy_(before)
        for storage in self._made.values():
            storage.fill_(255)  # nan, or -1

    def replay(self) -> None:
        tensors = {t for call in self.calls for t in tree_leaves(call[1:]) if isinstance(t, Tensor)}
        # A replay is nothing that Python, or a version counter, hears of.
        with torch.autograd._unsafe_preserve_version_counter(tuple(tensors)), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.calls:
                read = {storage._cdata for storage in storages((args, kwargs))}
                for recorded, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(recorded, Tensor) and recorded.untyped_storage()._cdata not in read:
                        recorded.copy_(new)


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


class Run:
    """A network in training, on inputs that stay where they are."""

    def __init__(self, sizes: tuple[int, ...] = (32, 160, 8), device: str = "cpu", **options: Any) -> None:
        torch.manual_seed(1)
        layers = [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
        self.model = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]).to(device)
        self.optimizer = ImpactSGD(self.model, **copy.deepcopy({**OPTIONS, **options}))
        self.x, self.y = torch.zeros(10, sizes[0], device=device), torch.zeros(10, sizes[-1], device=device)
        self.data = torch.Generator().manual_seed(2)
        self.scaler: torch.amp.GradScaler | None = None
        self.seen: list[Tensor] = []
        self.model[0].register_forward_hook(lambda module, *_: self.seen.append(module.weight))

    def feed(self) -> None:
        for t in (self.x, self.y):
            t.copy_(torch.randn(t.shape, generator=self.data))

    def train_step(self) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = (self.model(self.x) - self.y).square().mean()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            return loss

        if self.optimizer.param_groups[0]["importance"] == "lookahead":
            self.optimizer.step(closure)
        elif self.scaler is None:
            closure()
            self.optimizer.step()
        else:
            closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def eager(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.feed()
            self.train_step()

    def replay(self, graph: Any, steps: int = 1) -> None:
        for _ in range(steps):
            self.feed()
            graph.replay()


@contextmanager
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tape]:
    tape = Tape()
    try:
        with monkeypatch.context() as patch:
            for module in (fused, MODULE):
                patch.setattr(module, "is_capturing", lambda: True)
            with tape:
                yield tape
    finally:
        tape.undo()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], Tape]:
    def record(run: Run) -> Tape:
        with capture(monkeypatch) as tape:
            run.train_step()
        return tape

    return record


@pytest.fixture(autouse=True)
def _not_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled function does not run under a dispatch mode."""
    if "cuda" not in request.node.keywords:
        monkeypatch.setattr(fused, "compiled", lambda function, plan: functools.partial(function, plan=plan))


def assert_same(a: Run, b: Run) -> None:
    """Weights, momentum, importances, scalars and step counters, to the bit."""
    assert list(a.optimizer.state_dict()["state"]) == list(b.optimizer.state_dict()["state"])
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
        state, other = a.optimizer.state.get(p, {}), b.optimizer.state.get(q, {})
        assert state.keys() == other.keys()
        for name, value in state.items():
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name
    for group, other_group in zip(a.optimizer.param_groups, b.optimizer.param_groups, strict=True):
        assert int(group["step"]) == int(other_group["step"])


# ------------------------------------------------------------------------------------------ replays


@pytest.mark.parametrize(("implementation", "options"), CASES)
@pytest.mark.parametrize("sizes", [(32, 160, 8), (6, 16, 3)], ids=["large", "small"])
def test_a_replay_is_an_eager_step(implementation, options, sizes, captured):
    """To the bit, also with eager steps in between, and as without capturable."""
    run, eager, plain = (Run(sizes, **implementation, **options, capturable=c) for c in (True, True, False))
    assert (sum(p.numel() for p in run.model.parameters() if p.dim() > 1) > SAMPLE) == (sizes[0] == 32)
    run.eager(3)
    graph = captured(run)
    for step, is_replayed in enumerate((True, True, False, True, False, False, True, True)):
        run.replay(graph) if is_replayed else run.eager()
        if step == 0:
            eager.eager(3)
            plain.eager(3)
        eager.eager()
        plain.eager()
        assert_same(run, eager)
        assert_same(run, plain)
    assert run.optimizer.param_groups[0]["step"].equal(torch.tensor(11))
    if options.get("importance") != "uniform":
        assert run.optimizer.importance(run.model[0].weight).std() > 1e-3


@pytest.mark.parametrize(("implementation", "options"), CASES)
def test_a_capture_after_a_single_eager_step_is_right_or_refused(implementation, options, captured):
    run, eager = (Run(**implementation, **options, capturable=True) for _ in range(2))
    run.eager()
    # It has no signal before its second step, so that the first one prepares no masks.
    if options.get("importance") == "hypergradient" and "fused" in implementation:
        with pytest.raises(RuntimeError, match="eager steps of the same kind"):
            captured(run)
        return
    graph = captured(run)
    run.replay(graph, 2)
    run.eager()
    run.replay(graph)
    eager.eager(5)
    assert_same(run, eager)


@ALL_IMPLEMENTATIONS
def test_every_replay_draws_new_masks(implementation, captured):
    run = Run(**implementation, capturable=True)
    run.eager(3)
    graph = captured(run)
    masks = []
    for _ in range(5):
        run.replay(graph)
        masks.append(run.seen[-1].detach() == 0)
        assert 0.2 < masks[-1].float().mean() < 0.5
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def _share_in_place(optimizer: ImpactSGD, members: list[Tensor], group: Any, **values: Any) -> None:
    own = optimizer.state[members[0]]
    shared = {name: own[name].copy_(v) if isinstance(v, Tensor) else v for name, v in values.items()}
    for p in members:
        optimizer.state[p].update(shared)


BAKED_IN: dict[str, list[tuple[Any, str, Any]]] = {
    "a counter of Python's": [(MODULE, "_settle_counter", lambda group: None)],
    "scalars that are new ones": [(MODULE, "_in_place", lambda place, value: value)],
    "only a level that is a new one": [
        (MODULE, "_in_place", lambda place, value: value),
        (ImpactSGD, "_share", _share_in_place),
    ],
}


@pytest.mark.parametrize(
    ("implementation", "baked_in"),
    [
        pytest.param(implementation, baked_in, id=f"{name}-{baked_in}")
        for name, implementation in IMPLEMENTATIONS.items()
        for baked_in in BAKED_IN
        if name == "fused" or "level" not in baked_in  # the others leave no level to the next step
    ],
)
def test_what_python_bakes_in_would_show(implementation, baked_in, captured, monkeypatch):
    """The replays above can fail."""
    run, eager = (Run(**implementation, capturable=True) for _ in range(2))
    eager.eager(6)
    for owner, name, value in BAKED_IN[baked_in]:
        monkeypatch.setattr(owner, name, value)
    run.eager(3)
    graph = captured(run)
    masks = []
    for _ in range(3):
        run.replay(graph)
        masks.append(run.seen[-1].detach() == 0)
    assert not all(torch.equal(p, q) for p, q in zip(run.model.parameters(), eager.model.parameters(), strict=True))
    if "counter" in baked_in:
        assert (masks[1] != masks[2]).float().mean() < 0.05  # the same draws, with other importances


@pytest.mark.parametrize(("implementation", "options"), CASES)
def test_after_a_capture_that_failed_training_goes_on(implementation, options, monkeypatch):
    def broken_step() -> None:
        run.model(run.x).sum().backward()
        raise ZeroDivisionError

    run, eager = (Run(**implementation, **options, capturable=True) for _ in range(2))
    run.eager(3)
    run.feed()
    with pytest.raises(ZeroDivisionError), capture(monkeypatch):
        broken_step()
    run.train_step()
    run.eager(2)
    eager.eager(6)
    assert_same(run, eager)


@ALL_IMPLEMENTATIONS
def test_a_tensor_lr_changed_in_place_counts_in_a_replay(implementation, captured):
    """A scheduler changes it in place."""
    run, eager = (Run(**implementation, lr=torch.tensor(0.1), capturable=True) for _ in range(2))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(r.optimizer, 0.5) for r in (run, eager)]
    run.eager(3)
    eager.eager(3)
    graph = captured(run)
    for _ in range(3):
        for scheduler in schedulers:
            scheduler.step()
        run.replay(graph)
        eager.eager()
        assert_same(run, eager)
    assert run.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.0125)


def test_a_replay_skips_what_the_grad_scaler_skips(captured):
    run, eager = (Run(fused=True, capturable=True) for _ in range(2))
    for r in (run, eager):
        r.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
        r.eager(3)
    graph = captured(run)
    for step in range(5):
        before = run.model[0].weight.detach().clone()
        for r, train_step in ((run, graph.replay), (eager, eager.train_step)):
            r.feed()
            if step == 2:
                r.x[0, 0] = torch.inf
            train_step()
        assert torch.equal(run.model[0].weight, before) == (step == 2)
        assert_same(run, eager)
    assert run.scaler.get_scale() == eager.scaler.get_scale() == 512.0


@ALL_IMPLEMENTATIONS
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
def test_pruned_weights_stay_zero_in_replays(implementation, drop_rate, captured):
    run, eager = (Run(**implementation, capturable=True) for _ in range(2))
    for r in (run, eager):
        r.eager(3)
        r.optimizer.sparsify(0.5)
        r.optimizer.param_groups[0]["drop_rate"] = drop_rate
        r.eager(3)
    graph = captured(run)
    run.replay(graph, 3)
    eager.eager(3)
    assert_same(run, eager)
    assert sum((p == 0).sum() for p in run.model.parameters()).item() == (32 * 160 + 160 * 8) // 2


@ALL_IMPLEMENTATIONS
def test_scopes_and_several_groups_replay(implementation, monkeypatch):
    def build() -> Run:
        run = Run(**implementation, capturable=True, importance="fisher")
        first, *_, last = [part for part in run.model if isinstance(part, nn.Linear)]
        groups = [{"params": first.parameters()}, {"params": last.parameters(), "importance": "saliency", "seed": 3}]
        run.optimizer = ImpactSGD(groups, **OPTIONS, **implementation, capturable=True)
        return run

    def train_step(run: Run) -> None:
        run.optimizer.zero_grad()
        with run.optimizer.masked():
            (run.model(run.x) - run.y).square().mean().backward()
        run.optimizer.step()

    runs = build(), build()
    for run in runs:
        run.optimizer.detach()
        run.train_step = functools.partial(train_step, run)
        run.eager(3)
    with capture(monkeypatch) as graph:
        runs[0].train_step()
    runs[0].replay(graph, 3)
    runs[1].eager(3)
    assert_same(*runs)


@ALL_IMPLEMENTATIONS
def test_without_masks_the_step_alone_can_be_captured(implementation, monkeypatch):
    runs = [Run(**implementation, drop_rate=0.0, capturable=True) for _ in range(2)]
    grads = [[torch.randn_like(p) for p in runs[0].model.parameters()] for _ in range(6)]
    for run in runs:
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)

    def step(run: Run, values: list[Tensor], advance: Callable[[], Any]) -> None:
        torch._foreach_copy_([p.grad for p in run.model.parameters()], values)
        advance()

    for values in grads[:3]:
        step(runs[0], values, runs[0].optimizer.step)
    with capture(monkeypatch) as graph:
        runs[0].optimizer.step()
    for values in grads[3:]:
        step(runs[0], values, graph.replay)
    for values in grads:
        step(runs[1], values, runs[1].optimizer.step)
    assert_same(*runs)


# ------------------------------------------------------------------------------------------ refusals


@ALL_IMPLEMENTATIONS
def test_without_capturable_a_capture_is_refused(implementation, monkeypatch):
    run, eager = Run(**implementation), Run(**implementation)
    run.eager(2)
    with pytest.raises(RuntimeError, match="capturable=True"), capture(monkeypatch):
        run.model(run.x)
    run.feed()
    (run.model(run.x) - run.y).square().mean().backward()
    with pytest.raises(RuntimeError, match="capturable=True"), capture(monkeypatch):
        run.optimizer.step()
    run.train_step()
    eager.eager(3)
    assert_same(run, eager)


@ALL_IMPLEMENTATIONS
def test_masks_from_outside_of_the_capture_are_refused(implementation, monkeypatch):
    run = Run(**implementation, capturable=True)
    run.eager(3)
    run.model(run.x).sum().backward()
    with pytest.raises(RuntimeError, match=r"forward, backward and step\(\) in one graph"), capture(monkeypatch):
        run.optimizer.step()
    with capture(monkeypatch):  # drawn again inside
        run.train_step()


def _unfreeze(run: Run) -> None:
    run.model[0].weight.requires_grad_(True)


def _change_a_weight(run: Run) -> None:
    with torch.no_grad():
        run.model[0].weight.mul_(2.0)


def _add_a_group(run: Run) -> None:
    run.optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})


# What is done once: its setting, how many eager steps come before, what is changed then, and what the error says.
DONE_ONCE: dict[str, tuple[dict[str, Any], int, Callable[[Run], Any], str]] = {
    "the first step": ({}, 0, lambda run: None, "step counter"),
    "a group that is new": ({}, 3, _add_a_group, "step counter"),
    "a tensor that joins a simplex": ({}, 3, _unfreeze, "simplex of 0.weight is a new one"),
    "a first momentum": (
        {"momentum": 0.0},
        3,
        lambda run: run.optimizer.param_groups[0].update(momentum=0.5),
        "no momentum_buffer",
    ),
    "a level for another drop rate": (
        {},
        3,
        lambda run: run.optimizer.param_groups[0].update(drop_rate=0.2),
        "water level",
    ),
    "a level that is left": (
        {},
        3,
        lambda run: run.optimizer.param_groups[0].update(importance_lr=0.5),
        "water level",
    ),
    "importances of another dtype": (
        {},
        3,
        lambda run: run.optimizer.param_groups[0].update(importance_dtype=torch.bfloat16),
        "not stored in torch.bfloat16",
    ),
    "weights changed by hand": ({"fused": True}, 3, _change_a_weight, "left no masked weights"),
}


@pytest.mark.parametrize("case", DONE_ONCE)
def test_a_capture_of_what_is_done_once_is_refused(case, captured):
    """It leaves nothing behind, and a capture of the steps after it is none of these."""
    options, steps, change, message = DONE_ONCE[case]
    run, other = Run(**options, capturable=True), Run(**options, capturable=True)
    for each in (run, other):
        each.model[0].weight.requires_grad_(case != "a tensor that joins a simplex")
        each.eager(steps)
        change(each)
    data = run.data.get_state()
    with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph here.*{message}.*eager steps"):
        captured(run)
    run.data.set_state(data)
    run.eager(2)
    other.eager(2)
    assert_same(run, other)
    captured(run)


def test_a_forward_pass_captured_without_its_step_is_refused(monkeypatch):
    run = Run(capturable=True)
    run.eager(3)
    with capture(monkeypatch):
        run.optimizer.zero_grad()
        run.model(run.x).sum().backward()
    with pytest.raises(RuntimeError, match=r"forward, backward and step\(\) in one graph"):
        run.optimizer.step()


def test_the_simplex_of_a_capturable_fused_run_may_change():
    runs = [Run(fused=True, capturable=capturable) for capturable in (True, False)]
    for run in runs:
        run.eager(3)
        run.optimizer.param_groups[0]["simplex"] = "tensor"
        run.eager(3)
    assert_same(*runs)


def test_a_learning_rate_on_the_host_is_checked():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        Run(capturable=True, lr=torch.tensor(-1.0))


def test_an_optimizer_pickled_before_there_was_the_option_goes_on():
    run = Run()
    run.eager(2)
    state = run.optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        for name in ("capturable", "importance_dtype"):
            del options[name]
    old = object.__new__(type(run.optimizer))
    old.__setstate__(state)
    assert old.param_groups[0]["capturable"] is False
    assert old.param_groups[0]["importance_dtype"] == torch.float32


# ------------------------------------------------------------------------------------------ state


@ALL_IMPLEMENTATIONS
@pytest.mark.parametrize(("saved", "loaded"), [(True, True), (True, False), (False, True)])
def test_a_state_loads_with_and_without_capturable(implementation, saved, loaded, captured, tmp_path):
    """The option comes with the state, as everywhere in torch.optim, unless it is taken out of it."""
    run, other = Run(**implementation, capturable=saved), Run(**implementation, capturable=loaded)
    run.eager(3)
    if saved:
        graph = captured(run)
        run.replay(graph, 2)
    state_dict = run.optimizer.state_dict()
    assert isinstance(state_dict["param_groups"][0]["step"], Tensor if saved else int)
    torch.save(state_dict, tmp_path / "state")
    state_dict = torch.load(tmp_path / "state", weights_only=True)
    del state_dict["param_groups"][0]["capturable"]
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(state_dict)
    other.data.set_state(run.data.get_state())
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()))  # the fused step draws its masks once more, too
    run.eager(2)
    other.eager(2)
    assert_same(run, other)
    assert isinstance(other.optimizer.param_groups[0]["step"], Tensor if loaded else int)
    if loaded:
        graph = captured(other)
        other.replay(graph, 2)
        run.eager(2)
        assert_same(run, other)


def test_every_group_counts_its_own_steps():
    run = Run(capturable=True)
    run.eager(2)
    added = nn.Parameter(torch.ones(3))
    run.optimizer.add_param_group({"params": added})
    run.eager(1)
    steps = [group["step"] for group in run.optimizer.param_groups]
    assert [(t.dtype, t.shape, t.item()) for t in steps] == [(torch.int64, (), 3), (torch.int64, (), 1)]
    copied = copy.deepcopy(run.optimizer)
    run.eager(1)
    assert [int(group["step"]) for group in copied.param_groups] == [3, 1]


@pytest.mark.parametrize("step", [torch.ones(1, dtype=torch.int64), torch.tensor(1.0), 1.0])
def test_a_step_that_is_no_count_is_refused(step):
    run = Run(capturable=True)
    state_dict = run.optimizer.state_dict()
    state_dict["param_groups"][0]["step"] = step
    with pytest.raises(ValueError, match="Invalid step"):
        run.optimizer.load_state_dict(state_dict)


def test_numbers_packed_in_a_capture_are_the_same(monkeypatch):
    numbers = fused.Numbers(lr=torch.tensor([0.3]), decay=1e-3, next_level=torch.tensor(-2.5, dtype=torch.float64))
    expected = numbers.pack(torch.float32, torch.device("cpu"))
    monkeypatch.setattr(fused, "is_capturing", lambda: True)
    packed = numbers.pack(torch.float32, torch.device("cpu"))
    assert torch.equal(packed.view(torch.int32), expected.view(torch.int32))  # the sign of -0.0, too


# ------------------------------------------------------------------------------------------ CUDA


class _NothingCrosses(TorchDispatchMode):
    """Fails where something is copied between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert len({t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}) <= 1, func
        return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests below ask the device itself")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(("implementation", "options"), CASES)
def test_a_captured_step_copies_nothing_between_host_and_device(implementation, options, monkeypatch):
    """On tensors that say they are on a GPU and have no values: memory of the host is gone when a replay reads it."""
    if options.get("importance") == "lookahead":
        pytest.skip("there is no backward pass without a device")
    options = {**OPTIONS, **implementation, **options, "capturable": True}
    caches = (layout._places, fused._positions)
    monkeypatch.setattr(MODULE, "compiler_works", lambda device_type, warn=False: True)
    monkeypatch.setattr(MODULE, "_row_index", lambda sizes, *_: (torch.zeros(sum(sizes), dtype=torch.int64),) * 2)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    for cache in caches:
        cache.cache_clear()
    try:
        with FakeTensorMode(), torch.device("cuda"):
            model = nn.Sequential(nn.Linear(32, 160, bias=False), nn.Tanh(), nn.Linear(160, 8, bias=False))
            if "lr" in options and isinstance(options["lr"], Tensor):
                options["lr"] = torch.zeros(())
            optimizer = ImpactSGD(model, **options)

            def train_step() -> None:
                model(torch.ones(10, 32))
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                optimizer.step()

            for _ in range(3):
                train_step()
            with monkeypatch.context() as patch, _NothingCrosses():
                for module in (fused, MODULE):
                    patch.setattr(module, "is_capturing", lambda: True)
                train_step()
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.cuda
@pytest.mark.parametrize(("implementation", "options"), CASES)
def test_a_cuda_graph_replays_training_steps(implementation, options):
    options = {**options, "lr": torch.tensor(0.05, device="cuda")} if "lr" in options else options
    run, eager = (Run(device="cuda", **implementation, **options, capturable=True) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run.eager(3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    run.optimizer.zero_grad()
    with torch.cuda.graph(graph):
        run.train_step()
    eager.eager(3)
    for is_replayed in (True, True, False, True):
        run.replay(graph) if is_replayed else run.eager()
        eager.eager()
        for p, q in zip(run.model.parameters(), eager.model.parameters(), strict=True):
            torch.testing.assert_close(p, q)
            torch.testing.assert_close(run.optimizer.importance(p), eager.optimizer.importance(q))
        assert torch.equal(run.optimizer.param_groups[0]["step"], eager.optimizer.param_groups[0]["step"])
    assert run.optimizer.param_groups[0]["step"].device.type == "cuda"


@pytest.mark.cuda
@ALL_IMPLEMENTATIONS
def test_a_cuda_graph_is_refused_without_capturable(implementation):
    run = Run(device="cuda", **implementation)
    run.eager(2)
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.train_step()
