"""The blocks of a model whose bits gates choose: found by name, and what gates need to know of each."""

import re
from collections.abc import Sequence

from torch import nn

from lowbit.conversion.rules import matches
from lowbit.errors import UsageError, unknown
from lowbit.nn.gate import Block
from lowbit.nn.layers import converted_layers
from lowbit.nn.site import Site


def named_blocks(model: nn.Module, given: Sequence[str | re.Pattern[str]]) -> list[tuple[str, nn.Module]]:
    """The blocks of these names or patterns, in the model's order; none of them lies in another."""
    modules = dict(model.named_modules())
    if isinstance(given, str | re.Pattern) or not given:
        raise UsageError(f"blocks={given!r}: give a list of the names or patterns of the blocks that gates are for")
    for which in given:
        if not isinstance(which, str | re.Pattern):
            raise UsageError(f"block {which!r}: give a name or a compiled pattern of whole names")
        if not any(matches(which, name, module) for name, module in modules.items()):
            shown = which.pattern if isinstance(which, re.Pattern) else which
            if isinstance(which, str):
                raise unknown("block", shown, (name for name in modules if name))
            raise UsageError(
                f"the pattern {shown!r} of blocks matches no module of the model: it must match whole names"
            )
    chosen = {name: module for name, module in modules.items() if any(matches(w, name, module) for w in given)}
    for name in chosen:
        if outer := [other for other in chosen if other != name and name.startswith(f"{other}." if other else "")]:
            raise UsageError(f"block {name!r} lies in block {outer[0]!r}: a layer has one gate; name one of the two")
    return list(chosen.items())


def gated_block(name: str, module: nn.Module, pinned: set[Site]) -> Block:
    """What gates need to know of a block."""
    layers = list(converted_layers(module).values())
    gated = [site for layer in layers for site in layer.sites() if site not in pinned and len(site.slots("weight")) > 0]
    if not gated:
        raise UsageError(f"block {name!r} lacks a converted layer whose bits a gate could choose")
    for layer in layers:
        if layer.sample_axis != 0:
            raise UsageError(
                f"block {name!r}: {layer.sites()[0].name} has batch_first=False; gates need samples on the first axis"
            )
    first = next(layer for layer in layers if layer.sites()[0] in gated or layer.sites()[0] in pinned)
    op = first.operator(first)
    assert op is not None
    return Block(name=name, module=module, gated=gated, inputs=first.input_channels(first), channels_last=op.has_rows)
