import contextlib
import gzip
import hashlib
import io
import itertools
import os
import struct
import tracemalloc
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from lowbit.errors import RunError, UsageError
from lowbit.inputs import files
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


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set of this machine is seen, and the network is never used."""
    monkeypatch.delenv("LOWBIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(data, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)


def no_network(url: str, timeout: float) -> None:
    """What urllib does without a network."""
    raise urllib.error.URLError(f"no route to {url} in {timeout} s")


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small Fashion-MNIST that LOWBIT_DATA names."""
    monkeypatch.setenv("LOWBIT_DATA", str(tmp_path / "data"))
    return write(tmp_path / "data", fashion_files())


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both CIFAR sets, of 10 training and 4 test records a file, that LOWBIT_DATA names."""
    monkeypatch.setenv("LOWBIT_DATA", str(tmp_path / "data"))
    for name, layout in data.CIFAR.items():
        monkeypatch.setitem(data.CIFAR, name, replace(layout, train_records=10, test_records=4))
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


def labels(batches: data.Batches) -> list[list[int]]:
    """The labels of one epoch, batch by batch."""
    return [y.tolist() for _, y in batches]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether two lists of batches are equal bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.usefixtures("fashion")
def test_an_epoch_of_training_has_every_sample_of_its_whole_batches_once() -> None:
    """20 samples in batches of 4 are all seen, two of each of the ten labels."""
    loaded = data.load("fashion-mnist", batch_size=4, seed=0)

    seen = sorted(itertools.chain(*labels(loaded.train)))

    assert len(loaded.train) == 5
    assert seen == sorted([*range(10)] * 2)


@pytest.mark.usefixtures("fashion")
def test_epochs_have_different_orders() -> None:
    """The second epoch of a loader is another permutation than the first."""
    train = data.load("fashion-mnist", batch_size=4, seed=0).train

    assert labels(train) != labels(train)


@pytest.mark.usefixtures("fashion")
def test_seeds_have_different_orders() -> None:
    """Two seeds shuffle differently."""
    first, second = (data.load("fashion-mnist", batch_size=4, seed=seed).train for seed in (0, 1))

    assert labels(first) != labels(second)


@pytest.mark.parametrize("name", ["fashion-mnist", "imagefolder", "text"])
@pytest.mark.usefixtures("fashion")
def test_the_same_seed_gives_the_same_batches(name: str, folder: Path, text: Path) -> None:
    """Two loaders of one seed agree over two epochs, whatever was drawn from the global generator."""
    name = {"imagefolder": f"imagefolder:{folder}", "text": f"text:{text}"}.get(name, name)
    first, second = (data.load(name, batch_size=3, seed=5, context=16).train for _ in range(2))
    expected = [*first, *first]
    torch.rand(7)

    assert same([*second, *second], expected)


@pytest.mark.usefixtures("fashion")
def test_loading_and_iterating_leave_the_global_generator_alone() -> None:
    """An epoch with augmentation draws nothing from torch's global generator."""
    before = torch.get_rng_state()

    list(data.load("fashion-mnist", batch_size=4, seed=0).train)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["fashion-mnist", "text"])
@pytest.mark.parametrize("done", [0, 2, 5, 7])
@pytest.mark.usefixtures("fashion")
def test_a_resumed_loader_gives_the_remaining_batches(name: str, done: int, text: Path) -> None:
    """Saving after any batch and loading elsewhere continues this epoch and then the next one."""

    def loader() -> data.Batches:
        path = name if name == "fashion-mnist" else f"text:{text}"
        return data.load(path, batch_size=4, seed=3, subset=20, context=16).train

    whole, stopped, resumed = loader(), loader(), loader()
    expected = [*whole, *whole, *whole]
    epochs, rest = divmod(done, len(stopped))
    for count in [len(stopped)] * epochs + [rest] * (rest > 0):
        list(itertools.islice(stopped, count))

    resumed.load_state_dict(stopped.state_dict())
    actual = [batch for _ in range(3 - epochs) for batch in resumed]

    assert same(actual, expected[done:])


