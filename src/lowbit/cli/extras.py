"""Which extra of the package brings a library that is missing."""

import re
from importlib.metadata import requires

_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Distributions that are called otherwise than what they are imported as."""
_OTHERS = ("dev", "docs", "zoo")
"""Extras of who works on the package."""


def how_to_install(module: str) -> str:
    """The command that installs a module, of the extra it belongs to if there is one.

    Args:
        module: as it is imported, e.g. ``"lightning.pytorch"``.
    """
    name = module.partition(".")[0]
    distribution = _NAMES.get(name, name)
    found = [
        match[2]
        for match in (re.match(r"([\w-]+).*extra == ['\"]([\w-]+)['\"]", each) for each in requires("lowbit") or ())
        if match and match[1].lower().replace("_", "-") == distribution.replace("_", "-") and match[2] not in _OTHERS
    ]
    packages = [f"'lowbit[{extra}]'" for extra in dict.fromkeys(found)] or [distribution]
    return " or ".join(f"`pip install {package}`" for package in packages)
