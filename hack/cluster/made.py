"""What the demo makes in a cluster, and its removal from one that goes on without it.

Only namespaces with the demo's label go, the release in them, and the kind once no object is left.
"""

import json
import subprocess

from hack.cluster.access import Access
from hack.cluster.errors import ClusterError
from hack.progress import say, step

LABEL = "moeprism.io/demo"
SYSTEM, RELEASE = "prism-system", "prism"
KIND = "customresourcedefinition/prismmodels.moeprism.io"


def remove(access: Access) -> None:
    """In the order that lets the operator finish its part. Raises ClusterError."""
    listed = _kubectl(access, "get", "namespaces", "-l", LABEL, "-o", "json")
    namespaces = [one["metadata"]["name"] for one in json.loads(listed or "{}").get("items", ())]
    if not namespaces:
        say(f"context {access.context}: nothing of the demo is there")
        return
    with step(f"remove what the demo made in context {access.context}: {', '.join(namespaces)}"):
        if _kubectl(access, "get", KIND, "--ignore-not-found", "-o", "name"):
            for name in namespaces:
                _kubectl(access, "delete", "prismmodels", "--all", "-n", name, "--timeout=90s")
        if SYSTEM in namespaces:
            words = ["uninstall", RELEASE, "-n", SYSTEM, "--wait", "--ignore-not-found"]
            _run(access, access.helm, "--kube-context", access.context, *words)
        _kubectl(access, "delete", "namespace", *namespaces, "--timeout=180s")
        if not _kubectl(access, "get", "prismmodels", "-A", "-o", "name"):
            _kubectl(access, "delete", KIND, "--ignore-not-found")
        else:
            say(f"kept: {KIND}, since other PrismModels are there")


def _kubectl(access: Access, *words: str) -> str:
    return _run(access, access.kubectl, "--context", access.context, *words)


def _run(access: Access, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=access.environment())
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
