"""Debian packages that the tools of this folder need: which are missing, and getting them.

Installs only as root, with apt-get, after saying so; otherwise it stops with the command to type.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# A tool (or a file, with its path) -> the Debian package that brings it.
CLUSTER_TOOLS: Mapping[str, str] = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
    "openssl": "openssl",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/usr/lib/cni/host-local": "containernetworking-plugins",
    "/usr/lib/cni/loopback": "containernetworking-plugins",
}
IMAGE_TOOLS: Mapping[str, str] = {
    "buildah": "buildah",
    "/usr/lib/podman/netavark": "netavark",  # buildah asks for it even where it sets up no network
    "debootstrap": "debootstrap",
    "skopeo": "skopeo",
}


# What is built here, and the demo's clusters: one folder, which users may place (PRISM_CACHE).
CACHE = Path(os.environ.get("PRISM_CACHE") or Path.home() / ".cache/prism").resolve()


class MissingPackages(RuntimeError):
    """Packages are missing and cannot be installed here: the message has the command."""


def missing_packages(tools: Mapping[str, str]) -> list[str]:
    """The packages of those tools that are not on the path (or, for a path, not there)."""
    found = {
        tool: Path(tool).exists() if tool.startswith("/") else shutil.which(tool) for tool in tools
    }
    return sorted({package for tool, package in tools.items() if not found[tool]})


def require(tools: Mapping[str, str]) -> None:
    """Installs what is missing. Raises MissingPackages where that is not ours to do."""
    missing = missing_packages(tools)
    if not missing:
        return
    command = f"apt-get install --no-install-recommends {' '.join(missing)}"
    if not shutil.which("apt-get"):
        raise MissingPackages(f"not installed, and there is no apt-get: {', '.join(missing)}")
    if os.geteuid():
        raise MissingPackages(f"not installed: {', '.join(missing)}. Type: sudo {command}")
    print(f"installing Debian packages: {command}", file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["apt-get", "update", "-qq"], [*command.split(), "-qy"]):
        try:
            subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
        except subprocess.CalledProcessError as error:
            raise MissingPackages(f"{' '.join(words)} failed (its message is above)") from error
    if still := missing_packages(tools):
        raise MissingPackages(f"installed, but its programs are not found: {', '.join(still)}")
