"""The node's bridge, and one nftables table that lets pods reach other networks; and their removal.

Touches only what carries our names. ip_forward goes back to what it was.
"""

from pathlib import Path

from node.settings import ADDRESS, BRIDGE, PODS, RUN
from node.shell import run, succeeds, write

FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
BRIDGED = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
TABLE = f"""table ip local-cluster {{
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        ip saddr {PODS} ip daddr != {{ {PODS}, 224.0.0.0/4 }} oifname != "{BRIDGE}" masquerade
    }}
}}"""


def make() -> None:
    """Makes the bridge with the node's address, and the way out of it."""
    if not (RUN / "ip_forward").exists():
        write(RUN / "ip_forward", FORWARD.read_text())
    FORWARD.write_text("1")
    # A pod's packets to a Service come back through the bridge: the node must see them.
    if not BRIDGED.exists():
        run("modprobe", "br_netfilter")
    BRIDGED.write_text("1")
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        run("ip", "link", "add", BRIDGE, "type", "bridge")
    succeeds("ip", "address", "add", f"{ADDRESS}/{PODS.prefixlen}", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    succeeds("nft", "delete", "table", "ip", "local-cluster")
    run("nft", "-f", "-", stdin=TABLE)


def remove() -> None:
    """Removes the bridge and the tables, kube-proxy's too."""
    for family, table in (("ip", "local-cluster"), ("ip", "kube-proxy"), ("ip6", "kube-proxy")):
        succeeds("nft", "delete", "table", family, table)
    succeeds("ip", "link", "delete", BRIDGE)
    if (RUN / "ip_forward").exists():
        FORWARD.write_text((RUN / "ip_forward").read_text())
