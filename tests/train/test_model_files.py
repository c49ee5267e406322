"""Models of a user's file: built for a task, trained, and kept with the run that began with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config, last, same
from test_recipe_files import MINE

from lowbit import RunError, UsageError
from lowbit.cli import main as cli
from lowbit.cli import recipes
from lowbit.train import models, trainer
from lowbit.train.config import TrainConfig
from lowbit.train.data import Task

IMAGES = Task(kind="image", shape=(1, 8, 8), classes=10)
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape=(1, 8, 8), classes=10, width=16):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x))

class Fixed(Net):
    def __init__(self):
        super().__init__()

class Tokens(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.table = nn.Embedding(classes, classes)

    def forward(self, x):
        return self.table(x)

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Narrow(Net):
    def forward(self, x):
        return self.body(x)

class Wrong(Net):
    def forward(self, x):
        return self.head(x)

class Needs(Net):
    def __init__(self, depth):
        super().__init__()

class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.LazyLinear(10))

class Plain:
    pass

class Late(Net):
    def forward(self, x):
        if torch.is_grad_enabled():
            raise KeyError("late")
        return super().forward(x)
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A file with models."""
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def test_a_class_gets_what_its_constructor_takes(net: Path) -> None:
    """Of `classes` and `shape` those are given that the constructor names; its other arguments keep their defaults."""
    colours = Task(kind="image", shape=(3, 4, 4), classes=7)

    made: Any = models.build(f"{net}:Net", colours)
    assert made(torch.zeros(5, 3, 4, 4)).shape == (5, 7)
    assert made.head.in_features == 16
    assert made.training


def test_a_class_may_take_nothing(net: Path) -> None:
    """A model of fixed sizes serves the task that has them, and no other."""
    models.build(f"{net}:Fixed", IMAGES)

    with pytest.raises(UsageError, match=r"Fixed gives a tensor of \(2, 10\) .*must give logits of \(2, 7\)"):
        models.build(f"{net}:Fixed", Task(kind="image", shape=(1, 8, 8), classes=7))


def test_a_class_may_map_text(net: Path) -> None:
    """Logits of a text have a row for each position."""
    model = models.build(f"{net}:Tokens", Task(kind="text", shape=(6,), classes=256))

    assert model(torch.zeros(3, 6, dtype=torch.int64)).shape == (3, 6, 256)


def test_the_weights_follow_from_the_seed(net: Path) -> None:
    """They are drawn from torch's generator, as those of the library's own models."""
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(models.build(f"{net}:Net", IMAGES).state_dict()["head.weight"])

    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nett", r"unknown class of .*net\.py 'Nett'\. Did you mean 'Net'"),
        ("Plain", r"Plain is not a torch\.nn\.Module"),
        ("Pair", r"Pair gives a tuple for an input of \(2, 1, 8, 8\): it must give logits of \(2, 10\)"),
        ("Narrow", r"Narrow gives a tensor of \(2, 16\)"),
        ("Wrong", r"Wrong raises for an input of \(2, 1, 8, 8\): RuntimeError: .* \(line \d+\)"),
        ("Needs", r"constructor of .*net\.py:Needs raises TypeError: .*depth"),
        ("Lazy", r"Lazy has parameters without a shape"),
    ],
)
def test_a_class_that_is_not_a_model_of_the_task_is_refused(net: Path, name: str, message: str) -> None:
    """Each mistake has its own message, before anything is trained."""
    with pytest.raises(UsageError, match=message):
        models.build(f"{net}:{name}", IMAGES)


def test_a_file_alone_is_told_what_to_add() -> None:
    """A file without a class is an unknown model, and the message has the form to write."""
    with pytest.raises(UsageError, match=r"unknown model 'net\.py'.*FILE\.py:CLASS"):
        models.build("net.py", IMAGES)


def test_a_run_is_called_after_the_file_and_the_class() -> None:
    """The folder of a run has no path in its name."""
    settings = TrainConfig(model="/a/b/net.py:Net", data="digits", recipe="int8").resolved(threads=1, amp="none")

    assert settings.out == Path("runs", "net-Net-digits-int8-0")


def test_a_run_keeps_the_model_it_began_with(net: Path, tmp_path: Path) -> None:
    """A run resumes bit for bit although its file is another one by then, and gone before it is probed."""
    out = tmp_path / "half"
    trainer.train(config(tmp_path / "whole", model=f"{net}:Net", recipe="int8", max_steps=4))
    trainer.train(config(out, model=f"{net}:Net", recipe="int8", max_steps=4, checkpoint_every=2))
    (out / "result.json").unlink()
    (out / "last.ckpt").unlink()
    net.write_text(NET.replace("width=16", "width=4"))

    trainer.resume(out)
    net.unlink()

    assert (out / "model.py").read_text() == NET
    assert same(last(out)["state_dict"], last(tmp_path / "whole")["state_dict"])
    assert trainer.trained(out)[0].state_dict()["head.weight"].shape == (10, 16)


@pytest.mark.parametrize(("name", "change"), [("model.py", "# a comment\n"), ("recipe.toml", "# a comment\n")])
def test_a_run_whose_copy_is_another_file_is_refused(net: Path, tmp_path: Path, name: str, change: str) -> None:
    """A checkpoint belongs to the recipe and the model that it was trained with, letter by letter."""
    recipe, out = tmp_path / "mine.toml", tmp_path / "run"
    recipe.write_text(MINE)
    trainer.train(config(out, model=f"{net}:Net", recipe=str(recipe), max_steps=1))
    before = (out / name).read_text()
    (out / name).write_text(before + change)

    for refused in (lambda: trainer.resume(out, {"epochs": 4}), lambda: trainer.trained(out)):
        with pytest.raises(RunError, match=rf"run/{name} is not what the run began with \(SHA-256 [0-9a-f]{{64}}\)"):
            refused()
    (out / name).write_text(before)
    assert trainer.resume(out, {"epochs": 4}).steps == 1


def test_a_run_that_lost_its_model_does_not_take_another(net: Path, tmp_path: Path) -> None:
    """Without the copy that it began with, a run does not go on with what the file says by then."""
    out = tmp_path / "run"
    trainer.train(config(out, model=f"{net}:Net", recipe="int8", max_steps=1))
    (out / "model.py").unlink()

    with pytest.raises(RunError, match=r"model\.py cannot be read: the run began with the model in it"):
        trainer.resume(out, {"epochs": 4})


def test_an_error_of_a_users_file_is_one_line(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes up in training is said with the file and the line, and the exit code is 1."""
    command = ["train", "--model", f"{net}:Late", "--data", "digits", "--subset", "128", "--recipe", "int8"]

    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 1
    error, line = capsys.readouterr().err, NET[: NET.index("raise KeyError")].count("\n") + 1
    assert f"lowbit: error: {net} raises KeyError: 'late' (line {line})\n" in error
    assert "Traceback" not in error


def test_an_error_of_lowbit_is_not_blamed_on_a_users_file(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that passed no file of a user keeps its traceback."""
    models.build(f"{net}:Net", IMAGES)
    monkeypatch.setattr(recipes, "run", lambda **_: {}["a fault"])

    with pytest.raises(KeyError):
        cli.main(["recipes"])
