"""Runs of several processes, as torchrun starts them: the run of one process, killed and resumed like it."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import command
from runs import last, same_end
from torch import Tensor

from helpers import in_processes
from lowbit.evidence.ledger import Ledger
from lowbit.train import checkpoint
from lowbit.train.callbacks import StepTimer
from lowbit.train.lock import locked

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

# A network with batch normalisation, and 4 blocks for gates.
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, shape):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))
"""
STEPS = 10


def words(out: Path, recipe: str, *more: str, model: str = "mlp") -> list[str]:
    """A run of two epochs of five steps, with checkpoints at steps 3, 5, 6, 9 and 10."""
    said = f"train --model {model} --data digits --subset 320 --batch-size 64 --epochs 2 --lr 0.05 --threads 1"
    return [*said.split(), "--checkpoint-every", "3", "--recipe", recipe, "--out", str(out), *more]


def launch(given: list[str], world: int = 2, *, code: int = 0) -> list[str]:
    """What each process of a command wrote; all end with a code."""
    found = in_processes(command, world, *given)
    assert [each[0] for each in found] == [code] * world, found
    return [each[1] for each in found]


def hit(step: int, rank: int, number: int, *given: str) -> tuple[int, str]:
    """A command in whose run a signal hits one rank within a step."""

    def end(_timer: StepTimer, trainer: Any, *_: object) -> None:
        if trainer.global_step == step and dist.get_rank() == rank:
            os.kill(os.getpid(), number)

    StepTimer.on_train_batch_end = end  # type: ignore[method-assign]  # in a process of its own
    return command(*given)


def weights(out: Path) -> Tensor:
    """All parameters and statistics at the end of a run."""
    return torch.cat([v.flatten().double() for v in last(out)["state_dict"].values() if v.is_floating_point()])


