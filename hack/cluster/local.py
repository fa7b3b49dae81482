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
    """Why the local cluster was chosen; `state`: its folder (None: the one in the cache)."""

    reason: str
    state: str | None = None

    def access(self) -> Access:
        config = Path(self._tool("kubeconfig").strip())
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
            say(self._tool("up").strip())
        return self.access()

    def load(self, images: Sequence[str]) -> None:
        """Gives the node images; only the layers that it lacks."""
        engine = engines.choose()
        for image in images:
            if image.startswith("localhost/"):
                with step(f"load {image}"):
                    self._load(engine, image)

    def down(self, purge: bool) -> None:
        """Ends it; with `purge` also forgets its state and the images that this machine built."""
        with step("local cluster down"):
            self._tool("down", *(["--purge"] if purge else []))

    def _load(self, engine: engines.Engine, image: str) -> None:
        if engine.name == "buildah":
            LAYOUT.mkdir(parents=True, exist_ok=True)
            engine.layout(image, LAYOUT)
            self._tool("load-image", f"{LAYOUT}:{image}")
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "image.tar")
                engine.archive(image, file)
                self._tool("load-image", file)

    def _tool(self, *words: object) -> str:
        return tools.local_cluster(*words, state=self.state or "")
