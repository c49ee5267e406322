import gzip
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_data import same

from lowbit.errors import RunError, UsageError
from lowbit.inputs import files
from lowbit.train import data


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


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a FIFO"), (os.mkdir, "a folder")])
def test_what_is_not_a_file_is_refused_at_once(make: Callable[[Path], None], kind: str, tmp_path: Path) -> None:
    """A FIFO without a writer, which `open` would wait for, and a folder are named; so is a device."""
    make(tmp_path / "text")

    with pytest.raises(RunError, match=f"it is {kind}, not a file"):
        data.load(f"text:{tmp_path / 'text'}", batch_size=1, seed=0)
    with pytest.raises(RunError, match="it is a device, not a file"):
        data.load("text:/dev/zero", batch_size=1, seed=0)


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_an_impossible_limit_is_refused(value: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is not a number of bytes is an error with the variable's name."""
    monkeypatch.setenv("LOWBIT_MAX_BYTES", value)

    with pytest.raises(UsageError, match="LOWBIT_MAX_BYTES"):
        data.load(f"text:{text}", batch_size=1, seed=0)


@pytest.mark.parametrize("joined", [b"", b"\0" * 512])
def test_a_gzip_file_of_several_members_is_read_whole(joined: bytes, text: Path, tmp_path: Path) -> None:
    """Members one after the other, with zeros between them, give what gzip gives."""
    content = text.read_bytes()
    (tmp_path / "text.gz").write_bytes(gzip.compress(content[:300]) + joined + gzip.compress(content[300:]) + joined)

    found = files.read(tmp_path / "text.gz", limit=2000, hint="")

    assert bytes(found) == content
