"""Certificates and kubeconfigs: three authorities (cluster, etcd, front proxy), made once."""

import json
from pathlib import Path

from node.settings import ADDRESS, API, CONF, NODE, PKI, SERVICES
from node.shell import run, succeeds, write

HOSTS = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)


def make() -> None:
    """Makes what is missing: certificates of servers and clients, and the programs' kubeconfigs."""
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        if not (PKI / f"{name}.crt").exists():
            _openssl(name, f"/CN={name}")
    local = ("localhost", "127.0.0.1")
    _certificate("apiserver", "kube-apiserver", *HOSTS, *local, SERVICES[1], ADDRESS, server=True)
    _certificate("apiserver-kubelet", "kube-apiserver-kubelet-client", group="system:masters")
    _certificate("front-proxy", "front-proxy", ca="front-proxy-ca")
    _certificate("kubelet-server", NODE, NODE, ADDRESS, server=True)
    _certificate("etcd", "etcd", *local, ca="etcd-ca", server=True)
    _certificate("etcd-client", "kube-apiserver", ca="etcd-ca")
    _service_account_keys()
    _kubeconfig("admin", "admin", "system:masters")
    _kubeconfig("kube-controller-manager", "system:kube-controller-manager")
    _kubeconfig("kube-scheduler", "system:kube-scheduler")
    _kubeconfig("kubelet", f"system:node:{NODE}", "system:nodes")
    _kubeconfig("kube-proxy", "system:kube-proxy")
    _kubeconfig("coredns", "local-cluster:dns")
    _kubeconfig("storage", "local-cluster:storage")


def _service_account_keys() -> None:
    public, key = PKI / "service-accounts.pub", PKI / "service-accounts.key"
    if not public.exists():
        curve = "ec_paramgen_curve:prime256v1"
        run("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", curve, "-out", key)
        # NB: the API server refuses a private EC key in --service-account-key-file.
        run("openssl", "pkey", "-in", key, "-pubout", "-out", public)


def _certificate(
    name: str,
    user: str,
    *names: object,
    group: str | None = None,
    ca: str = "ca",
    server: bool = False,
) -> None:
    """A certificate for a client, or for a server that has these names and addresses."""
    if (PKI / f"{name}.crt").exists():
        return
    usage = "clientAuth,serverAuth" if server else "clientAuth"
    extensions = [
        "basicConstraints=critical,CA:FALSE",
        "keyUsage=critical,digitalSignature",
        f"extendedKeyUsage={usage}",
    ]
    if names:
        kinds = ("IP" if str(name)[0].isdigit() else "DNS" for name in names)
        pairs = (f"{kind}:{name}" for kind, name in zip(kinds, names, strict=True))
        extensions.append("subjectAltName=" + ",".join(pairs))
    options = [word for extension in extensions for word in ("-addext", extension)]
    issuer = ("-CA", PKI / f"{ca}.crt", "-CAkey", PKI / f"{ca}.key")
    _openssl(name, (f"/O={group}" if group else "") + f"/CN={user}", *issuer, *options)


def _openssl(name: str, subject: str, *options: object) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    files: tuple[object, ...] = ("-keyout", PKI / f"{name}.key", "-out", PKI / f"{name}.crt")
    command = ("openssl", "req", "-x509", *key, "-days", 3650, "-subj", subject, *options, *files)
    if not succeeds(*command):  # it draws dots on stderr: shown only when it fails
        run(*command)


def _kubeconfig(name: str, user: str, group: str | None = None) -> Path:
    _certificate(name, user, group=group)
    cluster = {"server": API, "certificate-authority": str(PKI / "ca.crt")}
    client = {"client-certificate": f"{PKI}/{name}.crt", "client-key": f"{PKI}/{name}.key"}
    context = {"cluster": "local-cluster", "user": name}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "local-cluster",
        "clusters": [{"name": "local-cluster", "cluster": cluster}],
        "users": [{"name": name, "user": client}],
        "contexts": [{"name": "local-cluster", "context": context}],
    }
    return write(CONF / f"{name}.kubeconfig", json.dumps(config, indent=2))
