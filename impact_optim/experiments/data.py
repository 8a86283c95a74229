"""The data sets of the study, whole and in memory: no workers, no loaders, batches by index."""

from __future__ import annotations

import gzip
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package ``dataset-fashion-mnist`` puts its files."""

_SPLIT_SEED = 0  # one split for all seeds of a study: runs differ in what they train, not in what they see


@dataclass(frozen=True)
class Data:
    """Training examples and the held-out ones that a run reports on.

    Inputs are float32 of shape ``(examples, channels, *spatial)``, standardised per channel by the training set;
    labels are int64.
    """

    x: Tensor
    y: Tensor
    heldout_x: Tensor
    heldout_y: Tensor
    classes: int
    heldout: str = "test"
    """What the held-out examples are, ``"test"`` or ``"validation"``."""
    augment: bool = False
    """Whether training batches are cropped and flipped at random."""

    def to(self, device: torch.device | str) -> Data:
        """The same data on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("x", "y", "heldout_x", "heldout_y")}
        return replace(self, **tensors)

    def subset(self, size: int) -> Data:
        """The same data with ``size`` training examples, the classes in proportion.

        Raises:
            ValueError: there are not as many.
        """
        if not 1 <= size <= len(self.y):
            raise ValueError(f"a subset of {size} examples was asked for, but there are {len(self.y)} to train on")
        chosen = stratified_choice(self.y, size)
        return replace(self, x=self.x[chosen], y=self.y[chosen])

    def validation_split(self, share: float) -> Data:
        """Holds out a share of the training examples, the classes in proportion; the test set is gone.

        Raises:
            ValueError: the share leaves one of the two sides empty.
        """
        size = round(share * len(self.y))
        if not 0 < size < len(self.y):
            raise ValueError(
                f"a validation split of {share} leaves {len(self.y) - size} examples to train on and {size} to "
                "validate on; both must have some"
            )
        held = stratified_choice(self.y, size)
        rest = torch.ones(len(self.y), dtype=torch.bool).index_fill_(0, held, False)
        return replace(
            self,
            x=self.x[rest],
            y=self.y[rest],
            heldout_x=self.x[held],
            heldout_y=self.y[held],
            heldout="validation",
        )


def load_data(name: str, folder: Path, download: bool = False) -> Data:
    """Loads a data set by name.

    Args:
        name: one of :data:`DATA`.
        folder: where the files of fashion-mnist, cifar10 and cifar100 are looked for, and downloaded to.
        download: fetch what is not there.

    Raises:
        ValueError: no such data set.
        FileNotFoundError: its files are not there; says how to get them.
        OSError: the download failed.
        ImportError: the package that it comes with is not installed.
    """
    if name not in DATA:
        raise ValueError(f"there is no data set {name!r}; choose from {', '.join(DATA)}")
    try:
        x, y, test_x, test_y = DATA[name](folder, download)
    except ImportError as error:
        package = {"digits": "scikit-learn", "mnist1d": "mnist1d"}.get(name, "torchvision")
        raise ImportError(f"{name} comes with {package}, which is not installed: pip install {package}") from error
    except RuntimeError as error:  # torchvision's, for a download that fails or does not match its checksum
        raise OSError(f"could not get {name}: {error}") from error
    dims = [d for d in range(x.dim()) if d != 1]
    mean, std = x.mean(dims, keepdim=True), x.std(dims, keepdim=True)
    x, test_x = x.sub_(mean).div_(std), test_x.sub_(mean).div_(std)
    return Data(x, y, test_x, test_y, classes=int(y.max()) + 1, augment=name.startswith("cifar"))


def stratified_choice(labels: Tensor, size: int) -> Tensor:
    """Indices of ``size`` examples in ascending order, the classes in proportion; always the same ones."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    order = order[torch.argsort(labels[order], stable=True)]
    # Class by class, every (n / size)-th: each class gets its share, give or take one.
    return order[torch.arange(size) * len(labels) // size].sort().values


def batches(data: Data, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of an epoch, in an order that depends on seed and epoch alone.

    The examples left over after the last full batch sit out; other ones do in the next epoch.
    """
    # On the CPU, so that every device sees the same order and the same crops.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(data.y), generator=generator)
    size = min(size, len(order))
    for start in range(0, len(order) - size + 1, size):
        index = order[start : start + size].to(data.x.device)
        x = data.x[index]
        yield (crop_and_flip(x, generator) if data.augment else x), data.y[index]


