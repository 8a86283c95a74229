"""Groups of small hand-made networks, checked against networks whose units are zeroed where they are read, by hand."""

from __future__ import annotations

import copy
import doctest
import functools
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import slow
from masked_networks import deafened, difference, draw, randomised, run, silenced
from torch import Tensor, nn

import impact_optim.pruning
from impact_optim.pruning import UnitGraph, cut, load_pruned, open_heads, save_pruned, trace

Unit = tuple[str, int]
"""Group, and number in it."""


class Case(NamedTuple):
    model: nn.Module
    inputs: Any
    groups: dict[str, int]
    """Every group that there should be, with its number of units."""
    reads: dict[str, tuple[int, list[Unit]]]
    """Module that reads units -> dimension of its input, and the unit that each index there belongs to."""


CASES: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    CASES[function.__name__] = function
    return function


class Run(nn.Module):
    """A network written down as a function of its named parts."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def image(channels: int = 3, size: int = 6) -> tuple[Tensor]:
    return (torch.randn(2, channels, size, size, dtype=torch.float64),)


def tokens(width: int = 12, length: int = 5) -> tuple[Tensor]:
    return (torch.randn(2, length, width, dtype=torch.float64),)


def of(group: str, count: int, times: int = 1) -> list[Unit]:
    """Units 0, 0, 1, 1, 2, 2 ... of a group."""
    return [(group, unit) for unit in range(count) for _ in range(times)]


# -- layers --


@case
def perceptron() -> Case:
    return Case(
        nn.Sequential(nn.Linear(12, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)),
        tokens(),
        {"0": 6, "2": 5},
        {"2": (-1, of("0", 6)), "4": (-1, of("2", 5))},
    )


@case
def convolution_to_linear() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 3)
    )
    return Case(model, image(), {"0": 5}, {"5": (1, of("0", 5, 4))})


@case
def convolutions_of_one_and_three_dimensions() -> Case:
    model = Run(
        lambda m, x, y: (m.b(F.silu(m.a(x))), m.d(F.elu(m.c(y)))),
        a=nn.Conv1d(2, 4, 3),
        b=nn.Conv1d(4, 2, 2, bias=False),
        c=nn.Conv3d(2, 4, 2),
        d=nn.Conv3d(4, 2, 1),
    )
    inputs = (torch.randn(2, 2, 8, dtype=torch.float64), torch.randn(2, 2, 3, 3, 3, dtype=torch.float64))
    return Case(model, inputs, {"a": 4, "c": 4}, {"b": (1, of("a", 4)), "d": (1, of("c", 4))})


@case
def transposed_convolutions() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 1)
    )
    return Case(model, image(), {"0": 6, "2": 4}, {"2": (1, of("0", 6)), "4": (1, of("2", 4))})


@case
def grouped_convolution() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1))
    return Case(model, image(), {"0": 4}, {"2": (1, of("0", 4, 3)), "4": (1, of("0", 4, 2))})


@case
def grouped_transposed_convolution() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    return Case(model, image(), {"0": 4}, {"2": (1, of("0", 4, 3)), "4": (1, of("0", 4, 2))})


@case
def depthwise_convolution_with_a_multiplier() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU6(),
        nn.Conv2d(6, 12, 3, groups=6),
        nn.BatchNorm2d(12),
        nn.ReLU6(),
        nn.Conv2d(12, 2, 1),
    )
    return Case(model, image(), {"0": 6}, {"2": (1, of("0", 6)), "5": (1, of("0", 6, 2))})


@case
def norms_over_channels() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.InstanceNorm2d(6, affine=True),
        nn.PReLU(6), nn.Conv2d(6, 5, 1), nn.InstanceNorm2d(5), nn.GroupNorm(5, 5, affine=False), nn.Conv2d(5, 2, 1),
    )  # fmt: skip
    groups = {"0": 4, "3": 6, "6": 5}
    return Case(model, image(), groups, {"3": (1, of("0", 4, 3)), "6": (1, of("3", 6)), "9": (1, of("6", 5))})


@case
def layer_norm_mixes_what_it_normalises() -> Case:
    model = nn.Sequential(
        nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.RMSNorm(4), nn.Linear(4, 3)
    )
    return Case(model, tokens(), {"2": 6}, {"4": (-1, of("2", 6))})


@case
def embeddings_tied_to_the_head() -> Case:
    model = Run(
        lambda m, ids: m.head(m.embed(ids) + m.down(F.relu(m.up(m.embed(ids))))),
        embed=nn.Embedding(11, 6),
        up=nn.Linear(6, 7),
        down=nn.Linear(7, 6),
        head=nn.Linear(6, 11, bias=False),
    )
    model.head.weight = model.embed.weight
    ids = (torch.randint(0, 11, (2, 5)),)
    return Case(
        model,
        ids,
        {"embed": 6, "up": 7},
        {"up": (-1, of("embed", 6)), "head": (-1, of("embed", 6)), "down": (-1, of("up", 7))},
    )


@case
def shared_layer() -> Case:
    model = Run(
        lambda m, x: m.out(m.twice(F.relu(m.twice(m.first(x))))),
        first=nn.Linear(12, 7),
        twice=nn.Linear(7, 7),
        out=nn.Linear(7, 3),
    )
    return Case(model, tokens(), {"first": 7}, {"twice": (-1, of("first", 7)), "out": (-1, of("first", 7))})


@case
def bare_parameters() -> Case:
    model = Run(
        lambda m, x: (torch.relu(x @ m.first * m.scale + m.shift) @ m.second).tanh() @ m.third,
        first=nn.Parameter(torch.randn(12, 6)),
        scale=nn.Parameter(torch.randn(6)),
        shift=nn.Parameter(torch.randn(1, 6)),
        second=nn.Parameter(torch.randn(6, 4)),
        third=nn.Parameter(torch.randn(4, 2)),
    )
    return Case(model, tokens(), {"first": 6, "second": 4}, {})


# -- shapes --


@case
def residual_stream() -> Case:
    model = Run(
        lambda m, x: m.out((h := F.relu(m.stem(x))) + m.down(F.relu(m.up(h)))),
        stem=nn.Conv2d(3, 6, 1),
        up=nn.Conv2d(6, 8, 1),
        down=nn.Conv2d(8, 6, 1),
        out=nn.Conv2d(6, 2, 1),
    )
    return Case(
        model,
        image(),
        {"stem": 6, "up": 8},
        {"up": (1, of("stem", 6)), "out": (1, of("stem", 6)), "down": (1, of("up", 8))},
    )


@case
def dense_concatenation() -> Case:
    model = Run(
        lambda m, x: m.out(torch.cat([a := m.first(x), b := F.relu(m.second(a)), m.third(torch.cat([b, a], 1))], 1)),
        first=nn.Conv2d(3, 4, 1),
        second=nn.Conv2d(4, 5, 1),
        third=nn.Conv2d(9, 6, 1),
        out=nn.Conv2d(15, 2, 1),
    )
    first, second, third = of("first", 4), of("second", 5), of("third", 6)
    reads = {"second": (1, first), "third": (1, second + first), "out": (1, first + second + third)}
    return Case(model, image(), {"first": 4, "second": 5, "third": 6}, reads)


@case
def gates() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.first(x).chunk(2, -1)
        return m.third(F.glu(m.second(left * torch.sigmoid(right)), -1))

    model = Run(forward, first=nn.Linear(12, 10), second=nn.Linear(5, 8), third=nn.Linear(4, 3))
    return Case(
        model, tokens(), {"first": 5, "second": 4}, {"second": (-1, of("first", 5)), "third": (-1, of("second", 4))}
    )


@case
def halves_by_slices() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.second(h[..., : h.shape[-1] // 2].sigmoid() * h[..., h.shape[-1] // 2 :])

    model = Run(forward, first=nn.Linear(12, 10), second=nn.Linear(5, 3))
    return Case(model, tokens(), {"first": 5}, {"second": (-1, of("first", 5))})


@case
def squeeze_and_excitation() -> Case:
    model = Run(
        lambda m, x: m.out((h := m.stem(x)) * torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(h, 1)))))),
        stem=nn.Conv2d(3, 8, 1),
        down=nn.Conv2d(8, 4, 1),
        up=nn.Conv2d(4, 8, 1),
        out=nn.Conv2d(8, 2, 1),
    )
    return Case(
        model,
        image(),
        {"stem": 8, "down": 4},
        {"down": (1, of("stem", 8)), "out": (1, of("stem", 8)), "up": (1, of("down", 4))},
    )


@case
def channel_shuffle() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.stem(x).chunk(2, 1)
        joined = torch.cat([left, m.branch(right)], 1)
        batch, channels, height, width = joined.shape
        shuffled = joined.view(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)
        return m.out(torch.cat([p := shuffled.chunk(2, 1)[0], F.relu(m.second(p))], 1))

    model = Run(
        forward, stem=nn.Conv2d(3, 8, 1), branch=nn.Conv2d(4, 4, 1), second=nn.Conv2d(4, 6, 1), out=nn.Conv2d(10, 2, 1)
    )
    # Halves are halved again: position p of 8 and p + 4 go together, and so do, through the shuffle, p and p + 2.
    reads = {
        "branch": (1, [("stem", 0), ("stem", 1)] * 2),
        "second": (1, of("stem", 2, 2)),
        "out": (1, of("stem", 2, 2) + of("second", 6)),
    }
    return Case(model, image(), {"stem": 2, "second": 6}, reads)


@case
def pixel_shuffles() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 5, 1), nn.PixelUnshuffle(3), nn.Conv2d(45, 2, 1)
    )
    return Case(model, image(), {"0": 3, "2": 5}, {"2": (1, of("0", 3)), "4": (1, of("2", 5, 9))})


@case
def spatial_operators() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.pad(F.interpolate(m.first(x), scale_factor=2, mode="bilinear"), (1, 2, 0, 1), mode="replicate").roll(1, 2)
        h = F.avg_pool2d(F.pad(h, (1, 1)), 2).flip(3)
        h = torch.cat([h, h[:, :, 1:3]], 2)
        return m.second(h).mean((2, 3)).softmax(-1)

    model = Run(forward, first=nn.Conv2d(3, 5, 1), second=nn.Conv2d(5, 4, 1))
    return Case(model, image(), {"first": 5}, {"second": (1, of("first", 5))})


@case
def patches() -> Case:
    model = Run(
        lambda m, x: m.mix(F.unfold(m.stem(x), 2).transpose(1, 2)), stem=nn.Conv2d(3, 4, 1), mix=nn.Linear(16, 3)
    )
    return Case(model, image(), {"stem": 4}, {"mix": (-1, of("stem", 4, 4))})


@case
def windows() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        h = m.stem(x).permute(0, 2, 3, 1)
        h = h.view(batch, height // 2, 2, width // 2, 2, h.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        h = F.relu(m.mix(h.reshape(-1, 4, h.shape[-1])))
        return m.out(torch.cat([h[:, 0::2], h[:, 1::2]], -1))

    model = Run(forward, stem=nn.Conv2d(3, 5, 1), mix=nn.Linear(5, 4), out=nn.Linear(8, 2))
    return Case(model, image(), {"stem": 5, "mix": 4}, {"mix": (-1, of("stem", 5)), "out": (-1, of("mix", 4) * 2)})


@case
def stacked_branches() -> Case:
    model = Run(
        lambda m, x: m.out(torch.stack([m.one(x), m.two(x)], 1).mean(1).unsqueeze(0).squeeze(0)),
        one=nn.Linear(12, 6),
        two=nn.Linear(12, 6),
        out=nn.Linear(6, 2),
    )
    return Case(model, tokens(), {"one": 6}, {"out": (-1, of("one", 6))})


@case
def new_tensors_that_follow() -> Case:
    model = Run(
        lambda m, x: m.out(torch.where((h := m.one(x)) > 0, h, torch.zeros_like(h)) + h.new_ones(h.shape[-1]) + m.b),
        one=nn.Linear(12, 6),
        out=nn.Linear(6, 2),
    )
    model.register_buffer("b", torch.randn(6))
    return Case(model, tokens(), {"one": 6}, {"out": (-1, of("one", 6))})


@case
def inputs_and_outputs_of_all_kinds() -> Case:
    model = Run(None, a=nn.Linear(12, 6), b=nn.Linear(4, 6), out=nn.Linear(6, 2))
    model.function = lambda m, *, x, y: {"sum": m.out(F.relu(m.a(x)) + m.b(y)), "parts": [x, (m.out.bias, None, 3)]}
    inputs = {"x": tokens()[0], "y": tokens(4)[0]}
    return Case(model, inputs, {"a": 6}, {"out": (-1, of("a", 6))})


@case
def the_larger_of_two_halves() -> Case:
    model = Run(lambda m, x: m.out(torch.max(*m.one(x).chunk(2, 1))), one=nn.Conv2d(3, 8, 1), out=nn.Conv2d(4, 2, 1))
    return Case(model, image(), {"one": 4}, {"out": (1, of("one", 4))})


@case
def types_of_others() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.one(x))
        h = h + torch.arange(x.shape[1]).type_as(h)[:, None] / torch.tensor(3).type_as(h)
        return m.out((h * (x.sum(-1, keepdim=True) > 0).type_as(h)).float().type_as(x))

    model = Run(forward, one=nn.Linear(12, 12), out=nn.Linear(12, 2))
    return Case(model, tokens(), {"one": 12}, {"out": (-1, of("one", 12))})


@case
def zeros_through_a_norm() -> Case:
    model = Run(
        lambda m, x: m.out(
            m.norm(h := m.one(x)) + 0 * m.other(torch.zeros_like(h)) + torch.ones_like(h).amax((2, 3), True)
        ),
        one=nn.Conv2d(3, 6, 1),
        norm=nn.BatchNorm2d(6),
        other=nn.BatchNorm2d(6),
        out=nn.Conv2d(6, 2, 1),
    )
    return Case(model, image(), {"one": 6}, {"out": (1, of("one", 6))})


@case
def a_part_of_each_unit_is_written_to() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.one(x).clone()
        h[:, :, :3] *= 2
        h[..., 0] = 1
        return m.out(h)

    model = Run(forward, one=nn.Conv2d(3, 6, 1), out=nn.Conv2d(6, 2, 1))
    return Case(model, image(), {"one": 6}, {"out": (1, of("one", 6))})


class SizesOfItsOwn(nn.Module):
    """As the code of others has them: properties of the weight instead of attributes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    in_features = property(lambda self: self.weight.shape[1])
    out_features = property(lambda self: self.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@case
def sizes_that_are_properties() -> Case:
    model = nn.Sequential(SizesOfItsOwn(12, 6), nn.ReLU(), SizesOfItsOwn(6, 2))
    return Case(model, tokens(), {"0": 6}, {"2": (-1, of("0", 6))})


@case
def largest_of_all_tokens() -> Case:
    """What goes along a dimension of tokens leaves the units alone."""
    model = Run(
        lambda m, x: m.b(m.a(x).topk(3, dim=1).values.sort(dim=1).values.flatten(1)),
        a=nn.Linear(12, 6),
        b=nn.Linear(18, 2),
    )
    return Case(model, tokens(), {"a": 6}, {"b": (-1, [("a", unit) for _ in range(3) for unit in range(6)])})


# -- attention: a head is a unit --


class Attention(nn.Module):
    def __init__(self, kind: str, heads: int = 3, kv_heads: int = 3, width: int = 4) -> None:
        super().__init__()
        self.kind, self.num_heads, self.num_kv_heads, self.head_dim = kind, heads, kv_heads, width
        self.qkv = nn.Linear(12, (heads + 2 * kv_heads) * width) if kind == "fused" else None
        self.q, self.k, self.v = (
            nn.Linear(12, heads * width),
            nn.Linear(12, kv_heads * width),
            nn.Linear(12, kv_heads * width),
        )
        if kind == "fused":
            del self.q, self.k, self.v
        self.proj = nn.Linear(heads * width, 12)
        if kind in ("rotary", "partial"):
            self.register_buffer("frequencies", torch.rand(width // 2 if kind == "rotary" else 1))

    def rotated(self, x: Tensor) -> Tensor:
        """One table turns all heads; its type is converted, as language models do it."""
        angle = (torch.arange(x.shape[2]).unsqueeze(-1) * torch.cat([self.frequencies, self.frequencies])).float()
        turned, rest = x[..., : angle.shape[-1]], x[..., angle.shape[-1] :]
        low, high = turned.chunk(2, -1)
        turned = turned * angle.cos().to(x.dtype) + torch.cat([-high, low], -1) * angle.sin().to(x.dtype)
        return torch.cat([turned, rest], -1) if self.kind == "partial" else turned

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.kind == "fused":
            q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (
                part(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for part in (self.q, self.k, self.v)
            )
        if self.kind in ("rotary", "partial"):
            q, k = self.rotated(q), self.rotated(k)
        if self.kind in ("fused", "gqa", "rotary", "partial"):
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kind != "fused", is_causal=True)
        elif self.kind == "repeated":
            k, v = (p[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for p in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "matmul":
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.head_dim)
            y = torch.softmax(scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -1e9), -1) @ v
        elif self.kind == "bmm":
            q, k, v = (p.reshape(-1, length, self.head_dim) for p in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(batch, -1, length, self.head_dim)
        else:
            y = torch.einsum("bhnm,bhme->bhne", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize(
    ("kind", "heads", "kv_heads"),
    [
        ("fused", 4, 4),
        ("matmul", 3, 3),
        ("bmm", 3, 3),
        ("einsum", 3, 3),
        ("gqa", 6, 3),
        ("repeated", 6, 3),
        ("rotary", 6, 3),
    ],
)
def test_heads_are_units(kind: str, heads: int, kv_heads: int) -> None:
    name = "qkv" if kind == "fused" else "q"
    reads = {"proj": (-1, of(name, kv_heads, heads // kv_heads * 4))}
    check(Case(Attention(kind, heads, kv_heads), tokens(), {name: kv_heads}, reads))


def test_number_of_heads_follows() -> None:
    model = randomised(Attention("fused", 4, 4))
    graph = trace(model, tokens())
    cut(model, graph, {"qkv": [1, 2]})
    assert (model.num_heads, model.head_dim) == (2, 4)


def test_width_of_a_head_is_cut_where_the_scale_does_not_follow_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), scale=m.scale))

    parts = {name: nn.Linear(12, 5) for name in "qkv"}
    model = Run(forward, **parts, out=nn.Linear(5, 2), scale=0.4)
    assert {name: group.size for name, group in trace(randomised(model), tokens()).groups.items()} == {"q": 5, "v": 5}
    check(Case(model, tokens(), {"q": 5, "v": 5}, {"out": (-1, of("v", 5))}), only={"v"})
    model.scale = None
    graph = trace(model, tokens())
    assert list(graph.groups) == ["v"]
    assert "scaled by the width" in graph.frozen["q"]


class Transposed(nn.Module):
    """A linear layer with its weight the other way round and its width written down, as in GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def test_an_attribute_of_what_stays_does_not_follow_what_has_as_many_units() -> None:
    up, down = Transposed(12, 12), Transposed(12, 12)
    model = randomised(Run(lambda m, x: m.norm(x + m.down(m.up(x).relu())), up=up, down=down, norm=nn.LayerNorm(12)))
    inputs = tokens()
    graph = trace(model, inputs)
    assert {name: group.size for name, group in graph.groups.items()} == {"up": 12}
    reference = deafened(model, graph, {"up": [0, 3]})
    cut(model, graph, {"up": [0, 3]})
    assert (up.nf, down.nf) == (10, 12)
    assert difference(run(reference, inputs), run(model, inputs)) < 1e-12


class Resized(nn.Module):
    """Has as many channels as the image that it gives has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.out_size, self.conv, self.head = 8, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.interpolate(F.relu(self.conv(x)), size=(self.out_size, self.out_size)))


class Context(nn.Module):
    """Takes as many tokens at most as it has hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.block_size, self.up, self.down = 8, nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] <= self.block_size or not self.training
        return self.down(F.relu(self.up(x[:, -self.block_size :]))).mean(1)


@pytest.mark.parametrize(
    ("model", "inputs", "group", "attribute"),
    [
        (Resized(), image(), "conv", "out_size"),
        (Context(), tokens(length=9), "up", "block_size"),  # it takes part, and must not change
        (Context(), tokens(length=4), "up", "block_size"),  # nothing shows what it is for
    ],
)
def test_attributes_with_the_number_of_units_by_chance_stay(
    model: nn.Module, inputs: Any, group: str, attribute: str
) -> None:
    graph = trace(randomised(model), inputs)
    assert {name: units.size for name, units in graph.groups.items()} == {group: 8}
    reference = deafened(model, graph, {group: [0, 3, 4]})
    cut(model, graph, {group: [0, 3, 4]})
    assert getattr(model, attribute) == 8
    assert difference(run(reference, inputs), run(model, inputs)) < 1e-12


# -- what cannot be cut --


class Fixed(nn.Module):
    """Code that knows the number of units."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(12, 8), nn.Linear(8 if how != "slice" else 4, 4)
        self.register_buffer("order", torch.randperm(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "view":
            h = h.view(2, 5, 4, 2).flatten(2)
        elif self.how == "slice":
            h = h[..., 2:6]
        elif self.how == "scale":
            h = h / h.shape[-1]
        elif self.how == "softmax":
            h = h.softmax(-1)
        elif self.how == "sum":
            h = h * h.sum(-1, keepdim=True)
        elif self.how == "permutation":
            h = h[..., self.order]
        elif self.how == "select":
            h = h * h[..., 3:4]
        elif self.how == "unknown":
            h = torch.fft.fft(h).real
        elif self.how == "positions":
            h = h + torch.arange(h.shape[-1])
        elif self.how == "input":
            h = h + torch.cat([x, x], -1)[..., : h.shape[-1]]
        elif self.how == "written":
            y = torch.zeros(2, 5, 8, dtype=h.dtype)
            y[:] = h
            h = y
        elif self.how in ("half", "first", "copied", "zero", "flat"):
            h = h.clone() if self.how != "flat" else h.transpose(1, 2).contiguous().flatten(1).view(2, 8, 5).mT
            part = h[..., : h.shape[-1] // 2] if self.how == "half" else h[..., :4]
            if self.how == "copied":
                part.copy_(2 * part)
            elif self.how == "zero":
                h[..., 4:6] = 0
            else:
                part *= 2
        elif self.how == "marked":
            marks = torch.zeros_like(h)
            marks[..., :4] = 1
            h = h * marks
        elif self.how == "number of ones":
            h = h / torch.ones_like(h).sum(-1, keepdim=True)
        elif self.how == "constant":
            h = h / torch.tensor(h.shape[-1])
        elif self.how == "first of two":
            h = torch.max(torch.zeros((), dtype=h.dtype), h).mean(-1, keepdim=True).expand(2, 5, 8)
        elif self.how == "branch" and h.shape[-1] != 8:
            h = h.relu()
        elif self.how == "roll":
            h = h.roll(1, -1)
        elif self.how == "padding":
            h = h[..., : h.shape[-1]] + F.pad(F.relu(h)[..., 2:], (0, 2))
        return self.b(h)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("view", "cannot follow"),
        ("slice", "follow"),
        ("scale", "constants"),
        ("softmax", "softmax"),
        ("sum", "sum"),
        ("permutation", "index"),
        ("select", "slice"),
        ("unknown", "aten::_fft_r2c"),
        ("positions", "not cut"),
        ("input", "not cut"),
        ("written", "writes"),
        ("branch", "number of units"),
        ("padding", "add"),
        ("roll", "linear"),
        ("half", "by position"),
        ("first", "by position"),
        ("copied", "by position"),
        ("zero", "by position"),
        ("flat", "by position"),
        ("marked", "not cut"),
        ("number of ones", "number of units"),
        ("constant", "number of units"),
        ("first of two", "mixes"),
    ],
)
def test_what_cannot_be_cut_is_named(how: str, why: str) -> None:
    graph = trace(Fixed(how).double(), tokens())
    assert not graph.groups
    assert why in graph.frozen["a"]


def test_groups_of_a_convolution_of_the_image_stay() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    check(Case(model, image(4), {"2": 6}, {"4": (1, of("2", 6))}))


def test_units_that_stay_are_not_taken_for_one_another() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h) + h[..., 2:4].softmax(-1).sum()  # two units that stay; after a cut, two others

    graph = trace(randomised(Run(forward, a=nn.Linear(12, 8), b=nn.Linear(8, 2))), tokens())
    assert not graph.groups


def test_multihead_attention_keeps_its_heads_and_the_rest_is_cut() -> None:
    model = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True)
    graph = trace(randomised(model), tokens())
    assert {name: group.size for name, group in graph.groups.items()} == {"linear1": 16}
    assert "embed_dim" in graph.frozen["self_attn"]
    frozen = copy.deepcopy(model).requires_grad_(False)  # which would take another path through the attention
    assert trace(frozen, tokens()).groups.keys() == graph.groups.keys()


def attention_arguments(how: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Of a forward pass of attention with 12 wide inputs and 3 heads."""
    x, y = (torch.randn(2, n, 12, dtype=torch.float64) for n in (5, 4))
    if how == "masks":
        padding = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]]).double().masked_fill(torch.eye(4)[:2] == 1, -torch.inf)
        return (x, y, y), {"key_padding_mask": padding, "attn_mask": torch.randn(5, 4, dtype=torch.float64)}
    if how == "causal":
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        return (x, x, x), {"attn_mask": mask, "is_causal": True, "need_weights": False}
    if how == "a mask for each head":
        return (x, y, y), {"attn_mask": torch.rand(6, 5, 4) > 0.8, "average_attn_weights": False}
    if how == "one sample":
        return (x[0], y[0], y[0]), {"key_padding_mask": torch.tensor([False, False, True, False])}
    return (x, x, x), {"need_weights": how == "weights"}


@pytest.mark.parametrize("how", ["plain", "weights", "masks", "causal", "a mask for each head", "one sample"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"kdim": 12, "vdim": 12, "bias": False, "batch_first": True}]
)
def test_open_attention_is_that_of_torch(how: str, options: dict[str, Any]) -> None:
    inputs, masks = attention_arguments(how)
    if not options.get("batch_first") and how != "one sample":
        inputs = tuple(tensor.transpose(0, 1) for tensor in inputs)
    model = nn.MultiheadAttention(12, 3, **options)
    if "kdim" in options:  # torch makes them separate only where the widths differ
        model.q_proj_weight, model.k_proj_weight, model.v_proj_weight = (
            nn.Parameter(part.clone()) for part in model.in_proj_weight.chunk(3)
        )
        model.register_parameter("in_proj_weight", None)
        model._qkv_same_embed_dim = False
    model = randomised(model)
    opened = open_heads(copy.deepcopy(model))
    assert type(opened) is not type(model)
    assert opened.state_dict().keys() == model.state_dict().keys()
    for one, other in zip(model(*inputs, **masks), opened(*inputs, **masks), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one)


@pytest.mark.parametrize("need_weights", [True, False])
def test_open_attention_drops_out_as_torch_does_and_needs_the_mask_it_is_told_of(need_weights: bool) -> None:
    model = randomised(nn.MultiheadAttention(12, 3, dropout=1.0, batch_first=True))
    opened, (x,) = open_heads(copy.deepcopy(model)), tokens()
    assert not torch.equal(opened(x, x, x, need_weights=need_weights)[0], model.out_proj.bias.expand_as(x))
    dropped = opened.train()(x, x, x, need_weights=need_weights)[0]
    assert torch.equal(dropped, model.out_proj.bias.expand_as(x))
    assert torch.equal(dropped, model.train()(x, x, x, need_weights=need_weights)[0])
    with pytest.raises(ValueError, match="hand in the mask"):
        opened(x, x, x, is_causal=True)


@pytest.mark.parametrize("norm_first", [True, False])
def test_heads_of_open_multihead_attention_are_cut(norm_first: bool) -> None:
    model = open_heads(nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=norm_first))
    check(Case(model, tokens(), {"self_attn": 3, "linear1": 16}, {}))
    left = model.self_attn.num_heads
    assert left < 3
    assert model.self_attn.in_proj_weight.shape == (3 * left * 4, 12)
    assert model.self_attn.out_proj.in_features == left * 4


def test_a_whole_transformer_is_cut_and_evaluates_with_padding() -> None:
    model = open_heads(nn.Transformer(12, 4, 1, 1, 16, batch_first=True))
    inputs = (*tokens(), torch.randn(2, 4, 12, dtype=torch.float64))
    heads = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    groups = dict.fromkeys(heads, 4)
    groups |= {f"{name}.layers.0.linear1": 16 for name in ("encoder", "decoder")}
    check(Case(model, inputs, groups, {}))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    masked = model.eval()(*inputs, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    with torch.no_grad():  # where torch's own layers would take a kernel of their own
        again = model(*inputs, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    torch.testing.assert_close(again, masked)
    inputs[0][1, 3:] = 7.0
    torch.testing.assert_close(model(*inputs, src_key_padding_mask=padding, memory_key_padding_mask=padding), masked)


def test_attention_with_more_keys_than_its_input_has_stays_as_it_is() -> None:
    kept = nn.Sequential(
        nn.MultiheadAttention(12, 3, add_bias_kv=True), nn.MultiheadAttention(12, 3, add_zero_attn=True)
    )
    assert all(type(module) is nn.MultiheadAttention for module in open_heads(kept))


def windowed(second: bool) -> nn.Module:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    block, merging = (
        (swin.SwinTransformerBlockV2, swin.PatchMergingV2) if second else (swin.SwinTransformerBlock, swin.PatchMerging)
    )
    sizes = {"patch_size": [2, 2], "embed_dim": 12, "depths": [2], "num_heads": [3], "window_size": [4, 4]}
    return randomised(swin.SwinTransformer(**sizes, num_classes=2, block=block, downsample_layer=merging))


@pytest.mark.parametrize("second", [slow(False), True], ids=["Swin", "Swin V2"])
def test_heads_of_open_windows_are_cut(second: bool, tmp_path: Path) -> None:
    model = windowed(second)
    opened = open_heads(copy.deepcopy(model))
    assert opened.state_dict().keys() == model.state_dict().keys()
    for side in (18, 32):  # padded at two sides; windows as large as the image, which are not shifted
        x = torch.randn(2, 3, side, side, dtype=torch.float64)
        assert torch.equal(opened(x), model(x))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for one, other in zip(
            torch.autograd.grad(opened(x).square().sum(), list(opened.parameters())), expected, strict=True
        ):
            torch.testing.assert_close(one, other)
    layers = ["features.1.0", "features.1.1"]
    groups = {f"{layer}.{name}": units for layer in layers for name, units in (("attn.qkv", 3), ("mlp.0", 48))}
    if second:
        groups |= {f"{layer}.attn.cpb_mlp.0": 512 for layer in layers}
    graph = check(Case(opened, (x,), groups, {}))
    assert graph.groups[f"{layers[0]}.attn.qkv"].kind == "heads of 4"  # though a bias and a scale have one for each
    attention = opened.features[1][0].attn
    assert attention.qkv.out_features == 3 * 4 * attention.num_heads < 36
    opened.eval()
    save_pruned(opened, tmp_path)
    assert torch.equal(load_pruned(open_heads(windowed(second)).eval(), tmp_path)(x), opened(x))


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    width = 5 * (2 if options.get("bidirectional") else 1)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.relu(m.rnn(m.a(x))[0]))

    return Run(forward, a=nn.Linear(12, 6), rnn=kind(6, 5, batch_first=True, **options), b=nn.Linear(width, 2))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "dropout": 0.0}])
def test_hidden_units_of_recurrent_layers_are_cut(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    model = recurrent(kind, **options)
    check(Case(model, tokens(), {"a": 6, "rnn": 5}, {}))
    left = model.rnn.weight_hh_l0.shape[1]
    assert (model.rnn.hidden_size, model.rnn.input_size) == (left, model.rnn.weight_ih_l0.shape[1])
    assert left < 5
    assert model.b.in_features == left * (2 if options.get("bidirectional") else 1)


def test_recurrent_layers_that_tell_their_state_or_project_it_are_not_cut() -> None:
    for options in ({"proj_size": 3}, {}):
        rnn, width = nn.LSTM(6, 5, **options), options.get("proj_size", 5)
        model = Run(lambda m, x: (m.b(m.rnn(m.a(x))[0]), m.rnn(m.a(x))[1]), a=nn.Linear(12, 6), rnn=rnn)
        model.b = nn.Linear(width, 2)
        inputs = tokens()
        before = run(randomised(model), inputs)
        assert "rnn" not in trace(model, inputs).groups
        assert difference(before, run(model, inputs)) == 0  # its own list of weights is the one with data again


def test_states_that_are_handed_in_keep_the_hidden_units() -> None:
    model = Run(lambda m, x, h: m.b(m.rnn(x, h)[0]), rnn=nn.GRU(12, 5, batch_first=True), b=nn.Linear(5, 2))
    inputs = (*tokens(), torch.randn(1, 2, 5, dtype=torch.float64))
    graph = trace(randomised(model), inputs)
    assert not graph.groups
    assert "not cut" in graph.frozen["rnn"]


class Deformable(nn.Module):
    """Attention that looks at few places, as in Deformable DETR: each head samples an image where a token says."""

    def __init__(self, computed: bool, heads: int = 3, width: int = 4, points: int = 2) -> None:
        super().__init__()
        self.n_heads, self.n_points, self.d_model, self.computed = heads, points, heads * width, computed
        self.value, self.out = nn.Linear(12, heads * width), nn.Linear(heads * width, 12)
        self.offsets, self.weights = nn.Linear(12, heads * points * 2), nn.Linear(12, heads * points)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        batch, length, _ = x.shape
        height, width = image.shape[1:3]
        each = self.d_model // self.n_heads if self.computed else -1
        value = self.value(image).view(batch, height * width, self.n_heads, each)
        value = value.flatten(2).transpose(1, 2).reshape(batch * self.n_heads, -1, height, width)
        places = self.offsets(x).view(batch, length, self.n_heads, self.n_points, 2).sigmoid() * 2 - 1
        places = places.transpose(1, 2).flatten(0, 1)
        seen = F.grid_sample(value, places, align_corners=False)
        weights = self.weights(x).view(batch, length, self.n_heads, self.n_points).softmax(-1)
        weights = weights.transpose(1, 2).reshape(batch * self.n_heads, 1, length, self.n_points)
        seen = (seen * weights).sum(-1).view(batch, -1, length)
        return self.out(seen.transpose(1, 2))


@pytest.mark.parametrize("computed", [False, True])
def test_heads_of_deformable_attention_are_units(computed: bool) -> None:
    inputs = (*tokens(), torch.randn(2, 4, 5, 12, dtype=torch.float64))
    model = Deformable(computed)
    check(Case(model, inputs, {"value": 3}, {"out": (-1, of("value", 3, 4))}))
    assert model.n_heads < 3
    assert model.d_model == (4 * model.n_heads if computed else 12)


class Diffusion(nn.Module):
    """Self-attention of diffusion models: over the places of an image, from one convolution, with its own scale."""

    def __init__(self, how: str, heads: int = 3, width: int = 4) -> None:
        super().__init__()
        self.how, self.heads, self.scale = how, heads, width**-0.25
        self.norm, self.body = nn.GroupNorm(2, 8), nn.Conv2d(3, 8, 1)
        self.qkv, self.proj = nn.Conv1d(8, 3 * heads * width, 1), nn.Conv1d(heads * width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.how == "chunked":  # guided-diffusion, new order
            q, k, v = qkv.chunk(3, dim=1)
            q, k, v = (part.reshape(batch * self.heads, -1, part.shape[-1]) for part in (q, k, v))
        elif self.how == "split":  # guided-diffusion, legacy order
            each = qkv.shape[1] // (3 * self.heads)
            q, k, v = qkv.reshape(batch * self.heads, 3 * each, -1).split(each, dim=1)
        elif self.how == "literal":  # and with numbers written down
            q, k, v = (part.reshape(batch * 3, 4, -1) for part in qkv.chunk(3, dim=1))
        scores = torch.einsum("bct,bcs->bts", q * self.scale, k * self.scale).softmax(-1)
        seen = torch.einsum("bts,bcs->bct", scores, v).reshape(batch, -1, height * width)
        return x + self.proj(seen).view(batch, channels, height, width)


@pytest.mark.parametrize("how", ["chunked", "split"])
def test_heads_of_diffusion_models_are_units(how: str) -> None:
    model = Diffusion(how)
    check(Case(model, image(), {"qkv": 3}, {"proj": (1, of("qkv", 3, 4))}))
    assert model.heads == model.proj.in_channels // 4


def test_heads_whose_number_is_written_down_stay() -> None:
    graph = trace(randomised(Diffusion("literal")), image())
    assert not graph.groups
    assert "follow" in graph.frozen["qkv"]


def test_weight_standardisation_keeps_the_inputs_of_a_layer() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.b.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return m.c(F.conv2d(m.a(x), weight, m.b.bias))

    model = Run(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 5, 3), c=nn.Conv2d(5, 2, 1))
    check(Case(model, image(), {"b": 5}, {"c": (1, of("b", 5))}))


def test_parametrised_layers() -> None:
    model = nn.Sequential(
        nn.Linear(12, 6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 2)
    )
    graph = trace(randomised(model), tokens())
    # The norm of a row mixes its columns, so the inputs stay; the rows go, and the originals with them.
    assert {name: group.size for name, group in graph.groups.items()} == {"2": 5}


def test_ignored_modules_are_not_cut() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    graph = trace(model.double(), tokens(), ignore=[model[4]])
    assert list(graph.groups) == ["0"]
    assert "ignored" in graph.frozen["2"]


def test_a_head_that_only_training_reads_is_cut_as_well() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = F.relu(m.a(x))
        return (m.out(h), m.side(h)) if m.training else m.out(h)

    model = Run(forward, a=nn.Linear(12, 6), out=nn.Linear(6, 3), side=nn.Linear(6, 2))
    graph = trace(model.double(), tokens())
    assert [axis.name for axis in graph.groups["a"].consumers] == ["out.weight", "side.weight"]
    cut(model, graph, {"a": [1, 4]})
    assert [part.shape for part in model.train()(*tokens())] == [(2, 5, 3), (2, 5, 2)]


class Noisy(nn.Module):
    """Code that only training runs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.aside = how, nn.Linear(12, 6), nn.Linear(6, 2), nn.Parameter(torch.ones(6))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.training:
            if self.how == "buffer":
                self.mean.lerp_(h.detach().mean((0, 1)), 0.1)
            elif self.how == "noise":
                h = h + torch.randn(*x.shape[:-1], 6)
            elif self.how == "chance" and torch.rand(()) < 0.5:
                h = h * self.aside
        return self.b(h)


@pytest.mark.parametrize(
    ("how", "why"), [("buffer", None), ("noise", "cannot follow"), ("chance", "aside is for, which only training uses")]
)
def test_what_only_training_runs_follows_or_is_refused(how: str, why: str | None) -> None:
    model, inputs = Noisy(how), (torch.randn(2, 5, 12),)
    graph = trace(model, inputs)
    assert (why or "") in graph.frozen.get("a", "")
    if why is None:
        cut(model, graph, {"a": [1, 4]})
        assert model.mean.shape == (4,)
    else:
        assert not graph.groups
    outputs(model.train(), inputs)[0].sum().backward()


def test_what_a_buffer_holds_is_an_input() -> None:
    model = Run(
        lambda m, x: m.out(F.relu(m.a(x)) + m.table(m.places)),
        a=nn.Linear(12, 6),
        table=nn.Linear(2, 6),
        out=nn.Linear(6, 2),
    )
    model.register_buffer("places", torch.randn(5, 2))
    graph = trace(randomised(model), tokens())
    assert list(graph.groups) == ["a"]
    assert "no parameter makes it" in graph.frozen["places"]


def test_weights_that_an_operator_without_a_rule_takes_are_named() -> None:
    class Quantised(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(weight, 0.01, 0, -128, 127)

    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    for layer in (model[0], model[2]):
        nn.utils.parametrize.register_parametrization(layer, "weight", Quantised())
    graph = trace(model, (torch.randn(2, 12),))
    assert not graph.groups
    assert all("aten::fake_quantize_per_tensor_affine" in graph.frozen[name] for name in ("0", "2"))


def test_an_output_of_an_unknown_type_is_named() -> None:
    class Cache:
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    model = Run(lambda m, x: (m.b(h := m.a(x)), Cache(h)), a=nn.Linear(12, 6), b=nn.Linear(6, 2))
    with pytest.raises(RuntimeError, match=r"its output contains a Cache.*use_cache=False"):
        trace(model, (torch.randn(2, 12),))


def test_an_untraceable_model_is_named_with_the_line() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(x) if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(12, 4), Run(forward, b=nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match=r"stopped in 1 \(.*test_pruning_graph.py:\d+\)"):
        trace(model.double(), tokens())


def test_a_buffer_that_the_first_forward_pass_makes_is_named_with_the_remedy() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if not hasattr(m, "scale"):
            m.register_buffer("scale", torch.ones(6, dtype=x.dtype))
        return m.b(m.a(x) * m.scale)

    model = Run(forward, a=nn.Linear(12, 6), b=nn.Linear(6, 2)).double()
    with pytest.raises(RuntimeError, match=r"makes the buffers \['scale'\]. Run it once before"):
        trace(model, tokens())
    assert not dict(model.named_buffers())
    model(*tokens())
    assert trace(model, tokens()).groups["a"].size == 6


@pytest.mark.parametrize("in_training", [False, True])
def test_code_that_knows_that_it_is_exported_is_rehearsed_by_itself_as_well(in_training: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        is_run = not torch.compiler.is_compiling() and m.training >= in_training
        if is_run and h.shape[-1] != 6:
            raise ValueError("the width must be 6")
        return m.b(h)

    graph = trace(Run(forward, a=nn.Linear(12, 6), b=nn.Linear(6, 2)).double(), tokens())
    assert "the width must be 6" in graph.frozen["a"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module_is_refused_and_the_model_left_as_it_was() -> None:
    model, inputs = (
        nn.Sequential(nn.Linear(12, 6), torch.jit.script(nn.Linear(6, 6)), nn.Linear(6, 2)).double(),
        tokens(),
    )
    before = model(*inputs)
    with pytest.raises(RuntimeError, match="stopped in 1 "):
        trace(model, inputs)
    assert torch.equal(model(*inputs), before)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_a_convolution_takes_a_sample_by_itself(kind: type[nn.Module]) -> None:
    check(Case(nn.Sequential(kind(3, 6, 2), nn.ReLU(), kind(6, 2, 2)), (torch.randn(3, 5).double(),), {"0": 6}, {}))


def test_an_untraceable_module_can_be_ignored() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor, *, scale: float) -> dict[str, Any]:
            return {"y": scale * (self.even(x) if x.sum() > 0 else self.odd(x)), "n": 3}

    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = m.b(F.relu(m.choice(F.relu(m.a(x)), scale=0.5)["y"]))
        return m.d(F.relu(m.c(x)))

    model = randomised(
        Run(forward, a=nn.Linear(12, 6), choice=Choice(), b=nn.Linear(5, 12), c=nn.Linear(12, 8), d=nn.Linear(8, 2))
    )
    graph = trace(model, tokens(), ignore=[model.choice])
    assert {name: group.size for name, group in graph.groups.items()} == {"c": 8}
    assert graph.frozen["a"] == "choice is ignored"
    reference = deafened(model, graph, {"c": [0, 5]})
    cut(model, graph, {"c": [0, 5]})
    inputs = tokens()
    assert difference(run(reference, inputs), run(model, inputs)) < 1e-12


@functools.lru_cache
def positions(length: int) -> Tensor:
    return torch.linspace(0, 1, length)


@functools.lru_cache
def tables_of(name: str) -> dict[int, Tensor]:
    return {}


TABLES: dict[int, Tensor] = {}


class Caching(nn.Module):
    """Keeps a table where it finds room."""

    table: Tensor | None = None

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.a, self.b = where, nn.Linear(12, 6), nn.Linear(6, 2)
        self.ordered, self.object, self.nested = OrderedDict[int, Tensor](), SimpleNamespace(table=None), {"a": [{}]}

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.where == "function":
            table = positions(length)
        elif self.where == "module":
            if "keeper" not in self._modules:
                self.keeper = nn.Identity()
                self.keeper.table = torch.linspace(0, 1, length)
            table = self.keeper.table
        elif self.where in ("class", "object"):
            keeper = type(self) if self.where == "class" else self.object
            if keeper.table is None:
                keeper.table = torch.linspace(0, 1, length)
            table = keeper.table
        else:
            tables = {
                "file": TABLES,
                "ordered": self.ordered,
                "nested": self.nested["a"][0],
                "function's dict": tables_of("positions"),
            }[self.where]
            if length not in tables:
                tables[length] = torch.linspace(0, 1, length)
            table = tables[length]
        return self.b(F.relu(self.a(x + table[:, None])))


def test_a_dict_that_a_function_keeps_is_looked_into_when_it_is_only_asked_for() -> None:
    model = Caching("function's dict")
    model(torch.randn(2, 4, 12))
    for length in (4, 5):
        trace(model, (torch.randn(2, length, 12),))
    assert type(model(torch.randn(2, 5, 12))) is Tensor
    tables_of.cache_clear()


@pytest.mark.parametrize(
    "where", ["function", "module", "class", "object", "file", "ordered", "nested", "function's dict"]
)
def test_no_cache_keeps_tensors_without_data(where: str) -> None:
    model, inputs = Caching(where), (torch.randn(2, 5, 12),)
    graph = trace(model, inputs)
    assert list(graph.groups) == ["a"]
    before = run(deafened(model, graph, {"a": [2]}), inputs)
    cut(model, graph, {"a": [2]})
    output = model(*inputs)
    assert type(output) is Tensor
    assert difference(before, [output.detach()]) < 1e-6
    Caching.table = None
    TABLES.clear()
    tables_of.cache_clear()


def test_numbers_that_code_takes_out_of_tensors() -> None:
    class Logging(nn.Module):
        def __init__(self, decides: bool) -> None:
            super().__init__()
            self.decides, self.a, self.b, self.last = decides, nn.Linear(12, 6), nn.Linear(6, 2), 0.0

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            self.last = h.detach().abs().max().item()
            return self.b(2 * h if self.decides and self.last > 1 else h)

    model = Logging(False)
    assert list(trace(model, (torch.randn(2, 12),)).groups) == ["a"]
    assert model.last == 0.0
    with pytest.raises(RuntimeError, match=r"the model itself \(.*test_pruning_graph.py:\d+\)"):
        trace(Logging(True), (torch.randn(2, 12),))


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.Conv2d(5, 2, 1)))
    model.train()
    model[1].eval()
    before, held = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    trace(model, image())
    assert [part.training for part in model.modules()] == [True, True, False, True, True]
    assert all(param is held[name] for name, param in model.named_parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_table_names_groups_and_reasons() -> None:
    text = str(
        trace(randomised(nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2))), tokens())
    )
    assert "2      6 neurons  2        3" in text
    assert "not cut: 0: aten::layer_norm in 1 mixes the units" in text
    block = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1))
    attention = Run(lambda m, x: m.attend(x), attend=Attention("fused", 4, 4))
    for model, inputs, line in (
        (nn.Sequential(block), image(), r"0\.0 +4 groups of 2 channels +\.0, \.1 +\.2"),
        (attention, tokens(), r"attend\.qkv +4 heads of 4 +\.qkv +\.proj"),
    ):
        graph = trace(randomised(model), inputs)
        assert re.search(line, str(graph)), str(graph)
    cut(attention, graph, {"attend.qkv": [1]})
    assert "3 of 4 heads of 4" in str(graph)


def test_observations_show_the_units_of_a_group() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)))
    group = trace(model, image()).groups["0"]
    seen = {(o.module, o.where): (o.dim, o.units.tolist()) for o in group.observations}
    assert seen == {
        ("4", "input"): (1, [unit for unit in range(4) for _ in range(36)]),
        ("0", "output"): (1, [0, 1, 2, 3]),
        ("1", "output"): (1, [0, 1, 2, 3]),
    }


