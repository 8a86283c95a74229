"""What tests share: the faces of the engine, a loop, a comparison to the last bit, the modules of a benchmark."""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from impact_optim import Impact, ImpactAdamW, ImpactSGD
from impact_optim.options import OPTIONS
from impact_optim.pruning import UnitGraph, pruner


@dataclass(frozen=True)
class Face:
    """One way to the engine: an optimizer that has it built in, or a base of torch with :class:`Impact` around it."""

    base: type[Optimizer]
    built_in: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.built_in.__name__ if self.built_in else f"Impact({self.base.__name__})"

    def __call__(self, params: Any, **options: Any) -> tuple[Any, Optimizer]:
        """The engine, and the optimizer that steps: one and the same if it is built in.

        Args:
            params: a module, which is attached, or what any optimizer takes.
            options: of the base and of the engine.
        """
        options = {**self.options, **options}
        if self.built_in is not None:
            optimizer = self.built_in(params, **options)
            return optimizer, optimizer
        own = {name: options.pop(name) for name in list(options) if name in OPTIONS}
        module = params if isinstance(params, nn.Module) else None
        optimizer = self.base(params if module is None else module.parameters(), **options)
        return Impact(module, optimizer, **own), optimizer

    def plain(self, params: Any, **options: Any) -> Optimizer:
        """The base alone; options of the engine are left out."""
        options = {name: value for name, value in {**self.options, **options}.items() if name not in OPTIONS}
        return self.base(params.parameters() if isinstance(params, nn.Module) else params, **options)


FACES = [
    Face(torch.optim.SGD, ImpactSGD, {"lr": 0.05, "momentum": 0.9}),
    Face(torch.optim.AdamW, ImpactAdamW, {"lr": 0.01, "weight_decay": 0.05}),
    Face(torch.optim.RMSprop, None, {"lr": 0.01, "momentum": 0.5}),
]
every_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)


def train(optimizer: Optimizer, loss: Callable[[], Tensor], steps: int = 5, closure: bool = False) -> list[float]:
    """An ordinary loop over one batch, with or without ``step(closure)``; the losses."""

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    losses = []
    for _ in range(steps):
        if closure:
            losses.append(optimizer.step(evaluate).item())
        else:
            losses.append(evaluate().item())
            optimizer.step()
    return losses


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to the last bit, through dicts, lists and modules; nan equals nan."""
    if isinstance(actual, nn.Module):
        actual, expected = actual.state_dict(), expected.state_dict()
    assert type(actual) is type(expected)
    if isinstance(actual, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same(actual[key], expected[key])
    elif isinstance(actual, list | tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    else:
        assert actual == expected


def clones(tensors: Any) -> Any:
    """Copies of tensors; of a module, those of its parameters by name."""
    if isinstance(tensors, nn.Module):
        return {name: p.detach().clone() for name, p in tensors.named_parameters()}
    return [t.detach().clone() for t in tensors]


MUON = Face(torch.optim.Muon, None, {"lr": 0.02, "weight_decay": 0.05})
"""For networks all of whose parameters are matrices."""


def two_layers(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    """A small network, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32, bias), nn.Tanh(), nn.Linear(32, 4, bias)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def run(model: nn.Module, optimizer: Optimizer, steps: range, closure: bool = False) -> None:
    """Trains such a network; every step number stands for a batch of its own."""
    for step in steps:
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        train(optimizer, lambda x=x: (model(x) - x[:, :4]).square().mean(), 1, closure)


def slow(*values: Any) -> Any:
    """A case of a parametrized test that only ``--slow`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


@contextmanager
def benchmark(name: str) -> Iterator[None]:
    """Where ``plan`` and ``report`` are those of a folder of benchmarks, all of which have their own."""
    root = Path(__file__).parent.parent / "benchmarks"
    others = {name: sys.modules.pop(name) for name in ("plan", "report") if name in sys.modules}
    sys.path[:0] = folders = [str(root), str(root / name)]
    yield
    for folder in folders:
        sys.path.remove(folder)
    for module in ("plan", "report"):
        sys.modules.pop(module, None)
    sys.modules.update(others)
    torch.set_flush_denormal(False)  # a run sets it, for its process


@contextmanager
def traced_once() -> Iterator[None]:
    """Pruners get copies of one graph for all models of one form: tracing takes most of a short test's time."""
    graphs, trace = {}, pruner.trace

    def traced(model: nn.Module, example_inputs: Any, *, ignore: Iterable[nn.Module] = ()) -> UnitGraph:
        names = {module: name for name, module in model.named_modules()}
        ignored = tuple(names[module] for module in ignore)
        key = (repr(model), repr([p.shape for p in model.parameters()]), repr(example_inputs), ignored)
        if key not in graphs:
            graphs[key] = trace(model, example_inputs, ignore=[model.get_submodule(name) for name in ignored])
        return copy.deepcopy(graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruner, "trace", traced)
        yield
