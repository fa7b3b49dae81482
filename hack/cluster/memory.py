"""Which clusters the demo was made in, so that `down` ends those, whatever would be chosen now.

The choice looks at the environment and at which engine answers, and both may have changed by then.
One line of JSON for each cluster, in the cache folder beside the clusters' state. The environment
has the last word all the same: who names a cluster means that one.
"""

import json
from collections.abc import Mapping

from hack.cluster.access import Access
from hack.cluster.choice import Cluster, choose
from hack.cluster.errors import ClusterError
from hack.cluster.kind import Kind
from hack.cluster.local import Local
from hack.cluster.named import Named
from hack.host import CACHE

FILE = CACHE / "demo-clusters.jsonl"
REASON = "it was brought up before"


def up(cluster: Cluster) -> Access:
    """Brings it up and remembers it: what we make also where it fails half-way or is killed."""
    if not isinstance(cluster, Named):
        _write([*_others(cluster), cluster])
    access = cluster.up()
    _write([*_others(cluster), cluster])  # a named one answers, so something can be made there
    return access


def used(environment: Mapping[str, str]) -> list[Cluster]:
    """Those to end: the one that the environment names, else the remembered, else the choice.

    Raises ClusterError.
    """
    if environment.get("PRISM_KUBECONTEXT") or environment.get("PRISM_CLUSTER"):
        return [choose()]
    return _read() or [choose()]


def forget(cluster: Cluster) -> None:
    """It is gone, and what was made in it."""
    _write(_others(cluster))


def hint() -> list[str]:
    """What to do about a remembered cluster that somebody else took away."""
    return [f"{FILE} has a line for each: take out what is no more"] if FILE.exists() else []


def _others(cluster: Cluster) -> list[Cluster]:
    return [one for one in _read() if _place(one) != _place(cluster)]


def _place(cluster: Cluster) -> tuple[str | None, ...]:
    """What tells clusters apart: neither why one was chosen nor how images reach it."""
    match cluster:
        case Named(context=context, kubeconfig=kubeconfig):
            return "named", context, kubeconfig
        case Kind():
            return ("kind",)
        case Local(state=state):
            return "local", state


def _read() -> list[Cluster]:
    if not FILE.exists():
        return []
    return [_parse(line) for line in FILE.read_text().splitlines()]


def _write(clusters: list[Cluster]) -> None:
    if not clusters:
        FILE.unlink(missing_ok=True)
        return
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("".join(json.dumps(_entry(one)) + "\n" for one in clusters))


def _entry(cluster: Cluster) -> dict[str, str | None]:
    match cluster:
        case Named(context, registry, _, kubeconfig):
            return {
                "kind": "named",
                "context": context,
                "registry": registry,
                "kubeconfig": kubeconfig,
            }
        case Kind(provider):
            return {"kind": "kind", "provider": provider}
        case Local(_, state):
            return {"kind": "local", "state": state}


def _parse(line: str) -> Cluster:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    match entry:
        case {
            "kind": "named",
            "context": str(context),
            "registry": str() | None as registry,
            "kubeconfig": str() | None as kubeconfig,
        }:
            return Named(context, registry, REASON, kubeconfig)
        case {"kind": "kind", "provider": str(provider)}:
            return Kind(provider, REASON)
        case {"kind": "local", "state": str() | None as state}:
            return Local(REASON, state)
    raise ClusterError(f"{FILE} has a line that names no cluster: {line!r}; take it out")
