"""Models that are not this library's: a class of a user's file, and those of torchvision and timm."""

import importlib
import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowbit.errors import UsageError, a_or_an
from lowbit.inputs import userfile
from lowbit.train.data import Task


def of_file(name: str, task: Task) -> nn.Module:
    """A model of a user's class, which maps what the task has to logits of its shape."""
    cls = userfile.load_class(name)
    if not issubclass(cls, nn.Module):
        raise UsageError(f"{name} is not a torch.nn.Module: make it one")
    with userfile.blamed(f"the constructor of {name} raises", str(Path(name.rpartition(":")[0]))):
        takes = inspect.signature(cls).parameters
        given = {"classes": task.classes, "shape": task.shape}
        model = cls(**{key: value for key, value in given.items() if key in takes})
    if any(is_lazy(each) for each in (*model.parameters(), *model.buffers())):
        raise UsageError(f"{name} has parameters without a shape: give its layers their sizes")
    if not any(each.is_meta for each in model.parameters()):
        _check_logits(name, model, task)
    return model


def _check_logits(name: str, model: nn.Module, task: Task) -> None:
    """Raise a UsageError unless a model gives logits for two samples."""
    wanted = (2, task.classes) if task.kind == "image" else (2, *task.shape, task.classes)
    x = torch.zeros((2, *task.shape), dtype=torch.float32 if task.kind == "image" else torch.int64, device="cpu")
    with userfile.blamed(f"{name} raises for an input of {tuple(x.shape)}:", userfile.file_of(model)), torch.no_grad():
        y = model.eval()(x)
    model.train()
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted:
        given = f"a tensor of {tuple(y.shape)}" if isinstance(y, Tensor) else a_or_an(type(y).__name__)
        raise UsageError(f"{name} gives {given} for an input of {tuple(x.shape)}: it must give logits of {wanted}")


def of_torchvision(task: Task, name: str) -> nn.Module:
    """A classification model of torchvision, untrained."""
    models = _import("torchvision.models")
    if name not in models.list_models(module=models):
        raise UsageError(
            f"torchvision has no classification model {name!r}: torchvision.models.list_models() lists them."
        )
    if task.shape[0] != 3:
        raise UsageError(
            f"torchvision:{name} takes images of 3 channels and this task has {task.shape[0]}. "
            f"timm:NAME adapts to any number of channels, as do this library's own models."
        )
    return cast(nn.Module, models.get_model(name, weights=None, num_classes=task.classes))


def of_timm(task: Task, name: str) -> nn.Module:
    """A model of timm, untrained."""
    timm = _import("timm")
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}: timm.list_models() lists them.")
    return cast(
        nn.Module,
        timm.create_model(name, pretrained=False, num_classes=task.classes, in_chans=task.shape[0]),
    )


def _import(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    # A torchvision built for another torch fails with RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"models of {package} need {package}, which cannot be imported ({error}): pip install {package}."
        ) from error
