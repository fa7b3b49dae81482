"""The configuration files of the programs, and the objects that every cluster has.

Pure text from the settings; writes only what changed. Choices worth knowing: the node's address is
the bridge's own, kube-proxy works through nftables (no iptables program, and tear-down is deleting
tables), DNS is a process of the node.
"""

import json
from typing import Any

from node import certificates
from node.settings import (
    ADDRESS,
    BRIDGE,
    CNI_PLUGINS,
    CONF,
    DNS_SERVICE,
    LOGS,
    NODE,
    PAUSE,
    PKI,
    PODS,
    RUN,
    SOCKET,
    STATE,
    VOLUMES,
)
from node.shell import write

Object = dict[str, Any]  # a Kubernetes object: JSON

CONTAINERD = f"""version = 2
root = "{STATE}/containerd"
state = "{RUN}/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
netns_mounts_under_state_dir = true
restrict_oom_score_adj = true  # for a root without CAP_SYS_RESOURCE
stream_server_address = "127.0.0.1"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{CONF}/cni"
"""

COREFILE = f"""cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {{
    bind {ADDRESS}
    errors
    health 127.0.0.1:10254
    ready 127.0.0.1:10253
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {CONF}/coredns.kubeconfig
        pods insecure
        ttl 5
    }}
}}
.:53 {{
    bind {ADDRESS}
    errors
    forward . /etc/resolv.conf
    cache 30
}}
"""

KUBELET: Object = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "address": str(ADDRESS),
    "authentication": {
        "anonymous": {"enabled": False},
        "webhook": {"enabled": True},
        "x509": {"clientCAFile": f"{PKI}/ca.crt"},
    },
    "authorization": {"mode": "Webhook"},
    "tlsCertFile": f"{PKI}/kubelet-server.crt",
    "tlsPrivateKeyFile": f"{PKI}/kubelet-server.key",
    "cgroupDriver": "cgroupfs",
    "failCgroupV1": False,
    "failSwapOn": False,
    "clusterDNS": [str(ADDRESS)],
    "clusterDomain": "cluster.local",
    "containerRuntimeEndpoint": f"unix://{SOCKET}",
    "podLogsDir": f"{STATE}/pod-logs",
    "volumePluginDir": f"{STATE}/kubelet/plugins",
    "makeIPTablesUtilChains": False,
    # A developer's machine: keep the images, and let the disk and the memory be nearly full.
    "imageGCHighThresholdPercent": 100,
    "imageGCLowThresholdPercent": 99,
    "evictionHard": {
        "memory.available": "100Mi",
        "nodefs.available": "1%",
        "imagefs.available": "1%",
        "nodefs.inodesFree": "1%",
    },
}

KUBE_PROXY: Object = {
    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
    "kind": "KubeProxyConfiguration",
    "mode": "nftables",
    "clusterCIDR": str(PODS),
    "hostnameOverride": NODE,
    "clientConnection": {"kubeconfig": f"{CONF}/kube-proxy.kubeconfig"},
    "bindAddress": str(ADDRESS),
    "nodePortAddresses": [f"{ADDRESS}/32"],
    "healthzBindAddress": "127.0.0.1:10256",
    "metricsBindAddress": "127.0.0.1:10249",
    "conntrack": {
        "maxPerCore": 0,
        "min": 0,
        "tcpEstablishedTimeout": "0s",
        "tcpCloseWaitTimeout": "0s",
    },
}

IPAM: Object = {
    "type": "host-local",
    "dataDir": f"{RUN}/cni",
    "ranges": [[{"subnet": str(PODS)}]],
    "routes": [{"dst": "0.0.0.0/0"}],
}
BRIDGE_PLUGIN: Object = {
    "type": "bridge",
    "bridge": BRIDGE,
    "isGateway": True,
    "hairpinMode": True,
    "ipam": IPAM,
}
CNI: Object = {"cniVersion": "0.4.0", "name": "local-cluster", "plugins": [BRIDGE_PLUGIN]}


def make() -> None:
    """Makes the folders, certificates and files that are missing or changed."""
    for folder in (CONF / "cni", LOGS, PKI, RUN, VOLUMES):
        folder.mkdir(parents=True, exist_ok=True)
    STATE.chmod(0o755)  # a pod's user enters its volumes
    PKI.chmod(0o700)
    certificates.make()
    write(CONF / "containerd.toml", CONTAINERD)
    write(CONF / "cni/local-cluster.conflist", json.dumps(CNI))
    write(CONF / "kubelet.json", json.dumps(KUBELET, indent=2))
    write(CONF / "kube-proxy.json", json.dumps(KUBE_PROXY, indent=2))
    write(CONF / "Corefile", COREFILE)
    addons = {"apiVersion": "v1", "kind": "List", "items": _addons()}
    write(CONF / "addons.json", json.dumps(addons, indent=2))


def _addons() -> list[Object]:
    return [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "provisioner": "local-cluster/directory",
            "metadata": {
                "name": "standard",
                "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
            },
            "reclaimPolicy": "Delete",
            "volumeBindingMode": "WaitForFirstConsumer",
        },
        _binding("storage", "system:persistent-volume-provisioner"),
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "local-cluster:dns"},
            "rules": [
                _look("", "namespaces", "pods", "services"),
                _look("discovery.k8s.io", "endpointslices"),
            ],
        },
        _binding("dns", "local-cluster:dns"),
        *_dns_service(),
    ]


def _look(group: str, *resources: str) -> Object:
    return {"apiGroups": [group], "resources": list(resources), "verbs": ["list", "watch"]}


def _binding(user: str, role: str) -> Object:
    group = "rbac.authorization.k8s.io"
    name = f"local-cluster:{user}"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": group, "kind": "User", "name": name}],
    }


def _dns_service() -> list[Object]:
    """The Service that programs expect, joined by hand to the DNS process of the node."""
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
    ]
    metadata: Object = {"name": "kube-dns", "namespace": "kube-system"}
    labels = {"kubernetes.io/service-name": "kube-dns"}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"clusterIP": str(DNS_SERVICE), "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "addressType": "IPv4",
            "ports": ports,
            "metadata": {**metadata, "labels": labels},
            "endpoints": [{"addresses": [str(ADDRESS)], "conditions": {"ready": True}}],
        },
    ]
