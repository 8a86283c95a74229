"""Surgery: exact on random architectures, all or nothing, and everything that belongs to a parameter stays with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_networks import deafened, difference, draw, randomised, run, silenced, tensors
from torch import Tensor, nn

from impact_optim.pruning import UnitGraph, cut, open_heads, surgery, trace

# -- random architectures: every block takes and gives [batch, channels, 4, 4], and keeps zeros zero --


class Residual(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )
        self.out = channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels + width, width, 1)
        self.out = channels + 2 * width

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return torch.cat([self.second(torch.cat([y, x], 1)), x, y], 1)


class Gated(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(channels, 2 * width, 1)
        self.out = width

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.lift(x).chunk(2, 1)
        return value * torch.sigmoid(gate)


class Grouped(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(channels, 2 * width, 1)
        self.grouped = nn.Conv2d(2 * width, 3 * width, 3, padding=1, groups=width)
        self.norm = nn.GroupNorm(width, 3 * width)
        self.out = 3 * width

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.grouped(F.relu(self.lift(x))))


class Separable(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, width, 1)
        self.out = width

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(F.hardswish(self.depthwise(x)))


class Shuffled(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(channels, 4 * width, 1)
        self.branch = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = 4 * width

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.lift(x).chunk(2, 1)
        x = torch.stack([left, self.branch(right)], 1)
        return x.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[3:])


class Attention(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.num_heads = width
        self.qkv = nn.Linear(channels, 3 * width * 5)
        self.proj = nn.Linear(5 * width, channels)
        self.out = channels

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, 5)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (tokens + self.proj(y)).transpose(1, 2).reshape(x.shape)


class Squeezed(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        self.out = channels

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[..., None, None]


class Folded(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(channels, 4 * width, 1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = 4 * width

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.leaky_relu(self.mix(F.pixel_shuffle(self.lift(x), 2))), 2)


class Recurrent(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(channels, width, num_layers=2, bidirectional=True, batch_first=True)
        self.read = nn.Linear(2 * width, channels)
        self.out = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.rnn(x.flatten(2).transpose(1, 2))[0]).transpose(1, 2).unflatten(2, x.shape[2:])


class Multihead(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lift, self.attend = nn.Linear(channels, 3 * width), open_heads(nn.MultiheadAttention(3 * width, width))
        self.read = nn.Linear(3 * width, channels)
        self.out = channels

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.lift(x.flatten(2).permute(2, 0, 1))
        y, _ = self.attend(tokens, tokens, tokens, need_weights=False)
        return x + self.read(y).permute(1, 2, 0).reshape(x.shape)


BLOCKS = [
    Residual, Dense, Gated, Grouped, Separable, Shuffled, Attention, Squeezed, Folded, Recurrent, Multihead
]  # fmt: skip


@st.composite
def networks(make: st.DrawFn, blocks: int) -> nn.Module:
    channels = make(st.integers(2, 6))
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 1)]
    for kind in make(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=blocks)):
        layers.append(kind(channels, make(st.integers(2, 4))))
        channels = layers[-1].out
        if make(st.booleans()):
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 3))


INPUT = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),)


@settings(max_examples=3, deadline=None)
@given(model=networks(2), seed=st.integers(0, 2**16))
def test_random_networks_equal_their_masked_selves(model: nn.Module, seed: int) -> None:
    check_against_masked_selves(model, seed)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(model=networks(4), seed=st.integers(0, 2**16))
def test_many_random_networks_equal_their_masked_selves(model: nn.Module, seed: int) -> None:
    check_against_masked_selves(model, seed)


def check_against_masked_selves(model: nn.Module, seed: int) -> None:
    model = randomised(model)
    graph = trace(model, INPUT)
    assert graph.groups
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        units = draw(graph, generator)
        deaf, silent = deafened(model, graph, units), silenced(model, graph, units)
        left = {name: group.size - len(units[name]) for name, group in graph.groups.items()}
        cut(model, graph, units)
        output = run(model, INPUT)
        assert difference(run(deaf, INPUT), output) < 1e-10
        assert difference(run(silent, INPUT), output) < 1e-10
        assert {name: group.size for name, group in graph.groups.items()} == left
    again = {name: group.size for name, group in trace(model, INPUT).groups.items()}
    # A group with one unit left is none; a convolution with one group left is not grouped any more.
    assert {name: size for name, size in left.items() if size > 1}.items() <= again.items()
    model(*INPUT)[0].sum().backward()


# -- what belongs to a parameter --


def small() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(96, 4)
    )
    return randomised(model)


def test_records_say_what_was_kept() -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    graph = trace(model, INPUT)
    records = cut(model, graph, {"0": [1, 6], "3": torch.tensor([0])})
    assert {(record.name, record.dim) for record in records} == {
        *((f"0.{part}", 0) for part in ("weight", "bias")),
        *((f"1.{part}", 0) for part in ("weight", "bias", "running_mean", "running_var")),
        *(("3.weight", 1), ("3.weight", 0), ("3.bias", 0), ("5.weight", 1)),
    }
    for record in records:
        before[record.name] = before[record.name].index_select(record.dim, record.kept)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(model).items())
    kept = {(record.name, record.dim): record.kept.tolist() for record in records}
    assert kept["0.weight", 0] == kept["3.weight", 1] == [0, 2, 3, 4, 5, 7]
    assert kept["5.weight", 1] == list(range(16, 96))


def test_parameters_keep_identity_gradients_hooks_flags_and_format() -> None:
    model = small().to(memory_format=torch.channels_last).train()
    model[0].bias.requires_grad_(False)
    model[1].eval()
    calls: list[tuple[int, ...]] = []
    model[0].weight.register_hook(lambda grad: calls.append(tuple(grad.shape)))
    seen: list[tuple[int, ...]] = []
    model[3].register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    loss = model(*INPUT).sum()  # somebody holds on to it
    loss.backward()
    graph = trace(model, INPUT)
    held, gradient = dict(model.named_parameters()), model[0].weight.grad.clone()
    cut(model, graph, {"0": [2]})
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert torch.equal(model[0].weight.grad, gradient[[0, 1, 3, 4, 5, 6, 7]])
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [part.training for part in model.modules()] == [True, True, False, True, True, True, True]
    assert [name for name, parameter in held.items() if not parameter.requires_grad] == ["0.bias"]
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (7, 7, 7)
    seen.clear()
    model.zero_grad()
    model(*INPUT).sum().backward()
    assert calls[-1] == (7, 3, 3, 3)
    assert seen == [(2, 7, 4, 4)]
    assert loss.grad_fn is not None


def test_attributes_of_every_kind_of_layer_follow() -> None:
    layers = [
        nn.Conv2d(3, 8, 1),
        nn.GroupNorm(4, 8),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 3, groups=4, padding=1),
        nn.InstanceNorm2d(8),
        nn.ConvTranspose2d(8, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.Linear(6, 2),
    ]
    model = randomised(nn.Sequential(*layers))
    graph = trace(model, INPUT)
    assert {name: group.size for name, group in graph.groups.items()} == {"0": 4, "5": 4, "8": 6}
    cut(model, graph, {"0": [0], "5": [1], "8": [2, 3]})
    expected = [
        {"out_channels": 6},
        {"num_channels": 6, "num_groups": 3},
        {"num_parameters": 6},
        {"in_channels": 6, "out_channels": 6, "groups": 3},
        {"num_features": 6},
        {"in_channels": 6, "out_channels": 3},
        {"num_features": 3},
        {},
        {"in_features": 48, "out_features": 4},
        {"in_features": 4, "out_features": 2},
    ]
    for layer, attributes in zip(model, expected, strict=True):
        assert {name: getattr(layer, name) for name in attributes} == attributes


def test_tied_weights_stay_tied_and_parametrised_ones_are_cut_at_the_source() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)
            self.up = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
            self.down = nn.Linear(5, 6)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids) + self.down(self.up(self.embed(ids)).tanh()))

    model = randomised(Tied())
    ids = (torch.arange(6).view(2, 3),)
    graph = trace(model, ids)
    assert {name: group.size for name, group in graph.groups.items()} == {
        "up": 5
    }  # the norm of its rows mixes the rest
    reference = deafened(model, graph, {"up": [0, 3]})
    cut(model, graph, {"up": [0, 3]})
    assert difference(run(reference, ids), run(model, ids)) < 1e-12
    assert model.head.weight is model.embed.weight
    assert model.up.parametrizations.weight.original1.shape == (3, 6)


# -- all or nothing --


def state(model: nn.Module, graph: UnitGraph) -> tuple[Any, ...]:
    """Everything that a cut changes."""
    attributes = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, (int, float, bool))}
        for name, module in model.named_modules()
    }
    values = {name: tensor.clone() for name, tensor in tensors(model).items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    places = {name: id(tensor) for name, tensor in tensors(model).items()}
    return attributes, values, gradients, places, str(graph), copy.deepcopy(graph.groups)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if hasattr(first, "__dataclass_fields__"):
        return same(vars(first), vars(second))
    return bool(first == second)


def counting(original: Callable[..., Any], fail_at: int) -> Callable[..., Any]:
    calls = iter(range(10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == fail_at:
            raise MemoryError("injected")
        return original(*args, **kwargs)

    return wrapped


class Stubborn(nn.BatchNorm2d):
    """Refuses a new size when it is armed."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "num_features" and getattr(self, "armed", False) and value != 8:
            raise MemoryError("injected")
        super().__setattr__(name, value)


