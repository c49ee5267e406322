"""Hugging Face Trainer: a callback that sets the bits of a converted model and keeps lowbit's state in checkpoints."""

import base64
import io
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lowbit.errors import UsageError, shown
from lowbit.integrations.run_state import RunState
from lowbit.nn.layers import sites_of


class LowbitCallback(TrainerCallback, ExportableState):
    """Low-precision training in ``transformers.Trainer``: ``Trainer(model, callbacks=[LowbitCallback()])``.

    Convert the model, and make its `PrecisionController` if bits change, before you make the trainer. The callback
    steps the controller after each step of the optimizer, with the mean loss of the forwards in that step as the
    model's output has it, and keeps noise, ranges and schedules in the ``trainer_state.json`` of every checkpoint.
    ``trainer.train(resume_from_checkpoint=...)`` then goes on bit for bit.
    """

    def __init__(self) -> None:
        self._run: RunState | None = None
        self._hook: RemovableHandle | None = None
        self._losses: list[torch.Tensor] = []
        self._summed = False

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps of this callback: tensors as torch saves them, as text."""
        if self._run is None:
            return {"args": {}, "attributes": {}}
        file = io.BytesIO()
        torch.save(self._run.state_dict(), file)
        return {"args": {}, "attributes": {"saved": base64.b64encode(file.getvalue()).decode("ascii")}}

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the trainer's arguments
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Take the state of the checkpoint, where the run goes on from one."""
        if not sites_of(model):
            raise UsageError("LowbitCallback: nothing in this model is converted: call lowbit.convert_ before Trainer")
        self._run = RunState(model)
        self._hook = model.register_forward_hook(self._keep_loss, with_kwargs=True)
        name = type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, {"args": {}, "attributes": {}})
        text = saved["attributes"].get("saved") if isinstance(saved, dict) else None
        if text is not None:
            self._run.load_state_dict(_read(text))

    def _keep_loss(self, module: nn.Module, _: object, given: dict[str, Any], output: Any) -> None:
        loss = getattr(output, "loss", None)
        if module.training and loss is not None:
            self._losses.append(loss.detach())
            # The trainer then divides by the items of the whole step, so that its forwards add up to the mean.
            self._summed = given.get("num_items_in_batch") is not None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Step the controllers."""
        assert self._run is not None
        losses, self._losses = self._losses, []
        total = sum(losses[1:], losses[0]) if losses else None
        self._run.step(total if total is None or self._summed else total / len(losses))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Look at the model no more."""
        if self._hook is not None:
            self._hook.remove()


def _read(text: object) -> Any:
    """The state that `LowbitCallback.state` made a text of."""
    try:
        return torch.load(io.BytesIO(base64.b64decode(str(text), validate=True)), weights_only=True)
    except Exception as error:
        raise UsageError(f"LowbitCallback: {shown(text)} in trainer_state.json is not a state of lowbit") from error
