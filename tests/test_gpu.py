"""What has to hold on a GPU as well; runs where there is one, and a smaller part of it on fake tensors is elsewhere."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import FACES, assert_same, every_face
from test_kernels import compare
from torch import nn

from impact_optim import SIGNALS, ImpactAdamW, ImpactSGD

pytestmark = pytest.mark.cuda

OPTIONS = {"drop_rate": 0.3, "importance_lr": 0.05, "kl_weight": 1.0, "seed": 3}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    # Two sizes: below and above what the level is solved for exactly.
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 5)).cuda()


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(32, 20, generator=generator).cuda(), torch.randint(5, (32,), generator=generator).cuda()


def train(model, optimizer, steps, start=0):
    for i in range(start, start + steps):
        x, y = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def masked_share(model) -> float:
    seen = []
    handle = model[2].register_forward_pre_hook(lambda m, _: seen.append((m.weight == 0).float().mean().item()))
    model(batch(0)[0])
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("importance", "dtype"),
    [
        *((name, torch.float32) for name in [*SIGNALS, "uniform"]),
        *(("saliency", dtype) for dtype in (torch.bfloat16, torch.float64)),
    ],
)
@pytest.mark.parametrize("hold_zeros", [False, True])
@pytest.mark.parametrize(
    "base",
    [
        (ImpactSGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        (ImpactAdamW, {"lr": 0.01, "eps": 1e-3, "amsgrad": True}),
        (None, {"lr": 0.01}),
    ],
    ids=["SGD", "AdamW", "RMSprop"],
)
def test_the_kernels_take_the_steps_of_the_tensor_code(base, importance, hold_zeros, dtype):
    options = {"drop_rate": 0.3, "importance": importance, "importance_lr": 0.1, "kl_weight": 0.1, "seed": 2**40 + 5}
    options |= {"drop": "unimportant", "rescale": "inverse", "keep_floor": 0.01, "maximize": base[0] is ImpactAdamW}
    shapes = [(90, 100), (300, 400), (7,), (16, 8, 3, 3)]
    doubtful, draws = compare(*base, {**options, "hold_zeros": hold_zeros}, shapes, dtype, True, device="cuda")
    assert draws > 390_000
    assert doubtful <= 3 + 1e-5 * draws


@every_face
def test_masked_in_training_dense_in_evaluation(face, network):
    impact, optimizer = face(network, **OPTIONS)
    train(network, optimizer, 10)
    rows = impact.importance_summary()
    assert sum(r.drop_rate * r.numel for r in rows) / sum(r.numel for r in rows) == pytest.approx(0.3, abs=1e-3)
    assert masked_share(network) > 0.1
    assert masked_share(network.eval()) == 0


@every_face
def test_nothing_waits_for_the_gpu(face, network):
    _, optimizer = face(network, **OPTIONS)
    train(network, optimizer, 2)
    x, y = batch(5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_face
def test_the_masks_are_those_of_a_cpu(face, network):
    """The stream is the same; a draw may differ only where it lies within rounding of its probability."""
    twin = copy.deepcopy(network).cpu()
    kept = {}
    for name, model in (("gpu", network), ("cpu", twin)):
        impact, _ = face(model, **OPTIONS)
        with torch.no_grad(), impact.masked():
            kept[name] = torch.cat([p.detach().flatten().cpu() != 0 for p in model.parameters() if p.dim() > 1])
    assert (kept["gpu"] != kept["cpu"]).sum() <= 2
    assert not kept["cpu"].all()


@every_face
def test_resumed_on_the_gpu_from_a_checkpoint_on_the_cpu(face, network, tmp_path):
    _, optimizer = face(network, **OPTIONS)
    train(network, optimizer, 4)
    torch.save([network.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    other = copy.deepcopy(network)
    _, again = face(other, **OPTIONS)
    weights, state = torch.load(tmp_path / "checkpoint.pt", map_location="cpu", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(network, optimizer, 3, start=4)
    train(other, again, 3, start=4)
    assert_same(other.state_dict(), network.state_dict())


@every_face
def test_zeros_stay_zero(face, network):
    impact, optimizer = face(network, **OPTIONS)
    train(network, optimizer, 3)
    report = impact.sparsify(0.8)
    train(network, optimizer, 3, start=3)
    assert report.sparsity == pytest.approx(0.8, abs=1e-3)
    for name, mask in report.masks.items():
        assert torch.equal(network.get_parameter(name) != 0, mask)


def test_one_group_on_two_devices():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(20, 60), nn.Linear(60, 5).cuda()])
    impact, optimizer = FACES[0](model, **OPTIONS)
    for i in range(4):
        x, y = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(model[1](torch.tanh(model[0](x.cpu())).cuda()), y).backward()
        optimizer.step()
    keep = torch.cat([impact.keep_probability(layer.weight).flatten().cpu() for layer in model])
    assert keep.mean().item() == pytest.approx(0.7, abs=1e-3)
    assert keep.std() > 0.01


def test_a_grad_scaler_with_float16(network):
    _, optimizer = FACES[0](network, **OPTIONS)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    before = copy.deepcopy(network.state_dict())
    for i in range(6):
        x, y = batch(i)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(network(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(network.state_dict()["0.weight"], before["0.weight"])
    assert all(p.isfinite().all() for p in network.parameters())


def test_a_cuda_graph_is_refused(network):
    _, optimizer = FACES[0](network, **OPTIONS)
    train(network, optimizer, 3)
    x, _ = batch(0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(graph):
        network(x)


@every_face
def test_a_compiled_model(face, network):
    _, optimizer = face(network, **OPTIONS)
    compiled = torch.compile(network)
    train(compiled, optimizer, 3)
    compiled.eval()
    torch.testing.assert_close(compiled(batch(0)[0]), network(batch(0)[0]), rtol=1e-3, atol=1e-3)
