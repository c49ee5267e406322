"""Data sets as batches whose order and augmentation are pure functions of (seed, epoch, batch index).

Notation: N samples, B batch, C channels, H and W pixels, T positions of a text.
"""

import hashlib
import http.client
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lowbit.errors import RunError, UsageError, unknown
from lowbit.inputs import files

FOLDER_SIZE = 224
"""Height and width in pixels of every image of an `ImageFolder`."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")

MAX_PIXELS = 50_000_000
"""Pixels that one image file may have; ``LOWBIT_MAX_PIXELS`` sets another limit. Decoding takes 8 bytes for each."""

FASHION_SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of what each file holds when decompressed: Debian and the mirror compress the same bytes apart."""
MIRROR_SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
"""SHA-256 of the mirror's files as they come, checked before anything is decompressed. Debian's package is checked by
apt against its signed list."""

FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
PACKAGE_TIMEOUT = 300.0
"""Seconds that `apt-get download` may take."""
MIRROR_TIMEOUT = 30.0
"""Seconds that the mirror may stay silent."""
MIRROR_TOTAL = 600.0
"""Seconds that its four files may take together."""
MIRROR_BYTES = 64 << 20
"""Bytes that one of its files may have."""

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's packages put data sets."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model must map.

    Args:
        kind: ``"image"`` has input (B, C, H, W) float32 and labels (B,) int64; ``"text"`` has bytes
            (B, T) int64 and the next byte of each, (B, T) int64.
        shape: of one sample, (C, H, W) or (T,).
        classes: number of labels; 256 for text.
    """

    kind: Literal["image", "text"]
    shape: tuple[int, ...]
    classes: int


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where samples are read.

    Args:
        samples: int64, the samples in use.
        augment: whether a training batch is changed at random.
    """

    samples: Tensor
    augment: bool

    @abstractmethod
    def order(self, noise: Generator | None) -> Tensor:
        """What `read` takes, for the samples of one epoch; shuffled unless `noise` is ``None``."""

    @abstractmethod
    def read(self, samples: Tensor, noise: Generator | None, /) -> tuple[Tensor, Tensor]:
        """Input and labels of one batch of `order`; augmented with `noise` unless it is ``None``."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str | int]:
        """Hashes of what the samples are, see `Batches.fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class Images(Source):
    """Images held in memory as bytes and normalised as they are read.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        mean: (C, 1, 1) float32, in units of a byte.
        std: (C, 1, 1) float32, in units of a byte.
        samples: int64, the samples in use.
        augment: whether a training batch is cropped and flipped at random.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def order(self, noise: Generator | None) -> Tensor:
        """The samples of one epoch, shuffled unless `noise` is ``None``."""
        return _shuffled(self.samples, noise)

    def read(self, samples: Tensor, noise: Generator | None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float32 and labels (B,) int64; augmented with `noise` unless it is ``None``."""
        x = self.images[samples]
        if self.augment and noise is not None:
            x = crop_and_flip(x, noise)
        return x.float().sub_(self.mean).div_(self.std), self.labels[samples]

    def fingerprint(self) -> dict[str, str | int]:
        """Hashes of what the samples are, see `Batches.fingerprint`."""
        return {"images": _hash(self.images), "labels": _hash(self.labels)}


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """Image files that are decoded as they are read, to 3 channels and 224×224 pixels.

    In training with `augment` a box of 8 % to 100 % of the area and of ratio 3/4 to 4/3, cut to the image's
    width and height, is resized, and flipped half of the time; otherwise the largest centred square is.

    Args:
        paths: one file for each sample.
        labels: (N,) int64.
        samples: int64, the samples in use.
        augment: whether a training batch is cropped and flipped at random.

    Source of the crop: Szegedy et al., arXiv:1409.4842, section 6.
    """

    paths: tuple[Path, ...]
    labels: Tensor

    def order(self, noise: Generator | None) -> Tensor:
        """The samples of one epoch, shuffled unless `noise` is ``None``."""
        return _shuffled(self.samples, noise)

    def read(self, samples: Tensor, noise: Generator | None) -> tuple[Tensor, Tensor]:
        """(B, 3, 224, 224) float32, normalised by ImageNet's mean and std, and labels (B,) int64."""
        paths = [self.paths[sample] for sample in samples.tolist()]
        draws: list[list[float]] | list[None] = [None] * len(paths)
        if self.augment and noise is not None:
            draws = torch.rand(len(paths), 5, generator=noise, dtype=torch.float32, device="cpu").tolist()
        # Decoding leaves Python's lock, so threads gain; every draw is made before they start.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            x = torch.stack(list(pool.map(_decode, paths, draws)))
        x = x.float()
        mean = x.new_tensor([0.485, 0.456, 0.406]).mul(255).view(3, 1, 1)
        std = x.new_tensor([0.229, 0.224, 0.225]).mul(255).view(3, 1, 1)
        return x.sub_(mean).div_(std), self.labels[samples]

    def fingerprint(self) -> dict[str, str | int]:
        """Hashes of what the samples are, see `Batches.fingerprint`."""
        # A folder may be moved: names count from the class's folder on.
        names = "\0".join(f"{path.parent.name}/{path.name}" for path in self.paths)
        content = hashlib.sha256()
        count = len(self.paths)
        chosen = torch.linspace(0, count - 1, min(64, count), dtype=torch.float32, device="cpu").long()
        for at in chosen.tolist():
            content.update(hashlib.sha256(files.read_whole(self.paths[at])).digest())
        return {
            "names": hashlib.sha256(names.encode()).hexdigest()[:16],
            "images": content.hexdigest()[:16],
            "labels": _hash(self.labels),
        }


@dataclass(frozen=True, kw_only=True)
class Text(Source):
    """Windows of a text's bytes, side by side; each epoch shifts them all by one random offset.

    Args:
        content: uint8, the text.
        context: T, the bytes of one window.
        samples: int64, numbers of the windows in use.
        augment: whether an epoch of training draws its offset; otherwise it is 0.
    """

    content: Tensor
    context: int

    def order(self, noise: Generator | None) -> Tensor:
        """The first byte of each window of one epoch, shuffled unless `noise` is ``None``."""
        starts = _shuffled(self.samples, noise) * self.context
        if noise is None or not self.augment:
            return starts
        # The last window also needs one byte after it, its last label.
        spare = len(self.content) - 1 - int(starts.max()) - self.context
        return starts + torch.randint(
            min(self.context, spare + 1), (), generator=noise, dtype=torch.int64, device="cpu"
        )

    def read(self, starts: Tensor, _noise: Generator | None) -> tuple[Tensor, Tensor]:
        """Bytes (B, T) int64 and the byte after each, (B, T) int64."""
        windows = self.content[starts[:, None] + torch.arange(self.context + 1, dtype=torch.int64, device="cpu")].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def fingerprint(self) -> dict[str, str | int]:
        """Hashes of what the samples are, see `Batches.fingerprint`."""
        return {"bytes": len(self.content), "text": _hash(self.content)}


class Batches:
    """A sized loader that resumes in the middle of an epoch; iterating gives (x, y) batch by batch.

    Epochs count from 0. An iterator gives the batches of the current epoch that remain after
    `load_state_dict`, and all those of the next epoch once a batch has been handed out. Only one iterator
    may be in use at a time.

    Args:
        source: where samples are read.
        batch_size: B.
        seed: of the order and the augmentation of a training set, whose short last batch is dropped.
            ``None`` means a test set: fixed order, no augmentation, the short last batch included.

    Raises:
        UsageError: `batch_size` is below 1, or a training set has fewer samples than one batch.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int | None) -> None:
        samples = len(source.samples)
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, given {batch_size}.")
        if seed is not None and samples < batch_size:
            raise UsageError(
                f"the training set has {samples} samples, fewer than one batch of {batch_size}: "
                f"use a batch_size of at most {samples}, or more samples."
            )
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._length = samples // batch_size if seed is not None else -(-samples // batch_size)
        self._epoch = 0
        self._batches = 0
        self._drawn = False  # a batch was handed out since the start or since load_state_dict

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Lightning stops after len(self) batches without meeting StopIteration, so an epoch ends here.
        if self._drawn or self._batches == self._length:
            self._epoch, self._batches, self._drawn = self._epoch + 1, 0, False
        return self._remaining()

    def _remaining(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self._epoch
        order = self._source.order(self._noise("order", epoch))
        for index in range(self._batches, self._length):
            samples = order[index * self._batch_size : (index + 1) * self._batch_size]
            batch = self._source.read(samples, self._noise("batch", epoch, index))
            self._batches, self._drawn = index + 1, True
            yield batch

    def _noise(self, *key: object) -> Generator | None:
        return None if self._seed is None else _generator(self._seed, *key)

    def fingerprint(self) -> dict[str, str | int]:
        """Numbers and hashes that tell this data: samples, their content, labels, and the order of the first epoch.

        Images in memory and texts are hashed whole. Of a folder every file's name is, and the size and content of 64
        files at even distances.
        """
        order = self._source.order(self._noise("order", 0))
        return {"samples": len(self._source.samples), "order": _hash(order), **self._source.fingerprint()}

    def state_dict(self) -> dict[str, int]:
        """The current epoch and how many of its batches were handed out."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch that a loader of the same arguments had handed out.

        Raises:
            RunError: `state` is not one of a loader with this many batches.
        """
        epoch, batches = state.get("epoch", -1), state.get("batches", -1)
        if epoch < 0 or not 0 <= batches <= self._length:
            raise RunError(
                f"loader state {state} does not fit an epoch of {self._length} batches: "
                f"resume with the data set, subset and batch size of the saved run."
            )
        self._epoch, self._batches, self._drawn = epoch, batches, False


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set ready for training.

    Args:
        name: as given to `load`.
        task: what a model must map.
        train: shuffled and augmented, without a short last batch.
        test: in a fixed order, not augmented, with every sample.
    """

    name: str
    task: Task
    train: Batches
    test: Batches

    def fingerprint(self) -> dict[str, str | int]:
        """What tells this data from other data of the name, see `Batches.fingerprint`."""
        sets = {"train": self.train, "test": self.test}
        return {f"{part} {name}": value for part, each in sets.items() for name, value in each.fingerprint().items()}


def load(
    name: str,
    *,
    batch_size: int,
    seed: int,
    subset: int | None = None,
    augment: bool = True,
    context: int = 128,
) -> Data:
    """Open a data set by name; only ``fashion-mnist`` may be fetched, and says so on stderr.

    Files are looked for in ``$LOWBIT_DATA``, ``$LOWBIT_DATA/NAME``, ``/usr/share/datasets/NAME`` and
    ``$XDG_CACHE_HOME/lowbit/NAME`` (``~/.cache`` where that is unset), in this order.

    - ``fashion-mnist``: 60,000 + 10,000 images (1, 28, 28), 10 classes.
    - ``digits``: 1,437 + 360 images (1, 8, 8), 10 classes: the first and the last of scikit-learn's file.
    - ``cifar10``, ``cifar100``: 50,000 + 10,000 images (3, 32, 32), the binary version.
    - ``imagefolder:PATH``: images ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*`` (or ``PATH/val``), as
      (3, 224, 224).
    - ``text:PATH``: the bytes of a file or a ``.gz`` file; the last 10 % are the test set.

    Args:
        name: one of `names()`, with a path in place of ``PATH``.
        batch_size: B, of both sets.
        seed: of the order and the augmentation of the training set.
        subset: train on this many samples only, drawn over all classes and the same for every `seed`;
            ``None`` means all. The test set and the normalisation do not change.
        augment: whether images of the training set are cropped and flipped at random (never ``digits``),
            and whether each epoch of a text draws the offset of its windows.
        context: T, bytes of one window of a text; images do not use it.

    Raises:
        UsageError: the name, the path or an argument does not exist or does not fit the data.
        RunError: a file is corrupt, or fetching failed.
    """
    kind, colon, path = name.partition(":")
    if colon and not path and f"{kind}:PATH" in names():
        raise UsageError(f"data set {name!r} lacks its path: write {kind}:PATH.")
    if context < 1:
        raise UsageError(f"context must be at least 1 byte, given {context}.")
    if name in _NAMED:
        task, train, test = _NAMED[name]()
    elif kind == "imagefolder" and path:
        task, train, test = _imagefolder(_expanded(path))
    elif kind == "text" and path:
        task, train, test = _text(_expanded(path), context)
    else:
        raise unknown("data set", name, names())
    if not augment:
        train = replace(train, augment=False)
    if subset is not None:
        train = replace(train, samples=_subset(train.samples, subset))
    return Data(
        name=name,
        task=task,
        train=Batches(train, batch_size=batch_size, seed=seed),
        test=Batches(test, batch_size=batch_size, seed=None),
    )


def names() -> tuple[str, ...]:
    """Every data set that `load` knows; ``PATH`` stands for a file or folder."""
    return (*_NAMED, "imagefolder:PATH", "text:PATH")


def crop_and_flip(x: Tensor, noise: Generator, *, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels both ways, filling with 0, and mirror half of them.

    Args:
        x: (B, C, H, W) uint8.
        noise: where the shifts and flips are drawn.
        pad: the largest shift in pixels.

    Returns:
        (B, C, H, W) uint8, a new tensor.

    Source: He et al., arXiv:1512.03385, section 4.2.
    """
    batch, _, height, width = x.shape
    top, left = torch.randint(2 * pad + 1, (2, batch), generator=noise, dtype=torch.int64, device="cpu")
    flip = torch.randint(2, (batch, 1, 1, 1), generator=noise, dtype=torch.int64, device="cpu").bool()
    # (B, C, shifts, shifts, H, W), a view: picking one shift for each image copies whole rows.
    shifts = F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    y = shifts[torch.arange(batch, dtype=torch.int64, device="cpu"), :, top, left]
    return torch.where(flip, y.flip(3), y)


def _generator(*key: object) -> Generator:
    """A generator that depends on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    # Torch's CPU generator is seeded by 32 bits.
    return Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _hash(tensor: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]


def _shuffled(samples: Tensor, noise: Generator | None) -> Tensor:
    return (
        samples
        if noise is None
        else samples[torch.randperm(len(samples), generator=noise, dtype=torch.int64, device="cpu")]
    )


def _subset(samples: Tensor, count: int) -> Tensor:
    if not 1 <= count <= len(samples):
        raise UsageError(f"subset must be 1 to {len(samples)}, the samples of the training set, given {count}.")
    return _shuffled(samples, _generator("subset"))[:count]


class _Sets(NamedTuple):
    task: Task
    train: Source
    test: Source


def _in_memory(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, classes: int, augment: bool) -> _Sets:
    """Two sets of (N, C, H, W) uint8 images with (N,) labels, both normalised by the first one's moments."""
    mean, std = _moments(train[0])
    sources = [
        Images(
            images=images,
            labels=labels.long(),
            mean=mean,
            std=std,
            samples=torch.arange(len(images), dtype=torch.int64, device="cpu"),
            augment=augment,
        )
        for images, labels in (train, test)
    ]
    task = Task(kind="image", shape=tuple(train[0].shape[1:]), classes=classes)
    return _Sets(task, *sources)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1) float32; the latter is 1 where it is 0."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64, device="cpu")
    mean = share @ value
    std = (share @ value**2 - mean**2).clamp(min=0).sqrt()
    std[std == 0] = 1
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def _digits() -> _Sets:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it has no annotations
    except ImportError as error:
        raise UsageError("digits needs scikit-learn: pip install 'lowbit[train]'.") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target)
    split = 1437
    return _in_memory((images[:split], labels[:split]), (images[split:], labels[split:]), classes=10, augment=False)


def _fashion_mnist() -> _Sets:
    folder = _fashion_folder()
    train, test = (
        _idx_pair(folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz")
        for part in ("train", "t10k")
    )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise RunError(f"{folder}: training images are {tuple(train[0].shape[2:])} pixels, test images differ.")
    return _in_memory(train, test, classes=10, augment=True)


def _idx_pair(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = _idx(images_path, dims=3)[:, None], _idx(labels_path, dims=1)
    if len(images) != len(labels):
        raise RunError(f"{images_path} has {len(images)} images and {labels_path} has {len(labels)} labels.")
    _check_labels(labels_path, labels, 10)
    return images, labels


def _idx(path: Path, *, dims: int) -> Tensor:
    """The uint8 tensor of a gzipped idx file: magic number, one 32-bit size for each dim, the bytes."""
    content = files.read_whole(path)
    header = 4 + 4 * dims
    _check_size(path, expected=header, found=len(content), at_least=True)
    magic, *shape = struct.unpack(f">{1 + dims}I", content[:header])
    if magic != 0x0800 + dims:
        raise RunError(f"{path}: magic number is 0x{magic:08x}, expected 0x{0x0800 + dims:08x}. Get the file again.")
    _check_size(path, expected=header + math.prod(shape), found=len(content))
    if len(content) == header:
        raise RunError(f"{path} holds no samples.")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(shape)


def _check_size(path: Path, *, expected: int, found: int, at_least: bool = False) -> None:
    if found != expected and not (at_least and found > expected):
        unpacked = " once decompressed" if path.suffix == ".gz" else ""
        raise RunError(
            f"{path} has the wrong size{unpacked}: {expected} bytes expected, {found} found. Get the file again."
        )


def _check_labels(path: Path, labels: Tensor, classes: int) -> None:
    if int(labels.max()) >= classes:
        sample = int(labels.argmax())
        raise RunError(
            f"{path}: label {int(labels[sample])} of sample {sample} is out of range, allowed are 0 to {classes - 1}."
        )


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"the path {path!r} cannot be resolved: {error}.") from error


def _cache(name: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lowbit" / name


def _places(name: str) -> list[Path]:
    """The folders in which a data set is looked for, best first."""
    root = os.environ.get("LOWBIT_DATA")
    given = [_expanded(root), _expanded(root) / name] if root else []
    return [*given, SYSTEM / name, _cache(name)]


def _lacks(folder: Path, files: tuple[str, ...]) -> str:
    """What keeps `folder` from being used, empty if nothing does."""
    if not folder.is_dir():
        return "no such folder"
    missing = [file for file in files if not (folder / file).is_file()]
    return f"lacks {', '.join(missing)}" if missing else ""


def _fashion_folder() -> Path:
    """The first folder with the four files; they are fetched into the cache if there is none."""
    tried = []
    for place in _places("fashion-mnist"):
        lacks = _lacks(place, tuple(FASHION_SHA256))
        if not lacks:
            return place
        tried.append(f"{place}: {lacks}")
    target = _cache("fashion-mnist")
    for source, get in (
        (f"Debian's package {FASHION_PACKAGE}", _get_from_debian),
        (FASHION_MIRROR, _get_from_mirror),
    ):
        print(f"lowbit: fetching fashion-mnist (31 MB) from {source} into {target}", file=sys.stderr)
        try:
            _fetch(target, get)
        except (RunError, OSError, subprocess.SubprocessError, http.client.HTTPException) as error:
            tried.append(f"{source}: {error}")
        else:
            return target
    raise RunError(
        "fashion-mnist was not found and could not be fetched:\n  "
        + "\n  ".join(tried)
        + "\nPut its four idx files in a folder and set LOWBIT_DATA to it."
    )


def _fetch(target: Path, get: Callable[[Path], Path]) -> None:
    """Get the files into a folder beside their place, check them, and only then move them there."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".fetch-") as beside:
        found = get(Path(beside))
        for file, expected in FASHION_SHA256.items():
            digest = hashlib.sha256(files.read_whole(found / file)).hexdigest()
            if digest != expected:
                raise RunError(f"{file} has SHA-256 {digest} once decompressed, expected {expected}")
        for file in FASHION_SHA256:
            os.replace(found / file, target / file)


def _get_from_debian(folder: Path) -> Path:
    """Download and unpack the package, which needs no rights of an administrator."""
    _command(["apt-get", "download", FASHION_PACKAGE], folder)
    packages = [str(path) for path in folder.glob("*.deb")]
    if len(packages) != 1:
        raise RunError(f"apt-get download left {len(packages)} packages, expected 1")
    _command(["dpkg", "-x", packages[0], "unpacked"], folder)
    return folder / "unpacked" / "usr" / "share" / "datasets" / "fashion-mnist"


def _command(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT, check=False)
    if done.returncode:
        raise RunError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()}")


def _get_from_mirror(folder: Path) -> Path:
    end = time.monotonic() + MIRROR_TOTAL
    for file, expected in MIRROR_SHA256.items():
        content = bytearray()
        with urllib.request.urlopen(FASHION_MIRROR + file, timeout=MIRROR_TIMEOUT) as response:
            # `read` would wait for all of it, however slowly it comes.
            while piece := response.read1(1 << 16):
                content += piece
                if time.monotonic() > end:
                    raise RunError(f"{file} did not come within {MIRROR_TOTAL:g} s")
                if len(content) > MIRROR_BYTES:
                    raise RunError(f"{file} is longer than {MIRROR_BYTES:,} bytes")
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected:
            raise RunError(f"{file} has SHA-256 {digest}, expected {expected}")
        (folder / file).write_bytes(content)
    return folder


@dataclass(frozen=True, kw_only=True)
class CifarLayout:
    """The files of the binary version of CIFAR-10 or CIFAR-100: records of labels and 3·32·32 bytes.

    Args:
        folder: as the archive unpacks.
        train: files of the training set.
        train_records: images in each of them.
        test: file of the test set.
        test_records: images in it.
        labels: bytes of label in a record; the last one is the class.
        classes: number of classes.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", and its web page.
    """

    folder: str
    train: tuple[str, ...]
    train_records: int
    test: str
    test_records: int
    labels: int
    classes: int


CIFAR = {
    "cifar10": CifarLayout(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        train_records=10_000,
        test="test_batch.bin",
        test_records=10_000,
        labels=1,
        classes=10,
    ),
    "cifar100": CifarLayout(
        folder="cifar-100-binary",
        train=("train.bin",),
        train_records=50_000,
        test="test.bin",
        test_records=10_000,
        labels=2,
        classes=100,
    ),
}


def _cifar(name: str) -> _Sets:
    layout = CIFAR[name]
    folder = _cifar_folder(name)
    parts = [_cifar_file(folder / file, layout, layout.train_records) for file in layout.train]
    images, labels = zip(*parts, strict=True)
    test = _cifar_file(folder / layout.test, layout, layout.test_records)
    return _in_memory((torch.cat(images), torch.cat(labels)), test, classes=layout.classes, augment=True)


def _cifar_folder(name: str) -> Path:
    layout, tried = CIFAR[name], []
    for place in _places(name):
        for folder in (place, place / layout.folder):
            lacks = _lacks(folder, (*layout.train, layout.test))
            if not lacks:
                return folder
            tried.append(f"{folder}: {lacks}")
    raise UsageError(
        f"{name} was not found. Get its binary version ({layout.folder}) from "
        "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it and set LOWBIT_DATA to the folder. "
        "Looked in:\n  " + "\n  ".join(tried)
    )


def _cifar_file(path: Path, layout: CifarLayout, records: int) -> tuple[Tensor, Tensor]:
    size = layout.labels + 3 * 32 * 32
    content = files.read(path, limit=records * size, hint="Get the file again.")
    _check_size(path, expected=records * size, found=len(content))
    table = torch.frombuffer(content, dtype=torch.uint8).view(records, size)
    labels = table[:, layout.labels - 1]
    _check_labels(path, labels, layout.classes)
    return table[:, layout.labels :].reshape(records, 3, 32, 32), labels


def _imagefolder(root: Path) -> _Sets:
    train, test = root / "train", root / "test"
    if not test.is_dir():
        test = root / "val"
    if not (train.is_dir() and test.is_dir()):
        raise UsageError(f"imagefolder needs the folders {train} and {root / 'test'} (or val), one folder a class.")
    classes, test_classes = _classes(train), _classes(test)
    if classes != test_classes:
        only = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise RunError(f"the class folders of {train} and {test} differ: only one of them has {only}.")
    task = Task(kind="image", shape=(3, FOLDER_SIZE, FOLDER_SIZE), classes=len(classes))
    return _Sets(task, _folder_source(train, classes), _folder_source(test, classes))


def _classes(folder: Path) -> list[str]:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise RunError(f"no images found: {folder} has no class folders.")
    return classes


def _folder_source(folder: Path, classes: list[str]) -> ImageFolder:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise RunError(f"no images found in {folder / name}: files end in {', '.join(IMAGE_SUFFIXES)}.")
        paths += found
        labels += [label] * len(found)
    samples, of = (
        torch.arange(len(paths), dtype=torch.int64, device="cpu"),
        torch.tensor(labels, dtype=torch.int64, device="cpu"),
    )
    return ImageFolder(paths=tuple(paths), labels=of, samples=samples, augment=True)


class _TooLargeError(Exception):
    """An image has more pixels than are allowed."""


def _decode(path: Path, draws: list[float] | None) -> Tensor:
    """(3, 224, 224) uint8: the centred square, or the box and flip that five uniform draws say."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("imagefolder needs pillow: pip install 'lowbit[train]'.") from error
    limit = files.limit_of("LOWBIT_MAX_PIXELS", MAX_PIXELS)
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow's own, for the whole process
    try:
        # Formats by name: Pillow would hand a file of another kind, whatever its name ends in, to other programs.
        with files.open_file(path) as content, Image.open(content, formats=IMAGE_FORMATS) as file:
            if file.width * file.height > limit:
                raise _TooLargeError(f"{file.width} by {file.height} pixels")
            image = file.convert("RGB")
    except (_TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RunError(
            f"{path} is too large: {error}, where {limit:,} pixels are allowed. Make it smaller, or set "
            "LOWBIT_MAX_PIXELS to a higher limit."
        ) from error
    # Pillow reports a broken file by any of these.
    except (OSError, SyntaxError, ValueError) as error:
        raise RunError(f"{path} cannot be decoded: {error}. Replace or remove it.") from error
    left, top, width, height = _square(*image.size) if draws is None else _box(*image.size, draws[:4])
    box = (left, top, left + width, top + height)
    image = image.resize((FOLDER_SIZE, FOLDER_SIZE), Image.Resampling.BILINEAR, box=box)
    if draws is not None and draws[4] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(FOLDER_SIZE, FOLDER_SIZE, 3).permute(2, 0, 1)


def _square(width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, width and height of the largest centred square."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side, side


def _box(width: int, height: int, draws: list[float]) -> tuple[float, float, float, float]:
    """Left, top, width and height of a box within the image, from draws in [0, 1)."""
    area, ratio, left, top = draws
    pixels = width * height * (0.08 + 0.92 * area)
    aspect = (3 / 4) * (16 / 9) ** ratio
    box_width = min(math.sqrt(pixels * aspect), width)
    box_height = min(math.sqrt(pixels / aspect), height)
    return (width - box_width) * left, (height - box_height) * top, box_width, box_height


def _text(path: Path, context: int) -> _Sets:
    if not path.exists():
        raise UsageError(f"text:{path}: no such file.")
    raw = files.read_whole(path)
    content = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8, device="cpu")
    split = len(content) * 9 // 10
    task = Task(kind="text", shape=(context,), classes=256)
    train = _text_source(path, content[:split], context, augment=True)
    return _Sets(task, train, _text_source(path, content[split:], context, augment=False))


def _text_source(path: Path, content: Tensor, context: int, *, augment: bool) -> Text:
    """All whole windows, less one in training where that leaves one: the offset needs its room."""
    whole = (len(content) - 1) // context
    if whole < 1:
        part = "first 90 %" if augment else "last 10 %"
        raise RunError(
            f"{path}: its {part} are {len(content)} bytes, shorter than one window of {context} + 1. "
            f"Use a longer text or a smaller context."
        )
    windows = max(1, len(content) // context - 1) if augment else whole
    return Text(
        content=content,
        context=context,
        samples=torch.arange(windows, dtype=torch.int64, device="cpu"),
        augment=augment,
    )


_NAMED: dict[str, Callable[[], _Sets]] = {
    "fashion-mnist": _fashion_mnist,
    "digits": _digits,
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
}
