"""Data sets as batches whose order and augmentation are pure functions of (seed, epoch, batch index).

A kind of source is one file; `named.py` has the sets that are known by name, `fetch.py` gets their files, `loading.py`
opens any of them.
"""

from lowbit.train.data.batches import Batches
from lowbit.train.data.images import crop_and_flip
from lowbit.train.data.loading import Data, load, names
from lowbit.train.data.source import Task

__all__ = ["Batches", "Data", "Task", "crop_and_flip", "load", "names"]
