"""Image sets that have a name: scikit-learn's digits, Fashion-MNIST's idx files and CIFAR's records."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import RunError, UsageError
from lowbit.inputs import files
from lowbit.train.data.fetch import fashion_folder, lack_of, places
from lowbit.train.data.images import in_memory
from lowbit.train.data.source import Sets


def _digits() -> Sets:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it has no annotations
    except ImportError as error:
        raise UsageError("digits needs scikit-learn: pip install 'lowbit[train]'.") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target)
    split = 1437
    return in_memory((images[:split], labels[:split]), (images[split:], labels[split:]), classes=10, augment=False)


def _fashion_mnist() -> Sets:
    folder = fashion_folder()
    train, test = (
        _idx_pair(folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz")
        for part in ("train", "t10k")
    )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise RunError(f"{folder}: training images are {tuple(train[0].shape[2:])} pixels, test images differ.")
    return in_memory(train, test, classes=10, augment=True)


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


def _cifar(name: str) -> Sets:
    layout = CIFAR[name]
    folder = _cifar_folder(name)
    parts = [_cifar_file(folder / file, layout, layout.train_records) for file in layout.train]
    images, labels = zip(*parts, strict=True)
    test = _cifar_file(folder / layout.test, layout, layout.test_records)
    return in_memory((torch.cat(images), torch.cat(labels)), test, classes=layout.classes, augment=True)


def _cifar_folder(name: str) -> Path:
    layout, tried = CIFAR[name], []
    for place in places(name):
        for folder in (place, place / layout.folder):
            lacks = lack_of(folder, (*layout.train, layout.test))
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


NAMED: dict[str, Callable[[], Sets]] = {
    "fashion-mnist": _fashion_mnist,
    "digits": _digits,
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
}
