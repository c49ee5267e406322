"""A LightningModule of one's own under Lightning's DDP and FSDP2, with lowbit's callback: two gloo processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from helpers import in_processes
from lowbit.integrations.lightning import LowbitCallback
from lowbit.methods.recipe import Recipe
from lowbit.nn.layers import sites_of

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


class Net(LightningModule):
    """A module that shards itself where the strategy asks for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.bits: list[int] = []

    def configure_model(self) -> None:
        """Shard the layers, which are converted by then."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.device_mesh is not None:
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss, and the bits that it was computed with."""
        self.bits.append(int(next(iter(sites_of(self))).bits[0]))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    """Sixteen samples in batches that two processes share: Lightning gives each every other one."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 16, generator=generator), torch.randint(4, (32,), generator=generator))
    return DataLoader(data, batch_size=4, shuffle=False)


def fit(recipe: str, strategy: Any, folder: Path, *, epochs: int, path: Path | None = None) -> dict[str, Any]:
    """The weights and the bits at the end, and a checkpoint beside."""
    chosen = Recipe.from_name(recipe)
    callback = LowbitCallback(chosen.tuned(cycles=2) if recipe == "cpt" else chosen, engine="reference")
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[callback],
        default_root_dir=folder,
        **quiet,
    )
    module = Net()
    trainer.fit(module, loader(), ckpt_path=None if path is None else str(path), weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    return {
        "weights": torch.cat([p.detach().flatten() for p in whole]),
        "bits": module.bits,
        "report": str(callback.report),
    }


def of_a_rank(folder: Path) -> dict[str, Any]:
    """What one of two processes finds."""
    found = {}
    for recipe in ("fp32", "int8", "cpt"):
        found[f"ddp {recipe}"] = fit(recipe, "ddp", folder, epochs=2)
    found["half"] = fit("int8", "ddp", folder, epochs=1)
    found["resumed"] = fit("int8", "ddp", folder, epochs=2, path=folder / "1.ckpt")
    for recipe in ("fp32", "int8"):
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        found[f"fsdp {recipe}"] = fit(recipe, strategy, folder, epochs=2)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes find."""
    return in_processes(of_a_rank, 2, tmp_path_factory.mktemp("lightning"))


@pytest.mark.parametrize("name", ["ddp fp32", "ddp int8", "ddp cpt", "fsdp fp32", "fsdp int8"])
def test_ranks_end_alike(found: list[dict[str, Any]], name: str) -> None:
    """Both have the same weights and had the same bits in every step, and the layers are converted."""
    one, two = (rank[name] for rank in found)

    assert torch.equal(one["weights"], two["weights"])
    assert one["bits"] == two["bits"]
    assert len(one["bits"]) == 8
    assert "net.0" in one["report"]


def test_bits_follow_the_recipe(found: list[dict[str, Any]]) -> None:
    """Cyclic precision moves."""
    assert len(set(found[0]["ddp cpt"]["bits"])) > 1


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_sharded_weights_train_as_whole_ones(found: list[dict[str, Any]], recipe: str) -> None:
    """FSDP2 ends where DDP ends, to 1e-6, with the same noise; 8 bits end elsewhere than full precision."""
    one = found[0]

    torch.testing.assert_close(one[f"fsdp {recipe}"]["weights"], one[f"ddp {recipe}"]["weights"], rtol=1e-5, atol=1e-6)
    assert not torch.equal(one["ddp int8"]["weights"], one["ddp fp32"]["weights"])


def test_a_resumed_run_is_the_run_that_was_never_stopped(found: list[dict[str, Any]]) -> None:
    """An epoch, a checkpoint and an epoch are two epochs, bit for bit."""
    for rank in found:
        assert torch.equal(rank["resumed"]["weights"], rank["ddp int8"]["weights"])
        assert not torch.equal(rank["half"]["weights"], rank["ddp int8"]["weights"])
