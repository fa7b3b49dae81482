"""Ending all that `up` started, also after a crash: processes, pods, mounts, network, cgroups.

Only what lies under our folder or carries our names is touched.
"""

import contextlib
import os
import shutil
from pathlib import Path

from node import network
from node.control_plane import start_containerd
from node.processes import stop
from node.settings import BIN, CGROUPS, RUN, SOCKET, STATE
from node.shell import run

PROGRAMS = (
    "etcd",
    "containerd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "coredns",
    "storage",
)


def stop_all(purge: bool) -> None:
    """Ends the cluster; with `purge` also forgets it: objects, volumes, images, certificates."""
    if RUN.exists():
        stop(*PROGRAMS[3:])
        start_containerd()  # if it crashed, its pods still run
        run(BIN / "kube", "clear", f"unix://{SOCKET}")
        # The API server says farewell through etcd: together they would take 15 s.
        stop("kube-apiserver")
        stop("containerd", "etcd")
    for point in _mounts():
        run("umount", "--lazy", point)
    network.remove()
    _remove_cgroups()
    shutil.rmtree(RUN, ignore_errors=True)
    _remove_log_links()
    if purge and STATE.exists():
        for path in STATE.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)


def _mounts() -> list[str]:
    """The mount points under the state folder, the innermost first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1].replace("\\040", " ") for line in lines]
    return [point for point in reversed(points) if point.startswith(f"{STATE}/")]


def _remove_cgroups() -> None:
    for tree in (*CGROUPS.glob("kubepods"), *CGROUPS.glob("*/kubepods")):  # cgroups v2, v1
        for folder, _, _ in os.walk(tree, topdown=False):
            with contextlib.suppress(OSError):  # another cluster's, in use
                os.rmdir(folder)


def _remove_log_links() -> None:
    for link in Path("/var/log/containers").glob("*.log"):  # the kubelet's, its place is fixed
        if link.is_symlink() and link.readlink().is_relative_to(STATE):
            link.unlink()
