"""Whole families of models: traced, cut twice, equal to themselves with the units zeroed where they are read.

``pytest --slow -s tests/test_pruning_models.py`` prints how many, at the end.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Generator, Mapping
from typing import Any

import pytest
import torch
from helpers import slow
from masked_networks import deafened, difference, draw, randomised, run
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from impact_optim.pruning import cut, open_heads, trace

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

CLASSIFICATION = torchvision.models.list_models(module=torchvision.models)
SEGMENTATION = torchvision.models.list_models(module=torchvision.models.segmentation)
OPEN = {"vit_b_16": 12 * 12, "swin_t": 6 + 12 + 72 + 48, "swin_v2_t": 6 + 12 + 72 + 48}
"""Classification models whose heads can be cut once they are opened, and how many they are."""
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
_BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_TOKENS = {"vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LANGUAGE = {**_TOKENS, **_BODY}
_ROTARY = {**_LANGUAGE, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}
_IMAGES = {**_BODY, "image_size": 16, "patch_size": 4}
_BOTH = {
    **_TOKENS, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "decoder_start_token_id": 2,
}  # fmt: skip
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "albert": {**_LANGUAGE, "embedding_size": 16},
    "bart": _BOTH,
    "bert": _LANGUAGE,
    "bloom": {"vocab_size": 50, "hidden_size": 24, "n_layer": 2, "n_head": 4},
    "clip_vision_model": _IMAGES,
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "deformable_detr": {
        "use_timm_backbone": False,
        "backbone_config": {
            "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
            "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
        },
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_queries": 7,
        "num_feature_levels": 3,
    },
    "deit": _IMAGES,
    "dinov2": _IMAGES,
    "distilbert": {"vocab_size": 50, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    "electra": {**_LANGUAGE, "embedding_size": 16},
    "gemma": _ROTARY,
    "gpt2": {**_TOKENS, "n_embd": 24, "n_layer": 2, "n_head": 4},
    "gpt_neox": _LANGUAGE,
    "llama": _ROTARY,
    "mistral": _ROTARY,
    "mobilevit": {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40]},
    "opt": {**_LANGUAGE, "ffn_dim": 40, "word_embed_proj_dim": 32},
    "phi": _LANGUAGE,
    "qwen2": _ROTARY,
    "regnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1]},
    "roberta": _LANGUAGE,
    "segformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "t5": {**_TOKENS, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4},
    "vit": _IMAGES,
    "whisper": {**_BOTH, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
}  # fmt: skip
HEADS = {
    "bert": 8,
    "bart": 24,
    "deformable_detr": 24,
    "gpt2": 8,
    "gpt_neox": 8,
    "phi": 8,
    "llama": 8,
    "mistral": 8,
    "qwen2": 8,
    "t5": 8,
    "vit": 8,
}
"""Heads, or groups of heads that share keys and values, that can be cut."""
QUICK = ["transformers/gpt2"]

SIDES = {"vit_h_14": 28, "vit": 32, "inception_v3": 299, "maxvit_t": 224, "ssd300": 300}
"""Sides of the images that models see, by the beginning of their names; all others see 64 x 64."""
NOTHING = ("timm/gmlp_ti16_224", "timm/nf_resnet26")
"""Layer norms over all that is produced, standardised weights in all that reads: no cut would be exact."""
LARGE = 150_000_000
"""Parameters from which a model is run in float32."""


def build(name: str) -> tuple[nn.Module, Any]:
    """A model with random weights, and an input."""
    family, _, short = name.partition("/")
    if family == "transformers":
        return build_transformer(short)
    if family == "timm":
        model = timm.create_model(short)
        return model, (torch.randn(1, *model.default_cfg["input_size"]),)
    if family == "video":
        side = 224 if short.startswith(("mvit", "s3d")) else 64
        return torchvision.models.get_model(short, weights=None), (torch.randn(1, 3, 16, side, side),)
    options: dict[str, Any] = {"weights": None}
    if family not in ("torchvision", "open"):
        options["weights_backbone"] = None
    side = next((side for start, side in SIDES.items() if short.startswith(start)), 64)
    if short.startswith("vit"):
        options["image_size"] = side
    if short in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if family == "segmentation" and not short.startswith("lraspp"):
        options["aux_loss"] = True
    model = torchvision.models.get_model(short, **options)
    model = model.backbone if family == "detection" else open_heads(model) if family == "open" else model
    return model, (torch.randn(2, 3, side, side),)


def build_transformer(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a family of Hugging Face's, and keyword arguments."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name, **TRANSFORMERS[name])
    model = transformers.AutoModel.from_config(config)
    ids = torch.arange(12).view(2, 6)
    if model.main_input_name == "pixel_values":
        side = getattr(config, "image_size", 64)
        return model, {"pixel_values": torch.randn(2, 3, side, side)}
    inputs = {"input_ids": ids} if model.main_input_name == "input_ids" else {"input_features": torch.randn(2, 8, 16)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model, inputs | ({"use_cache": False} if hasattr(config, "use_cache") else {})


@pytest.fixture(scope="module")
def tally() -> Generator[list[str], None, None]:
    """Names of what was traced, cut and equal."""
    done: list[str] = []
    yield done
    print(f"\n{len(done)} models: traced, cut, equal")


NAMES = [
    *(f"torchvision/{name}" for name in CLASSIFICATION),
    *(f"open/{name}" for name in OPEN),
    *(f"segmentation/{name}" for name in SEGMENTATION),
    *(f"video/{name}" for name in VIDEO),
    *(f"detection/{name}" for name in DETECTION),
    *(f"timm/{name}" for name in TIMM),
    *(f"transformers/{name}" for name in TRANSFORMERS),
]


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in NAMES])
def test_cut_equals_masked(name: str, tally: list[str]) -> None:
    gc.collect()
    model, inputs = build(name)
    large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
    dtype = torch.float32 if large else torch.float64
    model = randomised(model, dtype)
    inputs = tree_map_only(Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, inputs)
    start = time.perf_counter()
    graph = trace(model, inputs)
    traced = time.perf_counter() - start
    if name in NOTHING:
        assert not graph.groups
        assert graph.frozen
        return
    units_before = {group: entry.size for group, entry in graph.groups.items()}
    assert units_before, "nothing can be cut"
    if (heads := HEADS.get(name.removeprefix("transformers/"))) is not None and name.startswith("transformers"):
        assert sum(size for group, size in units_before.items() if re.search(r"att|Attention", group)) == heads
    if name.startswith("open"):
        heads = OPEN[name.removeprefix("open/")]
        assert sum(size for group, size in units_before.items() if re.search(r"attention|attn\.qkv", group)) == heads
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
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    sum(leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    print(
        f"{name}: {len(units_before)} groups, {sum(units_before.values())} units, {before} -> {after} parameters, "
        f"difference {worst:.1e} in {dtype}, traced in {traced:.1f} s, cut in {slowest:.2f} s"
    )
    assert after < before
    assert worst < (1e-4 if large else 1e-9)
    tally.append(name)