def distance(a: Path, b: Path) -> float:
    """How far two runs ended from each other, relative to what both have in common."""
    return float((weights(a) - weights(b)).norm() / weights(b).norm())


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model in a file."""
    path = tmp_path_factory.mktemp("net") / "net.py"
    path.write_text(NET)
    return f"{path}:Net"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    for recipe in ("fp32", "int8"):
        assert command(*words(folder / recipe, recipe))[0] == 0
    return {recipe: folder / recipe for recipe in ("fp32", "int8")}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    runs = {
        "fp32": ("fp32",),
        "fsdp": ("fp32", "--strategy", "fsdp"),
        "int8": ("int8",),
        "codes": ("int8", "--exchange", "int8"),
    }
    for name, given in runs.items():
        said, silent = launch(words(folder / name, *given))
        assert "test accuracy" in said
        assert silent == ""
    return {name: folder / name for name in runs}


@pytest.mark.parametrize("name", ["fp32", "fsdp"])
def test_two_processes_in_full_precision_are_one(name: str, one: dict[str, Path], two: dict[str, Path]) -> None:
    """Ten steps of two processes end where one process ends, to 1e-6, whole or sharded."""
    assert distance(two[name], one["fp32"]) < 1e-6
    assert last(two[name])["lowbit"]["processes"] == 2


def test_two_processes_in_8_bits_are_one_but_for_rounding(one: dict[str, Path], two: dict[str, Path]) -> None:
    """They end as near to one process in 8 bits as that ends to full precision, within a factor of 2, and not at it."""
    rounding = distance(one["int8"], one["fp32"])

    for name in ("int8", "codes"):
        assert 0.1 * rounding < distance(two[name], one["int8"]) < 2 * rounding


def test_the_ledger_is_of_the_whole(one: dict[str, Path], two: dict[str, Path]) -> None:
    """MACs, samples and evaluations are those of one process; result.json has the same sums."""
    whole = Ledger.load(one["int8"] / "ledger.jsonl")
    for name in ("int8", "codes"):
        merged = Ledger.load(two[name] / "ledger.jsonl")

        assert sum(total.macs for total in merged.totals()) == sum(total.macs for total in whole.totals()) > 0
        assert merged.samples == whole.samples == STEPS * 64
        assert [(e.step, e.samples) for e in merged.evaluations] == [(e.step, e.samples) for e in whole.evaluations]
        assert last(two[name])["lowbit"]["cost"] == last(one["int8"])["lowbit"]["cost"]
        assert any("2 processes" in note for note in merged.notes)


def test_the_ledger_has_the_bytes_of_the_exchange(one: dict[str, Path], two: dict[str, Path]) -> None:
    """Two processes send all parameters twice in halves each; codes are between a quarter and a third of that."""
    state = last(one["int8"])["state_dict"]
    full = STEPS * 2 * 4 * sum(v.numel() for v in state.values())
    full_bytes, code_bytes, single = (
        Ledger.load(runs / "ledger.jsonl").sent_bytes for runs in (two["int8"], two["codes"], one["int8"])
    )

    assert single == 0
    assert full_bytes == full
    assert 0.25 < code_bytes / full_bytes < 0.33


def test_the_proof_speaks_for_both(two: dict[str, Path]) -> None:
    """It says that the other process ran the same."""
    assert (
        "process 0 of 2 ran on its part of the first batch, and the others ran the same"
        in (two["int8"] / "proof.txt").read_text()
    )


KILLED = {
    "codes": ("mlp", ("int8", "--exchange", "int8")),
    "sharded": ("mlp", ("int8", "--strategy", "fsdp")),
    "norm": ("net", ("sbm8", "--synchronized")),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_process_loses_nothing(name: str, net: str, tmp_path: Path) -> None:
    """SIGKILL to one of two ends the other with one sentence; resumed, the run is bit for bit the one never stopped."""
    model, given = KILLED[name]
    model = net if model == "net" else model
    launch(words(tmp_path / "whole", *given, model=model))
    first, killed = in_processes(hit, 2, 8, 1, signal.SIGKILL, *words(tmp_path / "cut", *given, model=model))
    assert killed is None
    assert first[0] == 1
    assert "another process of the run is gone" in first[1]
    assert last(tmp_path / "cut")["global_step"] == 6
    launch(["resume", str(tmp_path / "cut")])

    assert same_end(tmp_path / "cut", tmp_path / "whole")


def test_a_signal_to_one_ends_all_and_other_numbers_of_processes_go_on(one: dict[str, Path], tmp_path: Path) -> None:
    """SIGTERM to rank 1 saves the step on rank 0; one process, and four, end where one process ends, to 1e-6."""
    found = in_processes(hit, 2, 4, 1, signal.SIGTERM, *words(tmp_path / "run", "fp32"))
    assert [code for code, _ in found] == [143, 143]
    assert "starts from step 4" in found[0][1]
    for world in (1, 4):
        out = Path(shutil.copytree(tmp_path / "run", tmp_path / str(world)))
        launch(["resume", str(out)], world)

        assert distance(out, one["fp32"]) < 1e-6
        assert (
            f"from step 4 on, batches were shared by {world} processes instead of 2"
            in Ledger.load(out / "ledger.jsonl").notes
        )


def test_gates_decide_for_the_batch_of_all(net: str, tmp_path: Path) -> None:
    """The cost that rules the penalty is the mean over both processes, and the run ends."""
    launch(words(tmp_path / "run", "dfq", "--blocks", r"blocks\.\d", model=net))

    assert last(tmp_path / "run")["global_step"] == STEPS


REFUSED = {
    "batch": (
        ("--batch-size", "63"),
        "batch of 63 cannot be split evenly over 2 processes: use a batch_size that is a multiple of 2",
    ),
    "gates": (
        ("--strategy", "fsdp", "--recipe", "dfq"),
        "has gates, whose parameters are outside the model: use strategy 'ddp'",
    ),
    "states": (("--strategy", "fsdp", "--optimizer-states", "int8"), "optimizer_states='int8' round them"),
    "exchange": (("--strategy", "fsdp", "--exchange", "int8"), "exchange='int8' goes with strategy 'ddp'"),
    "seeds": (("--seeds", "0,1"), "--seeds starts processes by itself"),
    "norm": (("--synchronized",), "synchronized goes with a recipe of Range BN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    """With the code of a wrong request, and nothing is written."""
    given, text = REFUSED[name]
    found = in_processes(command, 2, *words(tmp_path / "run", "int8", *given))

    assert found[0][0] == 2
    assert text in " ".join(found[0][1].split())
    assert found[1][0] in (1, 2)
    assert not (tmp_path / "run").exists()


def test_settings_of_several_are_refused_alone(tmp_path: Path) -> None:
    """One process has nobody to share weights with."""
    assert command(*words(tmp_path / "run", "int8", "--strategy", "fsdp"))[0] == 2
    assert (
        "torchrun --nproc-per-node 2 -m lowbit train"
        in command(*words(tmp_path / "run", "int8", "--exchange", "int8"))[1]
    )


def test_other_commands_are_refused_in_several_processes() -> None:
    """Each would do all of it."""
    for code, text in in_processes(command, 2, "inspect", "--model", "mlp"):
        assert code == 2
        assert "is one process" in text


def test_a_folder_in_use_is_refused_by_all(two: dict[str, Path], tmp_path: Path) -> None:
    """Rank 0 takes the lock, and says who has it; the other is silent."""
    out = Path(shutil.copytree(two["fp32"], tmp_path / "run"))
    with locked(out):
        said, silent = launch(["resume", str(out)], code=1)

    assert "is in use by process" in said
    assert silent == ""


def test_a_damaged_checkpoint_is_set_aside_once(two: dict[str, Path], tmp_path: Path) -> None:
    """Rank 0 renames it before the other looks, and both go on from the one before."""
    out = Path(shutil.copytree(two["fp32"], tmp_path / "run"))
    (out / "last.ckpt").write_bytes(b"damaged")
    said, silent = launch(["resume", str(out)])

    assert "last.ckpt.damaged" in said
    assert silent == ""
    assert checkpoint.load(out / "last.ckpt")["global_step"] == STEPS
    assert same_end(out, two["fp32"])
