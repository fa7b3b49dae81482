"""A cluster for the demo and the tests: `python3 -m hack.cluster`, or `choose()` from Python."""

from hack.cluster.access import Access
from hack.cluster.choice import Cluster, choose
from hack.cluster.errors import ClusterError

__all__ = ["Access", "Cluster", "ClusterError", "choose"]
