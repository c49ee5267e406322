import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import UsageError
from lowbit.schedules import Cyclic

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from lowbit.integrations.huggingface import LowbitCallback  # noqa: E402

# The libraries' own warnings are not ours to mend; lowbit's are tested one by one.
pytestmark = pytest.mark.filterwarnings("default")


def gpt2() -> nn.Module:
    """A tiny GPT-2 with dropout, converted, whose forward bits cycle."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with pytest.warns(UserWarning, match="of the weights"):  # GPT-2's blocks have a matrix product of their own
        lowbit.convert_(model, "int8", engine="reference", strict=False)
    return model


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens."""

    def __init__(self) -> None:
        self.tokens = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Bits(TrainerCallback):
    """Notes the forward bits of each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Note them."""
        self.seen.append(int(model.lm_head.site.bits[0]))


def run(folder: Path, *callbacks: TrainerCallback, resume: str | None = None, **options: Any) -> tuple[Any, list[int]]:
    """Eight steps with a checkpoint after every third."""
    model, bits = gpt2(), Bits()
    lowbit.PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=2, total_steps=8))
    arguments = TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        learning_rate=1e-2,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[*callbacks, bits])
    trainer.train(resume_from_checkpoint=resume)
    return model, bits.seen


@pytest.mark.parametrize("restored", [False, True], ids=["", "restore_callback_states"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(restored: bool, tmp_path: Path) -> None:
    """From the checkpoint of step 3, a new trainer gets the same weights, ranges and bits, bit for bit."""
    whole, bits = run(tmp_path, LowbitCallback())
    shutil.rmtree(tmp_path / "checkpoint-6")
    again, later = run(
        tmp_path,
        LowbitCallback(),
        resume=str(tmp_path / "checkpoint-3"),
        restore_callback_states_from_checkpoint=restored,
    )

    assert bits[3:] == later
    assert len(set(bits)) > 1
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    one, two = (lowbit.state_dict(model)["groups"][0] for model in (whole, again))
    assert one["step"] == two["step"] == 8
    assert all(torch.equal(one["sites"][n]["running_range"], two["sites"][n]["running_range"]) for n in one["sites"])


def test_a_checkpoint_without_the_callback_is_said_to_lack_its_state(tmp_path: Path) -> None:
    """What it resumes has noise of step 0, and the first forward warns of it."""

    def train(*callbacks: TrainerCallback, resume: str | None = None) -> None:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, save_steps=2, report_to=[], disable_tqdm=True,
            use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(gpt2(), arguments, train_dataset=Texts(), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)

    train()
    with pytest.warns(UserWarning, match="lowbit's own state was not: its noise begins"):
        train(LowbitCallback(), resume=str(tmp_path / "checkpoint-2"))


def test_the_loss_of_an_accumulated_step_is_the_mean_of_its_forwards(tmp_path: Path) -> None:
    """With two batches an update, the controller steps once for both, with about the loss of one."""
    losses: list[Any] = []

    class Listening(LowbitCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert self._run is not None
            self._run.step = lambda loss: losses.append(float(loss))  # type: ignore[method-assign]
            super().on_step_end(*args, **kwargs)

    run(tmp_path, Listening(), gradient_accumulation_steps=2)

    assert len(losses) == 8
    assert all(2 < loss < 6 for loss in losses)


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    """The callback has nothing to do there."""
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Texts(), callbacks=[LowbitCallback()])

    with pytest.raises(UsageError, match="nothing in this model is converted"):
        trainer.train()
