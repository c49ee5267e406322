"""What the settings of a run say, made: its data, its converted model, its threads."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import lowbit
from lowbit import ranks
from lowbit.engines.choice import refusals
from lowbit.engines.int8 import missing
from lowbit.errors import UsageError
from lowbit.methods.normalization import RangeNorm
from lowbit.precision.controller import PrecisionController
from lowbit.products.operators import Linear
from lowbit.train import data, models
from lowbit.train.config import Amp, TrainConfig
from lowbit.train.folder import model_name, read_recipe
from lowbit.train.module import Module


def assemble(config: TrainConfig) -> tuple[data.Data, Module, lowbit.Report]:
    """The data, the converted model and the report of its conversion: functions of the settings alone."""
    recipe, blocks = _recipe(config)
    loaded, model = build(config, model_name(config))
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

    return loaded, Module(config, loaded, model, control), report


def _recipe(config: TrainConfig) -> tuple[lowbit.Recipe, str | None]:
    """The recipe with the settings of the run, and the pattern of the blocks that it gates."""
    recipe = read_recipe(config).tuned(**config.tuned())
    if config.eval_bits is not None and recipe.schedule is None:
        raise UsageError(f"eval_bits goes with a recipe whose bits follow a schedule, and {recipe.name!r} has none.")
    if config.plateau_every is not None and "threshold" not in recipe.settings():
        raise UsageError(f"plateau_every goes with a recipe that follows the loss, and {recipe.name!r} does not.")
    asked = None if recipe.autocast is None else recipe.autocast.dtype
    if config.amp != asked and (asked is not None or config.amp == "fp16"):
        wants = "asks for no autocast and scales no loss" if asked is None else f"asks for {asked} autocast"
        raise UsageError(f"amp={config.amp!r}, and recipe {recipe.name!r} {wants}: leave amp out.")
    if config.synchronized is not None:
        if not isinstance(recipe.normalization, RangeNorm):
            raise UsageError(
                f"synchronized goes with a recipe of Range BN, and {recipe.name!r} has none: batch normalisation keeps "
                "the statistics of each process' own samples."
            )
        norm = dataclasses.replace(recipe.normalization, synchronized=config.synchronized)
        recipe = recipe.replace(normalization=norm)
    if config.strategy == "fsdp" and ranks.is_one_of_several():
        _check_sharded(config, recipe)
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
        raise UsageError(f"blocks={blocks!r} is not a regular expression: {error}.") from error
    return recipe, blocks


def _check_sharded(config: TrainConfig, recipe: lowbit.Recipe) -> None:
    """Raise where a part of the weights is not enough."""
    own = {"optimizer_states": config.optimizer_states, "weights": config.weights}
    given = [f"{name}={value!r}" for name, value in own.items() if value not in (None, "fp32")]
    reasons = {
        f"recipe {recipe.name!r} has gates, whose parameters are outside the model": recipe.gates is not None,
        f"recipe {recipe.name!r} rounds the weights or the optimizer's states": recipe.update is not None,
        f"{' and '.join(given)} round them": bool(given),
        "amp='fp16' scales the loss": config.amp == "fp16",
    }
    for reason, there in reasons.items():
        if there:
            raise UsageError(f"strategy 'fsdp' shares weights among the processes, and {reason}: use strategy 'ddp'.")


def build(config: TrainConfig, model: str) -> tuple[data.Data, nn.Module]:
    """The data and the plain model."""
    loaded = data.load(
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        subset=config.subset,
        context=config.context or 128,
        rank=ranks.rank(),
        world=ranks.world_size(),
    )
    if config.context is not None and loaded.task.kind != "text":
        raise UsageError(f"context is a setting of text, and the data set {config.data!r} is not text.")
    torch.manual_seed(config.seed)
    return loaded, models.build(model, loaded.task)


def accelerator() -> str:
    """Where training runs: on a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _engine(config: TrainConfig) -> str:
    """The engine to convert for: on a GPU, where the model moves after it, ``"auto"`` is the reference engine."""
    return "reference" if config.engine == "auto" and accelerator() == "cuda" else config.engine


def fastest_amp(config: TrainConfig) -> Amp:
    """What ``amp="auto"`` stands for: the recipe's own, else bf16 where all products run on 8-bit or bf16 units.

    What is simulated in float32 gains nothing from autocast, and would lose the digits of its results.
    """
    recipe = lowbit.Recipe.find(config.recipe)
    if recipe.autocast is not None:
        return recipe.autocast.dtype
    if _engine(config) == "reference" or missing("bf16"):
        return "none"
    return "none" if refusals(Linear(), recipe, device=accelerator()) else "bf16"


@contextlib.contextmanager
def threads_of(config: TrainConfig) -> Iterator[None]:
    """As many threads of torch as the settings say, in this context."""
    assert config.threads is not None
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
