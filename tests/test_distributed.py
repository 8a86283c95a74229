"""Processes with DistributedDataParallel: what they share; a single one is the measure. And FSDP, in one process."""

import datetime
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import FACES, Face, assert_same
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from impact_optim import ImpactSGD

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2
STEPS = 10
TIMEOUT = 120.0  # seconds; processes that have not ended by then are ended


class Scenario(NamedTuple):
    face: Face = FACES[0]
    attach: str = "wrapper"
    """What the optimizer is built with: the DistributedDataParallel or the module inside."""
    accumulate: int = 1
    """Backward passes before a step, all but the last under no_sync()."""
    ddp: dict[str, Any] = {}  # noqa: RUF012  never written
    options: dict[str, Any] = {}  # noqa: RUF012  never written
    experts: str | None = None
    """Whether every rank uses an expert of its own, and what it does with the other: "not called" or "thrown away"."""


COMMON = {"lr": 0.01, "weight_decay": 1e-3, "drop_rate": 0.3, "importance_lr": 0.1, "kl_weight": 1.0, "seed": 3}
SCENARIOS = {
    **{face.name: Scenario(face) for face in FACES},
    "inner module": Scenario(attach="inner"),
    "foreach, bucket view": Scenario(ddp={"gradient_as_bucket_view": True}, options={"foreach": True}),
    "accumulated": Scenario(accumulate=2),
    "hypergradient": Scenario(options={"importance": "hypergradient"}),
    "exact": Scenario(options={"sampling": "exact"}),
    "static graph": Scenario(ddp={"static_graph": True}),
    "experts": Scenario(ddp={"find_unused_parameters": True}, experts="not called"),
    "experts, thrown away": Scenario(ddp={"find_unused_parameters": True}, experts="thrown away"),
}
ALIKE = [name for name, scenario in SCENARIOS.items() if scenario.experts is None]


