"""What lowbit keeps of a run besides the weights, as one object to save and load."""

from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_keys, checked
from lowbit.nn.layers import sites_of
from lowbit.precision.controller import PrecisionController

_KEY = "lowbit_run"


class RunState:
    """The state of a converted model and of what sets its bits: noise, ranges, engines, schedules, rules, gates.

    It has `state_dict` and `load_state_dict`, so whatever saves such objects saves it, for example
    ``accelerator.register_for_checkpointing(RunState(model))``. The controllers are those that the model has when a
    method is called: make them before `load_state_dict`.

    Args:
        model: a converted model, or a wrapper of one such as `DistributedDataParallel`.
    """

    @checked
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def controllers(self) -> list[PrecisionController]:
        """The controllers that set bits of the model, in the order of its layers."""
        found = dict.fromkeys(site.controller for site in sites_of(self.model))
        return [controller for controller in found if isinstance(controller, PrecisionController)]

    def step(self, loss: Tensor | float | None = None) -> None:
        """Go on to the next batch: step every controller; see `PrecisionController.step`."""
        for controller in self.controllers():
            controller.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads with ``torch.load(..., weights_only=True)``."""
        return {
            "version": 1,
            "model": lowbit.state_dict(self.model),
            "controllers": [controller.state_dict() for controller in self.controllers()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; if it raises, nothing changes.

        Raises:
            UsageError: the state is damaged, or of another model, recipe or controller; or the saved model had
                controllers that this one lacks.
        """
        check_keys("RunState.load_state_dict: the state", state, ("version", "model", "controllers"))
        if state["version"] != 1:
            raise UsageError(f"RunState.load_state_dict: version {shown(state['version'])}: expected 1")
        controllers, saved = self.controllers(), state["controllers"]
        if not isinstance(saved, list) or len(saved) != len(controllers):
            number = len(saved) if isinstance(saved, list) else shown(saved)
            raise UsageError(
                f"RunState.load_state_dict: {number} controllers saved, the model has {len(controllers)}: make the "
                "PrecisionController of the run before you load its state"
            )
        before = self.state_dict()
        lowbit.load_state_dict(self.model, state["model"])
        try:
            for controller, entry in zip(controllers, saved, strict=True):
                controller.load_state_dict(entry)
        except UsageError:
            lowbit.load_state_dict(self.model, before["model"])
            for controller, entry in zip(controllers, before["controllers"], strict=True):
                controller.load_state_dict(entry)
            raise


@checked
def save_with_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Save and load what lowbit keeps of a run inside the optimizer's `state_dict`.

    A run that goes on needs the state of its optimizer, so every training script saves it; with this one line, it saves
    and restores lowbit's state too. Call it once the model is converted and has its controller, before anything wraps
    the optimizer. The optimizer's `state_dict` then has one more entry, of tensors and plain values.

    Args:
        model: a converted model.
        optimizer: the one whose state is saved; of several, one is enough.

    Returns:
        What is saved, whose `step(loss)` steps the controllers.

    Raises:
        UsageError: nothing in the model is converted.
    """
    if not sites_of(model):
        raise UsageError("save_with_optimizer: nothing in this model is converted; call lowbit.convert_ first")
    run = RunState(model)

    def add(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state[_KEY] = run.state_dict()

    def take(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if (saved := state.pop(_KEY, None)) is not None:
            run.load_state_dict(saved)

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(take)
    return run
