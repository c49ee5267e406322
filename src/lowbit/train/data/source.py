"""What a data set is made of: a task, and a source of samples to train and one to test.

Notation: B batch, C channels, H and W pixels, T positions of a text.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor


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
    def read(self, samples: Tensor, noise: Generator | None, part: slice, /) -> tuple[Tensor, Tensor]:
        """Input and labels of a part of one batch of `order`; augmented with `noise` unless it is ``None``.

        What is drawn for a sample does not depend on the part that is read.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, str | int]:
        """Hashes of what the samples are, see `Batches.fingerprint`."""


class Sets(NamedTuple):
    """What a model must map, and where its samples are read in training and in testing."""

    task: Task
    train: Source
    test: Source


def generator(*key: object) -> Generator:
    """A generator that depends on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    # Torch's CPU generator is seeded by 32 bits.
    return Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def hash_of(tensor: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]


def shuffled(samples: Tensor, noise: Generator | None) -> Tensor:
    """The samples in random order, or as they are where `noise` is ``None``."""
    return (
        samples
        if noise is None
        else samples[torch.randperm(len(samples), generator=noise, dtype=torch.int64, device="cpu")]
    )