@pytest.mark.usefixtures("fashion")
def test_the_state_counts_batches_handed_out() -> None:
    """After two batches of the second epoch the state is epoch 1 and 2 batches."""
    train = data.load("fashion-mnist", batch_size=4, seed=0).train

    list(train)
    list(itertools.islice(train, 2))

    assert train.state_dict() == {"epoch": 1, "batches": 2}


@pytest.mark.usefixtures("fashion")
def test_an_epoch_that_is_never_exhausted_is_followed_by_the_next() -> None:
    """A caller that stops after len batches, without StopIteration, gets the next epoch's order."""
    first, second = (data.load("fashion-mnist", batch_size=4, seed=0).train for _ in range(2))
    expected = [*first, *first]

    actual = []
    for _ in range(2):
        iterator = iter(second)
        actual += [next(iterator) for _ in range(len(second))]

    assert same(actual, expected)


@pytest.mark.usefixtures("fashion")
def test_an_iterator_that_drew_nothing_does_not_use_up_its_epoch() -> None:
    """Making two iterators before the first batch still starts in the middle where the state says."""
    train = data.load("fashion-mnist", batch_size=4, seed=0).train
    train.load_state_dict({"epoch": 2, "batches": 3})

    iter(train)
    remaining = list(train)

    assert len(remaining) == 2
    assert train.state_dict() == {"epoch": 2, "batches": 5}


@pytest.mark.parametrize("state", [{"epoch": 0, "batches": 6}, {"epoch": -1, "batches": 0}, {}])
@pytest.mark.usefixtures("fashion")
def test_a_state_of_another_loader_is_refused(state: dict[str, int]) -> None:
    """A state that no loader of five batches can have is an error that says so."""
    train = data.load("fashion-mnist", batch_size=4, seed=0).train

    with pytest.raises(RunError, match="epoch of 5 batches"):
        train.load_state_dict(state)


@pytest.mark.usefixtures("fashion")
def test_the_test_set_is_whole_and_in_order() -> None:
    """Six test images in batches of 4 come in file order, the short batch last, each epoch the same."""
    test = data.load("fashion-mnist", batch_size=4, seed=0).test

    assert len(test) == 2
    assert labels(test) == labels(test) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.usefixtures("fashion")
def test_training_drops_the_short_last_batch() -> None:
    """20 samples in batches of 6 make three batches of 6."""
    train = data.load("fashion-mnist", batch_size=6, seed=0).train

    assert [len(y) for y in labels(train)] == [6, 6, 6]


@pytest.mark.usefixtures("fashion")
def test_fewer_samples_than_a_batch_is_an_error() -> None:
    """A batch of 21 out of 20 samples is refused, with the largest size that works."""
    with pytest.raises(UsageError, match="20 samples, fewer than one batch of 21: use a batch_size of at most 20"):
        data.load("fashion-mnist", batch_size=21, seed=0)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"subset": 0}, {"subset": 21}, {"context": 0}])
@pytest.mark.usefixtures("fashion")
def test_a_number_out_of_range_is_an_error(wrong: dict[str, int]) -> None:
    """Sizes that no data set can have are refused by name."""
    with pytest.raises(UsageError, match=next(iter(wrong))):
        data.load("fashion-mnist", **{"batch_size": 4, "seed": 0, **wrong})


@pytest.mark.usefixtures("fashion")
def test_a_subset_is_the_same_for_every_seed() -> None:
    """Ten of twenty samples are picked once and for all, and their order alone depends on the seed."""
    first, second = (labels(data.load("fashion-mnist", batch_size=2, seed=seed, subset=10).train) for seed in (0, 1))

    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))
    assert len(first) == 5


@pytest.mark.usefixtures("fashion")
def test_a_subset_leaves_the_test_set_whole() -> None:
    """Training on four samples still tests on all six, normalised in the same way."""
    whole, part = (data.load("fashion-mnist", batch_size=4, seed=0, subset=n).test for n in (None, 4))

    assert same(list(part), list(whole))


