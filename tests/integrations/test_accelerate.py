from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.integrations import RunState
from lowbit.schedules import Cyclic

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = pytest.mark.filterwarnings("default")  # the library's own warnings are not ours to mend


def run(folder: Path, *, steps: int, resume: bool) -> tuple[nn.Module, RunState]:
    """A loop of Accelerate over shuffled batches, which saves its state after four of eight steps."""
    accelerate.utils.set_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    lowbit.convert_(model, "sbm8", engine="reference")
    lowbit.PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=2, total_steps=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = torch.utils.data.TensorDataset(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(data, 8, shuffle=False)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state = RunState(model)
    accelerator.register_for_checkpointing(state)
    if resume:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, 4)
    for step, (x,) in enumerate(loader, start=4 if resume else 0):
        if step == 4 and not resume:
            accelerator.save_state(str(folder))
        if step == steps:
            break
        loss = model(x).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        state.step(loss)
    return model, state


def test_a_resumed_loop_is_the_loop_that_was_never_stopped(tmp_path: Path) -> None:
    """With `RunState` registered, `load_state` brings back noise, ranges and bits: weights are equal bit for bit."""
    whole, one = run(tmp_path / "whole", steps=8, resume=False)
    run(tmp_path / "cut", steps=5, resume=False)
    again, two = run(tmp_path / "cut", steps=8, resume=True)

    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert str(one.state_dict()) == str(two.state_dict())
    assert one.state_dict()["controllers"][0]["step"] == 8
