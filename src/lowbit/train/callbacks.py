"""What happens beside a run's steps: times, ledger, logs, bits, checkpoints, the end, and how far it is."""

import math
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

import lowbit
from lowbit import ranks
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.memory import StepMemory, UpdateMemory
from lowbit.inputs import files
from lowbit.integrations.ddp import Int8AllReduce, average_buffers_, full_exchange_bytes
from lowbit.precision.range_test import RangeTestResult
from lowbit.report.spent import Spent
from lowbit.train.config import TrainConfig
from lowbit.train.folder import CHECKPOINT, RANGE_TEST
from lowbit.train.merging import MergedLedger
from lowbit.train.module import Module, log_row
from lowbit.train.processes import largest, mean
from lowbit.train.progress import Progress
from lowbit.train.stop import Leave, Stop

Evaluated = Callable[[Ledger], None]

_WARM_UP = 5  # steps of each start whose time is not counted
_LOG_EVERY = 10  # steps between two rows of metrics.csv


def ignored(_: Ledger) -> None:
    """Nobody wants to know."""


class StepTimer(Callback):
    """Wall seconds of each step: forward, backward and update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """Keep the step's seconds."""
        self.seconds.append(time.perf_counter() - self._began)

    def median(self) -> float | None:
        """The median of the steps that count; None where too few ran."""
        counted = self.seconds[_WARM_UP:]
        return statistics.median(counted) if counted else None


