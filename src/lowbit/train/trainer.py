"""Training runs on Lightning's Trainer that continue bit for bit after a kill.

A run is a folder: ``config.yaml`` (every setting), ``conversion.txt`` and ``proof.txt`` (what its first step ran), both
also as ``.json``, ``ledger.jsonl`` (what every step computed), ``measured.jsonl`` (seconds and joules), ``last.ckpt``
and ``last-1.ckpt``, ``csv/metrics.csv``, ``tensorboard/`` and, once it is complete, ``result.json``. One process writes
to it at a time. What is random in step i follows from the settings and i alone: the loader is a pure function of (seed,
epoch, batch), torch is seeded anew before each step, and lowbit counts its own noise.
"""

import contextlib
import copy
import logging
import math
import re
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import lowbit
from lowbit.errors import RunError, Stopped, UsageError
from lowbit.evidence.names import layer_names
from lowbit.evidence.records import PLAIN, Total
from lowbit.inputs import files
from lowbit.nn.kinds import is_depthwise
from lowbit.precision.controller import PrecisionController
from lowbit.precision.range_test import RangeTestResult
from lowbit.train import checkpoint, data, models
from lowbit.train.config import CHANGEABLE, RangeTestConfig, Result, TrainConfig, lr_factor, settled
from lowbit.train.folder import (
    CHECKPOINT,
    CONFIG,
    LEDGER,
    PROOF,
    RANGE_TEST,
    RESULT,
    Settings,
    model_name,
    read_recipe,
    read_result,
    read_settings,
    refuse_taken,
    sources,
    write_result,
    write_settings,
    write_sources,
)
from lowbit.train.lock import locked, refuse_held
from lowbit.train.measured import measured
from lowbit.train.rows import Rows
from lowbit.train.stop import Leave, Stop, signals

# What lowbit keeps in a checkpoint, beside what Lightning does.
_OWN = {"config", "state", "loader", "test", "controller", "cost", "data", "sources"}
_WARM_UP = 5  # steps of each start whose time is not counted
_LOG_EVERY = 10  # steps between two rows of metrics.csv


def train(config: TrainConfig) -> Result:
    """Run `config` from its first step in a new run folder.

    SIGINT, SIGTERM and SIGHUP end the run once the step in progress, and an evaluation in progress, is done and saved;
    a second signal of the kind ends it at once.

    Raises:
        UsageError: a name is unknown, the settings do not fit together, or the run folder is taken.
        RunError: the loss or the state is not finite, the disk is full, or another process has the run folder.
        Stopped: a signal came; its text says how to go on. It is a KeyboardInterrupt.
    """
    config = config.resolved(threads=torch.get_num_threads())
    out = _checked(config.out)
    with _ending(out) as stop:
        refuse_held(out)
        refuse_taken(out)
        with _threads(config):
            loaded, module, report = _assemble(config)
            out.mkdir(parents=True, exist_ok=True)
            with locked(out):
                refuse_taken(out)
                files.remove_parts(out)
                write_settings(Settings(config=config))
                stop.saved = 0  # there is a run to resume
                write_sources(config)
                return _run(stop, loaded, module, report, None)


def resume(
    out: Path,
    changes: Mapping[str, object] | None = None,
    *,
    data_changed: bool = False,
    drop_damaged: bool = False,
) -> Result:
    """Continue the run in folder `out` from its last good checkpoint; a complete run just gives its result.

    The final weights are bit for bit those of a run that was never stopped, on the same machine. A run that
    was stopped before its first checkpoint starts again from step 0. Where the newest checkpoint is damaged, the one
    before it is taken and stderr says so. Signals: as `train`.

    Args:
        out: run folder.
        changes: settings that change from here on, of `CHANGEABLE`; ``config.yaml`` keeps what changed, and when.
        data_changed: go on although the data set is not what it was at the checkpoint; ``config.yaml`` says so.
        drop_damaged: go on although lines of the ledger are damaged; the steps in them are missing from it.

    Raises:
        UsageError: `out` is not a run folder, or a change is impossible.
        RunError: the settings, the ledger or the result are damaged, no checkpoint is good or the newest is of another
            run, or the data set changed; or as `train`.
        Stopped: as `train`.
    """
    out = _checked(out)
    with _ending(out) as stop:
        if not (out / CONFIG).is_file():
            raise UsageError(f"{out} is not a run folder: it lacks {CONFIG}. Start a run with `lowbit train`.")
        if not changes:
            refuse_held(out)
            if (complete := _complete(out)) is not None:
                return complete
        with locked(out):
            files.remove_parts(out)
            settings = read_settings(out)
            config = settings.config.changed(changes or {})
            with _threads(config):
                loaded, module, report = _assemble(config)
                start, changed_data = _start(settings, loaded, module, data_changed=data_changed)
                step = 0 if start is None else start["global_step"]
                after = settings.changed(config, step=step, data=changed_data)
                if after != settings:
                    write_settings(after)
                return _run(stop, loaded, module, report, start, drop_damaged=drop_damaged)


