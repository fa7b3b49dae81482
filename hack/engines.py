"""Container engines: which one answers here, and the four things that we ask of it.

A program that is installed is not an engine that answers: Docker's client without its daemon is the
usual case, so each is asked. buildah needs no daemon, but root: without user namespaces it builds
with chroot isolation.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hack import host

ASK_SECONDS = 20
CACHE = host.CACHE / "images"
# A store of our own: removing it is removing a folder, and the user's images are never looked at.
STORAGE, RUN = CACHE / "storage", Path("/run/prism-images")
BUILDAH = ("buildah", "--root", str(STORAGE), "--runroot", str(RUN))


class NoEngine(RuntimeError):
    """Nothing here can build an image: the message says what was tried."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One of docker, podman, buildah, and why it was chosen."""

    name: str
    reason: str

    def build(
        self,
        dockerfile: Path,
        context: Path,
        image: str,
        arguments: Mapping[str, str],
        secrets: Mapping[str, Path],
    ) -> None:
        """Builds an image. Raises CalledProcessError; the engine's words are on stderr."""
        words = [*self._program, "build", "--file", dockerfile, "--tag", image]
        words += [w for key, value in arguments.items() for w in ("--build-arg", f"{key}={value}")]
        words += [w for key, file in secrets.items() for w in ("--secret", f"id={key},src={file}")]
        if self.name == "buildah":
            words += ["--isolation", "chroot"]
        if self.name != "docker":
            words += ["--layers", "--quiet", "--force-rm"]
        self._run(*words, context)

    def has(self, image: str) -> bool:
        """Whether the engine holds this image."""
        question = {
            "docker": ("docker", "image", "inspect", image),
            "podman": ("podman", "image", "exists", image),
            "buildah": (*BUILDAH, "inspect", "--type", "image", image),
        }
        return succeeds(question[self.name])

    def push(self, image: str) -> None:
        """Sends an image to the registry of its name. Raises CalledProcessError."""
        self._run(*self._program, "push", image)

    def archive(self, image: str, file: Path) -> None:
        """Writes a docker-archive. Raises CalledProcessError."""
        if self.name == "buildah":
            self._run(*BUILDAH, "push", image, f"docker-archive:{file}:{image}")
        else:
            self._run(self.name, "save", "--output", file, image)

    def layout(self, image: str, folder: Path) -> None:
        """Writes the image into an OCI layout, of its layers those that the layout lacks.

        buildah's store alone; NB: buildah itself would compress, and so write, all of them again.
        """
        source = f"containers-storage:[overlay@{STORAGE}+{RUN}]{image}"
        how = ("--quiet", "--insecure-policy", "--dest-oci-accept-uncompressed-layers")
        self._run("skopeo", "copy", *how, source, f"oci:{folder}:{image}")

    def remove(self, images: Sequence[str]) -> None:
        """Forgets images. Raises CalledProcessError."""
        command = (*BUILDAH, "rmi") if self.name == "buildah" else (self.name, "image", "rm")
        self._run(*command, "--force", *images)

    def images(self) -> list[str]:
        """The names, with tags, of all images that the engine holds."""
        words = [*self._program, "images", "--format"]
        form = "{{.Name}}:{{.Tag}}" if self.name == "buildah" else "{{.Repository}}:{{.Tag}}"
        done = subprocess.run([*words, form], check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.split()

    @property
    def _program(self) -> tuple[str, ...]:
        return BUILDAH if self.name == "buildah" else (self.name,)

    def _run(self, *words: object) -> None:
        environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
        command = [str(word) for word in words]
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


def succeeds(words: Sequence[str]) -> bool:
    """Whether a question to a program is answered with yes, in time."""
    devnull = subprocess.DEVNULL
    try:
        done = subprocess.run(words, stdout=devnull, stderr=devnull, timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def answering() -> str | None:
    """docker or podman, if it is installed and answers."""
    for name in ("docker", "podman"):
        if shutil.which(name) and succeeds((name, "info")):
            return name
    return None


def choose(install: bool = True) -> Engine:
    """The engine that builds images here. Raises NoEngine, MissingPackages.

    `install`: get Debian's packages for buildah when they are missing.
    """
    name = answering()
    if name:
        return Engine(name, f"{name} answers")
    if sys.platform == "linux" and os.geteuid() == 0:
        if install:
            host.require(host.IMAGE_TOOLS)
        if shutil.which("buildah"):
            return Engine("buildah", "neither docker nor podman answers; buildah needs no daemon")
    raise NoEngine("neither docker nor podman answers, and buildah needs Linux and root")
