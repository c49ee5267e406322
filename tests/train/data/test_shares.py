"""What several processes read of each batch."""

from pathlib import Path

import pytest
import torch

from lowbit.errors import UsageError
from lowbit.train import data
from lowbit.train.data.batches import Batches
from lowbit.train.data.images import in_memory


@pytest.mark.parametrize("name", ["fashion-mnist", "imagefolder", "text"])
@pytest.mark.usefixtures("fashion")
def test_parts_of_a_batch_are_the_batch(name: str, folder: Path, text: Path) -> None:
    """Side by side, what two processes read is what one reads, augmentation and the short last batch included."""
    name = {"imagefolder": f"imagefolder:{folder}", "text": f"text:{text}"}.get(name, name)
    whole = data.load(name, batch_size=4, seed=1, context=8)
    parts = [data.load(name, batch_size=4, seed=1, context=8, rank=rank, world=2) for rank in range(2)]

    for kind in ("train", "test"):
        loaders = [getattr(each, kind) for each in (whole, *parts)]
        assert len({len(loader) for loader in loaders}) == 1
        for (x, y), *others in zip(*loaders, strict=True):
            assert torch.equal(torch.cat([part for part, _ in others]), x)
            assert torch.equal(torch.cat([part for _, part in others]), y)
            assert all(len(part) < len(y) for _, part in others)


def test_a_test_set_leaves_no_process_without_samples() -> None:
    """Of 42 samples in batches of 8, the last 2 are too few for four processes, and go into the batch before."""
    images = torch.zeros(42, 1, 2, 2, dtype=torch.uint8), torch.arange(42)
    _, _, source = in_memory(images, images, classes=42, augment=False)
    parts = [Batches(source, batch_size=8, seed=None, rank=rank, world=4) for rank in range(4)]
    sizes = [[len(y) for _, y in part] for part in parts]

    assert sizes == [[2, 2, 2, 2, 2], [2, 2, 2, 2, 3], [2, 2, 2, 2, 2], [2, 2, 2, 2, 3]]


def test_parts_of_different_sizes_are_refused() -> None:
    """Gradients are averaged, which would weigh samples differently."""
    with pytest.raises(UsageError, match=r"multiple of 3, e\.g\. 66"):
        data.load("digits", batch_size=64, seed=0, world=3)
