"""Data sets by name, ready for training.

Notation: B batch, T positions of a text.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from lowbit.errors import UsageError, unknown
from lowbit.train.data.batches import Batches
from lowbit.train.data.fetch import expanded
from lowbit.train.data.imagefolder import imagefolder
from lowbit.train.data.named import NAMED
from lowbit.train.data.source import Task, generator, shuffled
from lowbit.train.data.text import text


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set ready for training.

    Args:
        name: as given to `load`.
        task: what a model must map.
        train: shuffled and augmented, without a short last batch.
        test: in a fixed order, not augmented, with every sample.
    """

    name: str
    task: Task
    train: Batches
    test: Batches

    def fingerprint(self) -> dict[str, str | int]:
        """What tells this data from other data of the name, see `Batches.fingerprint`."""
        sets = {"train": self.train, "test": self.test}
        return {f"{part} {name}": value for part, each in sets.items() for name, value in each.fingerprint().items()}


def load(
    name: str,
    *,
    batch_size: int,
    seed: int,
    subset: int | None = None,
    augment: bool = True,
    context: int = 128,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """Open a data set by name; only ``fashion-mnist`` may be fetched, and says so on stderr.

    Files are looked for in ``$LOWBIT_DATA``, ``$LOWBIT_DATA/NAME``, ``/usr/share/datasets/NAME`` and
    ``$XDG_CACHE_HOME/lowbit/NAME`` (``~/.cache`` where that is unset), in this order.

    - ``fashion-mnist``: 60,000 + 10,000 images (1, 28, 28), 10 classes.
    - ``digits``: 1,437 + 360 images (1, 8, 8), 10 classes: the first and the last of scikit-learn's file.
    - ``cifar10``, ``cifar100``: 50,000 + 10,000 images (3, 32, 32), the binary version.
    - ``imagefolder:PATH``: images ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*`` (or ``PATH/val``), as
      (3, 224, 224).
    - ``text:PATH``: the bytes of a file or a ``.gz`` file; the last 10 % are the test set.

    Args:
        name: one of `names()`, with a path in place of ``PATH``.
        batch_size: B, of both sets.
        seed: of the order and the augmentation of the training set.
        subset: train on this many samples only, drawn over all classes and the same for every `seed`;
            ``None`` means all. The test set and the normalisation do not change.
        augment: whether images of the training set are cropped and flipped at random (never ``digits``),
            and whether each epoch of a text draws the offset of its windows.
        context: T, bytes of one window of a text; images do not use it.
        rank: which of several processes reads, from 0: each reads its part of every batch, see `Batches`.
        world: the number of processes.

    Raises:
        UsageError: the name, the path or an argument does not exist or does not fit the data.
        RunError: a file is corrupt, or fetching failed.
    """
    kind, colon, path = name.partition(":")
    if colon and not path and f"{kind}:PATH" in names():
        raise UsageError(f"data set {name!r} lacks its path: write {kind}:PATH.")
    if context < 1:
        raise UsageError(f"context must be at least 1 byte, given {context}.")
    if name in NAMED:
        task, train, test = NAMED[name]()
    elif kind == "imagefolder" and path:
        task, train, test = imagefolder(expanded(path))
    elif kind == "text" and path:
        task, train, test = text(expanded(path), context)
    else:
        raise unknown("data set", name, names())
    if not augment:
        train = replace(train, augment=False)
    if subset is not None:
        train = replace(train, samples=_subset(train.samples, subset))
    return Data(
        name=name,
        task=task,
        train=Batches(train, batch_size=batch_size, seed=seed, rank=rank, world=world),
        test=Batches(test, batch_size=batch_size, seed=None, rank=rank, world=world),
    )


def names() -> tuple[str, ...]:
    """Every data set that `load` knows; ``PATH`` stands for a file or folder."""
    return (*NAMED, "imagefolder:PATH", "text:PATH")


def _subset(samples: Tensor, count: int) -> Tensor:
    if not 1 <= count <= len(samples):
        raise UsageError(f"subset must be 1 to {len(samples)}, the samples of the training set, given {count}.")
    return shuffled(samples, generator("subset"))[:count]
