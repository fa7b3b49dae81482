"""The cluster of hack/local-cluster: one real node on this machine, for Linux and root."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hack import engines
from hack.cluster import tools
from hack.cluster.access import Access
from hack.progress import say, step

CONTEXT = "local-cluster"
LAYOUT = engines.CACHE / "layout"  # an OCI layout: blobs are written once


@dataclass(frozen=True, slots=True)
class Local:
    """Why the local cluster was chosen."""

    reason: str

    def access(self) -> Access:
        config = Path(tools.local_cluster("kubeconfig").strip())
        programs = config.parents[1] / "bin"
        return Access(
            kind="local",
            reason=self.reason,
            context=CONTEXT,
            kubeconfig=str(config),
            kubectl=str(programs / "kubectl"),
            helm=str(programs / "helm"),
            registry="localhost",
        )

    def up(self) -> Access:
        """Builds and starts what is missing. Raises CalledProcessError."""
        with step("local cluster up"):
            say(tools.local_cluster("up").strip())
        return self.access()

    def load(self, images: Sequence[str]) -> None:
        """Gives the node images; only the layers that it lacks."""
        engine = engines.choose()
        for image in images:
            if image.startswith("localhost/"):
                with step(f"load {image}"):
                    _load(engine, image)

    def down(self, purge: bool) -> None:
        """Ends it; with `purge` also forgets its state and the images that this machine built."""
        with step("local cluster down"):
            tools.local_cluster("down", *(["--purge"] if purge else []))


def _load(engine: engines.Engine, image: str) -> None:
    if engine.name == "buildah":
        LAYOUT.mkdir(parents=True, exist_ok=True)
        engine.layout(image, LAYOUT)
        tools.local_cluster("load-image", f"{LAYOUT}:{image}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "image.tar")
            engine.archive(image, file)
            tools.local_cluster("load-image", file)