def trained(out: Path) -> tuple[nn.Module, data.Data]:
    """The converted model of a run's last good checkpoint, and its data.

    Raises:
        UsageError: `out` is not a run folder, or has no checkpoint yet.
        RunError: the settings or the checkpoints are damaged.
    """
    if not (out / CONFIG).is_file() or not checkpoint.kept(out / CHECKPOINT):
        raise UsageError(f"{out} has no {CONFIG} with a {CHECKPOINT}: give the folder of a run that saved a checkpoint")
    settings = read_settings(out)
    loaded, module, _ = _assemble(settings.config)
    path, content = _newest(settings)
    _check_fit(path, content, module)
    module.load_state_dict(content["state_dict"])
    lowbit.load_state_dict(module.model, content["lowbit"]["state"])
    return module.model, loaded


def _checked(out: Path | None) -> Path:
    assert out is not None
    if "\0" in str(out):
        raise UsageError(f"the run folder {str(out)!r} has a NUL byte in its name.")
    return out


@contextlib.contextmanager
def _ending(out: Path) -> Iterator[Stop]:
    """Turn what stops a run from outside into this library's errors."""
    with signals() as stop:
        try:
            yield stop
        except Leave:
            assert stop.signal is not None
            raise Stopped(f"{stop.signal.name}: stopped; {_how_to_go_on(out, stop)}", stop.signal) from None
        except _NotFiniteError as error:
            assert stop.saved is not None
            kept = f"The last good state is of step {stop.saved}"
            raise RunError(
                f"{error} {kept}: `lowbit resume {out} --lr RATE` goes on from there with another learning rate."
            ) from error
        except OSError as error:  # a log on a full disk, an image that is gone
            raise RunError(f"stopped by the system ({error}); {_how_to_go_on(out, stop)}.") from error
        if stop.signal is not None:
            raise Stopped(f"{stop.signal.name}: the run is complete; `lowbit resume {out}` shows it", stop.signal)


def _how_to_go_on(out: Path, stop: Stop) -> str:
    if stop.saved is None:
        return "nothing had changed yet: give the command again"
    return f"`lowbit resume {out}` starts from step {stop.saved}"