@pytest.mark.usefixtures("fashion")
def test_pixels_are_normalised_by_the_training_set() -> None:
    """Without augmentation an epoch has mean 0 and standard deviation 1, to float32 rounding."""
    train = data.load("fashion-mnist", batch_size=20, seed=0, augment=False).train

    ((x, y),) = train

    assert (x.dtype, x.shape) == (torch.float32, (20, 1, 28, 28))
    assert (y.dtype, y.shape) == (torch.int64, (20,))
    assert abs(float(x.double().mean())) < 1e-5
    assert abs(float(x.double().std(correction=0)) - 1) < 1e-5


def test_a_constant_channel_is_normalised_to_zero(fashion: Path) -> None:
    """Images of a single grey value become 0, not nan."""
    grey = torch.full((20, 28, 28), 7, dtype=torch.uint8)
    write(fashion, {"train-images-idx3-ubyte.gz": gzip.compress(idx(grey))})

    ((x, _),) = data.load("fashion-mnist", batch_size=20, seed=0, augment=False).train

    assert not x.any()


@pytest.mark.usefixtures("fashion")
def test_augmentation_changes_training_images_only() -> None:
    """With augmentation the order stays and the pixels of training change."""
    plain, augmented = (data.load("fashion-mnist", batch_size=20, seed=0, augment=augment) for augment in (False, True))
    ((x, y),), ((x_augmented, y_augmented),) = plain.train, augmented.train

    assert torch.equal(y, y_augmented)
    assert not torch.equal(x, x_augmented)
    assert same(list(plain.test), list(augmented.test))


def test_a_crop_is_a_shifted_and_possibly_mirrored_image() -> None:
    """Each of 64 crops is one of the 81 shifts of its image, mirrored or not, and both kinds occur."""
    noise = Generator().manual_seed(0)
    x = torch.randint(1, 256, (64, 2, 9, 10), generator=noise, dtype=torch.uint8)

    y = data.crop_and_flip(x, noise)

    found = set()
    for before, after in zip(x, y, strict=True):
        padded = torch.nn.functional.pad(before, (4, 4, 4, 4))
        matches = [
            (top, left, mirrored)
            for top, left, mirrored in itertools.product(range(9), range(9), (False, True))
            if torch.equal(padded[:, top : top + 9, left : left + 10], after.flip(2) if mirrored else after)
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(9))
    assert {mirrored for _, _, mirrored in found} == {False, True}


def test_an_unknown_name_lists_the_known_ones() -> None:
    """A misspelt data set is answered with the nearest name and all of them."""
    with pytest.raises(UsageError, match=r"Did you mean 'fashion-mnist'\?.*text:PATH"):
        data.load("fashion-mnits", batch_size=4, seed=0)


@pytest.mark.parametrize("name", ["text:", "imagefolder:"])
def test_a_name_without_its_path_is_an_error(name: str) -> None:
    """A colon with nothing after it asks for the path."""
    with pytest.raises(UsageError, match=f"write {name}PATH"):
        data.load(name, batch_size=4, seed=0)


def test_names_are_those_that_load_knows() -> None:
    """The names for help texts are the six of the documentation."""
    expected = ("fashion-mnist", "digits", "cifar10", "cifar100", "imagefolder:PATH", "text:PATH")

    assert data.names() == expected


def test_digits_are_split_1437_to_360() -> None:
    """The digits are images of 8×8 in ten classes, never augmented."""
    digits = data.load("digits", batch_size=1437, seed=0)
    plain = data.load("digits", batch_size=1437, seed=0, augment=False)

    assert digits.task == data.Task(kind="image", shape=(1, 8, 8), classes=10)
    assert same(list(digits.train), list(plain.train))
    assert [len(y) for y in labels(digits.test)] == [360]


