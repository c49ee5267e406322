"""Lightning's Trainer, set up so that a run does what its settings say and nothing else."""

import contextlib
import inspect
import logging
import math
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

import lowbit
from lowbit import ranks
from lowbit.train import checkpoint, data
from lowbit.train.assembly import accelerator
from lowbit.train.callbacks import (
    Checkpoints,
    MemoryOfStep,
    MeterSteps,
    NextBits,
    Share,
    ShowProgress,
    StepTimer,
    StopAtEnd,
    TrainingRows,
)
from lowbit.train.config import TrainConfig
from lowbit.train.folder import CHECKPOINT
from lowbit.train.loggers import make_loggers
from lowbit.train.module import Module
from lowbit.train.progress import SILENT, Progress
from lowbit.train.sharded import Sharded
from lowbit.train.step import NotFiniteError
from lowbit.train.stop import Leave, Stop


def make_trainer(
    config: TrainConfig,
    timer: StepTimer,
    start: dict[str, Any] | None,
    meter: MeterSteps,
    stop: Stop,
    module: Module,
    memory: MemoryOfStep,
    progress: Progress,
) -> Trainer:
    """A Trainer on one device a process, which keeps the checkpoints and writes the logs of this run."""
    assert config.out is not None
    several, is_first = ranks.is_one_of_several(), ranks.rank() == 0
    callbacks = [
        *([Share(config, meter.meter)] if several else []),
        meter,
        *([] if several and config.strategy == "fsdp" else [memory]),
        timer,
        TrainingRows(),
        NextBits(config.out),
        StopAtEnd(),
        Checkpoints(config, stop),
    ]
    if progress is not SILENT:
        assert meter.ledger.whole is not None
        callbacks.append(ShowProgress(config, meter.ledger.whole, progress))
    environment: ClusterEnvironment = TorchElasticEnvironment() if several else LightningEnvironment()
    never_finite = {"state_dict": module.state_dict(), "lowbit": {"state": lowbit.state_dict(module.model)}}
    return Trainer(
        accelerator=accelerator(),
        **(_of_several(config) if several else {"devices": 1}),
        max_epochs=config.epochs,
        logger=make_loggers(config, 0 if start is None else start["global_step"]) if is_first else False,
        log_every_n_steps=1,  # `TrainingRows` logs; a larger value is a warning where an epoch is shorter
        callbacks=callbacks,
        # Lightning would read any cluster's environment variables and change what the run does.
        plugins=[
            _CheckpointIO(start, config.keep, set(checkpoint.not_finite(never_finite))),
            environment,
            _precision(config, module),
        ],
        default_root_dir=config.out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0 if config.evaluate == "never" else 1.0,
        check_val_every_n_epoch=math.ceil(module.total_steps / len(module.loader)) if config.evaluate == "end" else 1,
        inference_mode=False,  # tensors that a layer keeps from the evaluation must serve the next step
    )


def _of_several(config: TrainConfig) -> dict[str, Any]:
    """The arguments of a Trainer for the processes that ``torchrun`` started."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy: Strategy
    if config.strategy == "fsdp":
        strategy = Sharded(data_parallel_size=ranks.world_size(), tensor_parallel_size=1)
    else:
        # `Share` averages what buffers have seen; the argument has another name before torch 2.13.
        names = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        without_buffers: dict[str, Any] = {name: False}
        strategy = DDPStrategy(**without_buffers)
    return {"devices": local, "num_nodes": ranks.world_size() // local, "strategy": strategy}


def _precision(config: TrainConfig, module: Module) -> Precision:
    """Autocast as the settings have it, and the scaled loss of the recipe, whose state the checkpoints keep."""
    if config.amp == "none":
        return Precision()
    if config.amp == "bf16":
        return MixedPrecision("bf16-mixed", accelerator())
    # Lightning refuses the name "16-mixed" on a CPU, and takes the plugin.
    scaler = lowbit.amp.GradScaler.from_recipe(module.model, device=accelerator())
    return MixedPrecision("16-mixed", accelerator(), scaler)


def fit(trainer: Trainer, module: Module, loaded: data.Data, stop: Stop, *, resumed: bool) -> None:
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
def quiet() -> Iterator[None]:
    """Hide what Lightning says about itself; warnings about the run stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)  # "GPU available", advertisements, "`Trainer.fit` stopped"
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 asks torch's tree utilities in a way that torch 2.13 deprecates.
            message = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
            warnings.filterwarnings("ignore", message, FutureWarning)
            # The first steps of a scaled loss may be skipped: the learning rate goes on, as it does for any step.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
            yield
    finally:
        logger.setLevel(level)


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
            raise NotFiniteError(
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
