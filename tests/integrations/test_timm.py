import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit.integrations import save_with_optimizer
from lowbit.schedules import Cyclic

timm = pytest.importorskip("timm", reason="timm is not installed")

from timm.models import resume_checkpoint  # noqa: E402 - skipped without it
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the library's own warnings are not ours to mend

EPOCHS, BATCHES = 3, 3


def run(folder: Path, *, epochs: int = EPOCHS, resume: bool = False) -> tuple[nn.Module, nn.Module]:
    """Timm's own training loop, as its train.py has it; one line is lowbit's besides the conversion.

    Returns:
        The model and its moving average.
    """
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4, in_chans=1)
    lowbit.convert_(model, "sbm8", engine="reference")
    lowbit.PrecisionController(model, forward=Cyclic(low=4, high=8, cycles=3, total_steps=EPOCHS * BATCHES))
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=1e-4)
    run = save_with_optimizer(model, optimizer)
    start = 0
    folder.mkdir(exist_ok=True)
    if resume:
        start = resume_checkpoint(model, str(folder / "last.pth.tar"), optimizer)
    ema = ModelEmaV3(model, decay=0.5)
    if resume:
        timm.models.load_checkpoint(ema.module, str(folder / "last.pth.tar"), use_ema=True)
    schedule = CosineLRScheduler(optimizer, t_initial=EPOCHS)
    saver = CheckpointSaver(
        model, optimizer, args=argparse.Namespace(model="resnet10t"), model_ema=ema, checkpoint_dir=str(folder)
    )
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(BATCHES, 4, 1, 32, 32, generator=generator), torch.arange(4)
    for epoch in range(start, epochs):
        schedule.step(epoch)
        model.train()
        for batch in x:
            loss = F.cross_entropy(model(batch), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            run.step(loss)
        saver.save_checkpoint(epoch)
    return model, ema.module


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    """Timm's `resume_checkpoint` brings back lowbit's state with the optimizer's: weights are equal bit for bit."""
    whole, average = run(tmp_path / "whole")
    run(tmp_path / "cut", epochs=2)
    again, average_again = run(tmp_path / "cut", resume=True)

    assert same(whole.state_dict(), again.state_dict())
    assert same(average.state_dict(), average_again.state_dict())
    assert str(lowbit.state_dict(whole)) == str(lowbit.state_dict(again))
    assert lowbit.state_dict(again)["groups"][0]["step"] == EPOCHS * BATCHES


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("kind", [ModelEmaV2, ModelEmaV3])
def test_an_average_evaluates_with_the_ranges_that_it_is_given(kind: Any) -> None:
    """It is a copy from before training; one line gives it the ranges of now, and another output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    lowbit.convert_(model, "sbm8", engine="reference")
    ema = kind(model, decay=0.5)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(16, 6)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        ema.update(model)
    before = ema.module(3 * x)
    assert ema.module[0].site.running_range[2] == 0

    lowbit.load_state_dict(ema.module, lowbit.state_dict(model))

    assert torch.equal(ema.module[0].site.running_range, model[0].site.running_range)
    assert ema.module[0].site.running_range[2] == 4
    assert not torch.equal(before, ema.module(3 * x))
    assert not torch.equal(ema.module[0].weight, model[0].weight)