@pytest.mark.parametrize("place", ["data", "data/fashion-mnist", "system/fashion-mnist", "cache/lowbit/fashion-mnist"])
def test_fashion_mnist_is_found_in_each_place(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four folders are searched, also where LOWBIT_DATA is set to a folder without the files."""
    monkeypatch.setenv("LOWBIT_DATA", str(tmp_path / "data"))
    write(tmp_path / place, fashion_files())

    loaded = data.load("fashion-mnist", batch_size=4, seed=0)

    assert loaded.task == data.Task(kind="image", shape=(1, 28, 28), classes=10)


def test_what_cannot_be_found_or_fetched_is_reported_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names each folder, each fetch and its reason; standard error told of each fetch."""
    monkeypatch.setenv("LOWBIT_DATA", str(tmp_path / "data"))
    files = fashion_files()
    del files["t10k-labels-idx1-ubyte.gz"]
    write(tmp_path / "data", files)

    with pytest.raises(RunError) as caught:
        data.load("fashion-mnist", batch_size=4, seed=0)

    message = str(caught.value)
    assert f"{tmp_path}/data: lacks t10k-labels-idx1-ubyte.gz" in message
    assert f"{tmp_path}/data/fashion-mnist: no such folder" in message
    assert f"{tmp_path}/system/fashion-mnist: no such folder" in message
    assert f"{tmp_path}/cache/lowbit/fashion-mnist: no such folder" in message
    assert "dataset-fashion-mnist: [Errno 2] No such file or directory: 'apt-get'" in message
    assert "no route to" in message
    assert capsys.readouterr().err.count("fetching fashion-mnist") == 2


def script(path: Path, lines: str) -> None:
    """An executable shell script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\nset -e\n{lines}\n")
    path.chmod(0o755)


def expect(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `files` the ones whose checksums are right."""
    sums = {name: hashlib.sha256(gzip.decompress(content)).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "FASHION_SHA256", sums)
    packed = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "MIRROR_SHA256", packed)


def fake_debian(tmp_path: Path, files: dict[str, bytes]) -> None:
    """An apt-get that downloads and a dpkg that unpacks `files`, and nothing else."""
    package = write(tmp_path / "package", files)
    script(tmp_path / "bin" / "apt-get", '[ "$*" = "download dataset-fashion-mnist" ]; touch some.deb')
    inside = '"$3/usr/share/datasets/fashion-mnist"'
    script(
        tmp_path / "bin" / "dpkg",
        f'[ "$1 ${{2##*/}}" = "-x some.deb" ]; mkdir -p {inside}; cp {package}/* {inside}',
    )


def fake_mirror(files: dict[str, bytes]) -> Callable[..., contextlib.closing[io.BytesIO]]:
    """A urlopen that serves `files`."""

    def urlopen(url: str, timeout: float) -> contextlib.closing[io.BytesIO]:
        assert timeout > 0
        return contextlib.closing(io.BytesIO(files[url.rpartition("/")[2]]))

    return urlopen


def test_fashion_mnist_comes_from_debian_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a working apt-get the four files, and nothing else, end up in the cache."""
    files = fashion_files()
    expect(files, monkeypatch)
    fake_debian(tmp_path, files)

    data.load("fashion-mnist", batch_size=4, seed=0)

    cache = tmp_path / "cache" / "lowbit" / "fashion-mnist"
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == files


def test_fashion_mnist_comes_from_the_mirror_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without apt-get the mirror is asked, and the second load finds its files in the cache."""
    files = fashion_files()
    expect(files, monkeypatch)
    monkeypatch.setattr(urllib.request, "urlopen", fake_mirror(files))

    data.load("fashion-mnist", batch_size=4, seed=0)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    data.load("fashion-mnist", batch_size=4, seed=0)

    assert len(list((tmp_path / "cache" / "lowbit" / "fashion-mnist").iterdir())) == 4


