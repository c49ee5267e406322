import gzip
import itertools
from pathlib import Path

import pytest
import torch
from small_data import idx, same, write
from torch import Generator

from lowbit.train import data


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
