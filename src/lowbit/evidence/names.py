"""Names of the layers in one model, by their sites and by what a product says of its source."""

from collections.abc import Callable

from torch import nn

from lowbit.nn.kinds import has_product_twin
from lowbit.nn.layers import converted_layers
from lowbit.nn.site import Site


def site_names(model: nn.Module) -> dict[object, str]:
    """The layers' names in this model by their sites; a site of a recurrent layer is named after its weight."""
    names: dict[object, str] = {}
    for name, layer in converted_layers(model).items():
        for site in layer.sites():
            names[site] = ".".join(filter(None, [name, site.part]))
    return names


def name_of_source(model: nn.Module) -> Callable[[object], str | None]:
    """A function from a product's source to the layer's name; None for another model's source, or for none.

    Layers are known by their sites, not by their names, which another model may share. The clock does not know the
    replicas of `torch.nn.DataParallel`; they are known by the clock and the name that they share with their layer.
    """
    names: dict[object, str | None] = {**site_names(model)}
    replicated = {(site.clock, site.name): name for site, name in names.items() if isinstance(site, Site)}

    def name_of(source: object) -> str | None:
        if source not in names and isinstance(source, Site):
            # A replica, a site of another model, or that of a product in a function which just ran for the first time.
            is_replica = source not in source.clock.sites
            found = replicated if is_replica else {(s.clock, s.name): n for s, n in _sites(model)}
            names[source] = found.get((source.clock, source.name))
        return names.get(source)

    return name_of


def _sites(model: nn.Module) -> list[tuple[Site, str]]:
    return [(site, name) for site, name in site_names(model).items() if isinstance(site, Site)]


def layers_of(model: nn.Module) -> dict[tuple[object, str], str]:
    """The converted layers' names in this model, by what a product says of its source; replicas share both."""
    return {
        (site.clock, site.name): plain_name(name) for site, name in site_names(model).items() if isinstance(site, Site)
    }


def plain_name(name: str) -> str:
    """A module's name without the prefix of a compiled model."""
    return name.removeprefix("_orig_mod").removeprefix(".")


def layer_names(model: nn.Module) -> list[str]:
    """The layers of a model that are expected to multiply, once each; of attention, not the modules inside it."""
    names: list[str] = []
    for full_name, layer in model.named_modules():
        name = plain_name(full_name)
        if has_product_twin(layer) and not any(name.startswith(known + ".") for known in names):
            names.append(name)
    return names
