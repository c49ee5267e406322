import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import UsageError
from lowbit.products.strides import suggests_channels_last
from lowbit.train import models
from lowbit.train.data import Task

GREY = Task(kind="image", shape=(1, 28, 28), classes=10)
TINY = Task(kind="image", shape=(1, 8, 8), classes=10)
CIFAR = Task(kind="image", shape=(3, 32, 32), classes=10)
IMAGENET = Task(kind="image", shape=(3, 224, 224), classes=1000)
TEXT = Task(kind="text", shape=(16,), classes=256)

ON_IMAGES = ["mlp", "resnet20", "resnet38", "resnet74", "resnet110", "resnet18", "resnet50", "mobilenetv2"]
ON_TEXT = ["gpt", "lstm"]


def parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "task", "count"),
    [
        # He et al.'s 269,722 and a 1×1 convolution with batch normalisation in each of two shortcuts
        ("resnet20", CIFAR, 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)),
        ("resnet110", CIFAR, 1_727_962 + 576 + 2_176),
        # torchvision's counts
        ("resnet18", IMAGENET, 11_689_512),
        ("resnet50", IMAGENET, 25_557_032),
        ("mobilenetv2", IMAGENET, 3_504_872),
        # a 3×3 stem in place of the 7×7
        ("resnet18", CIFAR, 11_689_512 - 990 * 513 - 64 * 3 * (49 - 9)),
        ("mlp", GREY, 785 * 256 + 2 * 257 * 256 + 257 * 10),
        ("gpt", TEXT, 256 * 128 + 16 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128 + 129 * 256),
        ("lstm", TEXT, 256 * 128 + 4 * 256 * (128 + 256 + 2) + 4 * 256 * (256 + 256 + 2) + 257 * 256),
    ],
)
def test_a_model_has_the_parameters_of_its_source(name: str, task: Task, count: int) -> None:
    """The number of parameters is the published one, to the last."""
    with torch.device("meta"):
        model = models.build(name, task)

    assert parameters(model) == count


@pytest.mark.parametrize("depth", [20, 38, 74, 110])
def test_a_cifar_resnet_is_as_deep_as_its_name(depth: int) -> None:
    """The 3×3 convolutions and the head are as many layers as the name says; two 1×1 are shortcuts."""
    with torch.device("meta"):
        model = models.build(f"resnet{depth}", CIFAR)
    kernels = [module.kernel_size for module in model.modules() if isinstance(module, nn.Conv2d)]

    assert kernels.count((3, 3)) + 1 == depth
    assert kernels.count((1, 1)) == 2


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", [name for name in ON_IMAGES if name not in ("resnet74", "resnet110")])
@pytest.mark.parametrize("task", [TINY, GREY, CIFAR], ids=["8", "28", "32"])
def test_an_image_model_trains_on_small_images(name: str, task: Task, batch: int) -> None:
    """Logits are (B, classes) and every parameter gets a finite gradient, also in a batch of 1."""
    torch.manual_seed(0)
    model = models.build(name, task)

    logits = model(torch.randn(batch, *task.shape))
    logits.square().mean().backward()

    assert logits.shape == (batch, 10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2"])
@pytest.mark.parametrize("pixels", [64, 224])
def test_an_imagenet_model_ends_at_a_32nd_of_its_input(name: str, pixels: int) -> None:
    """From 64 pixels on, the strides are those of the source: 32 in all."""
    task = Task(kind="image", shape=(3, pixels, pixels), classes=7)
    with torch.device("meta"):
        model = models.build(name, task)
        last = model.groups if isinstance(model, models.ResNet) else model.get_submodule("last")
        shapes: list[torch.Size] = []
        last.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))

        logits = model(torch.empty(1, 3, pixels, pixels))

    assert logits.shape == (1, 7)
    assert shapes[0][2:] == (pixels // 32, pixels // 32)


@pytest.mark.parametrize("name", ON_TEXT)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_text_model_trains(name: str, batch: int) -> None:
    """Logits are (B, T, 256) and every parameter gets a finite gradient, also in a batch of 1."""
    torch.manual_seed(0)
    model = models.build(name, TEXT)

    logits = model(torch.randint(256, (batch, 16)))
    logits.square().mean().backward()

    assert logits.shape == (batch, 16, 256)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ON_TEXT)
def test_a_text_model_does_not_see_the_future(name: str) -> None:
    """Changing byte 8 changes the logits from position 8 on and none before."""
    torch.manual_seed(0)
    model = models.build(name, TEXT)
    x = torch.randint(256, (1, 16))
    changed = x.clone()
    changed[0, 8] = (x[0, 8] + 1) % 256

    difference = (model(x) - model(changed)).abs().amax(2)[0]

    assert (difference[:8] == 0).all()
    assert (difference[8:] > 0).all()