@pytest.mark.parametrize("stage", ["plan", "forward", "select", "give", "attribute", "graph", "relist"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_failure_at_any_stage_changes_nothing(stage: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small().train()
    model[1] = Stubborn(8).double()
    graph = trace(model, INPUT)
    model(*INPUT).sum().backward()
    units = {"0": [1, 2], "3": [0]}
    before = state(model, graph)
    targets: dict[str, tuple[Any, str]] = {
        "plan": (UnitGraph, "plan"),
        "forward": (F, "conv2d"),
        "select": (surgery, "select"),
        "give": (surgery, "_give"),
        "graph": (UnitGraph, "forget"),
        "relist": (UnitGraph, "relist"),
    }
    with monkeypatch.context() as patch:
        if stage == "attribute":
            model[1].armed = True
        else:
            owner, name = targets[stage]
            # Some are called once, two convolutions run.
            fail_at = min(at, {"forward": 1, "select": 3, "give": 3}.get(stage, 0))
            patch.setattr(owner, name, counting(getattr(owner, name), fail_at))
        with pytest.raises((MemoryError, RuntimeError), match="injected"):
            cut(model, graph, units)
    if stage == "attribute":
        assert model[1].armed
        del model[1].armed
    assert same(before, state(model, graph))
    reference = deafened(model.eval(), graph, units)
    cut(model, graph, units)  # and nothing stands in the way of another attempt
    assert difference(run(reference, INPUT), run(model, INPUT)) < 1e-12


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"nowhere": [0]}, "not a group"),
        ({"5": [0]}, "output of the model"),
        ({"0": [8]}, "units 0 to 7"),
        ({"0": [-1]}, "units 0 to 7"),
        ({"0": [1, 1]}, "once"),
        ({"0": list(range(8))}, "must stay"),
        ({"0": [0.5]}, "integers"),
        ({"0": torch.zeros(8, dtype=torch.bool)}, "integers"),
        ({"3": [1], "0": [[1]]}, "one-dimensional"),
    ],
)
def test_wrong_units_are_refused_before_anything_is_touched(units: dict[str, Any], message: str) -> None:
    model = small()
    graph = trace(model, INPUT)
    before = state(model, graph)
    with pytest.raises(ValueError, match=message):
        cut(model, graph, units)
    assert same(before, state(model, graph))


