"""A folder of installed packages for an image, without a download where that can be.

The development environment already holds every package at its pinned version; where its Python is
the image's, the files are linked from there by their RECORD (seconds; a copy across file systems).
Where it is not, pip fetches wheels for the image's Python. Both ways: exactly the closure of the
extras, no bytecode, no scripts.
"""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from hack.images.closure import FOLLOWS_TORCH, ROOT, closure, constraints
from hack.progress import say, step

IMAGE_PYTHON = (3, 11)  # Debian 12's
TORCH_EXTRAS = ("refactor", "serving")
OPERATOR_EXTRAS = ("operator",)


def versions(extras: tuple[str, ...]) -> list[str]:
    """NAME==VERSION of all that these extras need. Raises ValueError where a pin says otherwise."""
    pins = constraints()
    found = {name: d.version.partition("+")[0] for name, d in closure(extras).items()}
    wrong = [
        f"{name} is {version}, constraints.txt says {pins.get(name, 'nothing')}"
        for name, version in found.items()
        if not FOLLOWS_TORCH.match(name) and pins.get(name) != version
    ]
    if wrong:
        raise ValueError("run `make setup` again: " + "; ".join(wrong))
    return sorted(f"{name}=={version}" for name, version in found.items())


def make(extras: tuple[str, ...], folder: Path) -> None:
    """Makes the folder, anew. Raises CalledProcessError when pip fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if sys.version_info[:2] == IMAGE_PYTHON:
        with step(f"link installed packages of {' and '.join(extras)}"):
            for distribution in closure(extras).values():
                _link(distribution, folder)
    else:
        say(f"this is Python {sys.version_info[0]}.{sys.version_info[1]}, the image's is another")
        with step(f"download packages of {' and '.join(extras)}"):
            _download(versions(extras), folder)


def _link(distribution: metadata.Distribution, folder: Path) -> None:
    for file in distribution.files or ():
        if ".." in file.parts or file.suffix == ".pyc":  # scripts; bytecode of another place
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = Path(str(distribution.locate_file(file)))
        try:
            os.link(source, target)
        except FileExistsError:  # two packages with one namespace file
            continue
        except OSError:  # another file system
            shutil.copy2(source, target)


def _download(wanted: list[str], folder: Path) -> None:
    version = ".".join(map(str, IMAGE_PYTHON))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--target", str(folder), "--only-binary=:all:", "--python-version", version]
    subprocess.run([*command, *wanted], check=True, cwd=ROOT, stdout=sys.stderr)
