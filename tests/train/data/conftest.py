"""Where the tests of data find small data sets, and nothing else."""

import itertools
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_data import fashion_files, no_network, write

from lowbit.train.data import fetch, named


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set of this machine is seen, and the network is never used."""
    monkeypatch.delenv("LOWBIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(fetch, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small Fashion-MNIST that LOWBIT_DATA names."""
    monkeypatch.setenv("LOWBIT_DATA", str(tmp_path / "data"))
    return write(tmp_path / "data", fashion_files())


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both CIFAR sets, of 10 training and 4 test records a file, that LOWBIT_DATA names."""
    monkeypatch.setenv("LOWBIT_DATA", str(tmp_path / "data"))
    for name, layout in named.CIFAR.items():
        monkeypatch.setitem(named.CIFAR, name, replace(layout, train_records=10, test_records=4))
        for file in (*layout.train, layout.test):
            count = 4 if file == layout.test else 10
            records = torch.zeros(count, layout.labels + 3072, dtype=torch.uint8)
            records[:, layout.labels - 1] = layout.classes - 1 - torch.arange(count)
            records[:, layout.labels] = 200  # the first red pixel
            records[:, -1] = 100  # the last blue one
            write(tmp_path / "data" / layout.folder, {file: records.numpy().tobytes()})
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of two classes: tall red images and wide blue ones."""
    for part, name in itertools.product(("train", "val"), ("blue", "red")):
        where = tmp_path / "images" / part / name
        where.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (30, 20) if name == "blue" else (20, 30), name).save(where / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 1,000 bytes that count up, modulo 251."""
    path = tmp_path / "text.bin"
    path.write_bytes(bytes(i % 251 for i in range(1000)))
    return path
