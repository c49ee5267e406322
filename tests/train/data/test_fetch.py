import contextlib
import gzip
import hashlib
import io
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from small_data import fashion_files, no_network, write

from lowbit.errors import RunError
from lowbit.train import data
from lowbit.train.data import fetch


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
    monkeypatch.setattr(fetch, "FASHION_SHA256", sums)
    packed = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(fetch, "MIRROR_SHA256", packed)


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
    monkeypatch.setattr(fetch, name, value)

    with pytest.raises(RunError, match=r"did not come within -1 s|longer than 10 bytes"):
        data.load("fashion-mnist", batch_size=4, seed=0)


def test_a_failing_apt_get_is_quoted(tmp_path: Path) -> None:
    """What apt-get writes on its standard error is in the message."""
    script(tmp_path / "bin" / "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")

    with pytest.raises(RunError, match="failed with 100: E: Unable to locate package"):
        data.load("fashion-mnist", batch_size=4, seed=0)