def batch_count(data: Data, size: int) -> int:
    """How many batches :func:`batches` yields in an epoch."""
    return max(1, len(data.y) // size)


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shifts images by up to ``padding`` pixels and mirrors half of them, each on its own.

    Args:
        x: shape ``(batch, channels, height, width)``.
        generator: on the CPU.
        padding: in pixels; zeros, which are the mean of standardised inputs, come in from outside.
    """
    n, channels, height, width = x.shape
    shifts = torch.randint(2 * padding + 1, (2, n, 1), generator=generator).to(x.device)
    flip = torch.rand(n, 1, generator=generator).to(x.device) < 0.5
    rows = shifts[0] + torch.arange(height, device=x.device)
    columns = shifts[1] + torch.arange(width, device=x.device)
    columns = torch.where(flip, columns.flip(1), columns)
    example = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return F.pad(x, [padding] * 4)[example, channel, rows[:, None, :, None], columns[:, None, None, :]]


# ------------------------------------------------------------------------------- the sets

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def _digits(folder: Path, download: bool) -> Split:
    """1797 digits of 8x8, 360 of them for the test; shipped by scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1), torch.tensor(bunch.target, dtype=torch.int64)
    test = torch.zeros(len(y), dtype=torch.bool).index_fill_(0, stratified_choice(y, 360), True)
    return x[~test], y[~test], x[test], y[test]


def _mnist1d(folder: Path, download: bool) -> Split:
    """4000 + 1000 signals of length 40, made on the spot by the published generator and seed."""
    from mnist1d.data import get_dataset_args, make_dataset

    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  the generator seeds both
    try:
        made = make_dataset(get_dataset_args())
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
    x, test_x = (torch.tensor(made[key], dtype=torch.float32).unsqueeze(1) for key in ("x", "x_test"))
    y, test_y = (torch.tensor(made[key], dtype=torch.int64) for key in ("y", "y_test"))
    return x, y, test_x, test_y


def _fashion_mnist(folder: Path, download: bool) -> Split:
    """60000 + 10000 garments of 28x28: torchvision's copy in ``folder``, or the Debian package's."""
    ours = folder / "FashionMNIST" / "raw"
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    places = (ours, DEBIAN_FASHION_MNIST)
    found = next((place for place in places if all((place / name).exists() for name in names)), None)
    if found is None and download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
        found = ours
    if found is None:
        raise FileNotFoundError(
            f"fashion-mnist is neither in {ours} nor in {DEBIAN_FASHION_MNIST}: run again with --download, or "
            "`apt-get install dataset-fashion-mnist`, or put the four *-ubyte.gz files into one of the two"
        )
    x, y, test_x, test_y = (read_idx(found / name) for name in names)
    return x.unsqueeze(1).float(), y.long(), test_x.unsqueeze(1).float(), test_y.long()


def _cifar(name: str) -> Callable[[Path, bool], Split]:
    def load(folder: Path, download: bool) -> Split:
        from torchvision import datasets

        kind = getattr(datasets, name)
        try:
            parts = [kind(str(folder), train=train, download=download) for train in (True, False)]
        except RuntimeError as error:  # what torchvision raises for files that are missing or damaged
            if download:
                raise
            raise FileNotFoundError(
                f"{name.lower()} is not in {folder}, or damaged: run again with --download, or unpack "
                f"{kind.filename} from {kind.url} there as {folder / kind.base_folder}"
            ) from error
        x, test_x = (torch.from_numpy(part.data).permute(0, 3, 1, 2).float().contiguous() for part in parts)
        y, test_y = (torch.tensor(part.targets, dtype=torch.int64) for part in parts)
        return x, y, test_x, test_y

    return load


def read_idx(path: Path) -> Tensor:
    """Reads a gzipped idx file of unsigned bytes, the format of MNIST and its descendants.

    Raises:
        ValueError: it is something else, or cut short.
    """
    with gzip.open(path) as file:
        try:
            content = file.read()
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}; get it anew") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it begins with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(sizes):
        raise ValueError(
            f"{path} is damaged: it should hold {sizes} bytes, but has {len(content) - start}; get it anew"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(sizes)


DATA: dict[str, Callable[[Path, bool], Split]] = {
    "digits": _digits,
    "mnist1d": _mnist1d,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
}
"""Data sets by name: functions of (folder, download) that return train inputs and labels, then test ones."""