@contextlib.contextmanager
def _threads(config: TrainConfig) -> Iterator[None]:
    assert config.threads is not None
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def range_test(config: RangeTestConfig) -> RangeTestResult:
    """Train a fresh model at rising precision until a width makes progress, see `lowbit.range_test`.

    Raises:
        UsageError: a name is unknown, or the settings do not fit together.
        RunError: the loss is not finite.
    """
    settings = config.training().resolved(threads=torch.get_num_threads())
    loaded, model = _build(settings, config.model)
    recipe = lowbit.Recipe.find(config.recipe)
    static = recipe.replace(schedule=None, gates=None, depthwise=None)
    lowbit.convert_(model, static, seed=config.seed)
    depthwise = recipe.depthwise if any(map(is_depthwise, model.modules())) else None
    optimizer = _optimizer(settings, list(model.parameters()))
    batches = _endless(loaded.train)
    steps = 0

    def step() -> float:
        nonlocal steps
        torch.manual_seed(step_seed(config.seed, steps))
        x, y = next(batches)
        loss, accuracy = _score(model(x), y)
        if not loss.isfinite():
            raise RunError(f"the loss is {loss.item()} at step {steps}: {explain_non_finite(model, x)}.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        return accuracy.item() if config.measure == "accuracy" else loss.item()

    with _threads(settings):
        return lowbit.range_test(
            model.train(),
            step,
            low=config.low,
            high=config.high,
            backward=config.backward,
            rules=[] if depthwise is None else [(is_depthwise, depthwise)],
            steps_per_bit=config.steps_per_bit,
            threshold=config.gain,
            significance=config.significance,
            better="higher" if config.measure == "accuracy" else "lower",
            every=config.every,
        )


def _endless(loader: data.Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def step_seed(seed: int, step: int) -> int:
    """The seed of torch's generator for one step: 63 bits of two rounds of splitmix64.

    Adding `step` to `seed` instead would give step 1 of seed 0 and step 0 of seed 1 the same draws.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    return _mix64(_mix64(seed) ^ step) >> 1


def explain_non_finite(model: nn.Module, x: Tensor) -> str:
    """Where a loss that is not finite came from, found by running the forward pass once more.

    Args:
        model: the model in the state that gave the loss.
        x: the batch's input.

    Returns:
        The end of a sentence that begins with "the loss is nan at step 12: ".
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite, so an earlier update was too large"
    places: list[str] = []

    def look(name: str, inputs: tuple[object, ...], output: object) -> None:
        if any(map(_is_bad, inputs)):
            places.append(f"the first value that is not finite enters the layer {name}")
        elif _is_bad(output):
            places.append(f"the first layer whose output is not finite is {name}")

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs, output))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return places[0] if places else "every layer's output is finite, so it came up after the last layer"


class _NotFiniteError(RunError):
    """A loss or a state that is not finite: the run diverged."""


class _Module(LightningModule):
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

    def on_train_batch_start(self, *_: object) -> None:
        torch.manual_seed(step_seed(self.config.seed, self.global_step))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        x, y = batch
        loss, accuracy = _score(self.model(x), y)
        if not loss.isfinite():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
                cause = explain_non_finite(self.model, x)
            raise _NotFiniteError(f"the loss is {loss.item()} at step {self.global_step}: {cause}.")
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
            values |= {"cost_percent": self.gates.cost, "target_percent": self.gates.target}
            for block, counts in zip(self.gates.blocks, self.gates.histogram().tolist(), strict=True):
                for (forward, backward), count in zip(self.gates.choices, counts, strict=True):
                    values[f"gates/{block}/{forward}-{backward}"] = count / max(sum(counts), 1)
        return {name: float(value) for name, value in values.items() if value is not None}

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device="cpu")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        loss, accuracy = _score(self.model(x), y)
        self.sums += self.sums.new_tensor([loss.item(), accuracy.item(), 1.0]) * y.numel()

    def on_validation_epoch_end(self) -> None:
        loss, accuracy, _ = (self.sums / self.sums[2]).tolist()
        score = {"test_bits_per_byte": loss / math.log(2)} if self.text else {"test_accuracy": accuracy}
        self.test = {"test_loss": loss, **score}
        _log(self.trainer, self.test)

    def configure_optimizers(self) -> Any:
        config = self.config
        gates = [] if self.gates is None else list(self.gates.parameters())
        optimizer = _optimizer(config, [*self.model.parameters(), *gates])
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(config.schedule, step, self.total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lowbit"] = {
            "config": self.config.to_dict(),
            "state": lowbit.state_dict(self.model),
            "loader": self.loader.state_dict(),
            "test": self.test,
            "controller": None if self.controller is None else self.controller.state_dict(),
            "cost": self.cost,
            "data": self.fingerprint,
            "sources": self.sources,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        _retune(checkpoint, self.config, self.total_steps)
        lowbit.load_state_dict(self.model, checkpoint["lowbit"]["state"])
        # Lightning restores a loader too, but not at the end of an epoch.
        self.loader.load_state_dict(checkpoint["lowbit"]["loader"])


class _CheckpointIO(CheckpointIO):
    """Lightning's own writes through the system's temporary folder, which may be another file system.

    Args:
        start: the checkpoint that the run goes on from, which is read already.
        keep: how many checkpoints to keep.
        never_finite: names of tensors that hold an inf or nan from the beginning, as a mask does.
    """

    def __init__(self, start: dict[str, Any] | None, keep: int, never_finite: set[str]) -> None:
        self.start = start
        self.keep = keep
        self.never_finite = never_finite

    def save_checkpoint(self, content: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert storage_options is None
        bad = sorted(set(checkpoint.not_finite(content)) - self.never_finite)
        if bad:
            raise _NotFiniteError(
                f"the state after step {content['global_step']} is not finite, so it is not saved: "
                f"{bad[0]} has an inf or nan{f', and so have {len(bad) - 1} others' if bad[1:] else ''}."
            )
        checkpoint.save(Path(path), content, keep=self.keep)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        assert path is not None
        assert map_location is None
        assert weights_only
        assert self.start is not None
        return self.start

    def remove_checkpoint(self, path: Any) -> None:
        raise AssertionError(f"a run keeps its checkpoints by itself, and {path} was to be removed")


class _StepTimer(Callback):
    """Wall seconds of each step: forward, backward and update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self._began)

    def median(self) -> float | None:
        counted = self.seconds[_WARM_UP:]
        return statistics.median(counted) if counted else None


class _Meter(Callback):
    """Ends the ledger's steps and evaluations where those of the run end, and adds up the run's cost from them."""

    def __init__(self, meter: lowbit.Meter) -> None:
        self.meter = meter

    def on_train_batch_end(self, _: Trainer, pl_module: LightningModule, *__: object) -> None:
        assert isinstance(pl_module, _Module)
        self.meter.step()
        pl_module.add_cost(self.meter.ledger.last_step())

    def on_validation_end(self, _: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, _Module)
        name = "test_bits_per_byte" if pl_module.text else "test_accuracy"
        self.meter.evaluated(name, pl_module.test[name], higher_is_better=not pl_module.text)

    def on_save_checkpoint(self, *_: object) -> None:
        self.meter.ledger.sync()  # a checkpoint never knows of a step that the ledger lost


class _Rows(Callback):
    """A row of training figures every few steps, before that step's checkpoint (Lightning's come after)."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: object) -> None:
        assert isinstance(pl_module, _Module)
        if trainer.global_step % _LOG_EVERY == 0:
            names = {"loss": "task_loss", "accuracy": "accuracy", "lr": "lr"}
            values = {f"train_{name}": float(outputs[key]) for name, key in names.items()}
            _log(trainer, values | pl_module.precision())


class _Precision(Callback):
    """Sets the bits of the next batch once the present one is logged, and before it is saved."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_batch_end(self, _: Trainer, pl_module: LightningModule, outputs: Any, *__: object) -> None:
        assert isinstance(pl_module, _Module)
        if pl_module.controller is not None:
            pl_module.controller.step(outputs["task_loss"])
            test = pl_module.controller.range_test
            if test is not None and test.done and not (self.out / RANGE_TEST).exists():
                files.write_text(self.out / RANGE_TEST, f"{RangeTestResult.of(test)}\n")


class _Stop(Callback):
    """Ends the run at `max_steps` with an evaluation; Lightning's `max_steps` loses an epoch on resume."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        assert isinstance(pl_module, _Module)
        trainer.should_stop = trainer.global_step >= pl_module.total_steps


class _Checkpoints(Callback):
    """Saves at each epoch's end once it has been evaluated, within an epoch by steps and minutes, and on a signal."""

    def __init__(self, config: TrainConfig, stop: Stop) -> None:
        assert config.out is not None
        self.path = config.out / CHECKPOINT
        self.every = config.checkpoint_every
        self.seconds = math.inf if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self.stop = stop
        self.saved_at = time.monotonic()

    def on_train_start(self, *_: object) -> None:
        self.stop.install()  # Lightning took the signals when it began
        self.stop.patient = True

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        due = self.every is not None and trainer.global_step % self.every == 0
        due = due or self.stop.signal is not None or time.monotonic() - self.saved_at >= self.seconds
        # The last batch waits for the evaluation: a run resumed from between would never do it.
        if due and not (trainer.is_last_batch or trainer.should_stop):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, _Module)
        self._save(trainer, complete=trainer.global_step >= pl_module.total_steps)

    def _save(self, trainer: Trainer, *, complete: bool = False) -> None:
        for logger in trainer.loggers:
            logger.save()  # else a kill loses rows from before the checkpoint
        trainer.save_checkpoint(self.path)
        self.stop.saved, self.saved_at = trainer.global_step, time.monotonic()
        if self.stop.signal is not None and not complete:
            raise Leave


class _Bar(Callback):
    """One line that moves with the steps of an epoch, and one that stays for each evaluation."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[state]}"),
            expand=True,
            transient=True,
        )
        self.line: TaskID | None = None

    def on_train_start(self, *_: object) -> None:
        self.progress.start()

    @staticmethod
    def _precision(module: LightningModule) -> str:
        """The bits of the next batch, or the gates' cost, and the bit operations of the run so far."""
        assert isinstance(module, _Module)
        if module.controller is None:
            return ""
        so_far = f"  {module.cost['bit_operations'] / max(module.cost['macs'], 1):.1f} bit ops/MAC"
        if module.gates is not None and module.gates.cost is not None:
            return f"  cost {module.gates.cost:.2f} % of {module.gates.target:g} %{so_far}"
        test = module.controller.range_test
        testing = "  range test" if test is not None and not test.done else ""
        return (
            f"  bits {module.controller.forward_bits or '-'}/{module.controller.backward_bits or '-'}{testing}{so_far}"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, _: object, batch_idx: int
    ) -> None:
        if self.line is None:
            name = f"epoch {trainer.current_epoch + 1}/{self.config.epochs}"
            self.line = self.progress.add_task(name, total=int(trainer.num_training_batches), state="")
        loss, accuracy, lr = (float(outputs[name]) for name in ("task_loss", "accuracy", "lr"))
        state = f"loss {loss:.3f}  accuracy {accuracy:.3f}  lr {lr:.2g}{self._precision(pl_module)}"
        self.progress.update(self.line, completed=batch_idx + 1, state=state)

    def on_validation_start(self, *_: object) -> None:
        if self.line is not None:
            self.progress.update(self.line, state="testing")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.line is not None:
            self.progress.remove_task(self.line)
            self.line = None
        assert isinstance(pl_module, _Module)
        if pl_module.test:
            name = f"epoch {trainer.current_epoch + 1}/{self.config.epochs}"
            scores = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in pl_module.test.items()]
            self.progress.console.print("  ".join([name, *scores]), highlight=False)

    def on_train_end(self, *_: object) -> None:
        self.progress.stop()

    def on_exception(self, *_: object) -> None:
        self.progress.stop()


def _run(
    stop: Stop,
    loaded: data.Data,
    module: _Module,
    report: lowbit.Report,
    start: dict[str, Any] | None,
    *,
    drop_damaged: bool = False,
) -> Result:
    """Take the run from the checkpoint `start`, or from step 0 without one, to its end."""
    config = module.config
    assert config.out is not None
    module.sources = sources(config)
    timer = _StepTimer()
    began = stop.saved = 0 if start is None else start["global_step"]
    if start is None:
        _write_report(config.out / "conversion.txt", str(report), report)
        proof = _prove(config, loaded, module)
        _write_report(config.out / PROOF, f"{proof.summary()}\n\n{proof}", proof)
    if began < module.total_steps:
        (config.out / RESULT).unlink(missing_ok=True)  # of the run before it went on
        with (
            _quiet(),
            measured(config.out, steps=lambda: began + len(timer.seconds), seconds_per_step=timer.median),
            lowbit.Meter(module.model, _open_ledger(config, module.model, began, drop_damaged=drop_damaged)) as meter,
        ):
            _fit(
                _make_trainer(config, timer, start, meter, stop, module),
                module,
                loaded,
                stop,
                resumed=start is not None,
            )
    test = None if module.controller is None else module.controller.range_test
    result = Result(
        test_loss=module.test["test_loss"],
        test_accuracy=module.test.get("test_accuracy"),
        test_bits_per_byte=module.test.get("test_bits_per_byte"),
        seconds_per_step=timer.median(),
        steps=module.total_steps,
        recipe=config.recipe,
        converted=sum(row.converted for row in report.rows),
        layers=len(report.rows),
        out=config.out,
        macs=module.cost["macs"],
        bit_operations=module.cost["bit_operations"],
        low=None if test is None else test.chosen,
    )
    write_result(result)
    return result


def _assemble(config: TrainConfig) -> tuple[data.Data, _Module, lowbit.Report]:
    """The data, the converted model and the report of its conversion: functions of the settings alone."""
    recipe, blocks = _recipe(config)
    loaded, model = _build(config, model_name(config))
    rules: list[Any] = []
    if blocks is not None:
        if not any(re.fullmatch(blocks, name) for name, _ in model.named_modules()):
            known = models.blocks(config.model)
            hint = f"; those of {config.model} match {known!r}" if known else ""
            raise UsageError(f"blocks={blocks!r} matches the name of no module of {config.model!r}{hint}.")
        # What has a gate is converted, whatever the recipe says of the first layer.
        rules = [(re.compile(rf"(?:{blocks})(\..*)?"), recipe)]
    report = lowbit.convert_(model, recipe, rules=rules, engine=_engine(config), seed=config.seed)

    def control(total_steps: int) -> PrecisionController | None:
        if not recipe.is_dynamic:
            return None
        return PrecisionController.from_recipe(
            model,
            total_steps=total_steps,
            steps_per_epoch=config.plateau_every or len(loaded.train),
            blocks=() if blocks is None else [re.compile(blocks)],
            eval_bits=config.eval_bits or "highest",
        )

    return loaded, _Module(config, loaded, model, control), report


def _recipe(config: TrainConfig) -> tuple[lowbit.Recipe, str | None]:
    """The recipe with the settings of the run, and the pattern of the blocks that it gates."""
    recipe = read_recipe(config).tuned(**config.tuned())
    if config.eval_bits is not None and recipe.schedule is None:
        raise UsageError(f"eval_bits goes with a recipe whose bits follow a schedule, and {recipe.name!r} has none.")
    if config.plateau_every is not None and "threshold" not in recipe.settings():
        raise UsageError(f"plateau_every goes with a recipe that follows the loss, and {recipe.name!r} does not.")
    if recipe.gates is None:
        if config.blocks is not None:
            raise UsageError(f"blocks goes with a recipe that has gates, and {recipe.name!r} has none.")
        return recipe, None
    blocks = config.blocks or models.blocks(config.model)
    if blocks is None:
        raise UsageError(
            f"recipe {recipe.name!r} chooses bits by block: say which with --blocks, a regular expression that matches "
            f"the names of the repeated blocks of {config.model!r}."
        )
    try:
        re.compile(blocks)
    except re.error as error:
        raise UsageError(f"blocks={blocks!r} is no regular expression: {error}.") from error
    return recipe, blocks


def _accelerator() -> str:
    """Where training runs: on a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _engine(config: TrainConfig) -> str:
    """The engine to convert for: on a GPU, where the model moves after it, ``"auto"`` is the reference engine."""
    return "reference" if config.engine == "auto" and _accelerator() == "cuda" else config.engine


def _build(config: TrainConfig, model: str) -> tuple[data.Data, nn.Module]:
    """The data and the plain model."""
    loaded = data.load(
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        subset=config.subset,
        context=config.context or 128,
    )
    if config.context is not None and loaded.task.kind != "text":
        raise UsageError(f"context is a setting of text, and the data set {config.data!r} is not text.")
    torch.manual_seed(config.seed)
    return loaded, models.build(model, loaded.task)


def _optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    assert config.lr is not None
    assert config.weight_decay is not None
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _prove(config: TrainConfig, loaded: data.Data, module: _Module) -> lowbit.Proof:
    """What the first step runs, measured on a copy: the run itself is not touched."""
    before = loaded.train.state_dict()
    x, y = next(iter(loaded.train))
    loaded.train.load_state_dict(before)
    copied, _controller = copy.deepcopy((module.model, module.controller))
    copied.train()
    amp = torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp == "bf16")
    with lowbit.verify(copied) as proof:
        with amp:
            loss, _ = _score(copied(x), y)
        loss.backward()
    return proof


def _write_report(path: Path, text: str, report: lowbit.Report | lowbit.Proof) -> None:
    """Write a report as text, and beside it as JSON."""
    files.write_text(path, f"{text}\n")
    files.write_text(path.with_suffix(".json"), f"{report.to_json()}\n")


def _open_ledger(config: TrainConfig, model: nn.Module, began: int, *, drop_damaged: bool) -> lowbit.Ledger:
    """The ledger of the run, without the records that follow the checkpoint of step `began`."""
    assert config.out is not None
    path = config.out / LEDGER
    if began and path.exists():
        return lowbit.Ledger.resume(path, steps=began, drop_damaged=drop_damaged)
    ledger = lowbit.Ledger.create(path, model=config.model, layers=layer_names(model), first_step=began)
    if began:
        ledger.add_note(f"the run had no ledger when it was resumed at step {began}: earlier steps are not in it")
    return ledger


def _make_trainer(
    config: TrainConfig,
    timer: _StepTimer,
    start: dict[str, Any] | None,
    meter: lowbit.Meter,
    stop: Stop,
    module: _Module,
) -> Trainer:
    assert config.out is not None
    callbacks = [
        _Meter(meter),
        timer,
        _Rows(),
        _Precision(config.out),
        _Stop(),
        _Checkpoints(config, stop),
    ]
    if sys.stdout.isatty():
        callbacks.append(_Bar(config))
    never_finite = {"state_dict": module.state_dict(), "lowbit": {"state": lowbit.state_dict(module.model)}}
    return Trainer(
        accelerator=_accelerator(),
        devices=1,
        precision="bf16-mixed" if config.amp == "bf16" else "32-true",
        max_epochs=config.epochs,
        logger=_loggers(config.out, 0 if start is None else start["global_step"]),
        log_every_n_steps=1,  # `_Rows` logs; a larger value is a warning where an epoch is shorter
        callbacks=callbacks,
        # One process: Lightning would read a cluster's environment variables and change what the run does.
        plugins=[_CheckpointIO(start, config.keep, set(checkpoint.not_finite(never_finite))), LightningEnvironment()],
        default_root_dir=config.out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,  # tensors that a layer keeps from the evaluation must serve the next step
    )


def _loggers(out: Path, began: int) -> list[Rows | TensorBoardLogger]:
    """Loggers that carry on where the checkpoint of step `began` was written."""
    # With this step TensorBoard drops what a killed process wrote after its checkpoint.
    board = TensorBoardLogger(out, name="", version="tensorboard", purge_step=began + 1)
    return [Rows(out / "csv" / "metrics.csv", step=began), board]


def _fit(trainer: Trainer, module: _Module, loaded: data.Data, stop: Stop, *, resumed: bool) -> None:
    """Train to the end."""
    path = trainer.default_root_dir + "/" + CHECKPOINT  # `_CheckpointIO` has read it
    try:
        trainer.fit(module, loaded.train, loaded.test, ckpt_path=path if resumed else None, weights_only=True)
    except SystemExit as ended:  # Lightning's answer to a KeyboardInterrupt, which a signal does not raise here
        if not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        stop.signal = signal.SIGINT
        raise Leave from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what Lightning says about itself; warnings about the run stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)  # "GPU available", advertisements, "`Trainer.fit` stopped"
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 asks torch's tree utilities in a way that torch 2.13 deprecates.
            message = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
            warnings.filterwarnings("ignore", message, FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _load_checkpoint(path: Path, settings: Settings) -> dict[str, Any]:
    """Read a checkpoint of the run with these settings.

    Raises:
        DamagedError: the file holds no checkpoint of lowbit.
        RunError: its settings were never those of the run folder.
    """
    content: dict[str, Any] = checkpoint.load(path)
    own = content.get("lowbit")
    if not isinstance(own, dict) or set(own) != _OWN:
        raise checkpoint.DamagedError(
            f"{path} has no state of lowbit; expected a checkpoint that `lowbit train` wrote."
        )
    if settled(own["config"]) not in map(settled, settings.versions()):
        now = settings.config.to_dict()
        name = next(name for name in {**now, **own["config"]} if own["config"].get(name) != now.get(name))
        raise RunError(
            f"{path} is of another run: it has {name}={own['config'].get(name)!r},"
            f" and {path.with_name(CONFIG)} has {now.get(name)!r}."
        )
    return content


def _newest(
    settings: Settings, tell: Callable[[Path, RunError], None] = lambda *_: None
) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is not damaged; `tell` hears of each newer one once there is one.

    Raises:
        RunError: all are damaged, or the newest is of another run.
    """
    assert settings.config.out is not None
    damaged: list[tuple[Path, RunError]] = []
    for path in checkpoint.kept(settings.config.out / CHECKPOINT):
        try:
            content = _load_checkpoint(path, settings)
        except checkpoint.DamagedError as error:
            damaged.append((path, error))
            continue
        for each in damaged:
            tell(*each)
        return path, content
    reasons = " ".join(str(error) for _, error in damaged)
    raise RunError(f"{reasons} No good checkpoint is left: to start again from step 0, remove the damaged ones.")


def _start(
    settings: Settings, loaded: data.Data, module: _Module, *, data_changed: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """The checkpoint that the run goes on from, None at step 0, and what of the data changed since; `module` fits it.

    Raises:
        RunError: as `_newest`, it does not fit the model, or the data set changed and `data_changed` is not set.
    """
    out = settings.config.out
    assert out is not None
    if not checkpoint.kept(out / CHECKPOINT):
        return None, []

    def tell(path: Path, error: RunError) -> None:
        print(f"lowbit: {error} It is now {checkpoint.set_aside(path).name}.", file=sys.stderr)

    path, content = _newest(settings, tell)
    _check_fit(path, content, module)
    if path.name != CHECKPOINT:
        print(f"lowbit: going on from {path}, of step {content['global_step']}", file=sys.stderr)
    then, now = content["lowbit"]["data"], module.fingerprint
    changed = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if changed and not data_changed:
        what = ", ".join(f"{name} (was {then.get(name)}, is {now.get(name)})" for name in changed)
        raise RunError(
            f"the data set {loaded.name} changed since step {content['global_step']}: {what}. Bring the old data back, "
            f"or go on with the new data: `lowbit resume {out} --data-changed`."
        )
    module.test = content["lowbit"]["test"]
    module.cost = dict(content["lowbit"]["cost"])
    if module.controller is not None:
        try:
            module.controller.load_state_dict(content["lowbit"]["controller"])
        except UsageError as error:
            raise RunError(f"{path} does not fit these settings: {error}") from error
    return content, changed


def _check_fit(path: Path, content: Mapping[str, Any], module: _Module) -> None:
    """Raise a RunError where the recipe, the model or its tensors are others, or the step is beyond the run's end."""
    now = sources(module.config)
    for name, then in content["lowbit"]["sources"].items():
        if now.get(name) != then:
            raise RunError(f"{path.with_name(name)} is not what the run began with (SHA-256 {then}): bring that back.")
    saved, own = content["state_dict"], module.state_dict()
    for name in sorted(saved.keys() | own.keys()):
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            raise RunError(f"{path} does not fit the model {module.config.model}: they differ in {name}.")
    step = content["global_step"]
    if not 0 < step <= module.total_steps:
        raise RunError(f"{path} is at step {step}; expected a step from 1 to {module.total_steps}.")


def _complete(out: Path) -> Result | None:
    """The result of a complete run whose checkpoint is good; None where there is something left to do."""
    if not (out / RESULT).is_file():
        return None
    result, path = read_result(out), out / CHECKPOINT
    if not checkpoint.kept(path):
        print(f"lowbit: the run is complete, and its checkpoints are gone from {out}", file=sys.stderr)
        return result
    try:
        step = _load_checkpoint(path, read_settings(out))["global_step"]
    except checkpoint.DamagedError:  # who goes on from the one before it says so
        return None
    return result if step == result.steps else None


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


def _is_bad(value: object) -> bool:
    return isinstance(value, Tensor) and not bool(value.isfinite().all())


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    """One row in every logger, at the number of steps done."""
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": float(trainer.current_epoch + 1), **values}, step=trainer.global_step)


def _score(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy in nats and the share of right predictions, of (..., classes) against (...)."""
    logits = logits.float().flatten(0, -2)  # bfloat16 under autocast, too coarse for a loss
    return F.cross_entropy(logits, y.flatten()), (logits.argmax(-1) == y.flatten()).double().mean()


def _mix64(x: int) -> int:
    """A bijection of 64-bit integers that turns each changed bit into about 32 changed bits."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)
