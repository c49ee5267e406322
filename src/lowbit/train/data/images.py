"""Images held in memory.

Notation: N samples, B batch, C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lowbit.train.data.source import Sets, Source, Task, hash_of, shuffled


@dataclass(frozen=True, kw_only=True)
class Images(Source):
    """Images held in memory as bytes and normalised as they are read.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        mean: (C, 1, 1) float32, in units of a byte.
        std: (C, 1, 1) float32, in units of a byte.
        samples: int64, the samples in use.
        augment: whether a training batch is cropped and flipped at random.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def order(self, noise: Generator | None) -> Tensor:
        """The samples of one epoch, shuffled unless `noise` is ``None``."""
        return shuffled(self.samples, noise)

    def read(self, samples: Tensor, noise: Generator | None, part: slice) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float32 and labels (B,) int64; augmented with `noise` unless it is ``None``."""
        x = self.images[samples]
        if self.augment and noise is not None:
            x = crop_and_flip(x, noise)
        return x[part].float().sub_(self.mean).div_(self.std), self.labels[samples[part]]

    def fingerprint(self) -> dict[str, str | int]:
        """Hashes of what the samples are, see `Batches.fingerprint`."""
        return {"images": hash_of(self.images), "labels": hash_of(self.labels)}


def crop_and_flip(x: Tensor, noise: Generator, *, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels both ways, filling with 0, and mirror half of them.

    Args:
        x: (B, C, H, W) uint8.
        noise: where the shifts and flips are drawn.
        pad: the largest shift in pixels.

    Returns:
        (B, C, H, W) uint8, a new tensor.

    Source: He et al., arXiv:1512.03385, section 4.2.
    """
    batch, _, height, width = x.shape
    top, left = torch.randint(2 * pad + 1, (2, batch), generator=noise, dtype=torch.int64, device="cpu")
    flip = torch.randint(2, (batch, 1, 1, 1), generator=noise, dtype=torch.int64, device="cpu").bool()
    # (B, C, shifts, shifts, H, W), a view: picking one shift for each image copies whole rows.
    shifts = F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    y = shifts[torch.arange(batch, dtype=torch.int64, device="cpu"), :, top, left]
    return torch.where(flip, y.flip(3), y)


def in_memory(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, classes: int, augment: bool) -> Sets:
    """Two sets of (N, C, H, W) uint8 images with (N,) labels, both normalised by the first one's moments."""
    mean, std = _moments(train[0])
    sources = [
        Images(
            images=images,
            labels=labels.long(),
            mean=mean,
            std=std,
            samples=torch.arange(len(images), dtype=torch.int64, device="cpu"),
            augment=augment,
        )
        for images, labels in (train, test)
    ]
    task = Task(kind="image", shape=tuple(train[0].shape[1:]), classes=classes)
    return Sets(task, *sources)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1) float32; the latter is 1 where it is 0."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64, device="cpu")
    mean = share @ value
    std = (share @ value**2 - mean**2).clamp(min=0).sqrt()
    std[std == 0] = 1
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)
