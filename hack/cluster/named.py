"""A cluster that the user named with PRISM_KUBECONTEXT: used, never created, never deleted.

Images reach it through PRISM_REGISTRY, or straight into its nodes where it is a kind cluster.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from hack import engines
from hack.cluster import kind, made, tools
from hack.cluster.access import Access
from hack.cluster.errors import ClusterError
from hack.progress import say, step


@dataclass(frozen=True, slots=True)
class Named:
    """The context, and where images are pushed to (None: loaded into a kind cluster).

    `kubeconfig`: the file that has the context, as $KUBECONFIG says it (None: the user's own).
    """

    context: str
    registry: str | None
    reason: str
    kubeconfig: str | None = None

    def access(self) -> Access:
        found = tools.find()
        return Access(
            kind="named",
            reason=self.reason,
            context=self.context,
            kubeconfig=self.kubeconfig or os.path.expanduser("~/.kube/config"),
            kubectl=found["kubectl"],
            helm=found["helm"],
            registry=self.registry or "localhost",
        )

    def up(self) -> Access:
        """Checks that it answers. Raises ClusterError."""
        access = self.access()
        command = [access.kubectl, "--context", self.context, "get", "nodes"]
        done = subprocess.run(command, capture_output=True, text=True, env=access.environment())
        if done.returncode:
            raise ClusterError(f"context {self.context} does not answer: {done.stderr.strip()}")
        return access

    def load(self, images: Sequence[str]) -> None:
        """Pushes to the registry, or loads into kind's nodes. Raises ClusterError."""
        engine = engines.choose()
        own = [image for image in images if image.startswith(f"{self.registry or 'localhost'}/")]
        if self.registry:
            for image in own:
                with step(f"push {image}"):
                    engine.push(image)
        elif self.context.startswith("kind-") and shutil.which("kind"):
            kind.load(engine, self.context.removeprefix("kind-"), own)
        else:
            raise ClusterError(
                f"images for context {self.context}: set PRISM_REGISTRY to a registry that this"
                " machine can push to and the cluster can pull from"
            )

    def down(self, purge: bool) -> None:
        """With `purge` removes what the demo made in it, nothing else. Raises ClusterError."""
        say(f"context {self.context} is the user's own: the cluster goes on")
        if purge:
            made.remove(self.access())