def test_convolutions_start_with_the_variance_of_their_outputs() -> None:
    """The largest convolution of resnet20 has standard deviation √(2/(9·64)) within 5 standard errors."""
    torch.manual_seed(0)
    weights = [m.weight for m in models.build("resnet20", CIFAR).modules() if isinstance(m, nn.Conv2d)]
    weight = max(weights, key=torch.Tensor.numel).detach().double()
    expected = (2 / (9 * 64)) ** 0.5

    # The standard error of a normal sample's deviation is sigma/√(2n); false alarm < 1e-6.
    assert abs(weight.std() - expected) < 5 * expected / (2 * weight.numel()) ** 0.5
    assert abs(weight.mean()) < 5 * expected / weight.numel() ** 0.5


def test_a_model_depends_on_the_seed_alone() -> None:
    """The same global seed gives the same weights."""
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.build("resnet20", CIFAR).state_dict())

    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", [*ON_IMAGES, *ON_TEXT])
def test_the_first_and_last_layers_are_registered_first_and_last(name: str) -> None:
    """Conversion finds the first and the last layer by registration: the stem or tokens, and the head."""
    with torch.device("meta"):
        model = models.build(name, TEXT if name in ON_TEXT else CIFAR)
    layers = [
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | nn.LSTM)
    ]

    assert layers[0] in ("stem.0", "tokens", "hidden.0.0")
    assert layers[-1] == "head"


@pytest.mark.parametrize("name", [*ON_IMAGES, *ON_TEXT])
def test_models_are_made_of_plain_torch_layers(name: str) -> None:
    """Every parameter belongs to a module of torch itself, so that conversion knows its type."""
    with torch.device("meta"):
        model = models.build(name, TEXT if name in ON_TEXT else CIFAR)
    owners = {type(module) for module in model.modules() if next(module.parameters(recurse=False), None) is not None}

    assert all(owner.__module__.startswith("torch.nn.") for owner in owners)


def test_public_classes_take_other_sizes() -> None:
    """A wider GPT, a narrower ResNet and a deeper MLP have the shapes asked for."""
    with torch.device("meta"):
        gpt = models.GPT(vocabulary=50, d=64, layers=2, heads=8, context=9)
        resnet = models.ResNet(depths=(1, 1), width=8, classes=5, channels=4)
        mlp = models.MLP(inputs=12, classes=3, width=7, layers=0)

        assert gpt(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 9, 50)
        assert resnet(torch.zeros(2, 4, 6, 6)).shape == (2, 5)
        assert parameters(mlp) == 13 * 3


def test_gpt_refuses_heads_that_do_not_divide_its_width() -> None:
    """A width of 10 in 4 heads is refused with both numbers."""
    with pytest.raises(UsageError, match="d=10 and heads=4"):
        models.GPT(d=10, heads=4)


def test_gpt_refuses_an_input_longer_than_its_context() -> None:
    """17 positions in a context of 16 are refused with both numbers."""
    gpt = models.build("gpt", TEXT)

    with pytest.raises(UsageError, match="takes 16 positions, given 17"):
        gpt(torch.zeros(1, 17, dtype=torch.int64))


def test_an_unknown_model_lists_the_known_ones() -> None:
    """A misspelt model is answered with the nearest name and all of them."""
    with pytest.raises(UsageError, match=r"Did you mean 'resnet20'\?.*lstm.*timm:NAME"):
        models.build("resnet2O", CIFAR)


@pytest.mark.parametrize("name", ["torchvision:", "timm:NAME", "gpt:large", "elsewhere:resnet18"])
def test_a_colon_is_for_the_two_packages_and_needs_a_name(name: str) -> None:
    """Nothing after the colon, the placeholder itself and other prefixes are unknown models."""
    with pytest.raises(UsageError, match="unknown model"):
        models.build(name, CIFAR)


@pytest.mark.parametrize(
    ("name", "task", "fitting"),
    [
        ("gpt", CIFAR, "mlp, resnet20, .*timm:NAME"),
        ("resnet20", TEXT, "gpt, lstm"),
        ("timm:vit", TEXT, "gpt, lstm"),
    ],
)
def test_a_model_for_the_other_kind_lists_those_that_fit(name: str, task: Task, fitting: str) -> None:
    """A text model on images, or an image model on text, is answered with the models that fit."""
    with pytest.raises(UsageError, match=f"Models that fit: {fitting}"):
        models.build(name, task)


def test_names_are_all_models() -> None:
    """The names for help texts are the models of this library and the two packages."""
    expected = (*ON_IMAGES, *ON_TEXT, "torchvision:NAME", "timm:NAME")

    assert models.names() == expected


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_convolutions_are_channels_last(name: str) -> None:
    """Weights and outputs of 2-d convolutions are channels last in memory, also for a contiguous input."""
    model = models.build(name, CIFAR).eval()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    outputs: list[Tensor] = []
    for m in convolutions:
        m.register_forward_hook(lambda *args: outputs.append(args[2]))

    model(torch.randn(2, 3, 32, 32))

    assert len(outputs) == len(convolutions)
    assert all(suggests_channels_last(t.shape, t.stride()) for t in [m.weight for m in convolutions] + outputs)