def test_a_model_that_has_changed_is_refused() -> None:
    model = small()
    graph = trace(model, INPUT)
    model[3] = nn.Conv2d(8, 7, 1).double()
    with pytest.raises(RuntimeError, match=r"3\.weight has shape \(7, 8, 1, 1\)"):
        cut(model, graph, {"0": [1]})


def test_a_plan_is_carried_out_as_long_as_it_fits() -> None:
    model = small()
    graph = trace(model, INPUT)
    plan, other = graph.plan({"0": [1, 2]}), graph.plan({"3": [0]})
    reference = deafened(model, graph, {"0": [1, 2]})
    records = cut(model, graph, plan)
    assert [(record.name, record.dim) for record in records] == [(record.name, record.dim) for record in plan.records]
    assert difference(run(reference, INPUT), run(model, INPUT)) < 1e-12
    for stale in (plan, other):
        before = state(model, graph)
        with pytest.raises(ValueError, match="another cut has been made"):
            cut(model, graph, stale)
        assert same(before, state(model, graph))


def test_a_model_that_would_not_run_is_refused_with_the_line() -> None:
    class Late(nn.Module):
        strict = False

        def forward(self, x: Tensor) -> Tensor:
            assert not self.strict or x.shape[1] == 8, "eight channels"
            return x

    model = small()
    model.insert(1, Late())
    graph = trace(model, INPUT)
    model[1].strict = True
    before = state(model, graph)
    with pytest.raises(
        RuntimeError, match=r"would not compute the same after the cut: the code of 1 cannot follow \(.*eight channels"
    ):
        cut(model, graph, {"0": [1]})
    assert same(before, state(model, graph))