# -- the oracle --


def masked(model: nn.Module, reads: dict[str, tuple[int, list[Unit]]], removed: set[Unit], gone: set[Unit]) -> None:
    """Zeroes removed units where modules read them; those that are gone already take no place there."""
    for name, (dim, units) in reads.items():
        left = [unit for unit in units if unit not in gone]

        def hook(module: nn.Module, args: tuple[Any, ...], dim: int = dim, left: list[Unit] = left) -> tuple[Any, ...]:
            assert args[0].size(dim) == len(left)
            index = torch.tensor([i for i, unit in enumerate(left) if unit in removed], dtype=torch.int64)
            return (args[0].index_fill(dim, index, 0), *args[1:])

        model.get_submodule(name).register_forward_pre_hook(hook)


def check(case: Case, only: set[str] | None = None) -> UnitGraph:
    model = randomised(case.model)
    graph = trace(model, case.inputs)
    assert {name: group.size for name, group in graph.groups.items()} == case.groups, str(graph)
    generator = torch.Generator().manual_seed(1)
    gone: set[Unit] = set()
    for _ in range(2):
        units = {name: chosen for name, chosen in draw(graph, generator).items() if only is None or name in only}
        # Without modules that read the units, it is what the graph says that is zeroed.
        reference = copy.deepcopy(model) if case.reads else deafened(model, graph, units)
        numbers = {name: graph.groups[name].original[chosen].tolist() for name, chosen in units.items()}
        removed = {(name, number) for name, chosen in numbers.items() for number in chosen}
        masked(reference, case.reads, removed, gone)
        gone |= removed
        cut(model, graph, units)
        assert difference(run(reference, case.inputs), run(model, case.inputs)) < 1e-12
        sum(leaf.sum() for leaf in outputs(model, case.inputs)).backward()
        assert all(param.grad is None or param.grad.shape == param.shape for param in model.parameters())
        model.zero_grad()
    return graph


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_cut_equals_masked(name: str) -> None:
    check(CASES[name]())


