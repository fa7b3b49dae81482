"""The programs of the node: which there are, how they are built from Go modules, where they lie.

One build for each digest of the sources, under a lock: the first checkout builds (12 minutes of
CPU), every other one links to the result. Go's own choice of toolchain is left alone unless Go is
too old: then a Go that can fetch a newer one (1.21 and later) is asked to, an older one is refused.
"""

import hashlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from hack.progress import locked, say
from node.archive import pack
from node.settings import BIN, PAUSE, PROGRAMS, SOURCES, STATE
from node.shell import output

PACKAGES = {"kube": ".", "helm": "helm.sh/helm/v3/cmd/helm", "pause": "./pause"}
LINKS = ("kubectl",)  # programs inside `kube` that people call by name
VERSION_VARIABLES = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
FETCHES_TOOLCHAINS = (1, 21)


class CannotBuild(RuntimeError):
    """Go is missing, too old, or failed: the message says what to do."""


def digest(sources: Path = SOURCES) -> str:
    """Names a build: the sources and the machine's architecture."""
    files = sorted([*sources.rglob("*.go"), sources / "go.mod", sources / "go.sum"])
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(os.uname().machine.encode() + content).hexdigest()[:16]


def ensure() -> Path:
    """Builds the programs unless these sources were built before; points STATE/bin at them."""
    folder = PROGRAMS / digest()
    STATE.mkdir(parents=True, exist_ok=True)
    with locked(PROGRAMS / "lock"):
        if not (folder / "built").exists():
            _build(folder)
        if BIN.resolve() != folder.resolve():
            link = BIN.with_name("bin.new")
            link.unlink(missing_ok=True)
            link.symlink_to(folder)
            link.replace(BIN)
    return BIN


def _build(folder: Path) -> None:
    environment = {**os.environ, "CGO_ENABLED": "0", **toolchain()}
    begin = time.monotonic()
    say(
        "local-cluster: building Kubernetes, etcd, CoreDNS and helm: about 12 minutes of CPU,"
        " once for these sources"
    )
    folder.mkdir(parents=True, exist_ok=True)
    flags = _linker_flags()
    for name, package in PACKAGES.items():
        command = ["go", "-C", str(SOURCES), "build", "-trimpath", "-ldflags", flags]
        try:
            subprocess.run(
                [*command, "-o", str(folder / name), package], check=True, env=environment
            )
        except subprocess.CalledProcessError as error:
            raise CannotBuild(f"go could not build {name} (its message is above)") from error
        say(f"local-cluster: {name} after {time.monotonic() - begin:.0f} s")
    for name in LINKS:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("kube")
    pack(folder / "pause", PAUSE, folder / "pause.tar")
    (folder / "built").touch()


def _linker_flags() -> str:
    """Without these the node would call itself v0.0.0-master."""
    required = re.search(r"^\s*k8s\.io/kubernetes (v\S+)", (SOURCES / "go.mod").read_text(), re.M)
    assert required, "go.mod requires k8s.io/kubernetes"
    version = required[1]
    major, minor, _ = version[1:].split(".", 2)
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    sets = (f"-X {p}.{key}={value}" for p in VERSION_VARIABLES for key, value in values.items())
    return " ".join(["-s", "-w", *sets])


def toolchain(sources: Path = SOURCES) -> dict[str, str]:
    """Environment that gives a Go new enough for go.mod. Raises CannotBuild with what to do."""
    line = re.search(r"^go (\d+)\.(\d+)", (sources / "go.mod").read_text(), re.M)
    assert line, "go.mod names its Go version"
    needed = (int(line[1]), int(line[2]))
    text = f"{needed[0]}.{needed[1]}"
    if not shutil.which("go"):
        raise CannotBuild(
            f"Go {text} or later is not installed (https://go.dev/dl, or your packages)"
        )
    answer = output("go", "env", "GOVERSION", "GOTOOLCHAIN").split()
    found = re.match(r"go(\d+)\.(\d+)", answer[0] if answer else "")
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version >= needed:
        return {}
    if version < FETCHES_TOOLCHAINS:
        raise CannotBuild(f"Go {text} or later is needed, {shutil.which('go')} is {answer[:1]}")
    wanted = f"go{text}.0+auto"
    say(f"local-cluster: {answer[0]} is older than {text}: GOTOOLCHAIN={wanted}")
    return {"GOTOOLCHAIN": wanted}
