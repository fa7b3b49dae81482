"""Fixtures of the operator's tests: a PrismModel as the API server would store it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prism_operator.pods import Context

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
