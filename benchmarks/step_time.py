"""What a step of ImpactSGD and ImpactAdamW costs, next to the fused steps of torch and to what the memory allows.

    python benchmarks/step_time.py                    # everything: about six minutes on two cores
    python benchmarks/step_time.py --quick            # small cases only, about a minute
    python benchmarks/step_time.py --only 'ResNet-18: .*masks' --device cuda

Every row is a candidate against fused SGD (or fused AdamW, where it is an AdamW) on weights of its own, with fixed
gradients. The two take turns, and the ratio is that of neighbours, so that a machine whose speed drifts does not show;
"SGD fused" against itself shows the noise. Where there are masks, the forward pass of a module that holds the weights
and only reads them is timed with the step, and so is its backward pass: it makes the masked weights. Rows "training"
time a whole step of a network.

The limit of a row is the time in which the machine moves as many bytes as the step has to read and write at least, at
the speed of `copy_` or of `add_` with large tensors, whichever is faster: a copy also fetches, uncounted, what it is
going to overwrite. What fits into the cache can be faster, and small cases are timed from there, both sides alike.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from tqdm import tqdm

from impact_optim import ImpactAdamW, ImpactSGD
from impact_optim.experiments.models import build_model

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OPTIONS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
TURN = 1e-3  # seconds: quicker steps are timed several at a time
WARM_UP = 8  # steps; slow ones that do not compile get three
MIN_PAIRS, MAX_PAIRS = 5, 200  # three are enough where five take ten times what a row is given
Step = Callable[[], None]


# ------------------------------------------------------------------------------ candidates


class Unavailable(Exception):
    """A candidate cannot run here."""


class Candidate(NamedTuple):
    """An optimizer of a module, and what it has to read and write for every weight."""

    build: Callable[[nn.Module], torch.optim.Optimizer]
    values: int
    """In the dtype of the weights: 5 are x, gradient and momentum read, x and momentum written."""
    more_values: int = 0
    """The same, for tensors of two or more dimensions alone: masked weights."""
    importances: int = 0
    """In units of 4 bytes, for tensors of two or more dimensions alone."""
    reads_weights: bool = False
    peer: str = "SGD fused"

    def bytes_moved(self, params: list[Tensor]) -> int:
        def of_one(p: Tensor) -> int:
            values = self.values + (self.more_values if p.dim() >= 2 else 0)
            return p.numel() * (values * p.element_size() + (4 * self.importances if p.dim() >= 2 else 0))

        return sum(map(of_one, params))


class WeightDropout(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.1, self.training)


def sgd(module: nn.Module, **how: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), **OPTIONS, **how)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=5e-4, fused=True)


def schedule_free(module: nn.Module) -> torch.optim.Optimizer:
    try:
        import schedulefree
    except ImportError:
        raise Unavailable("not installed: pip install schedulefree") from None
    optimizer = schedulefree.SGDScheduleFree(module.parameters(), **OPTIONS)
    optimizer.train()
    return optimizer


def parametrization(module: nn.Module) -> torch.optim.Optimizer:
    for part in list(module.modules()):
        for name, p in list(part.named_parameters(recurse=False)):
            if p.dim() >= 2:
                register_parametrization(part, name, WeightDropout())
    return sgd(module, fused=True)


def ours(face: type[Any], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    settings = OPTIONS if face is ImpactSGD else {"lr": 1e-4, "weight_decay": 5e-4}
    return lambda module: face(module, **settings, **options, fused=True)


# Read x, gradient, momentum and log-importance, write them but the gradient; read x and write it masked.
CANDIDATES = {
    "SGD fused": Candidate(lambda module: sgd(module, fused=True), values=5),
    "AdamW fused": Candidate(adamw, values=7),
    "schedule-free": Candidate(schedule_free, values=5),
    "dropout parametrization": Candidate(parametrization, values=5, more_values=2, reads_weights=True),
    "ImpactSGD, masks": Candidate(ours(ImpactSGD, drop_rate=0.1), 5, more_values=2, importances=2, reads_weights=True),
    "ImpactSGD, no masks": Candidate(ours(ImpactSGD, drop_rate=0.0), 5, importances=2),
    "ImpactAdamW, masks": Candidate(
        ours(ImpactAdamW, drop_rate=0.1), 7, more_values=2, importances=2, reads_weights=True, peer="AdamW fused"
    ),
}
TRAINED = ("SGD fused", "dropout parametrization", "ImpactSGD, masks", "ImpactAdamW, masks")
PLOTTED = ["SGD fused", "AdamW fused", "schedule-free", "dropout parametrization", "ImpactSGD, masks"]


# ----------------------------------------------------------------------------------- cases


class Weights(nn.Module):
    """Parameters, and a forward pass that only reads them."""

    def __init__(self, shapes: list[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(shape, dtype=dtype, device=device) * 0.05))
        self.names = [name for name, _ in self.named_parameters()]

    def forward(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.names]


class Case(NamedTuple):
    """Tensors to step, or with a network a whole training step on a batch of its inputs."""

    shapes: list[torch.Size]
    candidates: tuple[str, ...] = tuple(CANDIDATES)
    dtype: torch.dtype = torch.float32
    network: str = ""
    width: int | None = None
    batch: int = 64

    def step(self, candidate: Candidate, device: torch.device) -> tuple[Step, list[Tensor]]:
        """Something to time, and the parameters."""
        torch.manual_seed(0)
        if self.network:
            shape = (1, 1, 40) if self.network == "mlp" else (3, 32, 32)
            model = build_model(self.network, shape, 10, self.width).to(device)
            x, y = torch.randn(self.batch, *shape, device=device), torch.randint(10, (self.batch,), device=device)
            if self.network != "mlp":
                model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
            optimizer = candidate.build(model)

            def train() -> None:
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=self.network != "mlp"):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()

            return train, list(model.parameters())

        weights = Weights(self.shapes, self.dtype, device)
        optimizer = candidate.build(weights)
        grads = [torch.randn_like(read) * 0.01 for read in weights()]
        for p in weights.parameters():
            p.grad = torch.randn_like(p) * 0.01

        def read_and_step() -> None:
            optimizer.zero_grad()
            torch.autograd.backward(weights(), grads)
            optimizer.step()

        return read_and_step if candidate.reads_weights else optimizer.step, list(weights.parameters())


def tensors(numel: float, count: int = 1) -> list[torch.Size]:
    return [torch.Size((int(numel) // 100, 100))] * count


def shapes_of(build: Callable[[], nn.Module]) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in build().parameters()]


def vit_s() -> nn.Module:
    return torchvision.models.VisionTransformer(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


def all_cases(quick: bool) -> dict[str, Case]:
    resnet18 = shapes_of(lambda: torchvision.models.resnet18(num_classes=10))
    cases = {
        f"{n} weights": Case(tensors(float(n))) for n in (("1e4", "1e6") if quick else ("1e5", "1e6", "1.1e7", "1e8"))
    }
    cases["ResNet-18"] = Case(resnet18)
    cases["training an MLP"] = Case([], TRAINED, network="mlp", width=256, batch=100)
    if quick:
        cases["training ResNet-18/16"] = Case([], TRAINED, network="resnet18", batch=16, width=16)
        return cases
    cases["ResNet-50"] = Case(shapes_of(torchvision.models.resnet50))
    cases["ViT-S"] = Case(shapes_of(vit_s))
    cases["ViT-S, bfloat16"] = Case(shapes_of(vit_s), dtype=torch.bfloat16)
    cases["training ResNet-18"] = Case([], TRAINED, network="resnet18")
    cases["training a ViT"] = Case([], TRAINED, network="vit")
    return cases


# ---------------------------------------------------------------------------------- timing


def seconds_of(step: Step, device: torch.device, repeats: int = 1, warm: bool = False) -> float:
    if warm:
        step()  # into the cache, as far as it fits: the other one was here before
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def take_turns(steps: list[Step], device: torch.device, budget: float) -> tuple[list[tuple[float, ...]], list[float]]:
    """The seconds of every step, round by round, and those of their warm-ups."""
    repeats, warm_ups = [], []
    for step in steps:
        times = [seconds_of(step, device) for _ in range(3)]
        while len(times) < WARM_UP and (times[-1] < 0.2 or times[-1] < max(times) / 3):
            times.append(seconds_of(step, device))
        warm_ups.append(sum(times))
        repeats.append((max(1, round(TURN / min(times))), min(times) < 20 * TURN))
    rounds: list[tuple[float, ...]] = []
    start = time.perf_counter()
    while len(rounds) < MAX_PAIRS:
        elapsed = time.perf_counter() - start
        if elapsed > (budget if len(rounds) >= MIN_PAIRS else 10 * budget) and len(rounds) >= 3:
            break
        rounds.append(tuple(seconds_of(step, device, *k) for step, k in zip(steps, repeats, strict=True)))
    return rounds, warm_ups


def spread(values: list[float]) -> dict[str, float]:
    tenths = quantiles(values, n=10, method="inclusive")
    return {"median": median(values), "p10": tenths[0], "p90": tenths[-1]}


def compare(case: Case, name: str, device: torch.device, budget: float) -> dict[str, Any]:
    candidate = CANDIDATES[name]
    base = CANDIDATES[candidate.peer]
    peer, _ = case.step(base, device)
    step, params = case.step(candidate, device)
    rounds, warm_ups = take_turns([peer, step], device, budget)
    weights = sum(p.numel() for p in params)
    row: dict[str, Any] = {"weights": weights, "tensors": len(params), "dtype": str(case.dtype).split(".")[-1]}
    row |= {
        "peer": candidate.peer,
        "peer_ms": 1e3 * median(a for a, _ in rounds),
        "ms": 1e3 * median(b for _, b in rounds),
    }
    row |= {"ratio": spread([b / a for a, b in rounds]), "pairs": len(rounds), "warm_up_s": warm_ups[1]}
    if not case.network:
        row["bytes"], row["peer_bytes"] = candidate.bytes_moved(params), base.bytes_moved(params)
    return row


def overhead(name: str, device: torch.device, budget: float, numel: float, count: int) -> dict[str, Any]:
    """What a step takes longer for each further tensor among which as many weights are divided, and the peer's."""
    forms = [Case(tensors(numel * count)), Case(tensors(numel, count))]
    candidate = CANDIDATES[name]
    steps = [form.step(each, device)[0] for each in (CANDIDATES[candidate.peer], candidate) for form in forms]
    rounds, _ = take_turns(steps, device, budget)
    sgd_us = [1e6 * (many - one) / (count - 1) for one, many, _, _ in rounds]
    us = [1e6 * (many - one) / (count - 1) for _, _, one, many in rounds]
    row: dict[str, Any] = {"weights": int(numel * count), "tensors": count, "dtype": "float32", "pairs": len(rounds)}
    row |= {"peer": candidate.peer, "peer_ms": median(sgd_us) / 1e3, "ms": median(us) / 1e3}
    row["more_us_per_tensor"] = spread([b - a for a, b in zip(sgd_us, us, strict=True)])
    return row


