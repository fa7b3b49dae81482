"""What lies in examples/ fits the CRD, the contract and restricted namespaces."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prism import contract

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    return [m for path in EXAMPLES for m in yaml.safe_load_all(path.read_text()) if m]


def schema() -> Manifest:
    """The CRD's schema, made strict: the API server would drop what it does not know."""
    (path,) = (ROOT / "crds").glob("*.yaml")
    found: Manifest = yaml.safe_load(path.read_text())["spec"]["versions"][0]["schema"]

    def strict(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        node = {key: strict(value) for key, value in node.items()}
        if "properties" in node and "additionalProperties" not in node:
            node["additionalProperties"] = False
        return node

    spec: Manifest = strict(found["openAPIV3Schema"]["properties"]["spec"])
    return spec


@pytest.mark.parametrize(
    "model",
    [m for m in manifests() if m["kind"] == contract.KIND],
    ids=lambda m: m["metadata"]["name"],
)
def test_prismmodels_fit_the_schema(model: Manifest) -> None:
    assert model["apiVersion"] == contract.API_VERSION
    jsonschema.validate(model["spec"], schema())


@pytest.mark.parametrize(
    "workload",
    [m for m in manifests() if m["kind"] in {"Job", "Deployment"}],
    ids=lambda m: m["metadata"]["name"],
)
def test_pods_are_restricted(workload: Manifest) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["image"].startswith("localhost/prism-")
        assert not container["image"].endswith(":latest")


def test_prometheus_finds_the_serving_pods_by_the_contract_s_label() -> None:
    (config,) = (m for m in manifests() if m["kind"] == "ConfigMap")
    prometheus = yaml.safe_load(config["data"]["prometheus.yml"])
    assert prometheus["global"]["scrape_interval"] == "5s"
    (discovery,) = prometheus["scrape_configs"][0]["dns_sd_configs"]
    (targets,) = (m for m in manifests() if m["metadata"]["name"] == "prism-serving")
    assert discovery["names"] == ["prism-serving.prism-demo.svc.cluster.local"]
    assert discovery["port"] == contract.API_PORT
    assert targets["spec"]["selector"] == {contract.LABEL_ROLE: contract.ROLE_SERVING}
    assert targets["spec"]["clusterIP"] == "None"


def test_jobs_for_another_prometheus_use_the_contract_s_labels() -> None:
    jobs = yaml.safe_load((ROOT / "examples" / "prometheus" / "scrape-jobs.yml").read_text())
    selectors = {
        job["job_name"]: job["kubernetes_sd_configs"][0]["selectors"][0]["label"]
        for job in jobs["scrape_configs"]
    }
    assert selectors["prism-serving"] == f"{contract.LABEL_ROLE}={contract.ROLE_SERVING}"
    assert selectors["prism-refactor"] == f"{contract.LABEL_ROLE}={contract.ROLE_REFACTOR}"