def test_code_that_takes_units_by_position_is_verified_at_every_cut() -> None:
    class Ends(nn.Module):
        shift = 0

        def forward(self, x: Tensor) -> Tensor:
            middle = x.shape[1] // 2
            return torch.cat([x[:, :middle], x[:, middle:]], 1).roll(self.shift, 1)

    model = small()
    model.insert(1, Ends())
    graph = trace(model, INPUT)
    reference = deafened(model, graph, {"0": [7]})
    cut(model, graph, {"0": [7]})
    assert difference(run(reference, INPUT), run(model, INPUT)) < 1e-12
    model[1].shift = 1  # of the same shape, and wrong
    before = state(model, graph)
    with pytest.raises(RuntimeError, match="would not compute the same"):
        cut(model, graph, {"0": [6]})
    assert same(before, state(model, graph))


class Branching(nn.Module):
    """Code that decides by how many units there are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.how == "residual":
            return h + x if h.shape == x.shape else h
        if self.how == "wide" and h.shape[1] >= 8:
            h = F.avg_pool2d(h, 3, 1, 1)
        return F.avg_pool2d(h, 3, 1, 1, ceil_mode=h.shape[1] < 8) if self.how == "last" and h.shape[1] >= 8 else h


@pytest.mark.parametrize(
    ("how", "units"),
    [
        ("residual", {"0": [0, 1], "1.inner": [*range(6)]}),
        ("wide", {"1.inner": [*range(5)]}),
        ("last", {"1.inner": [*range(5)]}),
    ],
)
def test_a_cut_that_makes_the_code_take_another_branch_is_refused(how: str, units: dict[str, list[int]]) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 1), Branching(how), nn.ReLU(), nn.Conv2d(12, 2, 1)))
    graph = trace(model, INPUT)
    before = state(model, graph)
    with pytest.raises(RuntimeError, match="would not compute the same"):
        cut(model, graph, units)
    assert same(before, state(model, graph))
    smaller = {name: positions[:1] for name, positions in units.items()}
    reference = deafened(model, graph, smaller)
    cut(model, graph, smaller)
    assert difference(run(reference, INPUT), run(model, INPUT)) < 1e-12


def test_nothing_to_remove_changes_nothing() -> None:
    model = small()
    graph = trace(model, INPUT)
    before = state(model, graph)
    assert cut(model, graph, {}) == cut(model, graph, {"0": []}) == []
    assert same(before, state(model, graph))
