"""kubectl and helm: the user's own where they are on the path, else built with the local cluster's.

The local cluster brings both, so that a fresh machine needs neither.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

LOCAL_CLUSTER = Path(__file__).resolve().parents[1] / "local-cluster/local-cluster"


def local_cluster(*words: object, state: str | None = None) -> str:
    """Runs the local cluster's tool; its stdout. Raises CalledProcessError.

    `state`: its folder, empty for the one in the cache; None leaves it to the environment.
    """
    command = [sys.executable, str(LOCAL_CLUSTER), *map(str, words)]
    given = {} if state is None else {"PRISM_LOCAL_CLUSTER": state}
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **given}
    ).stdout


def find() -> dict[str, str]:
    """Paths of kubectl and helm; builds the local cluster's programs where one is missing."""
    found = {name: shutil.which(name) for name in ("kubectl", "helm")}
    missing = [name for name, path in found.items() if not path]
    folder = Path(local_cluster("build").strip()) if missing else Path()
    return {name: path or str(folder / name) for name, path in found.items()}