def test_a_fetched_file_with_another_checksum_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sources with one altered file each are refused, and the cache stays empty."""
    files = fashion_files()
    expect(files, monkeypatch)
    altered = files | {"t10k-labels-idx1-ubyte.gz": gzip.compress(b"altered")}
    fake_debian(tmp_path, altered)
    monkeypatch.setattr(urllib.request, "urlopen", fake_mirror(altered))

    with pytest.raises(RunError) as caught:
        data.load("fashion-mnist", batch_size=4, seed=0)

    assert str(caught.value).count("t10k-labels-idx1-ubyte.gz has SHA-256") == 2
    assert not list((tmp_path / "cache" / "lowbit" / "fashion-mnist").iterdir())


def test_a_download_is_hashed_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is not the mirror's nothing is decompressed."""
    files = fashion_files()
    expect(files, monkeypatch)
    altered = {name: gzip.compress(gzip.decompress(content), 1) for name, content in files.items()}
    monkeypatch.setattr(urllib.request, "urlopen", fake_mirror(altered))
    read: list[Path] = []
    monkeypatch.setattr("lowbit.inputs.files.read_whole", read.append)

    with pytest.raises(RunError, match=r"train-images-idx3-ubyte.gz has SHA-256 \w+, expected"):
        data.load("fashion-mnist", batch_size=4, seed=0)

    assert read == []


