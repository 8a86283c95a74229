"""The networks of the study: perceptrons, a small CNN, ResNet-18 for CIFAR, a small vision transformer and GPT.

Inputs have shape ``(batch, channels, *spatial)``, with one spatial dimension for signals and two for images. Those of
the GPT are tokens of a text, of shape ``(batch, length)``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build_model(name: str, shape: Sequence[int], classes: int, width: int | None = None) -> nn.Module:
    """Builds a network by name, initialised from PyTorch's global random state.

    Args:
        name: one of :data:`MODELS`.
        shape: of one input, ``(channels, length)``, ``(channels, height, width)`` or, of a text, ``(length,)``.
        classes: number of logits; of a text, also of different tokens.
        width: hidden units (mlp, lenet-300-100), channels (cnn, resnet18: those of the first stage), embedding size
            (vit, gpt); the network's own default if ``None``.

    Raises:
        ValueError: no such network, it cannot take inputs of this shape, or the width does not fit it.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; choose from {', '.join(MODELS)}")
    if len(shape) == 1 and name != "gpt":
        raise ValueError(f"{name} takes signals or images, but the inputs are texts of {shape[0]} characters; use gpt")
    if len(shape) not in (1, 2, 3):
        raise ValueError(f"inputs of shape {tuple(shape)} are neither signals (channels, length) nor images nor texts")
    if width is not None and width < 1:
        raise ValueError(f"the width of {name} must be at least 1, but is {width}")
    return MODELS[name](tuple(shape), classes, width)


class Perceptron(nn.Sequential):
    """Two hidden layers with ReLU, of ``width`` units and of ``second``."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, second: int) -> None:
        layers: dict[str, nn.Module] = {
            "flatten": nn.Flatten(),
            "hidden1": nn.Linear(math.prod(shape), width),
            "relu1": nn.ReLU(),
            "hidden2": nn.Linear(width, second),
            "relu2": nn.ReLU(),
            "head": nn.Linear(second, classes),
        }
        super().__init__(OrderedDict(layers))


def mlp(shape: tuple[int, ...], classes: int, width: int | None = None) -> Perceptron:
    """Two hidden layers of ``width`` units (256)."""
    return Perceptron(shape, classes, width or 256, width or 256)


def lenet_300_100(shape: tuple[int, ...], classes: int, width: int | None = None) -> Perceptron:
    """The perceptron of LeCun et al. 1998, with ReLU: ``width`` hidden units (300), and then a third as many."""
    return Perceptron(shape, classes, width or 300, max(1, (width or 300) // 3))


class CNN(nn.Sequential):
    """Three strided convolutions and a linear layer, as in Greydanus & Kobak, Scaling down deep learning with MNIST-1D.

    Works on signals (25 channels, the paper's network) and on images (64 channels, the same in two dimensions).
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int | None = None) -> None:
        spatial = shape[1:]
        conv: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv1d if len(spatial) == 1 else nn.Conv2d
        width = width or (25 if len(spatial) == 1 else 64)
        layers: dict[str, nn.Module] = {}
        channels = shape[0]
        for i, kernel in enumerate((5, 3, 3), start=1):
            layers[f"conv{i}"] = conv(channels, width, kernel, stride=2, padding=1)
            layers[f"relu{i}"] = nn.ReLU()
            channels, spatial = width, tuple((size + 2 - kernel) // 2 + 1 for size in spatial)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(width * math.prod(spatial), classes)
        super().__init__(OrderedDict(layers))


class ResNet18(nn.Module):
    """ResNet-18 in its CIFAR form: a 3x3 stem at full resolution instead of the 7x7 stem and the max-pooling.

    Source: He et al., Deep residual learning for image recognition, CVPR 2016, section 4.2.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int | None = None) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"resnet18 takes images, but the inputs have shape {shape}; use mlp, cnn or vit")
        width = width or 64
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(_conv3x3(shape[0], width), nn.BatchNorm2d(width), nn.ReLU())
        stages = [
            nn.Sequential(ResidualBlock(before, after, stride), ResidualBlock(after, after))
            for before, after, stride in zip([width, *widths], widths, (1, 2, 2, 2), strict=False)
        ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv3x3(before, after, stride), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = _conv3x3(after, after), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


class ViT(nn.Module):
    """A small pre-norm vision transformer: patches, fixed sine-cosine positions, four blocks, mean of the tokens.

    Positions that are not learnt leave the optimizer with nothing but layers' weights to mask. Signals are cut into
    patches of 4, images into 2x2 (up to 16 pixels a side) or 4x4.

    Source: Beyer, Zhai & Kolesnikov, Better plain ViT baselines for ImageNet-1k, 2022.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int | None = None) -> None:
        super().__init__()
        width, spatial = width or 64, shape[1:]
        heads = max(1, width // 32)
        if width % (4 * len(spatial) * heads):
            raise ValueError(f"the width of vit must be a multiple of {4 * len(spatial) * heads}, but is {width}")
        patch = 2 if len(spatial) == 2 and max(spatial) <= 16 else 4
        if any(size % patch for size in spatial):
            raise ValueError(f"vit cuts inputs into patches of {patch}, which does not divide their shape {shape}")
        conv: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv1d if len(spatial) == 1 else nn.Conv2d
        self.patches = conv(shape[0], width, kernel_size=patch, stride=patch)
        positions = sine_cosine_positions([size // patch for size in spatial], width)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class GPT(nn.Module):
    """A small pre-norm transformer that predicts the next token at every token of a text, by three causal blocks.

    Positions are fixed, as in :class:`ViT`. The logits come in the shape ``(batch, classes, length)`` that
    ``F.cross_entropy`` takes.

    Source: Radford et al., Language models are unsupervised multitask learners, 2019, section 2.3.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int | None = None) -> None:
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"gpt takes texts, but the inputs have shape {shape}; use mlp, cnn, resnet18 or vit")
        width = width or 64
        heads = max(1, width // 32)
        if width % (2 * heads):
            raise ValueError(f"the width of gpt must be a multiple of {2 * heads}, but is {width}")
        self.tokens = nn.Embedding(classes, width)
        self.register_buffer("positions", sine_cosine_positions(shape, width), persistent=False)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x) + self.positions[: x.shape[1]]  # type: ignore[index]  # a buffer, which is a tensor
        return self.head(self.norm(self.blocks(tokens))).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def sine_cosine_positions(sizes: Sequence[int], width: int) -> Tensor:
    """Positions of a grid of tokens, shape ``(tokens, width)``: each axis takes an equal share of sines and cosines."""
    frequencies = 10_000 ** -torch.linspace(0, 1, width // (2 * len(sizes)))
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in sizes), indexing="ij")
    angles = torch.stack([axis.flatten() for axis in axes], 1).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


MODELS: dict[str, Callable[[tuple[int, ...], int, int | None], nn.Module]] = {
    "mlp": mlp,
    "lenet-300-100": lenet_300_100,
    "cnn": CNN,
    "resnet18": ResNet18,
    "vit": ViT,
    "gpt": GPT,
}
"""Networks by name."""
