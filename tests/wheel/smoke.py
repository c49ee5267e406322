"""What an installed wheel must do, run by the Python that it is installed in: ``python smoke.py --native``.

Warnings are errors, so an incomplete list of dependencies fails at the import.
"""

import argparse
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path


def steps(*, native: bool) -> str:
    """Import, convert a model, train it for a step and verify it; what ran.

    Args:
        native: whether the wheel has native kernels. Without them `convert_` must say so.
    """
    warnings.simplefilter("error")
    import lowbit
    from lowbit.kernels import native_instruction_sets

    installed = Path(lowbit.__file__).parent
    assert installed.is_relative_to(sysconfig.get_path("platlib")), f"{installed} is not the installed package"
    assert (installed / "py.typed").is_file(), "py.typed is not in the wheel"
    sets = native_instruction_sets()
    assert (sets is not None) == native, f"native kernels: {sets}"

    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = lowbit.convert_(model, "int8")
    messages = [str(w.message) for w in said]
    assert any("reference engine" in m for m in messages) == (not native), messages
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lowbit.verify(model) as proof:
        loss = nn.functional.cross_entropy(model(torch.randn(32, 64)), torch.randint(10, (32,)))
        loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert not torch.equal(model[0].weight, before)
    engines = {row.engine for row in proof.rows}
    assert len(proof.rows) > 3, proof
    # A processor without the units runs the reference engine too, and the report says which units it lacks.
    assert native or engines == {"reference"}, engines
    assert "int8" in str(report)
    return f"engines {', '.join(sorted(engines))}, instruction sets {', '.join(sets or ['none'])}"


def command_line() -> None:
    """``lowbit --help`` and a command that needs no trainer."""
    # Beside this Python, whatever PATH has.
    lowbit = Path(sysconfig.get_path("scripts")) / "lowbit"
    done = subprocess.run([lowbit, "--help"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "recipes" in done.stdout
    assert done.stderr == ""


def main() -> None:
    """Run all of it and print what ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--native", action="store_true", help="the wheel must have native kernels")
    native = parser.parse_args().native
    ran = steps(native=native)
    command_line()
    print(f"Python {sys.version_info.major}.{sys.version_info.minor}: {ran}")


if __name__ == "__main__":
    main()
