"""FSDP2 for a run: each process keeps its part of the weights, and checkpoints have them whole.

So a checkpoint of any number of processes, sharded or not, continues with any other.
"""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

_WHOLE = StateDictOptions(full_state_dict=True)


class Sharded(ModelParallelStrategy):
    """Lightning's strategy, which would open the checkpoint itself; a run's is read and checked already."""

    def __init__(self, *, data_parallel_size: int, tensor_parallel_size: int) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ARG002 - Lightning forgets it
        """Give each process its part of the weights and of the optimizer's states."""
        content: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True)
        assert self.model is not None
        set_model_state_dict(self.model, content["state_dict"], options=_WHOLE)
        for optimizer, state in zip(self.optimizers, content["optimizer_states"], strict=True):
            names = {id(p): name for name, p in self.model.named_parameters()}
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            groups = [{**g, "params": [order[i] for i in g["params"]]} for g in state["param_groups"]]
            named: Any = {"state": {order[i]: each for i, each in state["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, named, options=_WHOLE)
        return content


def shard_(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the parameters of each block, which are gathered while it runs, and the rest together."""
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What the outermost containers hold, if it has parameters."""
    if not hasattr(module, "append"):
        for child in module.children():
            yield from _blocks(child)
        return
    for block in module.children():
        if any(True for _ in block.parameters()):
            yield block
