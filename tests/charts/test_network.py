"""The operator's NetworkPolicy lets through what it needs and nothing else."""

from collections.abc import Callable

import pytest
import yaml
from prism import contract

from .conftest import Rendering

Render = Callable[..., Rendering]
DNS = (53, 5353)


def ports(rules: list[dict[str, list[dict[str, object]]]]) -> set[object]:
    return {port["port"] for rule in rules for port in rule.get("ports", ())}


def test_policy_selects_the_operator(render: Render) -> None:
    rendering = render()
    selector = rendering.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    labels = rendering.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert selector and selector.items() <= labels.items()


def test_operator_s_pod_is_whom_the_serving_pods_policy_lets_in(render: Render) -> None:
    labels = render().one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert contract.OPERATOR_POD_LABELS.items() <= labels.items()


def test_defaults_open_probes_metrics_dns_api_and_serving_pods(render: Render) -> None:
    spec = render().one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert ports(spec["ingress"]) == {"health", "metrics"}
    assert ports(spec["egress"]) == {
        *DNS, 443, 6443, contract.API_PORT, contract.ADMIN_PORT,
    }  # fmt: skip


def test_serving_pods_are_reached_by_their_role(render: Render) -> None:
    rules = render().one("NetworkPolicy")["spec"]["egress"]
    (rule,) = (r for r in rules if ports([r]) == {contract.API_PORT, contract.ADMIN_PORT})
    (peer,) = rule["to"]
    assert peer["podSelector"]["matchLabels"] == {contract.LABEL_ROLE: contract.ROLE_SERVING}


def test_dns_is_reached_wherever_a_cluster_has_it_listen(render: Render) -> None:
    """53 with most, 5353 on OpenShift; CoreDNS behind kube-dns may have any port."""
    rules = render().one("NetworkPolicy")["spec"]["egress"]
    everywhere = [port for r in rules if "to" not in r for port in r["ports"]]
    for number in DNS:
        for protocol in ("UDP", "TCP"):
            assert {"protocol": protocol, "port": number} in everywhere
    (rule,) = (r for r in rules if "ports" not in r)
    (peer,) = rule["to"]
    namespace = {"kubernetes.io/metadata.name": "kube-system"}
    assert peer["namespaceSelector"]["matchLabels"] == namespace
    assert peer["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://prometheus.monitoring:9090", 9090),
        ("http://prometheus.monitoring:9090/prefix", 9090),
        ("https://p.example/select/0", 443),
        ("http://p.example", 80),
    ],
)
def test_prometheus_port_is_opened(render: Render, url: str, port: int) -> None:
    rendering = render(f"prometheus.url={url}")
    assert rendering.env["PRISM_PROMETHEUS_URL"] == url
    assert {"protocol": "TCP", "port": port} in rendering.one("NetworkPolicy")["spec"]["egress"][
        -1
    ]["ports"]


def test_values_of_the_policy(render: Render) -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "metrics"}}}
    extra = {"ports": [{"protocol": "TCP", "port": 3128}]}
    values = {"apiServerPorts": [16443], "metricsFrom": [peer], "extraEgress": [extra]}
    spec = render(values=yaml.safe_dump({"networkPolicy": values})).one("NetworkPolicy")["spec"]
    assert spec["ingress"][0]["from"] == [peer]
    assert "from" not in spec["ingress"][1], "kubelets must always reach the probes"
    assert spec["egress"][-1] == extra
    assert 16443 in ports(spec["egress"]) and 6443 not in ports(spec["egress"])


def test_policy_can_be_left_out(render: Render) -> None:
    assert render("networkPolicy.enabled=false").all("NetworkPolicy") == []