class Net(nn.Module):
    """Keeps the weights that each training pass has read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.read: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.read.append(joined(self.first.weight, self.second.weight))
        return self.second(torch.tanh(self.first(x)))


class Experts(nn.Module):
    """Two experts, of which a pass uses one."""

    def __init__(self, number: int, other: str) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(6, 16), nn.ModuleList([nn.Linear(16, 3) for _ in range(2)])
        self.number, self.other = number, other
        self.read: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.read.append(joined(self.first.weight, *(expert.weight for expert in self.experts)))
        h = torch.tanh(self.first(x))
        if self.other == "thrown away":
            self.experts[1 - self.number](h)
        return self.experts[self.number](h)


def joined(*tensors: Tensor) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def matrices(net: nn.Module) -> list[Tensor]:
    return [p for p in net.parameters() if p.dim() == 2]


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(STEPS)
    ]


def train(scenario: Scenario, rank: int | None) -> dict[str, Any]:
    """Ten steps of one rank on its part of every batch, or of a single process on all of it."""
    torch.manual_seed(0)
    net = Net() if scenario.experts is None else Experts(rank or 0, scenario.experts)
    called = net if rank is None else DistributedDataParallel(net, **scenario.ddp)
    impact, optimizer = scenario.face(called if scenario.attach == "wrapper" else net, **{**COMMON, **scenario.options})
    before, grads = [], []
    for x, y in data():
        before.append(joined(*matrices(net)))
        if rank is not None:
            x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
        parts = list(zip(x.chunk(scenario.accumulate), y.chunk(scenario.accumulate), strict=True))
        optimizer.zero_grad()
        for i, (part, target) in enumerate(parts):
            with called.no_sync() if rank is not None and i < len(parts) - 1 else nullcontext():
                (F.cross_entropy(called(part), target) / len(parts)).backward()
        grads.append(joined(*(p.grad for p in matrices(net))))
        optimizer.step()
    net.eval()
    return {
        "weights": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "importances": [impact.importance(p) for p in net.parameters()],
        "output": net(data()[0][0]).detach(),
        "before": before,
        "read": net.read,
        "grads": grads,
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    try:
        results = {name: train(scenario, rank) for name, scenario in SCENARIOS.items()}
        torch.save(results, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if rank == 0:
        torch.save(shard(), f"{folder}/sharded.pt")


def shard() -> dict[str, str]:
    """What becomes of FSDP of both kinds; one process suffices."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    outcomes = {}

    def attempt(name: str, wrap: Any) -> None:
        torch.manual_seed(0)
        x = torch.randn(6, 8)
        try:
            model = wrap(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
            optimizer = ImpactSGD(model, lr=0.1, drop_rate=0.5)
            dense = model.eval()(x)
            is_dense = torch.allclose(model.train()(x), dense)
            model(x).sum().backward()
            optimizer.step()
            outcomes[name] = "dense" if is_dense else "masked"
        except (RuntimeError, ValueError) as error:
            outcomes[name] = f"{type(error).__name__}: {error}"

    try:
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

        cpu = torch.device("cpu")
        attempt("flat", lambda m: FullyShardedDataParallel(m, device_id=cpu))
        attempt("use_orig_params", lambda m: FullyShardedDataParallel(m, device_id=cpu, use_orig_params=True))
        attempt("fully_shard", fully_shard)
    finally:
        dist.destroy_process_group()
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes, which run once for all tests, have put what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(work, args=(str(folder),), nprocs=WORLD, join=False, start_method="spawn")
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=max(deadline - time.monotonic(), 0.1)):
            if time.monotonic() > deadline:
                pytest.fail(f"the ranks did not finish in {TIMEOUT:.0f} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """What each rank has to say of each scenario."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def masks(result: dict[str, Any]) -> list[Tensor]:
    return [read != 0 for read in result["read"]]


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_have_the_same_weights_importances_and_state(ranks, name):
    first, second = (rank[name] for rank in ranks)
    for what in ("weights", "importances", "before", "grads"):
        assert_same(first[what], second[what])
    if name in ALIKE:
        assert_same(first["output"], second["output"])
    assert_same(first["optimizer"]["param_groups"], second["optimizer"]["param_groups"])
    assert_same(first["optimizer"]["state"], second["optimizer"]["state"])
    assert first["importances"][0].std() > 0.05
    assert not torch.isclose(first["weights"]["first.weight"].flatten(), first["before"][0][:96], rtol=1e-6).all()


@pytest.mark.parametrize("name", SCENARIOS)
def test_masks_are_equal_on_the_ranks_and_change_at_every_step(ranks, name):
    first, second = (masks(rank[name]) for rank in ranks)
    assert_same(first, second)
    a_step = SCENARIOS[name].accumulate
    assert len(first) == STEPS * a_step
    for i, mask in enumerate(first[1:], start=1):
        assert torch.equal(mask, first[i - 1]) == (i % a_step != 0)
        assert 0.1 < 1 - mask.float().mean() < 0.5


@pytest.mark.parametrize("name", ALIKE)
def test_they_train_as_one_process_on_the_full_batch(ranks, name):
    """But for rounding. Where that flips a bit of a mask, one in a million, the two part ways from there on."""
    result, alone = ranks[0][name], train(SCENARIOS[name], None)
    flips = [int((a != b).sum()) for a, b in zip(masks(result), masks(alone), strict=True)]
    same = next((i for i, flipped in enumerate(flips) if flipped), len(flips))
    assert sum(flips[: same + 1]) <= 2
    for i in range(min(same // SCENARIOS[name].accumulate + 1, STEPS)):
        torch.testing.assert_close(result["before"][i], alone["before"][i], rtol=1e-4, atol=1e-5)
    if same == len(flips):
        torch.testing.assert_close(result["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["importances"], alone["importances"], rtol=1e-3, atol=1e-4)


def test_it_does_not_matter_how_it_is_attached(ranks):
    assert_same(ranks[0]["inner module"]["weights"], ranks[0][FACES[0].name]["weights"])


@pytest.mark.parametrize("name", ["experts", "experts, thrown away"])
def test_a_weight_that_only_the_other_rank_has_used_is_masked_too(ranks, name):
    """The step of a dropped weight is that of a zero gradient: here, in the first step, the decay alone."""
    result = ranks[0][name]
    before, after, grad = result["before"][0], result["before"][1], result["grads"][0]
    dropped = ~masks(result)[0]
    assert (grad[dropped] != 0).all()
    torch.testing.assert_close(after[dropped], before[dropped] * (1 - 0.01 * 1e-3), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        after[~dropped], before[~dropped] - 0.01 * (grad / 0.7 + 1e-3 * before)[~dropped], rtol=1e-5, atol=1e-6
    )


# ------------------------------------------------------------------------------------------ sharded parameters


@pytest.mark.parametrize("kind", ["flat", "use_orig_params", "fully_shard"])
def test_sharded_parameters_are_refused_by_name(folder, kind):
    """They would train without masks, in silence, or fail with others' words."""
    outcome = torch.load(folder / "sharded.pt", weights_only=True).get(kind, "")
    assert "Error" in outcome, outcome
    assert ("FullyShardedDataParallel" if kind == "flat" else "fully_shard" if kind == "fully_shard" else "") in outcome
    assert "drop_rate=0" in outcome or "DistributedDataParallel" in outcome
