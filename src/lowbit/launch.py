"""How ``torchrun`` started this process, as its environment says: the command line asks before torch is imported."""

import os


def launched() -> int:
    """How many processes ``torchrun`` started; 1 outside of it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """Whether this process speaks for all of them."""
    return launched() == 1 or os.environ.get("RANK") == "0"
