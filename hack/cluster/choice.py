"""Which cluster the demo and the tests use: a pure decision on what the machine has.

Order: the one that the user named; kind, where it works; the local cluster. One that the user did
not name and we did not create is never touched.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from hack import engines
from hack.cluster.errors import ClusterError
from hack.cluster.kind import Kind
from hack.cluster.local import Local
from hack.cluster.named import Named

Cluster = Named | Kind | Local


@dataclass(frozen=True, slots=True)
class Machine:
    """What the decision looks at. `engine`: docker or podman, if one answers."""

    has_kind: bool
    engine: str | None
    linux: bool
    root: bool


def look() -> Machine:
    """Asks this machine; seconds where an engine is slow to answer."""
    has_kind = shutil.which("kind") is not None
    return Machine(
        has_kind=has_kind,
        engine=engines.answering() if has_kind else None,
        linux=sys.platform == "linux",
        root=os.geteuid() == 0,
    )


def decide(environment: Mapping[str, str], machine: Machine) -> Cluster:
    """The cluster to use. Raises ClusterError with what to do where there is none."""
    context = environment.get("PRISM_KUBECONTEXT")
    if context:
        registry = environment.get("PRISM_REGISTRY") or None
        kubeconfig = environment.get("KUBECONFIG") or None
        return Named(context, registry, f"PRISM_KUBECONTEXT={context}", kubeconfig)
    forced = environment.get("PRISM_CLUSTER", "")
    if forced not in ("", "kind", "local"):
        raise ClusterError(f"PRISM_CLUSTER={forced}: expected kind or local")
    why_not_kind = _why_not_kind(machine)
    if forced != "local" and machine.engine and not why_not_kind:
        answers = f"kind is installed and {machine.engine} answers"
        return Kind(machine.engine, "PRISM_CLUSTER=kind" if forced else answers)
    if forced == "kind":
        raise ClusterError(f"PRISM_CLUSTER=kind: {why_not_kind}")
    if machine.linux and machine.root:
        reason = "PRISM_CLUSTER=local" if forced else f"{why_not_kind}; Linux and root"
        return Local(reason, environment.get("PRISM_LOCAL_CLUSTER") or None)
    why = why_not_kind or "kind is not wanted"
    raise ClusterError(
        f"no cluster can be made here: {why}, and the local cluster needs Linux and root."
        " Install kind beside Docker or Podman, or name a cluster of yours: PRISM_KUBECONTEXT"
        " (and PRISM_REGISTRY for its images)"
    )


def _why_not_kind(machine: Machine) -> str | None:
    if not machine.has_kind:
        return "kind is not installed"
    if not machine.engine:
        return "kind is installed, but neither docker nor podman answers"
    return None


def choose() -> Cluster:
    """The cluster to use on this machine. Raises ClusterError."""
    return decide(os.environ, look())
