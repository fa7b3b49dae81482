"""Where the cluster keeps things, and the addresses and names it is made of.

Knows no process. Everything lives in one folder, so that removing the cluster is removing a folder;
the programs lie beside it under a digest of their sources, so that a second checkout with the same
sources builds nothing.
"""

import ipaddress
import os
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).resolve().parents[1] / "k8s"

CACHE: Final = Path(os.environ.get("PRISM_CACHE") or Path.home() / ".cache/prism").resolve()
STATE: Final = Path(os.environ.get("PRISM_LOCAL_CLUSTER") or CACHE / "local-cluster").resolve()
PROGRAMS: Final = CACHE / "programs"  # PROGRAMS/DIGEST; STATE/bin is a link to the one in use
BIN: Final = STATE / "bin"
CONF: Final = STATE / "conf"
LOGS: Final = STATE / "logs"
PKI: Final = STATE / "pki"
RUN: Final = STATE / "run"
VOLUMES: Final = STATE / "volumes"
SOCKET: Final = RUN / "containerd.sock"
ADMIN: Final = CONF / "admin.kubeconfig"

NODE: Final = "local"
BRIDGE: Final = "localcluster0"  # carries the node's address, and its pods
PODS: Final = ipaddress.IPv4Network("10.244.0.0/24")
SERVICES: Final = ipaddress.IPv4Network("10.96.0.0/16")
ADDRESS: Final = PODS[1]  # the node: API server, kubelet, DNS
DNS_SERVICE: Final = SERVICES[10]
API: Final = f"https://{ADDRESS}:6443"
ETCD: Final = "https://127.0.0.1:23790"
ETCD_PEER: Final = "http://127.0.0.1:23800"
PAUSE: Final = "localhost/pause:1"
CNI_PLUGINS: Final = "/usr/lib/cni"
CGROUPS: Final = Path("/sys/fs/cgroup")
