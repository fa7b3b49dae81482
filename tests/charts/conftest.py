"""Helm for the chart's tests: found once, each rendering kept for the session."""

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.host import CACHE

CHART = Path(__file__).parents[2] / "charts" / "prism"

Manifest = dict[str, Any]  # parsed YAML has no narrower type


def find_helm() -> str | None:
    """The helm program: PATH first, then what the local cluster built."""
    state = Path(os.environ.get("PRISM_LOCAL_CLUSTER") or CACHE / "local-cluster")
    return shutil.which("helm") or shutil.which("helm", path=str(state / "bin"))


class Refused(Exception):
    """Helm refused the values; the message is what a user sees."""


class Rendering:
    """The objects of one rendering."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.objects: list[Manifest] = [o for o in yaml.safe_load_all(text) if o]

    def all(self, kind: str) -> list[Manifest]:
        return [o for o in self.objects if o["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Manifest:
        found = [o for o in self.all(kind) if name in (None, o["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} objects {kind} {name or ''}"
        return found[0]

    @property
    def pod(self) -> Manifest:
        spec: Manifest = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    @property
    def env(self) -> dict[str, str]:
        return {e["name"]: e.get("value", "") for e in self.pod["containers"][0]["env"]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The last of all: on a fresh machine the cluster's tests build the helm that these need."""
    items.sort(key=lambda item: Path(__file__).parent in item.path.parents)


@pytest.fixture(scope="session")
def helm() -> str:
    found = find_helm()
    if found is None:
        pytest.skip("no helm in PATH or in the local cluster's bin folder (hack/cluster builds it)")
    return found


@pytest.fixture(scope="session")
def render(helm: str) -> Callable[..., Rendering]:
    """render("crds.enabled=false", …, values=YAML, release=NAME, namespace=NAME) -> Rendering.

    Raises Refused.
    """

    @functools.cache
    def render_once(
        *sets: str, values: str = "", release: str = "prism", namespace: str = "prism-system"
    ) -> Rendering:
        command = [helm, "template", release, str(CHART), "--namespace", namespace]
        command += ["--kube-version", "1.34.0"]
        command += [word for one in sets for word in ("--set", one)]
        command += ["--values", "-"] if values else []
        done = subprocess.run(command, input=values, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise Refused(done.stderr)
        return Rendering(done.stdout)

    return render_once
