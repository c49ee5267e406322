"""The settings and the result of a training run, as plain values.

The settings of schedules and gates among them are read off their classes, see `lowbit.train.tuning`.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from lowbit.engines.choice import ENGINES
from lowbit.errors import UsageError, shown, unknown
from lowbit.evidence.memory import StepMemory
from lowbit.inputs import userfile
from lowbit.inputs.checks import check_fields, is_finite, is_whole
from lowbit.methods.recipe import is_file_name
from lowbit.train.tuning import tunable, with_tunable

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["one-cycle", "cosine", "step", "constant"]
Amp = Literal["auto", "none", "bf16", "fp16"]
EvalBits = int | Literal["highest", "current"]
Measure = Literal["accuracy", "loss"]
OptimizerStates = Literal["fp32", "int8", "dynamic8"]
Weights = Literal["fp32", "bf16", "int8"]
Evaluate = Literal["epochs", "end", "never"]
Strategy = Literal["ddp", "fsdp"]
Exchange = Literal["fp32", "int8"]
LoggerName = Literal["tensorboard", "csv", "trackio", "mlflow", "wandb"]

CHANGEABLE = ("lr", "weight_decay", "epochs", "threads", "checkpoint_every", "checkpoint_minutes", "keep")
"""The settings that may change when a run goes on. `lr` stays the peak of the schedule, which `epochs` stretches."""

# torch starts as many as it is asked for, and the system may end the process where there are too many.
MOST_THREADS = 1024

_LR: dict[Optimizer, float] = {"sgd": 0.1, "adamw": 1e-3}
_WEIGHT_DECAY: dict[Optimizer, float] = {"sgd": 1e-4, "adamw": 0.01}


@dataclass(frozen=True, kw_only=True)
@with_tunable
class TrainConfig:
    """The settings of one training run; `resolved` fills in what was left open.

    Args:
        model: name of the model, e.g. ``resnet20``, or a class of your own file, ``net.py:Net``. The file is executed,
            and the run folder keeps it.
        data: name of the data set, e.g. ``fashion-mnist``.
        recipe: name of the recipe, e.g. ``sbm8``, or a file of one, ``mine.toml``, which the run folder then keeps;
            ``fp32`` trains in full precision.
        epochs: passes over the training set.
        batch_size: samples per step.
        optimizer: ``sgd`` (momentum 0.9) or ``adamw`` (betas 0.9 and 0.999).
        lr: peak learning rate. Default: 0.1 for sgd, 0.001 for adamw.
        weight_decay: of the optimizer. Default: 1e-4 for sgd, 0.01 for adamw.
        schedule: how the learning rate moves. ``one-cycle``: up from lr/25 over the first quarter of the run,
            then along a cosine to zero; ``cosine``: from lr to zero; ``step``: divided by 10 at a half and at
            three quarters of the run; ``constant``.
        seed: fixes the initial weights, the order of the data, the rounding noise and the dropout.
        out: run folder. Default: ``runs/<model>-<data>-<recipe>-<seed>``.
        subset: train on this many samples only.
        checkpoint_every: steps between two checkpoints. Default: by time and at the end of each epoch only.
        checkpoint_minutes: minutes after which a checkpoint is due, beside those at the end of each epoch. None: never.
        keep: how many checkpoints to keep, the newest included.
        threads: threads of torch. Default: torch's own choice. A resumed run keeps its first number.
        context: bytes in one sample of a text; other data sets refuse it. Default: 128.
        engine: how converted layers execute: ``auto``, or an engine, ``int8`` or ``reference``; see `lowbit.convert_`.
        amp: ``bf16`` runs the operations that no recipe covers under bfloat16 autocast, ``none`` in float32. ``auto``
            becomes ``bf16`` where all products of the recipe run on 8-bit or bf16 units here, since such steps are
            faster in it, else ``none``. Recipes that ask for autocast have theirs, ``amp-fp16`` alone ``fp16`` with a
            scaled loss. A resumed run keeps what it became.
        max_steps: stop after this many steps, even within an epoch.
        plateau_every: of recipes that follow the loss, e.g. ``pfq`` and ``fractrain``: steps whose mean loss the
            plateau rule takes as one epoch's. Default: an epoch.
        blocks: of recipes with gates, ``dfq`` and ``fractrain``: a regular expression that matches the names of the
            blocks. Default: the repeated blocks of this library's own models.
        eval_bits: bits of inputs and weights in evaluation where a schedule sets them. Default: the highest.
        optimizer_states: how the optimizer keeps its states between steps: ``fp32``, or in 8 bits as ``int8`` or
            ``dynamic8``, see `lowbit.optim.LowBitOptimizer`. Default: ``fp32``, or as the recipe's update says.
        weights: what weights are rounded to, by noise, as they are written: ``fp32``, ``bf16`` or ``int8``. Default:
            ``fp32``, or as the recipe's update says.
        logger: where the figures go beside ``csv/metrics.csv``: ``tensorboard``, ``mlflow``, ``trackio`` or ``wandb``,
            whose package must be installed, or ``csv``: nowhere else. Default: tensorboard.
        evaluate: when the model is tested: after each of the ``epochs``, once at the ``end``, or ``never``, which
            leaves the run without a score. Default: epochs.
        proof: whether the first step is proven, on a copy, before the run begins. Default: true.
        strategy: of several processes, which ``torchrun`` starts: ``ddp``, each has all weights, or ``fsdp``, each has
            its part (FSDP2). Default: ddp.
        exchange: of several processes with ``ddp``: how they exchange gradients, ``fp32`` or ``int8``, 8-bit codes with
            error feedback, see `lowbit.integrations.ddp.Int8AllReduce`. Default: fp32.
        synchronized: whether Range BN takes its statistics over the samples of all processes. Default: as the recipe
            says.

    Raises:
        UsageError: a value is out of its range; the message names the setting.
    """

    model: str
    data: str
    recipe: str = "sbm8"
    epochs: int = 1
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    lr: float | None = None
    weight_decay: float | None = None
    schedule: Schedule = "one-cycle"
    seed: int = 0
    out: Path | None = None
    subset: int | None = None
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = 10.0
    keep: int = 2
    threads: int | None = None
    context: int | None = None
    engine: str = "auto"
    amp: Amp = "auto"
    max_steps: int | None = None
    plateau_every: int | None = None
    blocks: str | None = None
    eval_bits: EvalBits | None = None
    optimizer_states: OptimizerStates | None = None
    weights: Weights | None = None
    logger: LoggerName | None = None
    evaluate: Evaluate | None = None
    proof: bool | None = None
    strategy: Strategy | None = None
    exchange: Exchange | None = None
    synchronized: bool | None = None

    def __post_init__(self) -> None:
        for name in ("model", "data", "recipe"):
            if not getattr(self, name) or not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} must be a name, got {shown(getattr(self, name))}.")
        if self.engine not in ("auto", *ENGINES):
            raise unknown("engine", self.engine, ("auto", *ENGINES))
        for name in ("epochs", "batch_size", "keep"):
            _check_count(name, getattr(self, name))
        for name in ("subset", "checkpoint_every", "threads", "context", "max_steps", "plateau_every"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        _check_count("seed", self.seed, low=0)
        if self.seed >= 2**63:
            raise UsageError(f"seed must be below 2**63, got {shown(self.seed)}.")
        for name in ("lr", "weight_decay", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not (is_finite(value) and value >= 0):
                raise UsageError(f"{name} must be a finite number of at least 0, got {shown(value)}.")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UsageError(f"threads must be at most {MOST_THREADS}, got {self.threads}.")
        check_fields(self)
        if self.strategy == "fsdp" and self.exchange == "int8":
            raise UsageError("exchange='int8' goes with strategy 'ddp': fsdp exchanges gradients by itself.")

    def changed(self, changes: Mapping[str, object]) -> Self:
        """The same run with other settings from some step on.

        Raises:
            UsageError: a setting is not one of `CHANGEABLE`, or its value is impossible.
        """
        for name in changes:
            if name not in CHANGEABLE:
                raise unknown("setting of a run that goes on", name, CHANGEABLE)
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # __post_init__ checks each value

    def tuned(self) -> dict[str, object]:
        """The settings that change the recipe's schedule or gates."""
        return {name: value for name in tunable() if (value := getattr(self, name, None)) is not None}

    def resolved(self, *, threads: int, amp: Amp) -> Self:
        """The same run with nothing left open but what only some runs have (subset, steps, context).

        Args:
            threads: what torch chose on this machine.
            amp: what ``auto`` stands for here.
        """
        recipe = Path(self.recipe).stem if is_file_name(self.recipe) else self.recipe
        own = userfile.split(self.model)
        model = self.model if own is None else f"{own[0].stem}-{own[1]}"
        name = f"{model}-{self.data}-{recipe}-{self.seed}"
        return dataclasses.replace(
            self,
            lr=_LR[self.optimizer] if self.lr is None else self.lr,
            weight_decay=_WEIGHT_DECAY[self.optimizer] if self.weight_decay is None else self.weight_decay,
            # A data set may carry a path (imagefolder:/data/cats), which must stay one folder name here.
            out=Path("runs", name.replace("/", "-").replace(":", "-")) if self.out is None else self.out,
            threads=self.threads or threads,
            amp=amp if self.amp == "auto" else self.amp,
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings but the run folder (which may be moved) as plain values, for YAML and checkpoints."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "out"}

    @classmethod
    def from_dict(cls, values: Mapping[str, object], *, out: Path) -> Self:
        """The inverse of `to_dict`; a setting that the run is older than is left open.

        Raises:
            UsageError: a setting is missing, unknown, or has an impossible value.
        """
        known = set(get_type_hints(cls)) - {"out"}
        for name in values:
            if name not in known:
                raise unknown("setting", name, known)
        if absent := known - set(values) - may_lack():
            raise UsageError(f"the settings {', '.join(sorted(absent))} are missing.")
        return cls(**values, out=out)  # type: ignore[arg-type]  # __post_init__ checks each value


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run reached.

    Args:
        test_loss: mean cross entropy over the test set, in nats per prediction; nan if the run was never tested.
        test_accuracy: share of right predictions on the test set; None for text, and if the run was never tested.
        test_bits_per_byte: mean code length of one byte of the test text; likewise.
        seconds_per_step: median wall time of one step: forward, backward and update, without data loading,
            checkpoints and evaluation. The first 5 steps after each start, and those before a resume, are not
            counted; None if no step is left.
        steps: optimizer steps done, those before a resume included.
        recipe: name of the recipe.
        converted: layers that ran the recipe.
        layers: layers of the model, whatever they ran; conversion.txt in the run folder lists them.
        out: run folder.
        macs: multiply-accumulates of the products of converted layers in training, all three products of each.
        bit_operations: the same, each counted as the product of its two operands' bits. Evaluation, layers that were
            left in full precision, gates, additions and quantisation are in neither.
        low: the lowest bits that a range test in the run found; None without one.
        model: name of the model; this and what follows is empty or None in results of earlier versions.
        data: name of the data set.
        seed: of the run.
        engines: products of converted layers by the engine that executes them.
        versions: of ``lowbit``, ``torch`` and ``python`` at the end of the run.
        memory: of one step of one process, measured early in the run's last start; None if it had no step left, or if
            processes share the weights (``fsdp``).
        processes: how many ran the last start.
    """

    test_loss: float
    test_accuracy: float | None
    test_bits_per_byte: float | None
    seconds_per_step: float | None
    steps: int
    recipe: str
    converted: int
    layers: int
    out: Path
    macs: int
    bit_operations: int
    low: int | None
    model: str = ""
    data: str = ""
    seed: int | None = None
    engines: Mapping[str, int] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    memory: StepMemory | None = None
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class RangeTestConfig:
    """The settings of a precision range test.

    Args:
        model: name of the model, e.g. ``resnet20``, or a class of your own file, ``net.py:Net``.
        data: name of the data set, e.g. ``fashion-mnist``.
        recipe: the recipe whose formats are used; what it says of bits over time does not count.
        low: the first width.
        high: the last width, chosen where no lower one makes progress.
        backward: bits of gradients. Default: the recipe's.
        steps_per_bit: training steps at each width, 4 or more, without `significance` 2.
        measure: what should get better: ``accuracy`` of the training batches, or their ``loss``.
        gain: what counts as progress: rise of the accuracy, or relative fall of the loss.
        significance: standard errors that the gain must exceed too; ``null``: `gain` decides alone.
        every: train at each width up to the last one, also after the choice.
        batch_size: samples per step.
        optimizer: as for training.
        lr: learning rate, constant. Default: 0.1 for sgd, 0.001 for adamw.
        seed: as for training.
        subset: use this many samples only.
        context: bytes in one sample of a text.
        threads: threads of torch. Default: torch's own choice.
    """

    model: str
    data: str
    recipe: str = "cpt"
    low: int = 2
    high: int = 8
    backward: int | None = None
    steps_per_bit: int = 100
    measure: Measure = "accuracy"
    gain: float = 0.01
    significance: float | None = 3.0
    every: bool = False
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    lr: float | None = None
    seed: int = 0
    subset: int | None = None
    context: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.training()

    def training(self) -> TrainConfig:
        """The same as settings of a training run, which checks them."""
        names = ("model", "data", "recipe", "batch_size", "optimizer", "lr", "seed", "subset", "context", "threads")
        return TrainConfig(**{name: getattr(self, name) for name in names}, schedule="constant")


def settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `TrainConfig.to_dict` gives them, without those that older runs lack and this one leaves open.

    Runs of two versions of this library are the same run where these are equal: a later one may have more settings.
    """
    return {name: value for name, value in values.items() if value is not None or name not in may_lack()}


_LATEST = ("evaluate", "proof", "strategy", "exchange", "synchronized")


def may_lack() -> set[str]:
    """The settings that runs of earlier versions may lack; None leaves each open."""
    return {*tunable(), "optimizer_states", "weights", "logger", *_LATEST}


def lr_factor(schedule: Schedule, step: int, total: int) -> float:
    """Share of the peak learning rate that step number `step` of `total` uses, in [0, 1].

    With t = step / total: cosine is ``(1 + cos(pi t)) / 2``; one-cycle rises linearly from 1/25 to 1 at
    t = 1/4 and follows a cosine over the rest to 0; step is 1, 1/10, 1/100 from t = 0, 1/2, 3/4.

    Source: one-cycle after Smith and Topin, arXiv:1708.07120, with a cosine for its descent.
    """
    t = min(step / total, 1.0)
    match schedule:
        case "constant":
            return 1.0
        case "step":
            return 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01
        case "cosine":
            return (1 + math.cos(math.pi * t)) / 2
        case "one-cycle":
            if t < 0.25:
                return 1 / 25 + (1 - 1 / 25) * 4 * t
            return (1 + math.cos(math.pi * (t - 0.25) / 0.75)) / 2


def _check_count(name: str, value: object, low: int = 1) -> None:
    if not is_whole(value) or not low <= value < 2**63:
        raise UsageError(f"{name} must be a whole number of at least {low}, got {shown(value)}.")
