"""Prints the requirements of extras: `python requirements.py EXTRA...` beside pyproject.toml.

An image installs these without the project itself, so that a change of code leaves the layer of the
packages as it is. Standard library only; it runs in the image's base.
"""

import sys
import tomllib
from pathlib import Path


def main(extras: list[str]) -> None:
    project = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    unknown = sorted(set(extras) - set(known))
    if unknown or not extras:
        sys.exit(f"unknown extras {unknown}; pyproject.toml has {sorted(known)}")
    print("\n".join(dict.fromkeys(line for extra in extras for line in known[extra])))


if __name__ == "__main__":
    main(sys.argv[1:])
