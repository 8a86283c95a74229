"""Whole families of models: traced, cut twice, equal to themselves with the units zeroed where they are read.

``pytest --slow -s tests/test_pruning_models.py`` prints how many, at the end.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Generator
from typing import Any

import pytest
import torch
from masked_networks import deafened, difference, draw, randomised, run
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from impact_optim.pruning import cut, trace

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

CLASSIFICATION = torchvision.models.list_models(module=torchvision.models)
SEGMENTATION = torchvision.models.list_models(module=torchvision.models.segmentation)
VIDEO = torchvision.models.list_models(module=torchvision.models.video)
DETECTION = torchvision.models.list_models(module=torchvision.models.detection)
TIMM = [
    "beit_base_patch16_224", "cait_xxs24_224", "coatnet_nano_rw_224", "convnext_atto", "crossvit_tiny_240",
    "cspresnet50", "davit_tiny", "densenet121", "dla34", "dpn48b", "edgenext_xx_small", "efficientformer_l1",
    "efficientnet_b0", "eva02_tiny_patch14_224", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "gmlp_ti16_224", "hrnet_w18_small", "inception_next_tiny", "levit_128s", "mixer_s32_224", "mobilenetv3_small_050",
    "mobilevit_xxs", "nest_tiny", "nf_resnet26", "poolformer_s12", "pvt_v2_b0", "regnety_002", "repvgg_a0",
    "res2net50_26w_4s", "resmlp_12_224", "resnest14d", "resnet26d", "resnetv2_50", "skresnet18",
    "swin_tiny_patch4_window7_224", "tf_efficientnetv2_s", "twins_svt_small", "vit_tiny_patch16_224", "volo_d1_224",
    "vovnet39a", "xcit_nano_12_p16_224", "xception41",
]  # fmt: skip
QUICK = ["torchvision/shufflenet_v2_x0_5", "torchvision/resnet18", "timm/vit_tiny_patch16_224"]

SIDES = {"vit_h_14": 28, "vit": 32, "inception_v3": 299, "maxvit_t": 224, "ssd300": 300}
"""Sides of the images that models see, by the beginning of their names; all others see 64 x 64."""
NOTHING = ("timm/gmlp_ti16_224", "timm/nf_resnet26")
"""Layer norms over all that is produced, standardised weights in all that reads: no cut would be exact."""
LARGE = 150_000_000
"""Parameters from which a model is run in float32."""


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model with random weights, and an input."""
    family, _, short = name.partition("/")
    if family == "timm":
        model = timm.create_model(short)
        return model, (torch.randn(1, *model.default_cfg["input_size"]),)
    if family == "video":
        side = 224 if short.startswith(("mvit", "s3d")) else 64
        return torchvision.models.get_model(short, weights=None), (torch.randn(1, 3, 16, side, side),)
    options: dict[str, Any] = {"weights": None}
    if family != "torchvision":
        options["weights_backbone"] = None
    side = next((side for start, side in SIDES.items() if short.startswith(start)), 64)
    if short.startswith("vit"):
        options["image_size"] = side
    if short in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if family == "segmentation" and not short.startswith("lraspp"):
        options["aux_loss"] = True
    model = torchvision.models.get_model(short, **options)
    return model.backbone if family == "detection" else model, (torch.randn(2, 3, side, side),)


@pytest.fixture(scope="module")
def tally() -> Generator[list[str], None, None]:
    """Names of what was traced, cut and equal."""
    done: list[str] = []
    yield done
    print(f"\n{len(done)} models: traced, cut, equal")


NAMES = [
    *(f"torchvision/{name}" for name in CLASSIFICATION),
    *(f"segmentation/{name}" for name in SEGMENTATION),
    *(f"video/{name}" for name in VIDEO),
    *(f"detection/{name}" for name in DETECTION),
    *(f"timm/{name}" for name in TIMM),
]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_cut_equals_masked(name: str, tally: list[str]) -> None:
    gc.collect()
    model, inputs = build(name)
    large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
    dtype = torch.float32 if large else torch.float64
    model, inputs = randomised(model, dtype), tuple(value.to(dtype) for value in inputs)
    start = time.perf_counter()
    graph = trace(model, inputs)
    traced = time.perf_counter() - start
    if name in NOTHING:
        assert not graph.groups
        assert graph.frozen
        return
    units_before = {group: entry.size for group, entry in graph.groups.items()}
    assert units_before, "nothing can be cut"
    generator = torch.Generator().manual_seed(0)
    before, worst = sum(parameter.numel() for parameter in model.parameters()), 0.0
    slowest = 0.0
    for _ in range(2):
        units = draw(graph, generator, share=0.5)
        expected = run(deafened(model, graph, units), inputs)
        model.train().eval()  # some cache what they compute from parameters, until they are trained again
        start = time.perf_counter()
        cut(model, graph, units)
        slowest = max(slowest, time.perf_counter() - start)
        worst = max(worst, difference(expected, run(model, inputs)))
    after = sum(parameter.numel() for parameter in model.parameters())
    outputs = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum(leaf.sum() for leaf in outputs).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    print(
        f"{name}: {len(units_before)} groups, {sum(units_before.values())} units, {before} -> {after} parameters, "
        f"difference {worst:.1e} in {dtype}, traced in {traced:.1f} s, cut in {slowest:.2f} s"
    )
    assert after < before
    assert worst < (1e-4 if large else 1e-9)
    tally.append(name)
