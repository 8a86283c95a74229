"""Two processes with DistributedDataParallel: what they share, what they do not, and a single one as the measure."""

import datetime
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from impact_optim import ImpactSGD

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2
STEPS = 10
TIMEOUT = 120.0  # seconds; processes that have not ended by then are ended


class Scenario(NamedTuple):
    attach: str = "wrapper"
    """What the optimizer is built with: the DistributedDataParallel or the module inside."""
    accumulate: int = 1
    """Backward passes before a step, all but the last under no_sync()."""
    bucket_view: bool = False
    """gradient_as_bucket_view: the gradients are views into what is communicated."""
    options: dict[str, Any] = {}  # noqa: RUF012  never written


COMMON = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "drop_rate": 0.3,
    "importance_lr": 0.1,
    "kl_weight": 1.0,
    "seed": 3,
}
SCENARIOS = {
    "shared": Scenario(),
    "shared, inner module": Scenario(attach="inner"),
    "shared, foreach, bucket view": Scenario(bucket_view=True, options={"foreach": True}),
    "shared, accumulated": Scenario(accumulate=2),
    "shared, scaled hypergradient": Scenario(options={"importance": "hypergradient", "scale_steps": True}),
    "per rank": Scenario(options={"per_rank_masks": True}),
    "per rank, inner module": Scenario(attach="inner", options={"per_rank_masks": True}),
    "per rank, exact": Scenario(options={"per_rank_masks": True, "sampling": "exact", "simplex": "tensor"}),
}
SHARED = [name for name in SCENARIOS if name.startswith("shared")]
PER_RANK = [name for name in SCENARIOS if name.startswith("per rank")]


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


def joined(*tensors: Tensor) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(STEPS)
    ]


def train(scenario: Scenario, rank: int | None, **options: Any) -> dict[str, Any]:
    """Ten steps of one rank on its part of every batch, or of a single process on all of it."""
    torch.manual_seed(0)
    net = Net()
    called = net
    if rank is not None:
        called = DistributedDataParallel(net, gradient_as_bucket_view=scenario.bucket_view)
    optimizer = ImpactSGD(called if scenario.attach == "wrapper" else net, **{**COMMON, **scenario.options, **options})
    before, grads = [], []
    for x, y in data():
        before.append(joined(net.first.weight, net.second.weight))
        if rank is not None:
            x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
        parts = list(zip(x.chunk(scenario.accumulate), y.chunk(scenario.accumulate), strict=True))
        optimizer.zero_grad()
        for i, (part, target) in enumerate(parts):
            with called.no_sync() if rank is not None and i < len(parts) - 1 else nullcontext():
                (F.cross_entropy(called(part), target) / len(parts)).backward()
        grads.append(joined(net.first.weight.grad, net.second.weight.grad))
        optimizer.step()
    net.eval()
    return {
        "weights": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "importances": [optimizer.importance(p) for p in net.parameters()],
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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each rank has to say of each scenario; the processes run once for all tests."""
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
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(WORLD)]


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def masks(result: dict[str, Any]) -> list[Tensor]:
    return [read != 0 for read in result["read"]]


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_have_the_same_weights_importances_and_state(ranks, name):
    first, second = (rank[name] for rank in ranks)
    for what in ("weights", "importances", "output"):
        assert_same(first[what], second[what])
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    assert_same(first["optimizer"]["state"], second["optimizer"]["state"])
    assert first["importances"][0].std() > 0.05
    assert not torch.isclose(joined(*first["weights"].values())[:96], first["before"][0][:96]).any()


@pytest.mark.parametrize("name", SHARED)
def test_shared_masks_are_equal_on_the_ranks_and_change_at_every_step(ranks, name):
    first, second = (masks(rank[name]) for rank in ranks)
    assert_same(first, second)
    a_step = SCENARIOS[name].accumulate
    assert len(first) == STEPS * a_step
    for i, mask in enumerate(first[1:], start=1):
        assert torch.equal(mask, first[i - 1]) == (i % a_step != 0)
        assert not mask.all()


@pytest.mark.parametrize("name", PER_RANK)
def test_masks_per_rank_differ_at_every_step(ranks, name):
    first, second = (masks(rank[name]) for rank in ranks)
    for i in range(STEPS):
        assert not torch.equal(first[i], second[i])
        assert i == 0 or not torch.equal(first[i], first[i - 1])
    shares = [1 - torch.stack(m).float().mean().item() for m in (first, second)]
    assert shares == pytest.approx([0.3, 0.3], abs=0.06)


def test_rank_0_draws_the_masks_of_a_single_process(ranks):
    """So a run goes on with the same masks on one device; the other ranks draw others."""
    alone = masks(train(SCENARIOS["per rank"], None))
    assert_same(masks(ranks[0]["per rank"])[0], alone[0])
    assert not torch.equal(masks(ranks[1]["per rank"])[0], alone[0])


@pytest.mark.parametrize("name", SHARED)
def test_shared_masks_train_as_one_process_on_the_full_batch(ranks, name):
    result, alone = ranks[0][name], train(SCENARIOS[name], None)
    torch.testing.assert_close(result["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["importances"], alone["importances"], rtol=1e-3, atol=1e-4)
    assert_same(masks(result), masks(alone))


def test_shared_masks_do_not_depend_on_how_it_is_attached(ranks):
    for name in ("shared", "per rank"):
        assert_same(ranks[0][name]["weights"], ranks[0][f"{name}, inner module"]["weights"])


@pytest.mark.parametrize("name", PER_RANK)
def test_masks_per_rank_average_gradients_that_are_masked_already(ranks, name):
    """The first gradient is the mean over the ranks of factor * (gradient of the rank's data at its masked weights)."""
    torch.manual_seed(0)
    net = Net()
    weights = [net.first.weight, net.second.weight]
    x, y = data()[0]
    for rank in range(WORLD):
        factor = ranks[rank][name]["read"][0] / joined(*weights)
        parts = factor.split([w.numel() for w in weights])
        masked = [w * part.view(w.shape) for w, part in zip(weights, parts, strict=True)]
        own = dict(zip(("first.weight", "second.weight"), masked, strict=True))
        output = torch.func.functional_call(net, own, x.chunk(WORLD)[rank])
        (F.cross_entropy(output, y.chunk(WORLD)[rank]) / WORLD).backward()
    expected = joined(*(w.grad for w in weights))
    for rank in ranks:
        torch.testing.assert_close(rank[name]["grads"][0], expected)
