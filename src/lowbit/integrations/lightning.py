"""Lightning: a callback that converts a LightningModule, sets its bits, and keeps lowbit's state in the checkpoints.

Where a recipe is constant, a precision plugin does the same in the place of Lightning's own precisions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import Precision

import lowbit
from lowbit.conversion.rules import RecipeLike, Rule, as_recipe
from lowbit.errors import UsageError
from lowbit.integrations.run_state import RunState
from lowbit.nn.layers import sites_of
from lowbit.precision.controller import PrecisionController


class LowbitCallback(Callback):
    """Low-precision training in Lightning: ``Trainer(callbacks=[LowbitCallback("sbm8")])``.

    It converts the LightningModule when a run is set up, after the module's data and before its optimizers exist, makes
    the controller of a recipe whose bits change, steps it after each step of the optimizer with the mean loss of the
    batches in that step, and saves and restores noise, ranges and schedules with every checkpoint. Evaluation runs at
    the evaluation bits and is no step. It goes with any ``precision`` of the trainer.

    Args:
        recipe: as for `lowbit.convert_`; None: the module is converted already when the run is set up. That is the way
            for layers that are made in ``setup`` or ``configure_model``, for gates, whose parameters the optimizer
            needs, and for a controller of your own.
        rules: as for `lowbit.convert_`; names begin at the LightningModule.
        strict: as for `lowbit.convert_`.
        engine: as for `lowbit.convert_`.
        seed: of all noise.

    Attributes:
        report: what was converted; None before, and without a recipe.
    """

    def __init__(
        self,
        recipe: RecipeLike | None = None,
        *,
        rules: Sequence[Rule] = (),
        strict: bool = True,
        engine: str = "auto",
        seed: int = 0,
    ) -> None:
        if recipe is None and rules:
            raise UsageError(f"rules={list(rules)!r} without a recipe: give both, or convert the module with them")
        self.recipe = recipe
        self.rules = rules
        self.strict = strict
        self.engine = engine
        self.seed = seed
        self.report: lowbit.Report | None = None
        self._loaded: dict[str, Any] | None = None
        self._run: RunState | None = None
        self._steps = 0
        self._losses: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002 - Lightning's
        """Convert the module, once."""
        converted = bool(sites_of(pl_module))
        if self.recipe is None and not converted:
            raise UsageError(
                "LowbitCallback: nothing in this LightningModule is converted: give a recipe, or call lowbit.convert_ "
                "in its __init__"
            )
        if self.recipe is not None and self.report is None:
            if converted:
                raise UsageError(
                    f"LowbitCallback: recipe={self.recipe!r} for a LightningModule that is converted already: "
                    "leave the recipe out"
                )
            self.report = lowbit.convert_(
                pl_module, self.recipe, rules=self.rules, strict=self.strict, engine=self.engine, seed=self.seed
            )
        self._run = RunState(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the controller where the recipe asks for one, and take the state of the checkpoint."""
        run = self._run
        assert run is not None
        if any(site.recipe.is_dynamic and site.controller is None for site in sites_of(pl_module)):
            steps = int(trainer.estimated_stepping_batches)
            epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else 1
            self._make_controller(pl_module, total_steps=steps, steps_per_epoch=max(1, steps // epochs))
        if self._loaded is not None:
            run.load_state_dict(self._loaded)
            self._loaded = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's
        """Evaluate with the ranges and bits of a checkpoint that was loaded to evaluate."""
        if self._loaded is not None:
            lowbit.load_state_dict(pl_module, self._loaded["model"])
            self._loaded = None

    on_test_start = on_predict_start = on_validation_start

    @staticmethod
    def _make_controller(pl_module: LightningModule, *, total_steps: int, steps_per_epoch: int) -> None:
        gated = {site.recipe.name for site in sites_of(pl_module) if site.recipe.gates is not None}
        if gated:
            raise UsageError(
                f"LowbitCallback: recipe {min(gated)!r} has gates, whose blocks have to be named and whose parameters "
                "need the optimizer: convert the module and make its PrecisionController in its __init__, and leave "
                "the recipe out here"
            )
        PrecisionController.from_recipe(pl_module, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's
        """Remember how many steps the run has made."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: object) -> None:  # noqa: ARG002 - Lightning's
        """Step the controllers where the optimizer made a step."""
        assert self._run is not None
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            self._losses.append(loss.detach() * trainer.accumulate_grad_batches)  # Lightning divided by it
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            losses, self._losses = self._losses, []
            self._run.step(sum(losses) / len(losses) if losses else None)

    def state_dict(self) -> dict[str, Any]:
        """What lowbit keeps of the run, for the checkpoint."""
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the controller is made."""
        self._loaded = state_dict


class LowbitPrecision(Precision):
    """A recipe as a precision of Lightning's: ``Trainer(plugins=[LowbitPrecision("int8")])``.

    It converts the LightningModule before its optimizers are made, runs every step in bfloat16 autocast if asked, and
    keeps lowbit's state in the checkpoints of `fit`. Lightning gives a plugin no state where a checkpoint is only
    evaluated: for recipes with running ranges evaluate with `LowbitCallback`, which also sets bits that change.

    Args:
        recipe: as for `lowbit.convert_`, with constant bits.
        autocast: whether forwards run in bfloat16 autocast; with `amp-bf16` they do anyway.
        device: the type of device whose autocast it is.
        rules: as for `lowbit.convert_`; names begin at the LightningModule.
        strict: as for `lowbit.convert_`.
        engine: as for `lowbit.convert_`.
        seed: of all noise.

    Attributes:
        report: what was converted; None before.

    Raises:
        UsageError: the bits of the recipe change, or it scales losses.
    """

    def __init__(
        self,
        recipe: RecipeLike,
        *,
        autocast: bool = False,
        device: str = "cpu",
        rules: Sequence[Rule] = (),
        strict: bool = True,
        engine: str = "auto",
        seed: int = 0,
    ) -> None:
        resolved = as_recipe(recipe)
        own = resolved.autocast
        if resolved.is_dynamic or (own is not None and own.scaling is not None):
            raise UsageError(
                f"LowbitPrecision: the bits of recipe {resolved.name!r} change, or its losses are scaled: use "
                "Trainer(callbacks=[LowbitCallback(...)]), with Lightning's MixedPrecision for scaled losses"
            )
        self.autocast = autocast or own is not None
        self.precision = "bf16-mixed" if self.autocast else "32-true"
        self.recipe = recipe
        self.device = device
        self.rules = rules
        self.strict = strict
        self.engine = engine
        self.seed = seed
        self.report: lowbit.Report | None = None
        self._run: RunState | None = None

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Convert the module, once; `fit` after `validate` finds it converted."""
        if self.report is None:
            self.report = lowbit.convert_(
                module, self.recipe, rules=self.rules, strict=self.strict, engine=self.engine, seed=self.seed
            )
            self._run = RunState(module)
        return module

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast, where it was asked for."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            yield

    def state_dict(self) -> dict[str, Any]:
        """What lowbit keeps of the run, for the checkpoint."""
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        if self._run is not None:
            self._run.load_state_dict(state_dict)