class MemoryOfStep(Callback):
    """Measures the first update of a run that finds the optimiser's states made; one that is skipped does not count.

    Args:
        meter: whose ledger knows what the forward passes keep.
    """

    def __init__(self, meter: lowbit.Meter) -> None:
        self.meter = meter
        self.found: StepMemory | None = None
        self._update: UpdateMemory | None = None

    def on_before_optimizer_step(self, _: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin in the step that is measured."""
        if self.found is None and optimizer.state and _all_finite(optimizer):
            self._update = UpdateMemory(pl_module, optimizer)
            self._update.begin()

    def on_exception(self, *_: object) -> None:
        """Watch no more."""
        if self._update is not None:
            self._update.end()

    def on_train_batch_end(self, *_: object) -> None:
        """End there; the meter, which comes first, has counted the step's forward."""
        if self._update is not None:
            self._update.end()
            self.found = self._update.result(activations=self.meter.ledger.held_bytes or 0)
            self._update = None


def _all_finite(optimizer: Optimizer) -> bool:
    """Whether all gradients are finite: a step without is skipped where the loss is scaled."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(grad.isfinite().all()) for grad in grads)


class Share(Callback):
    """Makes several processes one run: exchanges gradients as the settings say, and averages what buffers have seen.

    Args:
        config: the settings.
        meter: counts the bytes that this process sends for its gradients.
    """

    def __init__(self, config: TrainConfig, meter: lowbit.Meter) -> None:
        self.config = config
        self.meter = meter

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the exchange of gradients in place, with what each rank had not sent."""
        assert isinstance(pl_module, Module)
        if self.config.exchange == "int8":
            assert trainer.strategy.model is not None
            pl_module.begin_exchange(Int8AllReduce(trainer.strategy.model, meter=self.meter))

    def on_train_batch_end(self, _: Trainer, pl_module: LightningModule, *__: object) -> None:
        """Give all ranks the same running statistics, before anything is evaluated or saved."""
        average_buffers_(pl_module)
        if self.config.exchange != "int8":
            self.meter.sent(full_exchange_bytes(pl_module, sharded=self.config.strategy == "fsdp"))


class MeterSteps(Callback):
    """Ends the ledger's steps and evaluations where those of the run end, and adds up the run's cost from them.

    Args:
        meter: writes the ledger of this process.
        ledger: of the run.
        evaluated: gets the ledger after each evaluation.
    """

    def __init__(self, meter: lowbit.Meter, ledger: MergedLedger, evaluated: Evaluated) -> None:
        self.meter = meter
        self.ledger = ledger
        self.evaluated = evaluated

    def on_train_batch_end(self, _: Trainer, pl_module: LightningModule, *__: object) -> None:
        """End the step in the ledger, and add up its cost."""
        assert isinstance(pl_module, Module)
        self.meter.step()
        self.ledger.step()
        if self.ledger.whole is not None:
            pl_module.add_cost(self.ledger.whole.last_step())

    def on_validation_end(self, _: Trainer, pl_module: LightningModule) -> None:
        """Write the score into the ledger."""
        assert isinstance(pl_module, Module)
        name = "test_bits_per_byte" if pl_module.text else "test_accuracy"
        self.meter.evaluated(name, pl_module.test[name], higher_is_better=not pl_module.text)
        self.ledger.evaluated()
        if self.ledger.whole is not None:
            self.evaluated(self.ledger.whole)

    def on_save_checkpoint(self, *_: object) -> None:
        """Bring the ledger to the disk."""
        if self.ledger.whole is not None:
            self.ledger.whole.sync()  # a checkpoint never knows of a step that the ledger lost


class TrainingRows(Callback):
    """A row of training figures every few steps, before that step's checkpoint (Lightning's come after)."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: object) -> None:
        """Write a row where one is due."""
        assert isinstance(pl_module, Module)
        if trainer.global_step % _LOG_EVERY == 0:
            names = {"loss": "task_loss", "accuracy": "accuracy", "lr": "lr"}
            values = {f"train_{name}": float(outputs[key]) for name, key in names.items()}
            log_row(trainer, mean(values) | pl_module.precision())


class NextBits(Callback):
    """Sets the bits of the next batch once the present one is logged, and before it is saved."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_batch_end(self, _: Trainer, pl_module: LightningModule, outputs: Any, *__: object) -> None:
        """Step the controller; keep the table of a range test that is done."""
        assert isinstance(pl_module, Module)
        if pl_module.controller is not None:
            pl_module.controller.step(outputs["task_loss"])
            test = pl_module.controller.range_test
            written = ranks.rank() > 0 or (self.out / RANGE_TEST).exists()
            if test is not None and test.done and not written:
                files.write_text(self.out / RANGE_TEST, f"{RangeTestResult.of(test)}\n")


class StopAtEnd(Callback):
    """Ends the run at `max_steps` with an evaluation; Lightning's `max_steps` loses an epoch on resume."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Ask for the end after the last step."""
        assert isinstance(pl_module, Module)
        trainer.should_stop = trainer.global_step >= pl_module.total_steps


class Checkpoints(Callback):
    """Saves at each epoch's end once it has been evaluated, within an epoch by steps and minutes, and on a signal."""

    def __init__(self, config: TrainConfig, stop: Stop) -> None:
        assert config.out is not None
        self.path = config.out / CHECKPOINT
        self.every = config.checkpoint_every
        self.seconds = math.inf if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self.stop = stop
        self.saved_at = time.monotonic()

    def on_train_start(self, *_: object) -> None:
        """Take the signals, which Lightning took when it began."""
        self.stop.install()
        self.stop.patient = True

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Save where steps, minutes or a signal say so."""
        due = self.every is not None and trainer.global_step % self.every == 0
        due = due or time.monotonic() - self.saved_at >= self.seconds
        due = self._agree(due=due) or self.stop.signal is not None
        # The last batch waits for the evaluation: a run resumed from between would never do it.
        if due and not (trainer.is_last_batch or trainer.should_stop):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the evaluated epoch."""
        assert isinstance(pl_module, Module)
        self._agree()
        self._save(trainer, complete=trainer.global_step >= pl_module.total_steps)

    def _agree(self, *, due: bool = False) -> bool:
        """Whether a checkpoint is due on any rank; a signal to one is a signal to all."""
        number, found = largest(0 if self.stop.signal is None else self.stop.signal.value, due)
        if number:
            self.stop.signal = signal.Signals(int(number))
        return bool(found)

    def _save(self, trainer: Trainer, *, complete: bool = False) -> None:
        for logger in trainer.loggers:
            logger.save()  # else a kill loses rows from before the checkpoint
        trainer.save_checkpoint(self.path)
        self.stop.saved, self.saved_at = trainer.global_step, time.monotonic()
        if self.stop.signal is not None and not complete:
            raise Leave


class ShowProgress(Callback):
    """Says how far the run is: its steps, each evaluation, and the scores of each epoch.

    Args:
        config: the settings of the run.
        ledger: of the run.
        progress: hears it.
    """

    def __init__(self, config: TrainConfig, ledger: Ledger, progress: Progress) -> None:
        self.config = config
        self.ledger = ledger
        self.progress = progress
        self._spent = Spent()
        self._tested = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, with what was spent before a resume."""
        assert isinstance(pl_module, Module)
        self._spent.add(self.ledger.totals())
        self.progress.begin("training", pl_module.total_steps, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: object) -> None:
        """Move on."""
        self._spent.add(self.ledger.last_step())
        self.progress.move(trainer.global_step, lambda: [*self._figures(trainer, outputs), *self._precision(pl_module)])

    def _figures(self, trainer: Trainer, outputs: Any) -> list[str]:
        loss, accuracy = (float(outputs[name]) for name in ("task_loss", "accuracy"))
        return [self._epoch(trainer), f"loss {loss:.3f}", f"acc {100 * accuracy:.1f} %"]

    def _epoch(self, trainer: Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{self.config.epochs}"

    def _precision(self, module: LightningModule) -> list[str]:
        """The bits of the next batch, or the gates' cost, and the share of the bit operations that is saved so far."""
        assert isinstance(module, Module)
        saved = [
            f"{percent:.0f} % of {name.removeprefix('static ')}"
            for name, percent in self._spent.saved().items()
            if percent >= 0.5
        ]
        said = [f"saved {', '.join(saved)}"] if saved else []
        if module.controller is None:
            return said
        if module.gates is not None and module.gates.cost is not None:
            return [f"cost {module.gates.cost:.2f} % of {module.gates.target:g} %", *said]
        test = module.controller.range_test
        testing = " range test" if test is not None and not test.done else ""
        bits = f"bits {module.controller.forward_bits or '-'}/{module.controller.backward_bits or '-'}{testing}"
        return [bits, *said]

    def on_validation_start(self, trainer: Trainer, _: LightningModule) -> None:
        """Begin an evaluation."""
        self._tested = 0
        self.progress.begin("evaluation", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, *_: object) -> None:
        """Move on in it."""
        self._tested += 1
        self.progress.move(self._tested)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the scores."""
        assert isinstance(pl_module, Module)
        self.progress.end()
        scores = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in pl_module.test.items()]
        self.progress.say("  ".join([self._epoch(trainer), *scores]))
