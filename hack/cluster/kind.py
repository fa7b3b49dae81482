"""kind, where it is installed and a container engine answers: the cluster prism-demo, ours alone.

A file in the cache remembers that we created it; a cluster of this name that we did not create is
used as little as any other cluster that the user did not name.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hack import engines, host
from hack.cluster import tools
from hack.cluster.access import Access
from hack.cluster.errors import ClusterError
from hack.progress import say, step

NAME = "prism-demo"
FOLDER = host.CACHE / "kind"
KUBECONFIG = FOLDER / "kubeconfig"
CREATED = FOLDER / "created-by-prism"


@dataclass(frozen=True, slots=True)
class Kind:
    """Where kind's nodes run (docker or podman), and why kind was chosen."""

    provider: str
    reason: str

    def access(self) -> Access:
        found = tools.find()
        return Access(
            kind="kind",
            reason=self.reason,
            context=f"kind-{NAME}",
            kubeconfig=str(KUBECONFIG),
            kubectl=found["kubectl"],
            helm=found["helm"],
            registry="localhost",
        )

    def up(self) -> Access:
        """Creates the cluster unless we did before. Raises ClusterError, CalledProcessError."""
        exists = NAME in self._clusters()
        if exists and not CREATED.exists():
            raise ClusterError(
                f"a kind cluster {NAME} exists that this tool did not create. To use it:"
                f" PRISM_KUBECONTEXT=kind-{NAME}"
            )
        FOLDER.mkdir(parents=True, exist_ok=True)
        if not exists:
            with step(f"kind create cluster --name {NAME}"):
                CREATED.touch()
                self._kind("create", "cluster", "--kubeconfig", KUBECONFIG, "--wait", "180s")
        return self.access()

    def load(self, images: Sequence[str]) -> None:
        """Gives the nodes images that this machine's engine built."""
        load(engines.choose(), NAME, [i for i in images if i.startswith("localhost/")])

    def down(self, purge: bool) -> None:
        """Deletes the cluster if we created it."""
        if not CREATED.exists():
            say(f"kind: no cluster {NAME} of ours")
            return
        with step(f"kind delete cluster --name {NAME}"):
            self._kind("delete", "cluster", "--kubeconfig", KUBECONFIG)
        shutil.rmtree(FOLDER)

    def _clusters(self) -> list[str]:
        command = ["kind", "get", "clusters"]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=self._environment()
        )
        return done.stdout.split()

    def _kind(self, *words: object) -> None:
        command = ["kind", *map(str, words), "--name", NAME]
        subprocess.run(command, check=True, stdout=sys.stderr, env=self._environment())

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "KIND_EXPERIMENTAL_PROVIDER": self.provider}


def load(engine: engines.Engine, name: str, images: Sequence[str]) -> None:
    """Loads images of this machine into the nodes of a kind cluster."""
    for image in images:
        with step(f"load {image}"), tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "image.tar")
            engine.archive(image, file)
            command = ["kind", "load", "image-archive", str(file), "--name", name]
            subprocess.run(command, check=True, stdout=sys.stderr)
