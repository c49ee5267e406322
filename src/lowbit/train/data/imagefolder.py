"""Folders of image files, one folder a class, decoded as they are read.

Notation: N samples, B batch.
"""

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from lowbit.errors import RunError, UsageError
from lowbit.inputs import files
from lowbit.train.data.source import Sets, Source, Task, hash_of, shuffled

FOLDER_SIZE = 224
"""Height and width in pixels of every image of an `ImageFolder`."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")

MAX_PIXELS = 50_000_000
"""Pixels that one image file may have; ``LOWBIT_MAX_PIXELS`` sets another limit. Decoding takes 8 bytes for each."""


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
        return shuffled(self.samples, noise)

    def read(self, samples: Tensor, noise: Generator | None, part: slice) -> tuple[Tensor, Tensor]:
        """(B, 3, 224, 224) float32, normalised by ImageNet's mean and std, and labels (B,) int64."""
        paths = [self.paths[sample] for sample in samples.tolist()]
        draws: list[list[float]] | list[None] = [None] * len(paths)
        if self.augment and noise is not None:
            draws = torch.rand(len(paths), 5, generator=noise, dtype=torch.float32, device="cpu").tolist()
        # Decoding leaves Python's lock, so threads gain; every draw is made before they start.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            x = torch.stack(list(pool.map(_decode, paths[part], draws[part])))
        x = x.float()
        mean = x.new_tensor([0.485, 0.456, 0.406]).mul(255).view(3, 1, 1)
        std = x.new_tensor([0.229, 0.224, 0.225]).mul(255).view(3, 1, 1)
        return x.sub_(mean).div_(std), self.labels[samples[part]]

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
            "labels": hash_of(self.labels),
        }


def imagefolder(root: Path) -> Sets:
    """The sets in the folders ``train`` and ``test``, or ``val``, of `root`."""
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
    return Sets(task, _folder_source(train, classes), _folder_source(test, classes))


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
