"""Small data sets in the formats of the real ones."""

import gzip
import struct
import urllib.error
import urllib.request
from pathlib import Path

import torch
from torch import Generator, Tensor

from lowbit.train import data

PARTS = {"train": 20, "t10k": 6}


def idx(content: Tensor, magic: int | None = None) -> bytes:
    """`content` in the idx format, not compressed."""
    dims = content.dim()
    header = struct.pack(f">{1 + dims}I", 0x0800 + dims if magic is None else magic, *content.shape)
    return header + content.numpy().tobytes()


def fashion_files() -> dict[str, bytes]:
    """Four small files with the names and formats of Fashion-MNIST."""
    noise = Generator().manual_seed(0)
    files = {}
    for part, count in PARTS.items():
        images = torch.randint(256, (count, 28, 28), generator=noise, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(images))
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Put `files` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def no_network(url: str, timeout: float) -> None:
    """What urllib does without a network."""
    raise urllib.error.URLError(f"no route to {url} in {timeout} s")


def labels(batches: data.Batches) -> list[list[int]]:
    """The labels of one epoch, batch by batch."""
    return [y.tolist() for _, y in batches]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether two lists of batches are equal bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )
