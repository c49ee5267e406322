"""Training runs on Lightning's Trainer that continue bit for bit after a kill.

A run is a folder: ``config.yaml`` (every setting), ``conversion.txt``, ``proof.txt`` (what its first step ran),
``ledger.jsonl`` (what every step computed), ``measured.jsonl`` (seconds and joules), ``last.ckpt``,
``csv/metrics.csv``, ``tensorboard/`` and, once it is complete, ``result.json``. What is random in
step i follows from the settings and i alone: the loader is a pure function of (seed, epoch, batch), torch is seeded
anew before each step, and lowbit counts its own noise.
"""

import contextlib
import copy
import csv
import dataclasses
import io
import json
import logging
import math
import re
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import lowbit
from lowbit.controller import PrecisionController, is_depthwise
from lowbit.errors import RunError, UsageError
from lowbit.meter import layer_names
from lowbit.products import ProductCall, counted_by
from lowbit.range_test import RangeTestResult
from lowbit.train import checkpoint as files
from lowbit.train import data, models
from lowbit.train.config import RangeTestConfig, Result, TrainConfig, lr_factor
from lowbit.train.measured import measured

CHECKPOINT = "last.ckpt"
CONFIG = "config.yaml"
LEDGER = "ledger.jsonl"
PROOF = "proof.txt"
RESULT = "result.json"
RANGE_TEST = "range-test.txt"

_WARM_UP = 5  # steps of each start whose time is not counted
_LOG_EVERY = 10  # steps between two rows of metrics.csv


def train(config: TrainConfig) -> Result:
    """Run `config` from its first step in a new run folder.

    Raises:
        UsageError: a name is unknown, the settings do not fit together, or the run folder is taken.
        RunError: the loss is not finite, or the disk is full.
        KeyboardInterrupt: Ctrl-C; its text says how to go on.
    """
    config = config.resolved(threads=torch.get_num_threads())
    assert config.out is not None
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UsageError(
            f"{config.out} exists and is not empty. Continue that run with `lowbit resume {config.out}`,"
            " or choose another folder with --out."
        )
    return _run(config)


def resume(out: Path) -> Result:
    """Continue the run in folder `out` from its last checkpoint; a complete run just gives its result.

    The final weights are bit for bit those of a run that was never stopped, on the same machine. A run that
    was stopped before its first checkpoint starts again from step 0.

    Raises:
        UsageError: `out` is no run folder.
        RunError: the settings, the checkpoint or the result are damaged or of another run; or as `train`.
    """
    if not (out / CONFIG).is_file():
        raise UsageError(f"{out} is no run folder: it has no {CONFIG}. Start a run with `lowbit train`.")
    config = _read_config(out)
    if (out / RESULT).is_file():
        return _read_result(out)
    return _run(config)


def trained(out: Path) -> tuple[nn.Module, data.Data]:
    """The converted model of a run's last checkpoint, and its data.

    Raises:
        UsageError: `out` is no run folder, or has no checkpoint yet.
        RunError: the settings or the checkpoint are damaged.
    """
    if not (out / CONFIG).is_file() or not (out / CHECKPOINT).is_file():
        raise UsageError(f"{out} has no {CONFIG} with a {CHECKPOINT}: give the folder of a run that saved a checkpoint")
    config = _read_config(out)
    loaded, module, _ = _assemble(config)
    _read_progress(out / CHECKPOINT, module)
    content = _load_checkpoint(out / CHECKPOINT, config)
    module.load_state_dict(content["state_dict"])
    lowbit.load_state_dict(module.model, content["lowbit"]["state"])
    return module.model, loaded


def range_test(config: RangeTestConfig) -> RangeTestResult:
    """Train a fresh model at rising precision until a width makes progress, see `lowbit.range_test`.

    Raises:
        UsageError: a name is unknown, or the settings do not fit together.
        RunError: the loss is not finite.
    """
    settings = config.training().resolved(threads=torch.get_num_threads())
    loaded, model = _build(settings)
    recipe = lowbit.Recipe.from_name(config.recipe)
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

    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads_before)
    try:
        return lowbit.range_test(
            model.train(),
            step,
            low=config.low,
            high=config.high,
            backward=config.backward,
            rules=[] if depthwise is None else [(is_depthwise, depthwise)],
            steps_per_bit=config.steps_per_bit,
            threshold=config.gain,
            better="higher" if config.measure == "accuracy" else "lower",
            every=config.every,
        )
    finally:
        torch.set_num_threads(threads_before)


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
        self.model = model
        self.total_steps = steps if config.max_steps is None else min(steps, config.max_steps)
        self.test: dict[str, float] = {}
        self.controller = control(self.total_steps)
        self.gates = None if self.controller is None else self.controller.gates
        self.cost = {"macs": 0, "bit_operations": 0}

    def on_train_batch_start(self, *_: object) -> None:
        torch.manual_seed(step_seed(self.config.seed, self.global_step))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        x, y = batch
        with counted_by(self.count):
            loss, accuracy = _score(self.model(x), y)
        if not loss.isfinite():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
                cause = explain_non_finite(self.model, x)
            raise RunError(f"the loss is {loss.item()} at step {self.global_step}: {cause}.")
        lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]  # there is one optimizer
        penalty = 0.0 if self.gates is None else self.gates.penalty()
        return {"loss": loss + penalty, "task_loss": loss.detach(), "accuracy": accuracy, "lr": lr}

    def backward(self, loss: Tensor) -> None:
        with counted_by(self.count):
            loss.backward()

    def count(self, call: ProductCall) -> None:
        """Add a product of a converted layer to the run's cost."""
        self.cost["macs"] += call.macs
        self.cost["bit_operations"] += call.macs * call.bits[0] * call.bits[1]

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
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        lowbit.load_state_dict(self.model, checkpoint["lowbit"]["state"])
        # Lightning restores a loader too, but not at the end of an epoch.
        self.loader.load_state_dict(checkpoint["lowbit"]["loader"])


class _CheckpointIO(CheckpointIO):
    """Lightning's own writes through the system's temporary folder, which may be another file system."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert storage_options is None
        files.save(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        assert map_location is None
        assert weights_only
        return _load_checkpoint(Path(path), self.config)

    def remove_checkpoint(self, path: Any) -> None:
        raise AssertionError(f"a run keeps its one checkpoint, and {path} was to be removed")


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
    """Ends the ledger's steps and evaluations where those of the run end."""

    def __init__(self, meter: lowbit.Meter) -> None:
        self.meter = meter

    def on_train_batch_end(self, *_: object) -> None:
        self.meter.step()

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
                _write_text(self.out / RANGE_TEST, f"{RangeTestResult.of(test)}\n")


class _Stop(Callback):
    """Ends the run at `max_steps` with an evaluation; Lightning's `max_steps` loses an epoch on resume."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        assert isinstance(pl_module, _Module)
        trainer.should_stop = trainer.global_step >= pl_module.total_steps


class _Checkpoints(Callback):
    """Saves every `every` steps within an epoch, and at each epoch's end once it has been evaluated."""

    def __init__(self, path: Path, every: int | None) -> None:
        self.path = path
        self.every = every

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        # The last batch waits for the evaluation: a run resumed from between would never do it.
        last = trainer.is_last_batch or trainer.should_stop
        if self.every and trainer.global_step % self.every == 0 and not last:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: object) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # else a kill loses rows from before the checkpoint
        trainer.save_checkpoint(self.path)


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


def _run(config: TrainConfig) -> Result:
    """Take the run from its last checkpoint, or from step 0 without one, to its end."""
    assert config.out is not None
    assert config.threads is not None
    path = config.out / CHECKPOINT
    timer = _StepTimer()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        loaded, module, report = _assemble(config)
        began = 0
        if path.exists():
            began, module.test = _read_progress(path, module)
        else:
            _create_folder(config, report)
            proof = _prove(config, loaded, module.model)
            _write_text(config.out / PROOF, f"{proof.summary()}\n\n{proof}\n")
        if began < module.total_steps:
            with (
                _quiet(),
                measured(config.out, steps=lambda: began + len(timer.seconds), seconds_per_step=timer.median),
                lowbit.Meter(module.model, _open_ledger(config, module.model, began)) as meter,
            ):
                trainer = _make_trainer(config, timer, began, meter)
                _fit(trainer, module, loaded, config.out, path if began else None)
    finally:
        torch.set_num_threads(threads_before)
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
    _write_result(result)
    return result


def _assemble(config: TrainConfig) -> tuple[data.Data, _Module, lowbit.Report]:
    """The data, the converted model and the report of its conversion: functions of the settings alone."""
    recipe, blocks = _recipe(config)
    loaded, model = _build(config)
    rules: list[Any] = []
    if blocks is not None:
        if not any(re.fullmatch(blocks, name) for name, _ in model.named_modules()):
            known = models.blocks(config.model)
            hint = f"; those of {config.model} match {known!r}" if known else ""
            raise UsageError(f"blocks={blocks!r} matches the name of no module of {config.model!r}{hint}.")
        # What has a gate is converted, whatever the recipe says of the first layer.
        rules = [(re.compile(rf"(?:{blocks})(\..*)?"), recipe)]
    report = lowbit.convert_(model, recipe, rules=rules, engine=config.engine, seed=config.seed)

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
    recipe = lowbit.Recipe.from_name(config.recipe).tuned(**config.tuned())
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


def _build(config: TrainConfig) -> tuple[data.Data, nn.Module]:
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
    return loaded, models.build(config.model, loaded.task)


def _optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    assert config.lr is not None
    assert config.weight_decay is not None
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _create_folder(config: TrainConfig, report: lowbit.Report) -> None:
    assert config.out is not None
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the run folder {config.out}: {error.strerror}.") from error
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    _write_text(config.out / CONFIG, text)
    _write_text(config.out / "conversion.txt", f"{report}\n")


def _prove(config: TrainConfig, loaded: data.Data, model: nn.Module) -> lowbit.Proof:
    """What the first step runs, measured on a copy: the run itself is not touched."""
    before = loaded.train.state_dict()
    x, y = next(iter(loaded.train))
    loaded.train.load_state_dict(before)
    copied = copy.deepcopy(model).train()
    amp = torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp == "bf16")
    with lowbit.verify(copied) as proof:
        with amp:
            loss, _ = _score(copied(x), y)
        loss.backward()
    return proof


def _open_ledger(config: TrainConfig, model: nn.Module, began: int) -> lowbit.Ledger:
    """The ledger of the run, without the records that follow the checkpoint of step `began`."""
    assert config.out is not None
    path = config.out / LEDGER
    if began and path.exists():
        return lowbit.Ledger.resume(path, steps=began)
    ledger = lowbit.Ledger.create(path, model=config.model, layers=layer_names(model), first_step=began)
    if began:
        ledger.add_note(f"the run had no ledger when it was resumed at step {began}: earlier steps are not in it")
    return ledger


def _make_trainer(config: TrainConfig, timer: _StepTimer, began: int, meter: lowbit.Meter) -> Trainer:
    assert config.out is not None
    callbacks = [
        _Meter(meter),
        timer,
        _Rows(),
        _Precision(config.out),
        _Stop(),
        _Checkpoints(config.out / CHECKPOINT, config.checkpoint_every),
    ]
    if sys.stdout.isatty():
        callbacks.append(_Bar(config))
    return Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision="bf16-mixed" if config.amp == "bf16" else "32-true",
        max_epochs=config.epochs,
        logger=_loggers(config.out, began),
        log_every_n_steps=1,  # `_Rows` logs; a larger value is a warning where an epoch is shorter
        callbacks=callbacks,
        # One process: Lightning would read a cluster's environment variables and change what the run does.
        plugins=[_CheckpointIO(config), LightningEnvironment()],
        default_root_dir=config.out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,  # tensors that a layer keeps from the evaluation must serve the next step
    )


def _loggers(out: Path, began: int) -> list[CSVLogger | TensorBoardLogger]:
    """Loggers that carry on where the checkpoint of step `began` was written."""
    rows = _rows_up_to(out / "csv" / "metrics.csv", began)
    (out / "csv" / "metrics.csv").unlink(missing_ok=True)
    table = CSVLogger(out, name="", version="csv")
    for row in rows:
        table.log_metrics({key: float(value) for key, value in row.items() if value}, step=int(row["step"]))
    if rows:
        table.save()
    # With this step TensorBoard drops what a killed process wrote after its checkpoint.
    return [table, TensorBoardLogger(out, name="", version="tensorboard", purge_step=began + 1)]


def _rows_up_to(path: Path, step: int) -> list[dict[str, str]]:
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # a killed process may have left half a line
    rows = csv.DictReader(io.StringIO(whole))
    return [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= step]


def _fit(trainer: Trainer, module: _Module, loaded: data.Data, out: Path, checkpoint_path: Path | None) -> None:
    """Train to the end, and turn what stops it from outside into this library's errors."""
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, loaded.train, loaded.test, ckpt_path=checkpoint_path, weights_only=True)
    except OSError as error:  # a log on a full disk, an image that is gone
        raise RunError(f"stopped by the system ({error}) {_where(trainer, out)}.") from error
    except SystemExit as stop:  # Lightning's answer to signals
        signal.signal(signal.SIGINT, on_ctrl_c)
        if isinstance(stop, SIGTERMException):
            raise RunError(f"terminated {_where(trainer, out)}.") from stop
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted {_where(trainer, out)}") from None
        raise


def _where(trainer: Trainer, out: Path) -> str:
    return f"at step {trainer.global_step}; continue with `lowbit resume {out}`"


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


def _load_checkpoint(path: Path, config: TrainConfig) -> dict[str, Any]:
    """Read the checkpoint of the run `config`.

    Raises:
        RunError: the file is damaged or foreign, or its settings are not those of the run folder.
    """
    content: dict[str, Any] = files.load(path)
    own = content.get("lowbit")
    if not isinstance(own, dict) or set(own) != {"config", "state", "loader", "test", "controller", "cost"}:
        raise RunError(f"{path} has no state of lowbit; expected a checkpoint that `lowbit train` wrote.")
    for name, value in config.to_dict().items():
        if own["config"].get(name) != value:
            raise RunError(
                f"{path} is of another run: it has {name}={own['config'].get(name)!r},"
                f" and {path.with_name(CONFIG)} has {value!r}."
            )
    return content


def _read_progress(path: Path, module: _Module) -> tuple[int, dict[str, float]]:
    """The step a checkpoint of `module` is at, and the last evaluation before it; cost and precision go on from there.

    Raises:
        RunError: as `_load_checkpoint`, or the tensors are not those of the model.
    """
    content = _load_checkpoint(path, module.config)
    saved, own = content["state_dict"], module.state_dict()
    for name in sorted(saved.keys() | own.keys()):
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            raise RunError(f"{path} does not fit the model {module.config.model}: they differ in {name}.")
    step = content["global_step"]
    if not 0 < step <= module.total_steps:
        raise RunError(f"{path} is at step {step}; expected a step from 1 to {module.total_steps}.")
    module.cost = dict(content["lowbit"]["cost"])
    if module.controller is not None:
        module.controller.load_state_dict(content["lowbit"]["controller"])
    return step, content["lowbit"]["test"]


def _read_config(out: Path) -> TrainConfig:
    try:
        values = yaml.safe_load((out / CONFIG).read_text())
        if not isinstance(values, dict):
            raise UsageError("it is no list of settings.")
        return TrainConfig.from_dict(values, out=out)
    except (UsageError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{out / CONFIG} is damaged: {reason}") from error


def _write_result(result: Result) -> None:
    values = {name: value for name, value in dataclasses.asdict(result).items() if name != "out"}
    _write_text(result.out / RESULT, json.dumps(values, indent=2) + "\n")


def _read_result(out: Path) -> Result:
    try:
        return Result(**json.loads((out / RESULT).read_text()), out=out)
    except (ValueError, TypeError) as error:
        raise RunError(f"{out / RESULT} is damaged; delete it and resume again.") from error


def _is_bad(value: object) -> bool:
    return isinstance(value, Tensor) and not bool(value.isfinite().all())


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    """One row in every logger, at the number of steps done."""
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": float(trainer.current_epoch + 1), **values}, step=trainer.global_step)


def _write_text(path: Path, text: str) -> None:
    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    files.write_atomically(path, write)


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
