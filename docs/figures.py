"""Draws the pictures of "How it works" and of the tutorials, into docs/images: ``make figures``."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"


def code_of(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(page: Path) -> None:
    """Runs a page's blocks, which leave their pictures in the working folder."""
    namespace: dict[str, object] = {}
    for block in code_of(page):
        exec(compile(block, str(page), "exec"), namespace)


def keep_probability(w: torch.Tensor, drop_rate: float, floor: float = 0.01) -> torch.Tensor:
    """π = f + (1 - f)·min(1, c·w), with the level c by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        level = (low + high) / 2
        keep = floor + (1 - floor) * (level * w).clamp(max=1)
        low, high = (level, high) if keep.mean() < 1 - drop_rate else (low, level)
    return keep


def mathematics() -> Figure:
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    w = torch.linspace(-3, 3, 2000).exp()
    w = w / w.mean()
    for rate, color in ((0.1, BLUE), (0.3, ORANGE), (0.5, "#009E73")):
        left.plot(w, keep_probability(w, rate), color=color, label=f"r = {rate}")
    left.set_xscale("log")
    left.set_xlabel("importance w")
    left.set_ylabel("keep probability π")
    left.legend(frameon=False)
    for kl_weight, line in ((10.0, "-"), (1.0, "--"), (0.3, ":")):
        log_w, u = torch.zeros(3), torch.tensor([-1.0, 0.0, 1.0])
        history = [log_w.exp()]
        for _ in range(100):
            log_w = (log_w - 0.05 * u) / (1 + 0.05 * kl_weight)
            log_w = log_w - log_w.exp().mean().log()
            history.append(log_w.exp())
        for curve, color in zip(torch.stack(history).T, (BLUE, GREY, ORANGE), strict=True):
            right.plot(curve, line, color=color, label=f"λ = {kl_weight:g}" if color == BLUE else None)
    right.set_xlabel("steps")
    right.set_ylabel("importance w")
    right.legend(frameon=False)
    return figure


def masks() -> Figure:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 24, generator=generator)
    w = (1.0 * torch.randn(12, 24, generator=generator) + 0.8 * x.abs()).exp()
    w = w / w.mean()
    keep = keep_probability(w, 0.3)
    mask = (torch.rand(12, 24, generator=generator) < keep).float()
    panels = {
        "weights x": x,
        "importances w": w.log(),
        "keep probability π": keep,
        "mask m": mask,
        "x · m / π": x * mask / keep,
    }
    figure = Figure(figsize=(10, 1.9), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 5), panels.items(), strict=True):
        signed = title.startswith("x") or title.startswith("weights")
        axes.imshow(values, cmap="RdBu" if signed else "Blues", **({"vmin": -3, "vmax": 3} if signed else {}))
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def surgery() -> Figure:
    generator = torch.Generator().manual_seed(1)
    first, second, gone = torch.randn(8, 6, generator=generator), torch.randn(4, 8, generator=generator), [2, 5, 6]
    stays = [unit for unit in range(8) if unit not in gone]
    panels = [("first layer", first, (gone, [])), ("second layer", second, ([], gone))]
    panels += [("first, after the cut", first[stays], ([], [])), ("second, after the cut", second[:, stays], ([], []))]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (title, values, (rows, columns)) in zip(figure.subplots(1, 4), panels, strict=True):
        axes.imshow(values, cmap="RdBu", vmin=-3, vmax=3)
        for row in rows:
            axes.axhspan(row - 0.5, row + 0.5, color=ORANGE, alpha=0.7)
        for column in columns:
            axes.axvspan(column - 0.5, column + 0.5, color=ORANGE, alpha=0.7)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(-0.6, 7.6)
        axes.set_ylim(7.6, -0.6)
        axes.set_frame_on(False)
        axes.set_xlabel("its inputs", fontsize=8)
        axes.set_ylabel("its units", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def main() -> None:
    for draw in (mathematics, masks, surgery):
        draw().savefig(IMAGES / f"how_{draw.__name__}.png", dpi=110)
    for page in sorted((DOCS / "tutorials").glob("*.md")):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run(page)
            for picture in Path(folder).glob("*.png"):
                (IMAGES / picture.name).write_bytes(picture.read_bytes())


if __name__ == "__main__":
    main()
