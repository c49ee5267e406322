import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowbit.errors import RunError, UsageError
from lowbit.train import data


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


def test_an_image_of_another_format_is_refused(folder: Path) -> None:
    """Pillow opens a file by its content, and would start a program for PostScript that is called .png."""
    (folder / "val" / "red" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")

    with pytest.raises(RunError, match="cannot be decoded"):
        list(data.load(f"imagefolder:{folder}", batch_size=6, seed=0).test)


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
