"""Models of torchvision and timm, which are not installed here: stand-ins take their place."""

import sys
from types import SimpleNamespace

import pytest
from torch import nn

from lowbit.errors import UsageError
from lowbit.train import models
from lowbit.train.data import Task

GREY = Task(kind="image", shape=(1, 28, 28), classes=10)
CIFAR = Task(kind="image", shape=(3, 32, 32), classes=10)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package its models are refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torchvision.models", raising=False)

    with pytest.raises(UsageError, match=f"pip install {package}"):
        models.build(f"{package}:resnet18", CIFAR)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for both packages that know one model, a linear layer."""
    vision = SimpleNamespace(
        list_models=lambda module: ["small"] if module is vision else [],
        get_model=lambda name, *, weights, num_classes: nn.Linear(3, num_classes) if weights is None else name,
    )
    timm = SimpleNamespace(
        is_model=lambda name: name == "small",
        create_model=lambda name, *, pretrained, num_classes, in_chans: (
            name if pretrained else nn.Linear(in_chans, num_classes)
        ),
    )
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=vision))
    monkeypatch.setitem(sys.modules, "torchvision.models", vision)
    monkeypatch.setitem(sys.modules, "timm", timm)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("name", "task"), [("torchvision:small", CIFAR), ("timm:small", CIFAR), ("timm:small", GREY)])
def test_a_package_builds_its_model_for_the_task(name: str, task: Task) -> None:
    """The model comes untrained, with the classes of the task and, from timm, its channels."""
    model = models.build(name, task)

    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (task.shape[0], 10)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_model_that_a_package_lacks_is_an_error(package: str) -> None:
    """An unknown model of a package says how to list the known ones."""
    with pytest.raises(UsageError, match=r"no model 'large'|no classification model 'large'.*list_models"):
        models.build(f"{package}:large", CIFAR)


@pytest.mark.usefixtures("packages")
def test_torchvision_refuses_grey_images() -> None:
    """A task of one channel is refused, with the models that adapt."""
    with pytest.raises(UsageError, match="takes images of 3 channels and this task has 1"):
        models.build("torchvision:small", GREY)
