import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import UsageError
from lowbit.nn.frozen import FrozenLinear

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowbit.integrations.huggingface import LowbitCallback

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own warnings are not ours to mend

TOKENS = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))


def llama() -> nn.Module:
    """A tiny one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config)


def lora(model: nn.Module) -> Any:
    """With adapters in three kinds of its layers, which are not zero."""
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """Some steps of AdamW on one batch; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def frozen_lora() -> Any:
    """Adapters beside a base in 8 bits whose weights are codes."""
    base = llama()
    lowbit.convert_(base, "int8", engine="reference")
    model = lora(base)
    lowbit.freeze_(model)
    return model


def test_adapters_train_beside_a_base_of_codes() -> None:
    """Every linear layer of the base is codes, its grad_input runs in 8 bits, and the loss falls."""
    model = frozen_lora()
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    with lowbit.verify(model) as proof:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    losses = train(model, 8)
    frozen = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]

    assert len(frozen) == 2 * 7 + 1
    assert {row.product for row in proof.rows} == {"output", "grad_input"}
    assert losses[-1] < losses[0]
    assert all("lora" in name for name in before)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_adapters_are_merged_exactly() -> None:
    """After `thaw_`, the merged weight is the weight that ran plus the adapter's product, bit for bit."""
    model = frozen_lora()
    train(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    ran, delta = layer.base_layer.frozen.values(), layer.get_delta_weight("default").detach()
    lowbit.thaw_(model)
    merged = model.merge_and_unload()
    lowbit.restore_(merged)
    weight = merged.model.layers[0].self_attn.q_proj.weight

    assert torch.equal(weight, ran + delta)
    assert not torch.equal(weight, ran)
    assert merged(input_ids=TOKENS).logits.isfinite().all()


def test_merging_into_codes_is_refused() -> None:
    """PEFT would add to a copy, and lose it."""
    with pytest.raises(UsageError, match=r"kept as codes: call lowbit\.thaw_"):
        frozen_lora().merge_and_unload()


def test_adapters_are_saved_and_loaded() -> None:
    """The adapter's own state dict holds the adapters alone, and gives the same output in another process."""
    model, other = frozen_lora(), frozen_lora()
    train(model)
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(other, copy.deepcopy(state))

    assert all("lora" in name for name in state)
    assert torch.equal(model.eval()(input_ids=TOKENS).logits, other.eval()(input_ids=TOKENS).logits)


def test_a_model_with_adapters_converts() -> None:
    """Base and adapters become low-precision layers, and the adapters train with all three products."""
    model = lora(llama())
    report = lowbit.convert_(model, "int8", engine="reference")
    with lowbit.verify(model) as proof:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    adapters = {row.product for row in proof.rows if "lora" in row.layer}

    assert sum(row.converted for row in report.rows) == 2 * 7 + 1 + 2 * 2 * 3
    assert adapters == {"output", "grad_input", "grad_weight"}
    lowbit.restore_(model)
    assert model.merge_and_unload()(input_ids=TOKENS).logits.isfinite().all()


def test_full_fine_tuning_in_8_bits_resumes(tmp_path: Path) -> None:
    """Products in sbm8 and states of AdamW in 8-bit codes, in Hugging Face's Trainer: bit for bit after a resume."""

    def run(resume: str | None = None) -> list[Tensor]:
        model = llama()
        lowbit.convert_(model, "sbm8", engine="reference")
        optimizer = lowbit.optim.LowBitOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), smallest=256)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": t, "labels": t} for t in TOKENS],
            callbacks=[LowbitCallback()],
            optimizers=(optimizer, schedule),
        )
        trainer.train(resume_from_checkpoint=resume)
        packed = [state for state in optimizer.state.values() if isinstance(state.get("exp_avg"), dict)]
        assert len(packed) == 2 * 7 + 2
        return [p.detach().clone() for p in model.parameters()]

    whole = run()
    again = run(str(tmp_path / "checkpoint-2"))

    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
