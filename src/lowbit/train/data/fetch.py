"""Where the files of data sets are, and how Fashion-MNIST gets there: fetched, checked, then put in its place."""

import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from lowbit.errors import RunError, UsageError
from lowbit.inputs import files

FASHION_SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of what each file holds when decompressed: Debian and the mirror compress the same bytes separately."""

MIRROR_SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
"""SHA-256 of the mirror's files as they come, checked before anything is decompressed. Debian's package is checked by
apt against its signed list."""

FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
PACKAGE_TIMEOUT = 300.0
"""Seconds that `apt-get download` may take."""
MIRROR_TIMEOUT = 30.0
"""Seconds that the mirror may stay silent."""
MIRROR_TOTAL = 600.0
"""Seconds that its four files may take together."""
MIRROR_BYTES = 64 << 20
"""Bytes that one of its files may have."""

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's packages put data sets."""


def expanded(path: str) -> Path:
    """A path whose ``~`` is the folder that it stands for."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"the path {path!r} cannot be resolved: {error}.") from error


def _cache(name: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lowbit" / name


def places(name: str) -> list[Path]:
    """The folders in which a data set is looked for, best first."""
    root = os.environ.get("LOWBIT_DATA")
    given = [expanded(root), expanded(root) / name] if root else []
    return [*given, SYSTEM / name, _cache(name)]


def lack_of(folder: Path, files: tuple[str, ...]) -> str:
    """What keeps `folder` from being used, empty if nothing does."""
    if not folder.is_dir():
        return "no such folder"
    missing = [file for file in files if not (folder / file).is_file()]
    return f"lacks {', '.join(missing)}" if missing else ""


def fashion_folder() -> Path:
    """The first folder with the four files; they are fetched into the cache if there is none."""
    tried = []
    for place in places("fashion-mnist"):
        lacks = lack_of(place, tuple(FASHION_SHA256))
        if not lacks:
            return place
        tried.append(f"{place}: {lacks}")
    target = _cache("fashion-mnist")
    for source, get in (
        (f"Debian's package {FASHION_PACKAGE}", _get_from_debian),
        (FASHION_MIRROR, _get_from_mirror),
    ):
        print(f"lowbit: fetching fashion-mnist (31 MB) from {source} into {target}", file=sys.stderr)
        try:
            _fetch(target, get)
        except (RunError, OSError, subprocess.SubprocessError, http.client.HTTPException) as error:
            tried.append(f"{source}: {error}")
        else:
            return target
    raise RunError(
        "fashion-mnist was not found and could not be fetched:\n  "
        + "\n  ".join(tried)
        + "\nPut its four idx files in a folder and set LOWBIT_DATA to it."
    )


def _fetch(target: Path, get: Callable[[Path], Path]) -> None:
    """Get the files into a folder beside their place, check them, and only then move them there."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".fetch-") as beside:
        found = get(Path(beside))
        for file, expected in FASHION_SHA256.items():
            digest = hashlib.sha256(files.read_whole(found / file)).hexdigest()
            if digest != expected:
                raise RunError(f"{file} has SHA-256 {digest} once decompressed, expected {expected}")
        for file in FASHION_SHA256:
            os.replace(found / file, target / file)


def _get_from_debian(folder: Path) -> Path:
    """Download and unpack the package, which needs no rights of an administrator."""
    _command(["apt-get", "download", FASHION_PACKAGE], folder)
    packages = [str(path) for path in folder.glob("*.deb")]
    if len(packages) != 1:
        raise RunError(f"apt-get download left {len(packages)} packages, expected 1")
    _command(["dpkg", "-x", packages[0], "unpacked"], folder)
    return folder / "unpacked" / "usr" / "share" / "datasets" / "fashion-mnist"


def _command(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT, check=False)
    if done.returncode:
        raise RunError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()}")


def _get_from_mirror(folder: Path) -> Path:
    end = time.monotonic() + MIRROR_TOTAL
    for file, expected in MIRROR_SHA256.items():
        content = bytearray()
        with urllib.request.urlopen(FASHION_MIRROR + file, timeout=MIRROR_TIMEOUT) as response:
            # `read` would wait for all of it, however slowly it comes.
            while piece := response.read1(1 << 16):
                content += piece
                if time.monotonic() > end:
                    raise RunError(f"{file} did not come within {MIRROR_TOTAL:g} s")
                if len(content) > MIRROR_BYTES:
                    raise RunError(f"{file} is longer than {MIRROR_BYTES:,} bytes")
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected:
            raise RunError(f"{file} has SHA-256 {digest}, expected {expected}")
        (folder / file).write_bytes(content)
    return folder
