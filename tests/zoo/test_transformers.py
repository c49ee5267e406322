"""Ten families of transformers with all their products, attention included, in 8 bits, and losses beside fp32's.

With `-s` a line for each is printed: the share of MACs, and the largest distance of losses.
"""

from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import nn
from zoo_models import TRANSFORMERS, Entry, _images, loss_of

import lowbit

RECIPE = "int8-attention"
STEPS, RATE = 20, 0.005
# At the rate of the others, their losses in full precision jump up and down.
RATES = {"vit": 0.001, "clip": 0.001}
KNOWN = {entry.name.removesuffix(" (small)"): entry for entry in TRANSFORMERS}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def _clip() -> nn.Module:
    """Both towers and the contrast of their outputs."""
    config = transformers.CLIPConfig(
        text_config={**WIDTHS, "vocab_size": 100, "max_position_embeddings": 32, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**WIDTHS, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


def _pairs(g: torch.Generator) -> tuple[tuple[object, ...], dict[str, object]]:
    ids = torch.randint(3, 99, (16, 16), generator=g)
    ids[:, -1] = 2
    return (), {"input_ids": ids, "pixel_values": torch.randn(16, 3, 32, 32, generator=g), "return_loss": True}


def _swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10
    )
    return transformers.SwinForImageClassification(config)


def _eva() -> nn.Module:
    return timm.create_model(
        "eva02_tiny_patch14_224", pretrained=False, img_size=56, depth=2, embed_dim=64, num_heads=4, num_classes=10
    )


def _seen(name: str, build: Callable[[], nn.Module], size: int) -> Entry:
    return Entry(name=name, library="", build=build, inputs=_images(size, 4), evaluate=_images(size, 4))


ENTRIES = {
    **{name: KNOWN[name] for name in ("gpt2", "llama", "bert", "t5", "vit", "whisper", "mixtral")},
    "clip": Entry(name="clip", library="transformers", build=_clip, inputs=_pairs, evaluate=_pairs),
    "swin": _seen("swin", _swin, 64),
    "eva02": _seen("eva02", _eva, 56),
}


def _without_dropout(model: nn.Module) -> nn.Module:
    """The model with all its dropout, stochastic depth too, at 0: its noise is not the plain model's."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)
    return model


def _losses(model: nn.Module, entry: Entry, steps: int, rate: float) -> list[float]:
    args, options = entry.inputs(torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    found = []
    for _ in range(steps):
        loss = loss_of(model(*args, **options))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.filterwarnings("default")  # the libraries' own warnings are not ours to mend
@pytest.mark.parametrize("name", ENTRIES)
def test_all_products_of_a_transformer_run_in_8_bits(name: str) -> None:
    """97 % of a step's MACs or more are proven, and each of 20 losses is within 1 % of full precision's, not equal."""
    entry, rate = ENTRIES[name], RATES.get(name, RATE)

    def built() -> nn.Module:
        torch.manual_seed(0)
        return _without_dropout(entry.build().train())

    plain = _losses(built(), entry, STEPS, rate)
    model = built()
    lowbit.convert_(model, RECIPE, strict=False)
    losses = _losses(model, entry, STEPS, rate)
    with lowbit.verify(model) as proof:
        _losses(model, entry, 1, rate)

    inside = sum(row.macs for row in proof.rows)
    outside = {f"{row.module} {row.op}": row.macs or 0 for row in proof.outside}
    share = inside / (inside + sum(outside.values()))
    furthest = max(abs(a / b - 1) for a, b in zip(losses, plain, strict=True))
    print(f"{name}: {100 * share:.1f} % of MACs; losses {plain[0]:.3f} to {plain[-1]:.3f}, {100 * furthest:.2f} % off")

    assert losses != plain
    assert plain[-1] < plain[0]
    assert furthest < 0.01
    assert share >= 0.97, outside
