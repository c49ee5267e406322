"""lowbit in other people's loops: what it keeps of a run, and adapters for trainers, one file each.

`lightning` and `huggingface` need their libraries and are not imported here.
"""

from lowbit.integrations.run_state import RunState, save_with_optimizer

__all__ = ["RunState", "save_with_optimizer"]
