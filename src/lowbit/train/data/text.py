"""The bytes of a text, in windows.

Notation: B batch, T positions of a text.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from lowbit.errors import RunError, UsageError
from lowbit.inputs import files
from lowbit.train.data.source import Sets, Source, Task, hash_of, shuffled


@dataclass(frozen=True, kw_only=True)
class Text(Source):
    """Windows of a text's bytes, side by side; each epoch shifts them all by one random offset.

    Args:
        content: uint8, the text.
        context: T, the bytes of one window.
        samples: int64, numbers of the windows in use.
        augment: whether an epoch of training draws its offset; otherwise it is 0.
    """

    content: Tensor
    context: int

    def order(self, noise: Generator | None) -> Tensor:
        """The first byte of each window of one epoch, shuffled unless `noise` is ``None``."""
        starts = shuffled(self.samples, noise) * self.context
        if noise is None or not self.augment:
            return starts
        # The last window also needs one byte after it, its last label.
        spare = len(self.content) - 1 - int(starts.max()) - self.context
        return starts + torch.randint(
            min(self.context, spare + 1), (), generator=noise, dtype=torch.int64, device="cpu"
        )

    def read(self, starts: Tensor, _noise: Generator | None, part: slice) -> tuple[Tensor, Tensor]:
        """Bytes (B, T) int64 and the byte after each, (B, T) int64."""
        own = starts[part, None]
        windows = self.content[own + torch.arange(self.context + 1, dtype=torch.int64, device="cpu")].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def fingerprint(self) -> dict[str, str | int]:
        """Hashes of what the samples are, see `Batches.fingerprint`."""
        return {"bytes": len(self.content), "text": hash_of(self.content)}


def text(path: Path, context: int) -> Sets:
    """The first 90 % of a file's bytes and the last 10 %, in windows of `context` bytes."""
    if not path.exists():
        raise UsageError(f"text:{path}: no such file.")
    raw = files.read_whole(path)
    content = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8, device="cpu")
    split = len(content) * 9 // 10
    task = Task(kind="text", shape=(context,), classes=256)
    train = _text_source(path, content[:split], context, augment=True)
    return Sets(task, train, _text_source(path, content[split:], context, augment=False))


def _text_source(path: Path, content: Tensor, context: int, *, augment: bool) -> Text:
    """All whole windows, less one in training where that leaves one: the offset needs its room."""
    whole = (len(content) - 1) // context
    if whole < 1:
        part = "first 90 %" if augment else "last 10 %"
        raise RunError(
            f"{path}: its {part} are {len(content)} bytes, shorter than one window of {context} + 1. "
            f"Use a longer text or a smaller context."
        )
    windows = max(1, len(content) // context - 1) if augment else whole
    return Text(
        content=content,
        context=context,
        samples=torch.arange(windows, dtype=torch.int64, device="cpu"),
        augment=augment,
    )
