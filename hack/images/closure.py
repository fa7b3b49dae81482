"""What an extra of the project needs: its distributions, closed over their own requirements.

Knows the installed metadata and the constraints file, nothing of images. Two users: the copy of
installed packages into an image, and `python3 -m hack.images.closure`, which rewrites
constraints.txt from the versions that the development environment has, the eval extra included
(`pip install -e .[dev,eval]`).

Not pinned: torch's CUDA libraries and Triton. torch names their exact versions itself, and a build
for another CUDA release (`--torch-index`) needs others.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("refactor", "serving", "operator", "eval", "bench", "dev")
FOLLOWS_TORCH = re.compile(r"nvidia-|cuda-|triton$")
HEADER = """\
# The versions that the tests ran with, of everything that the extras need; no index, no address.
# Written by `.venv/bin/python -m hack.images.closure`; CUDA libraries and Triton follow torch.
"""


def closure(extras: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Canonical name -> installed distribution of all that these extras need, without the project.

    Read from pyproject.toml and the installed metadata. Raises PackageNotFoundError for one that is
    not installed, KeyError for an unknown extra.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = project["optional-dependencies"]
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(project["name"], frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        if name == project["name"]:
            requires = [text for extra in wanted for text in own[extra]]
        else:
            found[name] = metadata.distribution(name)
            requires = found[name].requires or []
        for text in requires:
            need = Requirement(text)
            marker = need.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                waiting.append((canonicalize_name(need.name), frozenset(need.extras)))
    return found


def constraints(file: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Canonical name -> version that the file pins. Raises ValueError on any other line."""
    pins: dict[str, str] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            name, equals, version = line.partition("==")
            if not equals or not re.fullmatch(r"[\w.+!-]+", version):
                raise ValueError(f"{file}:{number}: expected NAME==VERSION, found {line!r}")
            pins[canonicalize_name(name)] = version
    return pins


def main() -> None:
    pins = sorted(
        f"{name}=={distribution.version.partition('+')[0]}\n"
        for name, distribution in closure(EXTRAS).items()
        if not FOLLOWS_TORCH.match(name)
    )
    (ROOT / "constraints.txt").write_text(HEADER + "".join(pins))
    print(f"constraints.txt: {len(pins)} pins", file=sys.stderr)


if __name__ == "__main__":
    main()
