"""Training from the command line or in one call: data sets, models, and runs that resume bit for bit.

`lowbit.train.trainer` has ``train`` and ``resume``. It needs Lightning, so it is not imported here.
"""

from lowbit.train.config import Result, TrainConfig

__all__ = ["Result", "TrainConfig"]
