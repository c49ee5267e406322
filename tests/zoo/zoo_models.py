"""The models of the zoo: public architectures with random weights, at sizes that a step takes a second or less for.

Nothing here asks a network for anything: weights come from a seed, configurations are written out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import torchvision.models as tv
import transformers
from timm.layers import GatedMlp
from timm.models import create_model
from timm.models.convmixer import ConvMixer
from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.maxvit import MaxVit
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

LIBRARIES = {"torchvision": torchvision, "timm": timm, "transformers": transformers}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the zoo.

    Args:
        name: as its library calls it; ``(small)`` where depth or width were cut.
        library: where it comes from.
        build: makes it, with weights from torch's generator.
        inputs: the arguments of a training forward, from a generator.
        evaluate: those of a forward in evaluation, where they differ.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    evaluate: Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]


def loss_of(output: Any) -> Tensor:
    """A loss for any output: its own where it has some, or else the distance of every tensor in it to fixed noise."""
    if isinstance(output, transformers.utils.ModelOutput) and getattr(output, "loss", None) is not None:
        return output.loss
    if isinstance(output, dict) and all(isinstance(v, Tensor) and v.dim() == 0 for v in output.values()):
        return sum(output.values(), torch.zeros(()))
    generator = torch.Generator().manual_seed(1)
    return sum(
        (
            (t - torch.randn(t.shape, generator=generator)).square().mean()
            for t in tensors_of(output)
            if t.requires_grad
        ),
        torch.zeros(()),
    )


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    values = dict(output) if isinstance(output, transformers.utils.ModelOutput) else output
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


def _images(size: int, batch: int) -> Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda g: ((torch.rand(batch, 3, size, size, generator=g),), {})


def _vision(name: str, build: Callable[[], nn.Module], size: int = 64, batch: int = 4) -> Entry:
    inputs = _images(size, batch)
    return Entry(name=name, library="torchvision", build=build, inputs=inputs, evaluate=inputs)


def _timm(name: str, size: int = 64, batch: int = 4, **options: Any) -> Entry:
    inputs = _images(size, batch)
    return Entry(
        name=f"{name} (small)" if options.keys() - {"img_size"} else name,
        library="timm",
        build=lambda: create_model(name, pretrained=False, num_classes=10, **options),
        inputs=inputs,
        evaluate=inputs,
    )


def _own(name: str, build: Callable[[], nn.Module]) -> Entry:
    """A model of timm that is made by its class."""
    inputs = _images(64, 4)
    return Entry(name=f"{name} (small)", library="timm", build=build, inputs=inputs, evaluate=inputs)


def _detection(name: str, build: Callable[[], nn.Module], size: int = 64) -> Entry:
    """A detector: it takes lists of pictures, and in training the boxes to find in them."""

    def pictures(g: torch.Generator) -> list[Tensor]:
        return [torch.rand(3, size, size, generator=g) for _ in range(2)]

    def inputs(g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found = pictures(g)
        target = {
            "boxes": torch.tensor([[4.0, 4.0, 32.0, 40.0], [20.0, 10.0, 60.0, 56.0]]),
            "labels": torch.tensor([1, 2]),
            "masks": torch.ones(2, size, size, dtype=torch.uint8),
            "keypoints": torch.tensor([[[20.0, 20.0, 1.0]], [[40.0, 40.0, 1.0]]]),
        }
        return (found, [target, target]), {}

    return Entry(
        name=name,
        library="torchvision",
        build=build,
        inputs=inputs,
        evaluate=lambda g: ((pictures(g),), {}),
    )


def _video(name: str, build: Callable[[], nn.Module]) -> Entry:
    def inputs(g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.rand(2, 3, 4, 32, 32, generator=g),), {}

    return Entry(name=name, library="torchvision", build=build, inputs=inputs, evaluate=inputs)


def _flow(g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.rand(1, 3, 128, 128, generator=g), torch.rand(1, 3, 128, 128, generator=g)), {"num_flow_updates": 2}


def _no_weights(model: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: model(weights=None, **options)


def _no_backbone(model: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: model(weights=None, weights_backbone=None, **options)


def _smaller_head(model: nn.Module, channels: int, *, pooled: int) -> nn.Module:
    """The same features; what follows them in a hundredth of the parameters."""
    model.avgpool = nn.AdaptiveAvgPool2d(pooled)
    model.classifier = nn.Sequential(
        nn.Dropout(),
        nn.Linear(channels * pooled**2, 256),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(256, 256),
        nn.ReLU(inplace=True),
        nn.Linear(256, 10),
    )
    return model


_FEW_PIXELS = {"min_size": 64, "max_size": 64}
_FEW_BOXES = {"box_batch_size_per_image": 16}
TORCHVISION = (
    _vision("alexnet (small)", lambda: _smaller_head(tv.alexnet(weights=None), 256, pooled=1)),
    _vision("vgg11_bn (small)", lambda: _smaller_head(tv.vgg11_bn(weights=None, init_weights=False), 512, pooled=2)),
    _vision("squeezenet1_1", _no_weights(tv.squeezenet1_1, num_classes=10)),
    _vision("resnet18", _no_weights(tv.resnet18, num_classes=10)),
    _vision("resnet50", _no_weights(tv.resnet50, num_classes=10)),
    _vision("resnext50 (small)", lambda: ResNet(Bottleneck, [1, 1, 1, 1], 10, groups=32, width_per_group=4)),
    _vision("wide_resnet50 (small)", lambda: ResNet(Bottleneck, [1, 1, 1, 1], 10, width_per_group=128)),
    _vision("densenet121", _no_weights(tv.densenet121, num_classes=10)),
    _vision("googlenet", _no_weights(tv.googlenet, num_classes=10, init_weights=False)),
    _vision(
        "inception_v3",
        _no_weights(tv.inception_v3, num_classes=10, aux_logits=False, init_weights=False),
        size=96,
    ),
    _vision("mobilenet_v2", _no_weights(tv.mobilenet_v2, num_classes=10)),
    _vision("mobilenet_v3_small", _no_weights(tv.mobilenet_v3_small, num_classes=10)),
    _vision("shufflenet_v2_x0_5", _no_weights(tv.shufflenet_v2_x0_5, num_classes=10)),
    _vision("mnasnet0_5", _no_weights(tv.mnasnet0_5, num_classes=10)),
    _vision("efficientnet_b0", _no_weights(tv.efficientnet_b0, num_classes=10)),
    _vision("efficientnet_v2_s", _no_weights(tv.efficientnet_v2_s, num_classes=10), batch=2),
    _vision("regnet_y_400mf", _no_weights(tv.regnet_y_400mf, num_classes=10)),
    _vision("convnext_tiny", _no_weights(tv.convnext_tiny, num_classes=10)),
    _vision(
        "vit (small)",
        lambda: tv.VisionTransformer(
            image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
        ),
        size=32,
    ),
    _vision(
        "swin (small)",
        lambda: SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10),
    ),
    _vision(
        "swin_v2 (small)",
        lambda: SwinTransformer(
            [4, 4],
            32,
            [2, 2],
            [2, 4],
            [4, 4],
            num_classes=10,
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
    ),
    _vision(
        "maxvit (small)",
        lambda: MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10),
    ),
    _vision("fcn_resnet50", _no_backbone(tv.segmentation.fcn_resnet50, num_classes=5, aux_loss=True)),
    _vision(
        "deeplabv3_mobilenet_v3_large",
        _no_backbone(tv.segmentation.deeplabv3_mobilenet_v3_large, num_classes=5),
    ),
    _vision(
        "lraspp_mobilenet_v3_large",
        _no_backbone(tv.segmentation.lraspp_mobilenet_v3_large, num_classes=5),
    ),
    _detection(
        "fasterrcnn_mobilenet_v3_large_fpn",
        _no_backbone(tv.detection.fasterrcnn_mobilenet_v3_large_fpn, num_classes=3, **_FEW_PIXELS, **_FEW_BOXES),
    ),
    _detection(
        "ssdlite320_mobilenet_v3_large",
        _no_backbone(tv.detection.ssdlite320_mobilenet_v3_large, num_classes=3),
    ),
    _detection(
        "retinanet_resnet50_fpn",
        _no_backbone(tv.detection.retinanet_resnet50_fpn, num_classes=3, **_FEW_PIXELS),
    ),
    _detection(
        "fcos_resnet50_fpn",
        _no_backbone(tv.detection.fcos_resnet50_fpn, num_classes=3, **_FEW_PIXELS),
    ),
    _detection(
        "maskrcnn_resnet50_fpn",
        _no_backbone(tv.detection.maskrcnn_resnet50_fpn, num_classes=3, **_FEW_PIXELS, **_FEW_BOXES),
    ),
    _detection(
        "keypointrcnn_resnet50_fpn",
        _no_backbone(
            tv.detection.keypointrcnn_resnet50_fpn,
            num_classes=3,
            num_keypoints=1,
            **_FEW_PIXELS,
            **_FEW_BOXES,
        ),
    ),
    _video("r3d_18", _no_weights(tv.video.r3d_18, num_classes=10)),
    _video("mc3_18", _no_weights(tv.video.mc3_18, num_classes=10)),
    Entry(
        name="raft_small",
        library="torchvision",
        build=_no_weights(tv.optical_flow.raft_small),
        inputs=_flow,
        evaluate=_flow,
    ),
)

TIMM = (
    _timm("resnetv2_50", layers=(1, 1, 1, 1)),
    _own("resnetv2_bit", lambda: ResNetV2((1, 1, 1, 1), num_classes=10)),
    _timm("nfnet_l0"),
    _timm("eva02_tiny_patch14_224", size=28, img_size=28, depth=4),
    _own("mixer", lambda: MlpMixer(10, img_size=64, patch_size=8, num_blocks=4, embed_dim=64)),
    _own(
        "gmlp",
        lambda: MlpMixer(
            10,
            img_size=64,
            patch_size=8,
            num_blocks=4,
            embed_dim=64,
            mlp_ratio=6,
            block_layer=SpatialGatingBlock,
            mlp_layer=GatedMlp,
        ),
    ),
    _own("convmixer", lambda: ConvMixer(64, 4, kernel_size=7, patch_size=4, num_classes=10)),
    _timm("levit_128s", size=224, batch=2),
    _timm("mobilevit_xxs"),
    _timm("ghostnet_050"),
    _timm("vit_tiny_patch16_224", img_size=64, depth=4),
    _timm("deit_tiny_distilled_patch16_224", img_size=64, depth=4),
    _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=48, depths=(2, 2), num_heads=(3, 6)),
    _timm("beit_base_patch16_224", img_size=64, depth=4, embed_dim=96, num_heads=4),
    _timm("xcit_nano_12_p8_224", depth=3),
    _timm("poolformer_s12"),
    _timm("coatnet_pico_rw_224", img_size=64),
    _timm("repvgg_a0"),
    _timm("hrnet_w18_small"),
    _timm("tf_efficientnet_b0"),
    _timm("mobilenetv4_conv_small"),
    _timm("sequencer2d_s", img_size=64, layers=(1, 1, 1, 1)),
    _timm("skresnet18"),
    _timm("mambaout_femto"),
)


def _tokens(g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = torch.randint(1, 99, (2, 16), generator=g)
    return (), {"input_ids": ids, "labels": ids}


def _text(name: str, model: str, config: str, **options: Any) -> Entry:
    """A language model with a vocabulary of 100, trained to repeat its input."""

    def build() -> nn.Module:
        settings = getattr(transformers, config)(vocab_size=100, **options)
        return getattr(transformers, model)(settings)

    return Entry(name=f"{name} (small)", library="transformers", build=build, inputs=_tokens, evaluate=_tokens)


_WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def _hf_vit() -> nn.Module:
    config = transformers.ViTConfig(**_WIDTHS, image_size=32, patch_size=8, num_labels=10)
    return transformers.ViTForImageClassification(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=100,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _speech(g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    features = torch.randn(2, 16, 64, generator=g)
    return (), {"input_features": features, "labels": torch.randint(1, 99, (2, 12), generator=g)}


def _waves(g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(2, 4000, generator=g),), {}


def _wav2vec2() -> nn.Module:
    return transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**_WIDTHS, conv_dim=(32,) * 7, num_conv_pos_embedding_groups=4, mask_time_prob=0.0)
    )


TRANSFORMERS = (
    _text("gpt2", "GPT2LMHeadModel", "GPT2Config", n_positions=32, n_embd=64, n_layer=2, n_head=4),
    _text("bert", "BertForMaskedLM", "BertConfig", **_WIDTHS, max_position_embeddings=32),
    _text("albert", "AlbertForMaskedLM", "AlbertConfig", **_WIDTHS, embedding_size=32, max_position_embeddings=32),
    _text("llama", "LlamaForCausalLM", "LlamaConfig", **_WIDTHS, num_key_value_heads=2, pad_token_id=0),
    _text(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        **_WIDTHS,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
    ),
    _text(
        "mamba", "MambaForCausalLM", "MambaConfig", hidden_size=64, num_hidden_layers=2, state_size=8, pad_token_id=0
    ),
    _text(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    Entry(
        name="vit (small)",
        library="transformers",
        build=_hf_vit,
        inputs=_images(32, 4),
        evaluate=_images(32, 4),
    ),
    Entry(name="whisper (small)", library="transformers", build=_whisper, inputs=_speech, evaluate=_speech),
    Entry(name="wav2vec2 (small)", library="transformers", build=_wav2vec2, inputs=_waves, evaluate=_waves),
)
ENTRIES = (*TORCHVISION, *TIMM, *TRANSFORMERS)
