"""Fixtures of the operator's tests: a PrismModel as the API server would store it."""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prism_operator.pods import Context

from . import real_apiserver
from .harness import Operator
from .real_apiserver import ApiServer

Json = dict[str, Any]
CRD_FILE = Path(__file__).parents[2] / "crds" / "prismmodels.moeprism.io.yaml"


@pytest.fixture(scope="session")
def crd() -> Json:
    loaded: Json = yaml.safe_load(CRD_FILE.read_text())
    return loaded


@pytest.fixture
def make_body() -> Callable[..., Json]:
    """A PrismModel; keyword arguments are merged into its spec."""

    def merge(into: Json, other: Json) -> Json:
        for key, value in other.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                merge(into[key], value)
            elif value is None:
                into.pop(key, None)
            else:
                into[key] = copy.deepcopy(value)
        return into

    def make(name: str = "tiny", **spec: Any) -> Json:
        base = {
            "model": {"uri": "pvc://models/tiny-moe"},
            "cache": {"pvc": {"claimName": "models", "subPath": "prism"}},
            "slo": {"ttft": {"targetMilliseconds": 500, "percentile": 95}},
            "elasticity": {"mode": "Auto", "minLevelPercent": 25},
        }
        return {
            "apiVersion": "moeprism.io/v1alpha1",
            "kind": "PrismModel",
            "metadata": {"name": name, "namespace": "llm", "uid": f"uid-{name}", "generation": 1},
            "spec": merge(base, spec),
        }

    return make


@pytest.fixture
def context() -> Context:
    return Context(
        refactor_image="localhost/prism-refactor:1",
        serving_image="localhost/prism-serving:1",
        namespace="prism-system",
        admin_key=b"k" * 32,
        pull_secrets=("pull",),
    )


@pytest.fixture
def operator(context: Context) -> Operator:
    return Operator(context)


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory, crd: Json) -> Iterator[ApiServer]:
    """A real API server with our kind installed, and the namespace ``llm``."""
    if not real_apiserver.binary().exists():
        pytest.skip(f"{real_apiserver.binary()} is missing; hack/local-cluster builds it")
    server = ApiServer(tmp_path_factory.mktemp("apiserver"))
    try:
        server.start()
        install(server, crd)
        yield server
    finally:
        server.stop()


def install(server: ApiServer, crd: Json) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    code, answer = server.request("POST", path, crd)
    assert code == 201, answer
    name = {"metadata": {"name": "llm"}}
    assert server.request("POST", "/api/v1/namespaces", name)[0] == 201
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if server.request("GET", "/apis/moeprism.io/v1alpha1/prismmodels")[0] == 200:
            return
        time.sleep(0.1)
    raise AssertionError("the kind was never served")
