"""What a caller gets from a cluster: how to reach it, and with which tools."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Access:
    """A cluster that is up. `registry` is the prefix of image names that its nodes can run."""

    kind: str  # named, kind or local
    reason: str
    context: str
    kubeconfig: str
    kubectl: str
    helm: str
    registry: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)

    def environment(self) -> dict[str, str]:
        """This process's environment with KUBECONFIG and both tools on the path.

        NB: the file may hold other contexts: say `--context` (helm: `--kube-context`) as well.
        """
        folders = dict.fromkeys(str(Path(tool).parent) for tool in (self.kubectl, self.helm))
        path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
        return {**os.environ, "KUBECONFIG": self.kubeconfig, "PATH": path}
