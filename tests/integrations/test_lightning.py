from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lowbit
from lowbit import UsageError

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402 - skipped without it
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402

from lowbit.integrations.lightning import LowbitCallback, LowbitPrecision  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|GPU|log_every_n|isinstance|LeafSpec|not empty|dirpath)")


class Net(LightningModule):
    """A LightningModule as people write them: `training_step` calls a part of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.Linear(16, 4)
        )
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy; the forward bits of the batch are noted."""
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.seen.append(tuple(self.net[0].site.bits[:2].tolist()) if hasattr(self.net[0], "site") else ())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Cross entropy in evaluation."""
        x, y = batch
        self.log("val", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def cyclic(tmp_path: Path) -> str:
    """A recipe like `cpt` whose cycles fit twelve steps."""
    path = tmp_path / "cyclic.toml"
    path.write_text(
        'base = "cpt"\nsummary = "four cycles"\nsource = "this test"\n'
        "[schedule]\nforward = { kind = 'cyclic', low = 3, high = 8, cycles = 4 }\nbackward = 8\n"
    )
    return str(path)


class KilledError(Exception):
    """What stands for a kill."""


class KillAt(Callback):
    """Ends the process' part in the run after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Raise there."""
        if trainer.global_step >= self.step:
            raise KilledError


def loader() -> DataLoader[Any]:
    """Four batches, always in the same order."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randn(32, 1, 8, 8, generator=generator), torch.randint(4, (32,), generator=generator)),
        batch_size=8,
    )


def fit(folder: Path, callback: LowbitCallback | None, *more: Callback, **options: Any) -> Net:
    """Three epochs of training, with a checkpoint after each."""
    model, path = Net(), options.pop("ckpt_path", None)
    saving = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([] if callback is None else [callback]), *more, saving],
        **options,
    )
    trainer.fit(model, loader(), loader(), ckpt_path=path)
    return model


def weights(model: nn.Module) -> list[Tensor]:
    """Everything in the state dict."""
    return list(model.state_dict().values())


@pytest.mark.parametrize("static", [True, False], ids=["sbm8", "cyclic"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(static: bool, cyclic: str, tmp_path: Path) -> None:
    """Killed in its last epoch and resumed in a new trainer, weights, ranges and bits are the same bit for bit."""
    recipe = "sbm8" if static else cyclic
    whole = fit(tmp_path / "whole", LowbitCallback(recipe, engine="reference"))
    with pytest.raises(KilledError):
        fit(tmp_path / "cut", LowbitCallback(recipe, engine="reference"), KillAt(10))
    resumed = fit(
        tmp_path / "cut", LowbitCallback(recipe, engine="reference"), ckpt_path=str(tmp_path / "cut" / "last.ckpt")
    )

    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert whole.seen[8:] == resumed.seen
    one, two = (lowbit.state_dict(model)["groups"][0] for model in (whole, resumed))
    assert one["step"] == two["step"] == 12
    for name, site in one["sites"].items():
        assert torch.equal(site["running_range"], two["sites"][name]["running_range"])


def test_without_the_callback_the_resumed_run_is_another_and_says_so(tmp_path: Path) -> None:
    """The same run whose module is converted by hand goes on with other noise, and warns of it."""

    class Converted(Net):
        def __init__(self) -> None:
            super().__init__()
            lowbit.convert_(self, "sbm8", engine="reference")

    def run(folder: str, path: str | None = None) -> Net:
        model = Converted()
        saving = ModelCheckpoint(tmp_path / folder, save_last=True, save_on_train_epoch_end=True, save_top_k=-1)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[saving], **options)
        trainer.fit(model, loader(), loader(), ckpt_path=path)
        return model

    whole = run("whole")
    first = next(p for p in (tmp_path / "whole").glob("epoch=0*"))
    with pytest.warns(UserWarning, match=r"lowbit's own state was not.*lowbit.load_state_dict"):
        resumed = run("again", str(first))

    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_each_batch_of_a_part_is_a_step_and_evaluation_is_none(cyclic: str, tmp_path: Path) -> None:
    """Twelve batches of `self.net` are twelve steps, whatever was validated between, and bits follow the recipe."""
    model = fit(tmp_path, LowbitCallback(cyclic, engine="reference"))

    assert lowbit.state_dict(model)["groups"][0]["step"] == 12
    assert len(set(model.seen)) > 1
    assert tuple(model.net[0].site.evaluation_bits[:2].tolist()) == max(model.seen)


def test_an_accumulated_step_is_one_step_of_the_controller(tmp_path: Path) -> None:
    """Two batches an update: both have the same bits, and a plateau rule gets the mean of their losses."""
    callback = LowbitCallback("pfq", engine="reference")
    model = fit(tmp_path, callback, accumulate_grad_batches=2)
    (controller,) = {site.controller for site in (model.net[0].site,)}

    assert controller is not None
    assert controller.last_step == 6
    assert len(model.seen) == 12
    assert model.seen[0::2] == model.seen[1::2]


def test_a_checkpoint_is_evaluated_with_its_ranges(cyclic: str, tmp_path: Path) -> None:
    """`Trainer.validate` of a checkpoint gives what the run's own validation gave."""
    trained = fit(tmp_path, LowbitCallback(cyclic, engine="reference"))
    model = Net()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=[LowbitCallback(cyclic, engine="reference")], **options)
    trainer.validate(model, loader(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    x, _ = next(iter(loader()))

    assert model.net[0].site.running_range[2] == 12
    assert torch.equal(model.eval().net(x), trained.eval().net(x))


def test_a_recipe_for_a_converted_module_is_refused() -> None:
    """It would be ignored."""

    class Converted(Net):
        def __init__(self) -> None:
            super().__init__()
            lowbit.convert_(self, "sbm8")

    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[LowbitCallback("int8")], max_epochs=1)

    with pytest.raises(UsageError, match="converted already: leave the recipe out"):
        trainer.fit(Converted(), loader(), loader())


def test_gates_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """Gates need names of blocks and a place in the optimizer."""
    with pytest.raises(UsageError, match=r"has gates.*in its __init__"):
        fit(tmp_path, LowbitCallback("dfq", engine="reference"))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_run_resumed_with_the_precision_is_the_run_that_was_never_stopped(autocast: bool, tmp_path: Path) -> None:
    """Killed in its last epoch and resumed in a new trainer: weights, ranges and the step are the same bit for bit."""

    def precision() -> list[LowbitPrecision]:
        return [LowbitPrecision("sbm8", autocast=autocast, engine="reference")]

    whole = fit(tmp_path / "whole", None, plugins=precision())
    with pytest.raises(KilledError):
        fit(tmp_path / "cut", None, KillAt(10), plugins=precision())
    resumed = fit(tmp_path / "cut", None, plugins=precision(), ckpt_path=str(tmp_path / "cut" / "last.ckpt"))

    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    one, two = (lowbit.state_dict(model)["groups"][0] for model in (whole, resumed))
    assert one["step"] == two["step"] == 12
    for name, site in one["sites"].items():
        assert torch.equal(site["running_range"], two["sites"][name]["running_range"])


def test_the_precision_runs_forwards_in_autocast_where_asked(tmp_path: Path) -> None:
    """Of the same layers, products give bfloat16 with it and float32 without."""

    class Seen(Net):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.dtype_seen = self.net(batch[0]).dtype
            return super().training_step(batch)

    seen = {}
    for autocast in (False, True):
        model, plugin = Seen(), LowbitPrecision("int8", autocast=autocast)
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            plugins=[plugin],
            default_root_dir=tmp_path,
        )
        trainer.fit(model, loader(), loader())
        assert plugin.report is not None
        seen[autocast] = model.dtype_seen

    assert seen == {False: torch.float32, True: torch.bfloat16}


@pytest.mark.parametrize("recipe", ["cpt", "amp-fp16"])
def test_the_precision_refuses_what_needs_the_callback(recipe: str) -> None:
    """Bits that change and losses that are scaled, with the way to have them."""
    with pytest.raises(UsageError, match="LowbitCallback"):
        LowbitPrecision(recipe)