class Between(nn.Module):
    """Two layers, and something between them and a third that only torch's own rules tell of."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.between(F.relu(self.a(x)), torch.tanh(self.b(x))))


@pytest.mark.parametrize(
    ("between", "groups"),
    [
        (lambda h, k: torch.vstack([h, k]), ["a"]),
        (lambda h, k: torch.column_stack([h.T, k.T]).T, ["a"]),
        (lambda h, k: torch.dstack([h, k]).mean(2), ["a"]),
        (lambda h, k: torch.vsplit(h, 2)[0] * torch.vsplit(k, 2)[1], ["a"]),
        (lambda h, k: torch.tensordot(torch.tensordot(h, k, ([0], [0])), h, ([0], [1])).T, ["a", "b"]),
        (lambda h, k: torch.outer(h.new_ones(4), h[0]) + torch.kron(h.new_ones(4, 1), k[:1]), ["a"]),
        (lambda h, k: k * torch.inner(h, k).sum(), ["a"]),
        (lambda h, k: torch.addr(h, h.new_ones(4), k[0]), ["a"]),
        (lambda h, k: h * F.cosine_similarity(h, k, dim=0), ["a"]),
        (lambda h, k: h / (1 + torch.linalg.norm(k, dim=0)), ["a"]),
        (lambda h, k: torch.diff(h, dim=0) + torch.trapezoid(k, dim=0), ["a"]),
        (lambda h, k: torch.float_power(h, 2.0) + torch.sinc(k), ["a"]),
        (lambda h, k: torch.special.expit(h) + torch.special.xlog1py(h, k.abs()), ["a"]),
        (lambda h, k: F.glu(torch.cat([h, k], -1), -1), ["a"]),
    ],
)  # fmt: skip
def test_an_operator_without_a_rule_is_taken_apart(between: Callable[..., Tensor], groups: list[str]) -> None:
    model = randomised(Between(between))
    graph, inputs = trace(model, torch.randn(4, 5).double()), (torch.randn(4, 5).double(),)
    assert list(graph.groups) == groups
    units = {name: [0, 2, 3, 6][: 3 + position] for position, name in enumerate(groups)}
    expected = run(deafened(silenced(model, graph, units), graph, units), inputs)
    cut(model, graph, units)
    assert difference(expected, run(model, inputs)) < 1e-12


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda h, k: h * F.cosine_similarity(h, k, dim=-1).unsqueeze(-1), "mixes the units"),
        (lambda h, k: h * F.pairwise_distance(h, k).unsqueeze(-1), "mixes the units"),
        (lambda h, k: [h := h.clone(), torch.hsplit(h, 2)[0].mul_(2)][0] + k, "by position"),
        (lambda h, k: torch.cdist(h, k) @ h, "aten::_cdist_forward of aten::cdist in the model has no rule"),
        (
            lambda h, k: h + nn.utils.rnn.pad_sequence([torch.arange(8.0)[: h.shape[1]]] * 4, batch_first=True),
            "not cut",
        ),
    ],
)
def test_what_the_parts_of_an_operator_do_not_allow_is_named(between: Callable[..., Tensor], why: str) -> None:
    graph = trace(Between(between), torch.randn(4, 5))
    assert not graph.groups
    assert why in graph.frozen["a"]


def test_layers_of_torch_whose_sizes_no_rule_knows_stay() -> None:
    model = Run(
        lambda m, x: m.out(m.cell(h := torch.tanh(m.first(x)), m.cell(h, h))),
        first=nn.Linear(12, 8),
        cell=nn.RNNCell(8, 8),
        out=nn.Linear(8, 3),
    )
    graph = trace(model, torch.randn(4, 12))
    assert not graph.groups
    assert "rnn_tanh_cell in cell has no rule" in graph.frozen["first"]


def test_an_operator_that_draws_numbers_is_not_run() -> None:
    model = Between(lambda h, k: h * k + torch.normal(0.0, 1.0, (4, 8)))
    before = torch.random.get_rng_state()
    graph = trace(model, torch.randn(4, 5, generator=torch.Generator()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not graph.groups


def test_units_that_code_shifts_by_half_their_number_stay() -> None:
    graph = trace(Between(lambda h, k: h.roll(h.shape[1] // 2, 1) + k), torch.randn(4, 5))
    assert not graph.groups


def test_groups_that_must_lose_as_many_stay() -> None:
    model = Run(
        lambda m, x: m.c(F.relu(m.a(x)) * x.new_ones(m.b(x).shape[1])) + m.d(F.relu(m.b(x))),
        a=nn.Linear(5, 8),
        b=nn.Linear(5, 8),
        c=nn.Linear(8, 3),
        d=nn.Linear(8, 3),
    )
    assert not trace(model, torch.randn(4, 5)).groups


def test_a_group_of_three_is_rehearsed_with_two_left() -> None:
    model = nn.Sequential(nn.Linear(5, 3), Run(lambda m, x: x.relu().unsqueeze(1).squeeze()), nn.Linear(3, 2))
    assert trace(model, torch.randn(4, 5)).groups.keys() == {"0"}


@pytest.mark.parametrize("module", [impact_optim.pruning, impact_optim.pruning.schedule])
def test_docstring_examples(module: Any) -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for test in finder.find(module) if test.examples and "train_one_epoch" not in test.docstring]
    assert examples
    runner = doctest.DocTestRunner()
    for example in examples:
        assert runner.run(example).failed == 0
