"""The model of a run as Lightning sees it: loss, evaluation, and lowbit's state in the checkpoint."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

import lowbit
from lowbit import ranks
from lowbit.evidence.records import PLAIN, Total
from lowbit.integrations.ddp import Int8AllReduce
from lowbit.precision.controller import PrecisionController
from lowbit.train import data
from lowbit.train.config import CHANGEABLE, TrainConfig, lr_factor
from lowbit.train.processes import collected
from lowbit.train.step import NotFiniteError, autocast, explain_non_finite, loss_and_accuracy, make_optimizer, step_seed


class Module(LightningModule):
    """A model with its loss, optimizer and schedule, and lowbit's state inside the checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        loaded: data.Data,
        model: nn.Module,
        control: Callable[[int], PrecisionController | None],
    ) -> None:
        super().__init__()
        steps = config.epochs * len(loaded.train)
        self.config = config
        self.text = loaded.task.kind == "text"
        self.loader = loaded.train
        self.fingerprint = loaded.fingerprint()
        self.model = model
        self.total_steps = steps if config.max_steps is None else min(steps, config.max_steps)
        self.test: dict[str, float] = {}
        self.controller = control(self.total_steps)
        self.gates = None if self.controller is None else self.controller.gates
        self.cost = {"macs": 0, "bit_operations": 0}
        self.sources: dict[str, str] = {}
        self.exchange: Int8AllReduce | None = None
        self.is_sharded = False
        self.unsent: list[dict[str, Any]] = []

    def configure_model(self) -> None:
        """Give each process its part of the weights where the settings say so."""
        if self.config.strategy == "fsdp" and ranks.is_one_of_several() and not self.is_sharded:
            from lowbit.train.sharded import shard_

            assert self.device_mesh is not None
            shard_(self.model, self.device_mesh["data_parallel"])
            self.is_sharded = True

    def on_train_batch_start(self, *_: object) -> None:
        """Seed torch for the step."""
        torch.manual_seed(step_seed(self.config.seed, self.global_step, rank=ranks.rank()))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """The loss of a batch, with what the logs and the controller want to know."""
        x, y = batch
        loss, accuracy = loss_and_accuracy(self.model(x), y)
        if not loss.isfinite():
            if self.config.strategy == "fsdp" or self.config.synchronized:
                cause = "one process alone cannot run the forward again to find out where"
            else:
                with autocast(self.config, x.device.type):
                    cause = explain_non_finite(self.model, x)
            raise NotFiniteError(f"the loss is {loss.item()} at step {self.global_step}: {cause}.")
        lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]  # there is one optimizer
        penalty = 0.0 if self.gates is None else self.gates.penalty()
        return {"loss": loss + penalty, "task_loss": loss.detach(), "accuracy": accuracy, "lr": lr}

    def add_cost(self, ran: list[Total]) -> None:
        """Add what converted layers ran in one step to the run's cost."""
        converted = [total for total in ran if total.product.engine != PLAIN]
        self.cost["macs"] += sum(total.macs for total in converted)
        self.cost["bit_operations"] += sum(total.bit_operations for total in converted)

    def precision(self) -> dict[str, float]:
        """What the precision of the present batch is, and what the run cost so far: figures for the logs."""
        if self.controller is None:
            return {}
        values: dict[str, float | None] = {
            "forward_bits": self.controller.forward_bits,
            "backward_bits": self.controller.backward_bits,
            "stage": self.controller.stage,
            "bit_operations_per_mac": self.cost["bit_operations"] / max(self.cost["macs"], 1),
        }
        for name, (forward, _) in self.controller.bits().items():
            values[f"bits/{name}"] = forward
        if self.gates is not None:
            histogram = ranks.gathered(self.gates.histogram()).sum(0)
            values |= {"cost_percent": self.gates.cost, "target_percent": self.gates.target}
            for block, counts in zip(self.gates.blocks, histogram.tolist(), strict=True):
                for (forward, backward), count in zip(self.gates.choices, counts, strict=True):
                    values[f"gates/{block}/{forward}-{backward}"] = count / max(sum(counts), 1)
        return {name: float(value) for name, value in values.items() if value is not None}

    def on_validation_epoch_start(self) -> None:
        """Begin the sums of loss, accuracy and labels."""
        self.sums = torch.zeros(3, dtype=torch.float64, device="cpu")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Add a batch to the sums."""
        x, y = batch
        loss, accuracy = loss_and_accuracy(self.model(x), y)
        self.sums += self.sums.new_tensor([loss.item(), accuracy.item(), 1.0]) * y.numel()

    def on_validation_epoch_end(self) -> None:
        """Turn the sums into the scores, and log them."""
        sums = ranks.gathered(self.sums).sum(0)
        loss, accuracy, _ = (sums / sums[2]).tolist()
        score = {"test_bits_per_byte": loss / math.log(2)} if self.text else {"test_accuracy": accuracy}
        self.test = {"test_loss": loss, **score}
        log_row(self.trainer, self.test)

    def configure_optimizers(self) -> Any:
        """The optimizer of model and gates, and the schedule of its rate by steps."""
        config = self.config
        gates = [] if self.gates is None else list(self.gates.parameters())
        settings = {"states": config.optimizer_states, "weights": config.weights}
        optimizer = lowbit.optim.from_recipe(
            self.model,
            make_optimizer(config, [*self.model.parameters(), *gates]),
            seed=config.seed,
            **{name: value for name, value in settings.items() if value is not None},
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(config.schedule, step, self.total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what lowbit keeps."""
        checkpoint["lowbit"] = {
            "config": self.config.to_dict(),
            "state": lowbit.state_dict(self.model),
            "loader": self.loader.state_dict(),
            "test": self.test,
            "controller": None if self.controller is None else self.controller.state_dict(),
            "cost": self.cost,
            "data": self.fingerprint,
            "sources": self.sources,
            "processes": ranks.world_size(),
            "unsent": [] if self.exchange is None else collected(self.exchange.state_dict()),
        }

    def begin_exchange(self, exchange: Int8AllReduce) -> None:
        """Exchange gradients in this way from now on; what the ranks of the checkpoint had not sent comes first.

        With another number of processes that is lost, which is the rounding of one step.
        """
        self.exchange = exchange
        if len(self.unsent) == ranks.world_size():
            exchange.load_state_dict(self.unsent[ranks.rank()])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what lowbit kept, and apply settings that have changed."""
        _retune(checkpoint, self.config, self.total_steps)
        lowbit.load_state_dict(self.model, checkpoint["lowbit"]["state"])
        self.unsent = checkpoint["lowbit"].get("unsent", [])
        # Lightning restores a loader too, but not at the end of an epoch.
        self.loader.load_state_dict(checkpoint["lowbit"]["loader"])


def _retune(content: dict[str, Any], config: TrainConfig, total_steps: int) -> None:
    """Give the optimizer and the schedule of a checkpoint the settings of `config`, where they have changed."""
    if all(content["lowbit"]["config"][name] == getattr(config, name) for name in CHANGEABLE):
        return
    assert config.lr is not None
    lr = config.lr * lr_factor(config.schedule, content["global_step"], total_steps)
    for optimizer in content["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group |= {"lr": lr, "initial_lr": config.lr, "weight_decay": config.weight_decay}
    for scheduler in content["lr_schedulers"]:
        groups = len(scheduler["base_lrs"])
        scheduler |= {"base_lrs": [config.lr] * groups, "_last_lr": [lr] * groups}


def log_row(trainer: Trainer, values: dict[str, float]) -> None:
    """One row in every logger, at the number of steps done."""
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": float(trainer.current_epoch + 1), **values}, step=trainer.global_step)