@pytest.mark.parametrize(("name", "value"), [("MIRROR_TOTAL", -1.0), ("MIRROR_BYTES", 10)])
def test_a_download_has_a_limit_of_time_and_bytes(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror that gives its bytes too slowly, or too many, is left."""
    files = fashion_files()
    expect(files, monkeypatch)
    monkeypatch.setattr(urllib.request, "urlopen", fake_mirror(files))
    monkeypatch.setattr(data, name, value)

    with pytest.raises(RunError, match=r"did not come within -1 s|longer than 10 bytes"):
        data.load("fashion-mnist", batch_size=4, seed=0)


def test_a_failing_apt_get_is_quoted(tmp_path: Path) -> None:
    """What apt-get writes on its standard error is in the message."""
    script(tmp_path / "bin" / "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")

    with pytest.raises(RunError, match="failed with 100: E: Unable to locate package"):
        data.load("fashion-mnist", batch_size=4, seed=0)


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


def test_an_image_folder_is_decoded_to_224_pixels(folder: Path) -> None:
    """Classes are the sorted folder names, and an image keeps its colour when resized and cropped."""
    loaded = data.load(f"imagefolder:{folder}", batch_size=6, seed=0)
    ((x, y),) = loaded.test

    assert loaded.task == data.Task(kind="image", shape=(3, 224, 224), classes=2)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert (x.dtype, x.shape) == (torch.float32, (6, 3, 224, 224))
    assert torch.allclose(x[0, 2], torch.tensor((1 - 0.406) / 0.225))
    assert torch.allclose(x[5, 0], torch.tensor((1 - 0.485) / 0.229))


def test_the_test_crop_is_the_centred_square(folder: Path) -> None:
    """A wide test image loses its sides: white borders beside the middle square never show."""
    image = Image.new("RGB", (60, 20), "white")
    # One pixel wider on both sides, which interpolation reaches.
    image.paste(Image.new("RGB", (22, 20), "blue"), (19, 0))
    image.save(folder / "val" / "blue" / "0.png")

    x, _ = next(iter(data.load(f"imagefolder:{folder}", batch_size=6, seed=0).test))

    assert torch.equal(x[0], x[1])


def test_the_training_crop_differs_from_epoch_to_epoch(folder: Path) -> None:
    """A gradient image is cropped and flipped anew in each epoch, and not at all without `augment`."""
    for path in folder.glob("train/*/*.png"):
        Image.linear_gradient("L").convert("RGB").save(path)
    augmented, plain = (
        data.load(f"imagefolder:{folder}", batch_size=6, seed=0, augment=augment).train for augment in (True, False)
    )
    first, second = ((next(iter(augmented))[0], next(iter(plain))[0]) for _ in range(2))

    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """The error says which folders are needed."""
    with pytest.raises(UsageError, match=r"needs the folders .*train and .*test"):
        data.load(f"imagefolder:{tmp_path}", batch_size=1, seed=0)


def test_folders_without_images_are_an_error(folder: Path) -> None:
    """A class without any image names its folder."""
    (folder / "train" / "red").rename(folder / "train" / "old")
    (folder / "train" / "red").mkdir()
    (folder / "val" / "old").mkdir()

    with pytest.raises(RunError, match=r"no images found in .*train/red"):
        data.load(f"imagefolder:{folder}", batch_size=1, seed=0)


def test_a_folder_without_classes_is_an_error(tmp_path: Path) -> None:
    """A training folder with no class folders has no images."""
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()

    with pytest.raises(RunError, match=r"no images found: .*train has no class folders"):
        data.load(f"imagefolder:{tmp_path}", batch_size=1, seed=0)


def test_classes_that_differ_are_an_error(folder: Path) -> None:
    """A class of the test set that training lacks is named."""
    (folder / "val" / "green").mkdir()

    with pytest.raises(RunError, match="only one of them has green"):
        data.load(f"imagefolder:{folder}", batch_size=1, seed=0)


def test_a_broken_image_is_an_error(folder: Path) -> None:
    """An image cut short is named when its batch is read."""
    path = folder / "val" / "red" / "1.png"
    path.write_bytes(path.read_bytes()[:40])

    with pytest.raises(RunError, match=r"red/1.png cannot be decoded"):
        list(data.load(f"imagefolder:{folder}", batch_size=6, seed=0).test)


def test_text_is_shifted_by_one(text: Path) -> None:
    """Each label is the byte after its input, in windows of `context` bytes."""
    loaded = data.load(f"text:{text}", batch_size=4, seed=0, context=16)
    x, y = next(iter(loaded.train))

    assert loaded.task == data.Task(kind="text", shape=(16,), classes=256)
    assert (x.dtype, y.dtype, x.shape, y.shape) == (torch.int64, torch.int64, (4, 16), (4, 16))
    assert torch.equal((x + 1) % 251, y)


def test_text_windows_of_an_epoch_do_not_overlap(text: Path) -> None:
    """The 55 windows of 16 bytes in the first 900 lie side by side, shifted differently in each epoch."""
    text.write_bytes(bytes(range(256)) * 4)
    train = data.load(f"text:{text}", batch_size=1, seed=0, subset=15, context=16).train
    starts = [sorted(int(x[0, 0]) % 16 for x, _ in train) for _ in range(4)]

    assert all(len(set(epoch)) == 1 for epoch in starts)
    assert len({epoch[0] for epoch in starts}) > 1


def test_text_without_augmentation_starts_at_its_first_byte(text: Path) -> None:
    """With `augment` off each epoch has the windows at multiples of `context`."""
    train = data.load(f"text:{text}", batch_size=1, seed=0, subset=10, context=16, augment=False).train
    starts = [{int(x[0, 0]) % 251 for x, _ in train} for _ in range(2)]

    assert starts[0] == starts[1] <= {16 * i % 251 for i in range(56)}


def test_the_last_tenth_of_a_text_is_held_out(text: Path) -> None:
    """Six windows of 16 bytes fit in the last 100, from byte 900 on, in order."""
    x, _ = next(iter(data.load(f"text:{text}", batch_size=9, seed=0, context=16).test))

    assert x[:, 0].tolist() == [(900 + 16 * i) % 251 for i in range(6)]


@pytest.mark.parametrize("length", [170, 171, 177, 330, 341, 350])
def test_a_text_of_any_length_is_read_within_its_bounds(length: int, text: Path) -> None:
    """Texts that just fill a window or two give whole windows at every offset."""
    text.write_bytes(bytes(length))
    loaded = data.load(f"text:{text}", batch_size=1, seed=0, context=16)
    shapes = {x.shape for _ in range(20) for x, _ in loaded.train}

    assert shapes == {(1, 16)}
    assert len(loaded.train) == max(1, length * 9 // 10 // 16 - 1)


def test_a_gzipped_text_is_the_same_text(text: Path, tmp_path: Path) -> None:
    """A file that ends in .gz is decompressed."""
    packed = tmp_path / "text.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    plain, unpacked = (data.load(f"text:{path}", batch_size=4, seed=0, context=16) for path in (text, packed))

    assert same(list(plain.train), list(unpacked.train))


@pytest.mark.parametrize(("length", "fault"), [(0, "first 90 % are 0 bytes"), (160, "last 10 % are 16 bytes")])
def test_a_text_shorter_than_a_window_is_an_error(length: int, fault: str, text: Path) -> None:
    """The error says which part is too short, and for what."""
    text.write_bytes(bytes(length))

    with pytest.raises(RunError, match=f"{fault}, shorter than one window of 16"):
        data.load(f"text:{text}", batch_size=1, seed=0, context=16)


def test_a_corrupt_gzipped_text_is_an_error(tmp_path: Path) -> None:
    """A .gz file that is no gzip is named."""
    (tmp_path / "text.gz").write_bytes(b"plain")

    with pytest.raises(RunError, match=r"text.gz is a corrupt gzip file"):
        data.load(f"text:{tmp_path}/text.gz", batch_size=1, seed=0)


def test_a_missing_text_is_an_error(tmp_path: Path) -> None:
    """A path that is no file is named."""
    with pytest.raises(UsageError, match=r"none.txt: no such file"):
        data.load(f"text:{tmp_path}/none.txt", batch_size=1, seed=0)


def bomb(path: Path, megabytes: int) -> None:
    """A gzip file of zeros, a thousandth of its content's length."""
    with gzip.open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(bytes(1 << 20))


def peak_of(load: Callable[[], object]) -> int:
    """The most bytes that Python held while it ran."""
    tracemalloc.start()
    try:
        load()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_compressed_file_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that decompresses to more than allowed is refused before it fills the memory; the limit can be raised."""
    bomb(tmp_path / "text.gz", 64)
    monkeypatch.setenv("LOWBIT_MAX_BYTES", str(4 << 20))

    def refused() -> None:
        with pytest.raises(RunError, match=r"more than 4,194,304 bytes once decompressed.*LOWBIT_MAX_BYTES"):
            data.load(f"text:{tmp_path / 'text.gz'}", batch_size=1, seed=0)

    assert 4 << 20 < peak_of(refused) < 16 << 20
    monkeypatch.setenv("LOWBIT_MAX_BYTES", str(64 << 20))
    assert len(data.load(f"text:{tmp_path / 'text.gz'}", batch_size=1, seed=0, context=1 << 20).train) > 50


def test_a_sparse_file_is_refused_by_its_length(tmp_path: Path) -> None:
    """A file of a terabyte that takes no disk is not read."""
    with open(tmp_path / "text", "wb") as file:
        file.truncate(1 << 40)

    with pytest.raises(RunError, match=r"too long: 1,099,511,627,776 bytes, where 2,147,483,648 are allowed"):
        data.load(f"text:{tmp_path / 'text'}", batch_size=1, seed=0)


def test_a_cifar_file_is_read_up_to_its_own_length(cifar: Path) -> None:
    """A binary file longer than CIFAR's is refused unread."""
    with open(cifar / "cifar-10-batches-bin" / "test_batch.bin", "ab") as file:
        file.truncate(1 << 40)

    with pytest.raises(RunError, match=r"test_batch.bin is too long.*12,292 are allowed. Get the file again"):
        data.load("cifar10", batch_size=1, seed=0)


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a FIFO"), (os.mkdir, "a folder")])
def test_what_is_not_a_file_is_refused_at_once(make: Callable[[Path], None], kind: str, tmp_path: Path) -> None:
    """A FIFO without a writer, which `open` would wait for, and a folder are named; so is a device."""
    make(tmp_path / "text")

    with pytest.raises(RunError, match=f"it is {kind}, not a file"):
        data.load(f"text:{tmp_path / 'text'}", batch_size=1, seed=0)
    with pytest.raises(RunError, match="it is a device, not a file"):
        data.load("text:/dev/zero", batch_size=1, seed=0)


def test_a_fifo_among_images_is_refused_at_once(folder: Path) -> None:
    """An image that is not a file does not make the run wait."""
    (folder / "val" / "red" / "1.png").unlink()
    os.mkfifo(folder / "val" / "red" / "1.png")

    with pytest.raises(RunError, match=r"red/1.png cannot be decoded: .*a FIFO"):
        list(data.load(f"imagefolder:{folder}", batch_size=6, seed=0).test)


@pytest.mark.parametrize("size", [(7072, 7071), (20_000, 20_000)])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(size: tuple[int, int], folder: Path) -> None:
    """More than 50 million pixels are refused before any is decoded, also where Pillow has its own word on them."""
    path = folder / "val" / "red" / "1.png"
    header = struct.pack(">II5B", *size, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(start + struct.pack(">I", 9) + b"IDAT")

    with pytest.raises(RunError, match=r"red/1.png is too large: .*50,000,000 pixels are allowed.*LOWBIT_MAX_PIXELS"):
        list(data.load(f"imagefolder:{folder}", batch_size=6, seed=0).test)


def test_the_limit_of_pixels_can_be_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of 600 pixels are read with that limit and refused with one less."""
    monkeypatch.setenv("LOWBIT_MAX_PIXELS", "600")
    assert len(list(data.load(f"imagefolder:{folder}", batch_size=6, seed=0).test)) == 1
    monkeypatch.setenv("LOWBIT_MAX_PIXELS", "599")

    with pytest.raises(RunError, match="30 by 20 pixels, where 599"):
        list(data.load(f"imagefolder:{folder}", batch_size=6, seed=0).test)


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_an_impossible_limit_is_refused(value: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is not a number of bytes is an error with the variable's name."""
    monkeypatch.setenv("LOWBIT_MAX_BYTES", value)

    with pytest.raises(UsageError, match="LOWBIT_MAX_BYTES"):
        data.load(f"text:{text}", batch_size=1, seed=0)


def test_an_image_of_another_format_is_refused(folder: Path) -> None:
    """Pillow opens a file by its content, and would start a program for PostScript that is called .png."""
    (folder / "val" / "red" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")

    with pytest.raises(RunError, match="cannot be decoded"):
        list(data.load(f"imagefolder:{folder}", batch_size=6, seed=0).test)


@pytest.mark.parametrize("joined", [b"", b"\0" * 512])
def test_a_gzip_file_of_several_members_is_read_whole(joined: bytes, text: Path, tmp_path: Path) -> None:
    """Members one after the other, with zeros between them, give what gzip gives."""
    content = text.read_bytes()
    (tmp_path / "text.gz").write_bytes(gzip.compress(content[:300]) + joined + gzip.compress(content[300:]) + joined)

    found = files.read(tmp_path / "text.gz", limit=2000, hint="")

    assert bytes(found) == content


def test_fingerprints_tell_what_changed(folder: Path) -> None:
    """A renamed image, another content and another order change their own entry and no other."""

    def print_of(seed: int = 0) -> dict[str, str | int]:
        return data.load(f"imagefolder:{folder}", batch_size=2, seed=seed).fingerprint()

    before = print_of()
    assert print_of() == before
    assert {key for key, value in print_of(1).items() if value != before[key]} == {"train order"}
    Image.new("RGB", (20, 30), "green").save(folder / "train" / "red" / "1.png")
    assert {key for key, value in print_of().items() if value != before[key]} == {"train images"}
    (folder / "val" / "blue" / "2.png").rename(folder / "val" / "blue" / "3.png")
    assert {key for key, value in print_of().items() if value != before[key]} == {"train images", "test names"}


def test_a_fingerprint_does_not_draw(text: Path) -> None:
    """Asking for it leaves the loader where it was."""
    loaded = data.load(f"text:{text}", batch_size=4, seed=0, context=16)
    first = [y for _, y in loaded.train]

    again = data.load(f"text:{text}", batch_size=4, seed=0, context=16)
    again.fingerprint()

    assert all(torch.equal(a, b) for a, (_, b) in zip(first, again.train, strict=True))
