"""The pip settings of this machine as build secrets: an index of one's own, a CA of one's own.

They come into a build as mounts, and no layer keeps them. Only settings that mean something inside
an image are passed: addresses and the CA's certificate, not this machine's folders.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PASSED = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout")
CA_IN_BUILD = "/run/secrets/ca"


def parse(listing: str) -> dict[str, str]:
    """Setting -> value from `pip config list`; the environment wins over files, as in pip.

    >>> parse("global.index-url='https://a/simple'\\n:env:.index-url='https://b/simple'")
    {'index-url': 'https://b/simple'}
    """
    settings: dict[str, str] = {}
    for line in sorted(listing.splitlines(), key=_precedence):
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2].replace("default-timeout", "timeout")
        if value.startswith(("'", '"')):
            settings[name] = str(ast.literal_eval(value))
    return settings


def _precedence(line: str) -> int:
    order = ("global.", "install.", ":env:.")
    return next((rank for rank, prefix in enumerate(order) if line.startswith(prefix)), -1)


def secrets(settings: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Writes the secret files; secret id -> file. Nothing where pip has its defaults."""
    lines = [
        f"{name} = {value}"
        for name, value in sorted(settings.items())
        if name in PASSED and not (name == "find-links" and "://" not in value)
    ]
    found: dict[str, Path] = {}
    if settings.get("cert"):
        found["ca"] = Path(settings["cert"])
        lines.append(f"cert = {CA_IN_BUILD}")
    if lines:
        found["pip"] = folder / "pip.conf"
        found["pip"].write_text("[global]\n" + "\n".join(lines) + "\n")
        found["pip"].chmod(0o600)
    return found


@contextmanager
def of_this_machine() -> Iterator[dict[str, Path]]:
    """Secret id -> file, for the time of a build."""
    question = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(question, check=True, stdout=subprocess.PIPE, text=True).stdout
    with TemporaryDirectory(prefix="prism-build-") as folder:
        yield secrets(parse(listing), Path(folder))
