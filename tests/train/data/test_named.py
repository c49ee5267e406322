import gzip
from pathlib import Path

import pytest
import torch
from small_data import idx, labels, same, write

from lowbit.errors import RunError, UsageError
from lowbit.train import data


def test_digits_are_split_1437_to_360() -> None:
    """The digits are images of 8×8 in ten classes, never augmented."""
    digits = data.load("digits", batch_size=1437, seed=0)
    plain = data.load("digits", batch_size=1437, seed=0, augment=False)

    assert digits.task == data.Task(kind="image", shape=(1, 8, 8), classes=10)
    assert same(list(digits.train), list(plain.train))
    assert [len(y) for y in labels(digits.test)] == [360]


IMAGES = idx(torch.zeros(20, 28, 28, dtype=torch.uint8))
BROKEN = {
    "truncated": (gzip.compress(IMAGES[:-7]), "15696 bytes expected, 15689 found"),
    "no header": (gzip.compress(b"\0\0"), "16 bytes expected, 2 found"),
    "magic": (
        gzip.compress(idx(torch.zeros(20, 28, 28, dtype=torch.uint8), 0x0C03)),
        "0x00000c03, expected 0x00000803",
    ),
    "not gzip": (IMAGES, "corrupt gzip"),
    "cut gzip": (gzip.compress(IMAGES)[:-9], "corrupt gzip"),
    "bad gzip": (gzip.compress(IMAGES)[:12] + b"\xff" * 40, "corrupt gzip"),
    "empty": (gzip.compress(idx(torch.zeros(0, 28, 28, dtype=torch.uint8))), "holds no samples"),
    "fewer": (gzip.compress(idx(torch.zeros(9, 28, 28, dtype=torch.uint8))), "9 images and .* 20 labels"),
    "other size": (gzip.compress(idx(torch.zeros(20, 8, 8, dtype=torch.uint8))), "test images differ"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_idx_file_is_one_clear_error(case: str, fashion: Path) -> None:
    """Whatever is wrong with a file of images, the message names the file or folder and the fault."""
    content, fault = BROKEN[case]
    write(fashion, {"train-images-idx3-ubyte.gz": content})

    with pytest.raises(RunError, match=fault) as caught:
        data.load("fashion-mnist", batch_size=4, seed=0)

    assert str(fashion) in str(caught.value)


def test_an_idx_label_out_of_range_is_an_error(fashion: Path) -> None:
    """A label of 10 names its file and sample."""
    bad = torch.tensor([1, 2, 10, 3, 4, 5], dtype=torch.uint8)
    write(fashion, {"t10k-labels-idx1-ubyte.gz": gzip.compress(idx(bad))})

    with pytest.raises(
        RunError, match=r"t10k-labels-idx1-ubyte.gz: label 10 of sample 2 is out of range, allowed are 0 to 9"
    ):
        data.load("fashion-mnist", batch_size=4, seed=0)


@pytest.mark.parametrize(("name", "samples", "classes"), [("cifar10", 50, 10), ("cifar100", 10, 100)])
@pytest.mark.usefixtures("cifar")
def test_cifar_is_read_from_its_binary_version(name: str, samples: int, classes: int) -> None:
    """All training files are joined, the fine label is the class, planes are red, green, blue."""
    loaded = data.load(name, batch_size=samples, seed=0, augment=False)
    ((x, _),), ((_, y),) = loaded.train, loaded.test

    assert loaded.task == data.Task(kind="image", shape=(3, 32, 32), classes=classes)
    assert x.shape == (samples, 3, 32, 32)
    assert (x[:, 0, 0, 0] > 1).all()
    assert (x[:, 2, 31, 31] > 1).all()
    assert not x[:, 1].any()
    assert y.tolist() == [classes - 1 - i for i in range(4)]


def test_missing_cifar_says_what_to_get(tmp_path: Path) -> None:
    """The error names the binary version, where it is published and the folders that were searched."""
    with pytest.raises(UsageError, match="binary version") as caught:
        data.load("cifar10", batch_size=4, seed=0)

    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in str(caught.value)
    assert f"{tmp_path}/system/cifar10/cifar-10-batches-bin: no such folder" in str(caught.value)


def test_a_truncated_cifar_file_is_an_error(cifar: Path) -> None:
    """A file that lacks bytes is named, with the bytes expected and found."""
    path = cifar / "cifar-100-binary" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(RunError, match=r"train.bin .* 30740 bytes expected, 30739 found"):
        data.load("cifar100", batch_size=4, seed=0)


def test_a_cifar_label_out_of_range_is_an_error(cifar: Path) -> None:
    """A label of 10 in CIFAR-10 names its file and sample."""
    path = cifar / "cifar-10-batches-bin" / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    content[3073] = 10
    path.write_bytes(content)

    with pytest.raises(RunError, match=r"data_batch_2.bin: label 10 of sample 1 is out of range"):
        data.load("cifar10", batch_size=4, seed=0)


def test_a_cifar_file_is_read_up_to_its_own_length(cifar: Path) -> None:
    """A binary file longer than CIFAR's is refused unread."""
    with open(cifar / "cifar-10-batches-bin" / "test_batch.bin", "ab") as file:
        file.truncate(1 << 40)

    with pytest.raises(RunError, match=r"test_batch.bin is too long.*12,292 are allowed. Get the file again"):
        data.load("cifar10", batch_size=1, seed=0)
