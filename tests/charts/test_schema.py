"""The schema refuses what is unknown or contradicts itself before anything reaches a cluster."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import yaml

from .conftest import CHART, Refused, Rendering

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())

DIGEST = "sha256:" + "ab" * 32
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("unknown value", {"replicas": 2}),
    ("unknown nested value", {"image": {"name": "x"}}),
    ("misspelt", {"prometheus": {"URL": "http://p"}}),
    ("tag and digest of one image", {"image": {"serving": {"tag": "a", "digest": DIGEST}}}),
    ("short digest", {"image": {"operator": {"digest": "sha256:ab"}}}),
    ("pull policy", {"image": {"pullPolicy": "Sometimes"}}),
    ("empty registry", {"image": {"registry": ""}}),
    ("no account and no name", {"serviceAccount": {"create": False}}),
    ("address without scheme", {"prometheus": {"url": "prometheus:9090"}}),
    ("address with port 0", {"prometheus": {"url": "http://prometheus:0"}}),
    ("address with port 65536", {"prometheus": {"url": "http://prometheus:65536"}}),
    ("address with port 99999", {"prometheus": {"url": "http://prometheus:99999/prefix"}}),
    ("address with a long port", {"prometheus": {"url": "http://[fd00::1]:100000"}}),
    ("address with a worded port", {"prometheus": {"url": "http://prometheus:web"}}),
    ("address without port after a colon", {"prometheus": {"url": "http://prometheus:"}}),
    ("the same namespace twice", {"watchNamespaces": ["a", "a"]}),
    ("namespace in capitals", {"watchNamespaces": ["LLM"]}),
    ("switch as text", {"crds": {"enabled": "yes"}}),
    ("no API server port", {"networkPolicy": {"apiServerPorts": []}}),
    ("port out of range", {"networkPolicy": {"apiServerPorts": [70000]}}),
    ("pull secret as text", {"imagePullSecrets": ["regcred"]}),
    ("variable of the chart", {"extraEnv": [{"name": "PRISM_PROMETHEUS_URL", "value": "x"}]}),
    ("variable twofold", {"extraEnv": [{"name": "A", "value": "x", "valueFrom": {"a": {}}}]}),
    ("variable without value", {"extraEnv": [{"name": "A"}]}),
    ("label of the selector", {"podLabels": {"app.kubernetes.io/name": "x"}}),
    ("memory in nonsense", {"resources": {"limits": {"memory": "lots"}}}),
    ("long name", {"fullnameOverride": "x" * 41}),
]


def merged(change: dict[str, Any]) -> dict[str, Any]:
    """Defaults with a change laid over them, as Helm does."""

    def over(base: Any, top: Any) -> Any:
        if isinstance(base, dict) and isinstance(top, dict):
            return base | {key: over(base.get(key), value) for key, value in top.items()}
        return top

    result: dict[str, Any] = over(DEFAULTS, change)
    return result


def test_schema_is_a_schema_and_the_defaults_pass() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(DEFAULTS, SCHEMA)


@pytest.mark.parametrize("change", [c for _, c in REFUSED], ids=[name for name, _ in REFUSED])
def test_refused(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged(change), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"global": {"anything": 1}},
        {"image": {"tag": "t", "serving": {"digest": DIGEST}}},
        {"serviceAccount": {"create": False, "name": "theirs"}},
        {"extraEnv": [{"name": "PRISM_LOG_FORMAT", "value": "plain"}]},
        {"prometheus": {"url": "https://p.example/select/0"}},
        {"prometheus": {"url": "http://user:99999@p.example:65535/a:99999"}},
        {"prometheus": {"url": "http://[fd00::1]:9090"}},
        *({"prometheus": {"url": f"http://p:{n}"}} for n in (1, 80, 9090, 59999, 65499, 65529)),
        {"resources": {}},
    ],
    ids=str,
)
def test_accepted(change: dict[str, Any]) -> None:
    jsonschema.validate(merged(change), SCHEMA)


def test_helm_itself_refuses_with_the_path_in_its_message(render: Callable[..., Rendering]) -> None:
    with pytest.raises(Refused, match="replicas"):
        render("replicas=2")
    with pytest.raises(Refused, match="apiServerPorts"):
        render("networkPolicy.apiServerPorts[0]=70000")
    with pytest.raises(Refused, match=r"prometheus.url"):
        render("prometheus.url=http://prometheus:99999")


def objects_of(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every object schema that names properties, with its path."""
    found = [(path, schema)] if "properties" in schema and schema.get("type") == "object" else []
    for key, sub in (*schema.get("properties", {}).items(), *schema.get("definitions", {}).items()):
        found += objects_of(sub, f"{path}/{key}")
    return found


def test_no_object_lets_unknown_names_through() -> None:
    loose = [
        path for path, sub in objects_of(SCHEMA) if sub.get("additionalProperties") is not False
    ]
    assert loose == []