def memory_speed(source: Tensor, target: Tensor, device: torch.device) -> dict[str, float]:
    """GB/s, read and written, of a copy and of a sum in place."""
    size = source.numel() * source.element_size() / 1e9
    copy = [seconds_of(lambda: target.copy_(source), device) for _ in range(10)]
    add = [seconds_of(lambda: target.add_(source), device) for _ in range(10)]
    return {"copy": 2 * size / median(copy), "add": 3 * size / median(add)}


# ---------------------------------------------------------------------------------- report


def machine(device: torch.device) -> dict[str, Any]:
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    packages = ["torch", "torchvision", "impact-optim", "schedulefree"]
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {
        "command": shlex.join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        "cpu": names[0] if names else platform.processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version()} | {p: installed[p] for p in packages if p in installed},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | candidate | its peer, ms | ms | ratio | 10–90 % | bytes per weight | limit ms | of the limit |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "note" in row:
            cells = [row["note"]] + [""] * 6
        elif "more_us_per_tensor" in row:
            more = row["more_us_per_tensor"]
            cells = [f"{row['peer_ms']:.4f}", f"{row['ms']:.4f}", f"{more['median']:+.1f} µs"]
            cells += [f"{more['p10']:+.1f} to {more['p90']:+.1f}", "", "", ""]
        else:
            ratio = row["ratio"]
            cells = [f"{row['peer_ms']:.3g}", f"{row['ms']:.3g}", f"**{ratio['median']:.2f}**"]
            cells.append(f"{ratio['p10']:.2f}–{ratio['p90']:.2f}")
            limit = row.get("limit_ms")
            cells += (
                [f"{row['bytes'] / row['weights']:.3g}", f"{limit:.3g}", f"{row['ms'] / limit:.2f}×"]
                if limit
                else [""] * 3
            )
        lines.append(f"| {row['case']} | {row['candidate']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Milliseconds of a step against its limit; the sizes of one tensor are joined, lists of parameters are hollow."""
    rows = [row for row in rows if row.get("limit_ms") and row["dtype"] == "float32"]
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for color, name in zip(plt.cm.tab10.colors, PLOTTED, strict=False):  # type: ignore[attr-defined]
        single = sorted((r["limit_ms"], r["ms"]) for r in rows if r["candidate"] == name and r["tensors"] == 1)
        several = [(r["limit_ms"], r["ms"]) for r in rows if r["candidate"] == name and r["tensors"] > 1]
        axes.plot(*zip(*single, strict=True), "o-", color=color, label=name) if single else None
        label = None if single else name
        axes.plot(*zip(*several, strict=True), "D", color=color, mfc="none", label=label) if several else None
    if limits := [row["limit_ms"] for row in rows]:
        ends = [min(limits), max(limits)]
        axes.plot(ends, ends, "k--", label="limit: bytes at the speed of memory")
    axes.set(xscale="log", yscale="log", xlabel="limit, ms", ylabel="step, ms", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose 'case: candidate' it is found in")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/step_time.json"), help="the plot goes next to it, as PNG"
    )
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seconds", type=float, help="of each row, after its warm-up")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    budget = args.seconds or (0.3 if args.quick else 1.2)
    count = 20 if args.quick else 100
    cases = all_cases(args.quick)
    divided = f"each further tensor, {count} of 1e4"
    work = [(case, name) for case in cases for name in cases[case].candidates]
    work += [(divided, name) for name in CANDIDATES if name.startswith("Impact")]
    work = [(case, name) for case, name in work if re.search(args.only, f"{case}: {name}")]

    if not work:
        parser.error(f"no row has {args.only!r} in its name")

    results: dict[str, Any] = machine(args.device) | {"gb_per_s": {}, "rows": []}
    print(
        f"{results['cpu']} ({results['instruction_set']}), {results['device']}, {results['threads']} threads, "
        f"{results['versions']}\n"
    )
    source, target = (torch.ones(20_000_000 if args.quick else 50_000_000, device=args.device) for _ in range(2))
    try:
        for case, name in (bar := tqdm(work, unit="row", dynamic_ncols=True)):
            bar.set_description(f"{case}: {name}")
            if case not in results["gb_per_s"]:
                results["gb_per_s"][case] = memory_speed(source, target, args.device)
            row = {"case": case, "candidate": name}
            try:
                if case == divided:
                    row |= overhead(name, args.device, budget, 1e4, count)
                else:
                    row |= compare(cases[case], name, args.device, budget if cases[case].shapes else 3 * budget)
            except Unavailable as error:
                row["note"] = str(error)
            results["rows"].append(row)
            gc.collect()
    finally:  # what is measured is kept when the rest is interrupted
        speeds = results["gb_per_s"].values()
        fastest = {way: max(speed[way] for speed in speeds) for way in ("copy", "add")} if speeds else {}
        for row in results["rows"]:
            if "bytes" in row:
                row["limit_ms"] = row["bytes"] / max(fastest.values()) / 1e6
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    print(table(results["rows"]))
    print(f"\nCopies move {fastest['copy']:.1f} GB/s, sums in place {fastest['add']:.1f}.", end=" ")
    if measured := [row for row in results["rows"] if "bytes" in row]:
        row = max((row for row in measured if row["peer"] == "SGD fused"), key=lambda row: row["weights"])
        print(f"SGD fused moves {row['peer_bytes'] / row['peer_ms'] / 1e6:.1f} GB/s in {row['case']}.")
    noise = [row["ratio"] for row in results["rows"] if row["candidate"] == row.get("peer")]
    if any(ratio["p90"] > 1.25 * ratio["p10"] for ratio in noise):
        print("SGD against itself spreads by more than a quarter: something else kept the machine busy.")
    plot(results["rows"], f"{results['cpu']}, {results['threads']} thread(s)", args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
