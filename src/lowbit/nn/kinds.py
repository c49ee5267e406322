"""What kind of layer a module is: one with a twin, one that cannot have a twin, or one without a product."""

from collections.abc import Iterator

from torch import Tensor, nn

from lowbit.methods.recipe import Recipe
from lowbit.nn import NORM_LAYERS, PRODUCT_LAYERS, REFUSED_LAYERS
from lowbit.nn.calls.caller import Caller
from lowbit.nn.calls.readers import OPERATORS
from lowbit.nn.layers import QuantLayer

_TWINS: dict[type[nn.Module], tuple[type[QuantLayer], ...]] = {
    **{plain: (twin,) for plain, twin in PRODUCT_LAYERS.items()},
    **NORM_LAYERS,
}

# What a report says of a layer that does not multiply.
WITHOUT_PRODUCT = "has no product"

# Layers of torch without a twin whose forward calls one function that multiplies.
_CALLED = (nn.Bilinear,)

# How many calls of one operator a rule by a pattern is tried on before any has run.
_FEW = 10

_NO_PRODUCT: tuple[type[nn.Module], ...] = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.PReLU,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.batchnorm._BatchNorm,
)


def twin_of(layer: nn.Module) -> type[QuantLayer] | None:
    """The twin of a layer's type, or of the nearest type that it is a subclass of; None without one.

    A normalisation has several; they are alike in all but what they compute.
    """
    return next((_TWINS[base][0] for base in type(layer).__mro__ if base in _TWINS), None)


def plain_type(layer: nn.Module) -> type[nn.Module]:
    """The class that a converted layer stands for; for any other layer, its own class."""
    if isinstance(layer, Caller):
        return layer.lowbit_plain
    return layer.plain if isinstance(layer, QuantLayer) else type(layer)


def is_watched(module: nn.Module) -> bool:
    """Whether a conversion watches the forward of a module for products in functions."""
    return isinstance(module, Caller)


def is_called(layer: nn.Module) -> bool:
    """Whether the products of a layer without a twin of its own are converted where its forward calls them."""
    near = twin_of(layer)
    if near is None and _refused(layer) and not isinstance(layer, _CALLED):
        return False
    if near is not None and (type(layer) in _TWINS or not near.is_seen_in_calls):
        return False
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return False
    return (near is not None or bool(weights(layer))) and "forward" not in layer.__dict__


def in_calls(layer: nn.Module) -> str:
    """What a report says of a layer whose products are converted where its forward calls them."""
    near = twin_of(layer)
    kind = "unknown type" if near is None else f"a subclass of {near.plain.__name__}"
    return f"{kind}: products in its forward are converted"


def possible_calls(module: str) -> Iterator[str]:
    """Names that calls of a module may have: of each operator, the first few."""
    for operator in OPERATORS:
        for number in range(_FEW):
            yield f"{module}.{operator}.{number}" if module else f"{operator}.{number}"


def choose_twin(layer: nn.Module, recipe: Recipe) -> tuple[type[QuantLayer] | None, str, bool]:
    """What a layer becomes with a recipe, or None; a remark or reason; and whether a request is thereby refused."""
    near = twin_of(layer)
    exact = next((twin for twin in _TWINS.get(type(layer), ()) if twin.is_in(recipe)), None)
    if exact is not None:
        why = next(filter(None, (exact.refusal(layer, phase) for phase in recipe.in_phases())), "")
        return (None, why, True) if why else (exact, exact.remark, False)
    if near is None and (why := _refused(layer)):
        return None, why, True
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and recipe.normalization is not None:
        return None, f"only {', '.join(t.__name__ for t in NORM_LAYERS)} have a normalisation of recipes", True
    if near is not None and near.is_in(recipe):
        lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
        hint = "run one forward first" if lazy else "its forward may differ"
        return None, f"a subclass of {near.plain.__name__}, and types match exactly: {hint}", True
    if isinstance(layer, _NO_PRODUCT):
        return None, WITHOUT_PRODUCT, False
    return None, "unknown type: its products, if any, run as they are", False


def _refused(layer: nn.Module) -> str:
    """Why a layer that has products lacks a twin; empty if it has a twin, or lacks products."""
    return next((why for refused, why in REFUSED_LAYERS.items() if isinstance(layer, refused)), "")


def multiplies(layer: nn.Module) -> bool:
    """Whether a layer's type is known to have products, with or without a twin."""
    return has_product_twin(layer) or bool(_refused(layer))


def has_product_twin(layer: nn.Module) -> bool:
    """Whether a layer's type is known to have products, and to have a twin."""
    twin = twin_of(layer)
    return twin is not None and twin.operator(layer) is not None


def walk(module: nn.Module, name: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Every layer, once, in registration order: known types, and whatever owns parameters itself."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    twin = twin_of(module)
    known = twin is not None or _refused(module)
    if known or any(True for _ in module.parameters(recurse=False)):
        yield name, module
    if twin is None or not twin.owns_modules:
        for key, child in module.named_children():
            yield from walk(child, f"{name}.{key}" if name else key, seen)


def weights(layer: nn.Module) -> list[Tensor]:
    """The parameters of a layer that are, or may be, the weight of a matrix product or a convolution."""
    twin = twin_of(layer)
    if twin is not None:
        return twin.weights(layer)
    if isinstance(layer, _NO_PRODUCT):
        return []
    given = [p for p in layer.parameters(recurse=False) if not nn.parameter.is_lazy(p)]
    if _refused(layer):
        return [p for p in given if p.dim() >= 2]
    return [p for p in given if sum(size > 1 for size in p.shape) >= 2]


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution with several groups of one input channel each."""
    twin = twin_of(layer)
    op = None if twin is None else twin.operator(layer)
    if twin is None or op is None or op.geometry is None:
        return False
    return 1 < op.geometry.groups == twin.input_channels(layer)
