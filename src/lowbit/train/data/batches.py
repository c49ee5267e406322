"""A loader whose order and augmentation are pure functions of (seed, epoch, batch index).

Notation: B batch.
"""

from collections.abc import Iterator

from torch import Generator, Tensor

from lowbit.errors import RunError, UsageError
from lowbit.train.data.source import Source, generator, hash_of


class Batches:
    """A sized loader that resumes in the middle of an epoch; iterating gives (x, y) batch by batch.

    Epochs count from 0. An iterator gives the batches of the current epoch that remain after
    `load_state_dict`, and all those of the next epoch once a batch has been handed out. Only one iterator
    may be in use at a time.

    Of several processes, each reads its part of every batch: side by side, in the order of ranks, these are the batch
    that one process reads, with the same augmentation. The place in an epoch is that of the whole, so a run goes on
    with another number of processes.

    Args:
        source: where samples are read.
        batch_size: B.
        seed: of the order and the augmentation of a training set, whose short last batch is dropped.
            ``None`` means a test set: fixed order, no augmentation, the short last batch included. If that has fewer
            samples than there are processes, the batch before it takes them.
        rank: which process this is, from 0.
        world: the number of processes.

    Raises:
        UsageError: `batch_size` is below 1 or no multiple of `world`, or a training set has fewer samples than one
            batch, or a test set fewer than there are processes.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int | None, rank: int = 0, world: int = 1) -> None:
        samples = len(source.samples)
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, given {batch_size}.")
        if seed is not None and samples < batch_size:
            raise UsageError(
                f"the training set has {samples} samples, fewer than one batch of {batch_size}: "
                f"use a batch_size of at most {samples}, or more samples."
            )
        if batch_size % world:
            # Gradients are averaged over processes: parts of different sizes would weigh samples differently.
            raise UsageError(
                f"a batch of {batch_size} cannot be split evenly over {world} processes: use a batch_size that is a "
                f"multiple of {world}, e.g. {-(-batch_size // world) * world}."
            )
        if samples < world:
            raise UsageError(f"the test set has {samples} samples, fewer than the {world} processes: use fewer.")
        self._source = source
        self._rank, self._world = rank, world
        self._batch_size = batch_size
        self._seed = seed
        # In a test set, samples that are too few for a batch of their own are in the last batch.
        drops_rest = seed is not None or 0 < samples % batch_size < world
        self._length = samples // batch_size if drops_rest else -(-samples // batch_size)
        self._epoch = 0
        self._batches = 0
        self._drawn = False  # a batch was handed out since the start or since load_state_dict

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Lightning stops after len(self) batches without meeting StopIteration, so an epoch ends here.
        if self._drawn or self._batches == self._length:
            self._epoch, self._batches, self._drawn = self._epoch + 1, 0, False
        return self._remaining()

    def _remaining(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self._epoch
        order = self._source.order(self._noise("order", epoch))
        for index in range(self._batches, self._length):
            last = self._seed is None and index == self._length - 1
            samples = order[index * self._batch_size : None if last else (index + 1) * self._batch_size]
            count = len(samples)
            part = slice(count * self._rank // self._world, count * (self._rank + 1) // self._world)
            batch = self._source.read(samples, self._noise("batch", epoch, index), part)
            self._batches, self._drawn = index + 1, True
            yield batch

    def _noise(self, *key: object) -> Generator | None:
        return None if self._seed is None else generator(self._seed, *key)

    def fingerprint(self) -> dict[str, str | int]:
        """Numbers and hashes that tell this data: samples, their content, labels, and the order of the first epoch.

        Images in memory and texts are hashed whole. Of a folder every file's name is, and the size and content of 64
        files at even distances.
        """
        order = self._source.order(self._noise("order", 0))
        return {"samples": len(self._source.samples), "order": hash_of(order), **self._source.fingerprint()}

    def state_dict(self) -> dict[str, int]:
        """The current epoch and how many of its batches were handed out."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch that a loader of the same arguments had handed out.

        Raises:
            RunError: `state` is not one of a loader with this many batches.
        """
        epoch, batches = state.get("epoch", -1), state.get("batches", -1)
        if epoch < 0 or not 0 <= batches <= self._length:
            raise RunError(
                f"loader state {state} does not fit an epoch of {self._length} batches: "
                f"resume with the data set, subset and batch size of the saved run."
            )
        self._epoch, self._batches, self._drawn = epoch, batches, False
