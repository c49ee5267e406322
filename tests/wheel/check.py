"""Build the sdist and its wheels, and try each in a fresh environment (`make test-wheel`).

For every Python of `PYTHONS` that is on the machine: the wheel of the sdist, installed beside the pinned torch, must do
what `smoke.py` does, and mypy must find its types. From 3.12 on they share one wheel, by the stable ABI. The first
Python also tries a wheel that was built without a compiler.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
PYTHONS = ("3.11", "3.12", "3.13")
# The first Python with a stable ABI that nanobind builds for, `wheel.py-api` of pyproject.toml.
STABLE = "3.12"
NEEDED = (
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "src/lowbit/py.typed",
    "src/lowbit/kernels/native/module.cpp",
)
USER = """\
import lowbit

names: list[int] = lowbit.recipes()  # error: they are strings
"""


def run(*command: str | Path, **environment: str) -> str:
    """The output of a command; it is shown if the command fails."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}} | environment
    done = subprocess.run(
        list(map(str, command)),
        env=env,
        cwd=Path(tempfile.gettempdir()),
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\ntest-wheel: {' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


def python_of(version: str) -> Path | None:
    """The Python of a version: on the PATH, or of pyenv, whose commands on the PATH may stand for none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    of_path = shutil.which(f"python{version}")
    candidates = [of_path] if of_path else []
    candidates += sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), reverse=True)
    for candidate in candidates:
        # A shim is a script, which needs the PATH that the build without a compiler lacks.
        asked = [candidate, "-c", "import ensurepip, sys; print(sys.executable)"]
        done = subprocess.run(asked, check=False, capture_output=True, text=True)
        if not done.returncode:
            return Path(done.stdout.strip())
    return None


def sdist_into(folder: Path) -> Path:
    """Build the sdist and check what is in it."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not (missing := set(NEEDED) - names), f"the sdist lacks {missing}"
    assert not (more := {name for name in names if name.startswith(("tests", "docs", ".", "build"))}), f"it has {more}"
    return sdist


def wheel_of(sdist: Path, python: Path, folder: Path, **environment: str) -> Path:
    """Build the wheel of an sdist."""
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist, **environment)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
    assert bool(modules) == (not wheel.name.endswith("-py3-none-any.whl")), (wheel.name, modules)
    assert all(name.endswith(".abi3.so") for name in modules) == ("abi3" in wheel.name or not modules), modules
    return wheel


def types_are_found(python: Path, folder: Path) -> None:
    """Mypy must know what the package returns: without py.typed it would say that stubs are missing."""
    (folder / "user.py").write_text(USER, encoding="utf-8")
    done = subprocess.run(
        [python, "-m", "mypy", "--cache-dir", folder / "cache", "user.py"],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert 'variable has type "list[int]"' in done.stdout, done.stdout + done.stderr
    assert "found 1 error" in done.stdout.lower(), done.stdout


def main() -> None:
    """Build, install and try, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", default=" ".join(PYTHONS), help=f"versions to try ({' '.join(PYTHONS)})")
    asked = parser.parse_args().pythons.split()
    found = {version: python for version in asked if (python := python_of(version))}
    if not found:
        sys.exit(f"test-wheel: none of Python {', '.join(asked)} is on the PATH or in pyenv")
    scratch = ROOT / "build"
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="test-wheel-") as name:
        folder = Path(name)
        sdist = sdist_into(folder / "sdist")
        print(f"sdist: {sdist.name}, {sdist.stat().st_size / 2**10:,.0f} KiB", flush=True)
        wheels: dict[bool, Path] = {}
        for version, python in found.items():
            stable = tuple(map(int, version.split("."))) >= tuple(map(int, STABLE.split(".")))
            if not stable or stable not in wheels:
                wheels[stable] = wheel_of(sdist, python, folder / f"wheel-{version}")
            run(python, "-m", "venv", folder / version)
            own = folder / version / "bin" / "python"
            install = (own, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
            run(*install, "torch")
            run(*install, wheels[stable], "mypy")
            print(f"{wheels[stable].name}: {run(own, '-I', SMOKE, '--native').strip()}", flush=True)
            types_are_found(own, folder / version)
            if version == next(iter(found)):
                # The programs of the build come from the packages that pip installs for it; a compiler does not.
                bare = wheel_of(sdist, python, folder / "bare", PATH=os.devnull, CXX=os.devnull)
                run(*install, "--force-reinstall", "--no-deps", bare)
                print(f"{bare.name} (no compiler): {run(own, '-I', SMOKE).strip()}", flush=True)
            shutil.rmtree(folder / version)
    left = [version for version in PYTHONS if version not in found]
    print(f"test-wheel: passed on Python {', '.join(found)}; not tried: {', '.join(left) or 'none'}")


if __name__ == "__main__":
    main()
