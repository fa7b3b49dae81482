"""kubectl for what a person would type, and its proxy for what is asked every second.

The proxy listens on a unix socket in a folder of ours, so no other user of the machine gets the
administrator's rights; a kubectl process for each sample would eat the CPU that is being measured.
"""

import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from prism import contract

T = TypeVar("T")
Json = dict[str, Any]  # the API server's own documents


class KubectlFailed(RuntimeError):
    """kubectl or helm ended with an error; the message holds the command and what it said."""


class TookTooLong(RuntimeError):
    """Something did not happen in time; the message says what was seen last."""


@dataclass(frozen=True, slots=True)
class Kube:
    """One cluster and one namespace of it, by its kubeconfig."""

    kubectl: str
    helm: str
    environment: Mapping[str, str]
    context: str
    namespace: str

    def run(self, *words: str, stdin: str = "", timeout_s: float = 120) -> str:
        """kubectl in our namespace; its output. Raises KubectlFailed."""
        command = [self.kubectl, "--context", self.context, "--namespace", self.namespace, *words]
        return self._run(command, stdin, timeout_s)

    def run_helm(self, *words: str, timeout_s: float = 300) -> str:
        return self._run([self.helm, "--kube-context", self.context, *words], "", timeout_s)

    def get(self, *words: str) -> Json:
        result: Json = json.loads(self.run("get", *words, "-o", "json"))
        return result

    def patch_model(self, name: str, spec: Json) -> None:
        patch = json.dumps({"spec": spec})
        self.run("patch", "prismmodel", name, "--type", "merge", "-p", patch)

    def popen(self, *words: str) -> subprocess.Popen[str]:
        """A kubectl that stays, such as a port-forward; the caller ends it."""
        command = [self.kubectl, "--context", self.context, "--namespace", self.namespace, *words]
        return subprocess.Popen(
            command,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def _run(self, command: list[str], stdin: str, timeout_s: float) -> str:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            env=self._environment(),
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise KubectlFailed(
                f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout


@contextmanager
def proxy(kube: Kube) -> Iterator[Path]:
    """Path of a unix socket that speaks the API server's plain HTTP."""
    with tempfile.TemporaryDirectory(prefix="prism-demo-") as folder:
        path = Path(folder) / "api.sock"
        process = kube.popen("proxy", f"--unix-socket={path}")
        try:
            wait_until(lambda: path.exists() or None, 20, "kubectl proxy's socket")
            yield path
        finally:
            process.terminate()
            process.wait(10)


def api_client(path: Path) -> httpx.Client:
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=15
    )


def async_api_client(path: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://localhost", timeout=15
    )


def models_path(namespace: str, name: str = "") -> str:
    path = f"/apis/{contract.GROUP}/{contract.VERSION}/namespaces/{namespace}/{contract.PLURAL}"
    return f"{path}/{name}" if name else path


def wait_until(
    look: Callable[[], T | None], timeout_s: float, what: str, every_s: float = 0.5
) -> T:
    """What ``look`` returns once it is not None; raises TookTooLong."""
    end = time.monotonic() + timeout_s
    while (found := look()) is None:
        if time.monotonic() > end:
            raise TookTooLong(f"no {what} within {timeout_s:.0f} s")
        time.sleep(every_s)
    return found


@contextmanager
def endpoint(kube: Kube, service: str, port: int) -> Iterator[str]:
    """A URL of a Service: its own address where this machine reaches it, else a port-forward."""
    address = kube.get("service", service)["spec"]["clusterIP"]
    if _reaches(address, port):
        yield f"http://{address}:{port}"
        return
    process = kube.popen("port-forward", f"service/{service}", f":{port}")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # Forwarding from 127.0.0.1:40123 -> 8000
        if not line:
            _, problem = process.communicate(timeout=10)
            raise KubectlFailed(f"port-forward to {service}: {problem.strip()}")
        for pipe in (process.stdout, process.stderr):  # a line for each connection: full, it blocks
            threading.Thread(target=deque, args=(pipe, 0), daemon=True).start()
        yield f"http://127.0.0.1:{line.split('127.0.0.1:', 1)[1].split()[0]}"
    finally:
        process.terminate()
        process.wait(10)


def _reaches(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False
