"""Starting the programs in their order, each with its flags, until the node is ready.

`up` on a running cluster starts what is missing. Order matters: etcd and containerd first, the API
server before all that talk to it.
"""

import json
import ssl
import time
import urllib.request

from node import images
from node.processes import process, start, wait
from node.settings import (
    ADDRESS,
    ADMIN,
    API,
    BIN,
    CONF,
    ETCD,
    ETCD_PEER,
    NODE,
    PKI,
    SERVICES,
    SOCKET,
    STATE,
    VOLUMES,
)
from node.shell import run, succeeds

KUBE = BIN / "kube"


def start_all() -> None:
    """Starts every program and waits until pods can run. Raises NotReady."""
    _start_etcd()
    start_containerd()
    images.load(BIN / "pause.tar")
    _start_apiserver()
    apply = ("apply", "--server-side", "--force-conflicts", "-f", CONF / "addons.json")
    kubectl(*apply, silent=True)
    _start_controllers()
    since = "" if process("kubelet") else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _start_node()
    wait("kubelet", lambda: _node_ready(since))
    # Without this account the API server refuses pods.
    account = f"{API}/api/v1/namespaces/default/serviceaccounts/default"
    wait("kube-controller-manager", lambda: get(account))
    wait("coredns", lambda: get("http://127.0.0.1:10253/ready"))
    wait("kube-proxy", lambda: get("http://127.0.0.1:10256/healthz"))


def kubectl(*arguments: object, silent: bool = False) -> None:
    """Runs kubectl as the administrator. Raises CalledProcessError."""
    run(BIN / "kubectl", "--kubeconfig", ADMIN, *arguments, silent=silent)


def start_containerd() -> None:
    start("containerd", "containerd", "--config", CONF / "containerd.toml")
    wait("containerd", lambda: succeeds("ctr", "--address", SOCKET, "version"))


def get(url: str) -> bytes | None:
    """What the server says, or nothing while it is not well."""
    context = None
    if url.startswith(API):
        context = ssl.create_default_context(cafile=str(PKI / "ca.crt"))
        context.load_cert_chain(PKI / "admin.crt", PKI / "admin.key")
    try:
        with urllib.request.urlopen(url, context=context, timeout=2) as answer:
            content: bytes = answer.read()
            return content
    except OSError:
        return None


def _node_ready(since: str) -> bool:
    """Whether the kubelet said so after this moment: what it said before a stop is still there."""
    node = json.loads(get(f"{API}/api/v1/nodes/{NODE}") or "{}")
    return any(
        c["type"] == "Ready" and c["status"] == "True" and c["lastHeartbeatTime"] >= since
        for c in node.get("status", {}).get("conditions", [])
    )


def _start_etcd() -> None:
    start(
        "etcd",
        *(KUBE, "etcd", f"--name={NODE}", f"--data-dir={STATE}/etcd", "--log-level=warn"),
        "--unsafe-no-fsync",  # a power loss may lose the cluster: it is a developer's
        *(f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}"),
        *(f"--listen-peer-urls={ETCD_PEER}", f"--initial-advertise-peer-urls={ETCD_PEER}"),
        f"--initial-cluster={NODE}={ETCD_PEER}",
        *(f"--cert-file={PKI}/etcd.crt", f"--key-file={PKI}/etcd.key"),
        *("--client-cert-auth", f"--trusted-ca-file={PKI}/etcd-ca.crt"),
    )


def _start_apiserver() -> None:
    start(
        "kube-apiserver",
        *(KUBE, "kube-apiserver", f"--advertise-address={ADDRESS}", f"--bind-address={ADDRESS}"),
        *("--secure-port=6443", "--allow-privileged", f"--service-cluster-ip-range={SERVICES}"),
        *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
        "--enable-bootstrap-token-auth",
        *(f"--tls-cert-file={PKI}/apiserver.crt", f"--tls-private-key-file={PKI}/apiserver.key"),
        f"--client-ca-file={PKI}/ca.crt",
        *(f"--etcd-servers={ETCD}", f"--etcd-cafile={PKI}/etcd-ca.crt"),
        *(f"--etcd-certfile={PKI}/etcd-client.crt", f"--etcd-keyfile={PKI}/etcd-client.key"),
        f"--kubelet-certificate-authority={PKI}/ca.crt",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet.key",
        "--kubelet-preferred-address-types=InternalIP",
        f"--proxy-client-cert-file={PKI}/front-proxy.crt",
        f"--proxy-client-key-file={PKI}/front-proxy.key",
        f"--requestheader-client-ca-file={PKI}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={PKI}/service-accounts.pub",
        f"--service-account-signing-key-file={PKI}/service-accounts.key",
    )
    wait("kube-apiserver", lambda: get(f"{API}/readyz"))


def _start_controllers() -> None:
    kinds = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    options = {
        "kube-controller-manager": (
            "--use-service-account-credentials",
            "--controllers=*,bootstrapsigner,tokencleaner",
            f"--root-ca-file={PKI}/ca.crt",
            f"--service-account-private-key-file={PKI}/service-accounts.key",
            f"--cluster-signing-cert-file={PKI}/ca.crt",
            f"--cluster-signing-key-file={PKI}/ca.key",
            f"--service-cluster-ip-range={SERVICES}",
        ),
        "kube-scheduler": (),
    }
    for name, extra in options.items():
        who = (f"--{kind}={CONF}/{name}.kubeconfig" for kind in kinds)
        start(name, KUBE, name, "--bind-address=127.0.0.1", "--leader-elect=false", *who, *extra)


def _start_node() -> None:
    start(
        "kubelet",
        *(KUBE, "kubelet", f"--config={CONF}/kubelet.json"),
        *(f"--kubeconfig={CONF}/kubelet.kubeconfig", f"--hostname-override={NODE}"),
        *(f"--node-ip={ADDRESS}", f"--root-dir={STATE}/kubelet"),
    )
    start("kube-proxy", KUBE, "kube-proxy", f"--config={CONF}/kube-proxy.json")
    start("coredns", KUBE, "coredns", "-conf", CONF / "Corefile", "-quiet")
    config = CONF / "storage.kubeconfig"
    start("storage", KUBE, "storage", "-kubeconfig", config, "-root", VOLUMES)
