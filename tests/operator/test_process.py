"""``python -m prism_operator`` as a process on a real API server: start, work, silence, end."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .real_apiserver import ApiServer

Json = dict[str, Any]
Make = Callable[..., Json]
MODELS = "/apis/moeprism.io/v1alpha1/namespaces/llm/prismmodels"
JOBS = "/apis/batch/v1/namespaces/llm/jobs"
MERGE = "application/merge-patch+json"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""
    except OSError:
        return 0, ""


def until(what: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("not reached")


class Process:
    def __init__(self, server: ApiServer, folder: Path) -> None:
        key = folder / "key"
        key.write_bytes(b"k" * 32)
        self.health, self.metrics = free_port(), free_port()
        self.log = folder / "log"
        env = {
            **os.environ,
            "KUBECONFIG": str(server.kubeconfig()),
            "PRISM_SERVING_IMAGE": "serving:1",
            "PRISM_REFACTOR_IMAGE": "refactor:1",
            "PRISM_NAMESPACE": "prism-system",
            "PRISM_ADMIN_KEY_FILE": str(key),
            "PRISM_TICK_SECONDS": "0.2",
            "PRISM_HEALTH_PORT": str(self.health),
            "PRISM_METRICS_PORT": str(self.metrics),
        }
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "prism_operator"]
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture
def process(apiserver: ApiServer, tmp_path: Path) -> Iterator[Process]:
    started = Process(apiserver, tmp_path)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()


def clean(server: ApiServer, name: str) -> None:
    server.request("DELETE", f"{MODELS}/{name}")
    body = {"metadata": {"finalizers": None}}
    server.request("PATCH", f"{MODELS}/{name}", body, MERGE)


@pytest.mark.apiserver
def test_it_starts_works_is_silent_and_ends(
    apiserver: ApiServer, process: Process, make_body: Make
) -> None:
    until(lambda: get(process.health, "/healthz")[0] == 200, 40)
    body = make_body("real", cache={"pvc": None, "create": {"size": "1Gi"}})
    for key in ("uid", "generation"):
        del body["metadata"][key]
    claim = {
        "metadata": {"name": "models"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    assert (
        apiserver.request("POST", "/api/v1/namespaces/llm/persistentvolumeclaims", claim)[0] == 201
    )
    try:
        assert apiserver.request("POST", MODELS, body)[0] == 201

        def jobs() -> list[Json]:
            found = apiserver.request("GET", JOBS)[1]["items"]
            return [job for job in found if job["metadata"]["name"].startswith("real-refactor-")]

        (job,) = until(jobs)

        def phase() -> str:
            status = apiserver.request("GET", f"{MODELS}/real")[1].get("status") or {}
            return str(status.get("phase"))

        until(lambda: phase() == "Refactoring")
        assert get(process.metrics, "/metrics")[1].count("prism_reconcile_seconds_count") == 1
        version = apiserver.request("GET", f"{MODELS}/real")[1]["metadata"]["resourceVersion"]
        time.sleep(3)
        stored = apiserver.request("GET", f"{MODELS}/real")[1]
        assert stored["metadata"]["resourceVersion"] == version, "it wrote while nothing happened"
        assert stored["metadata"]["generation"] == 1
        managers = {m["manager"] for m in stored["metadata"]["managedFields"] if "subresource" in m}
        assert managers == {"prism-operator"}

        apiserver.request(
            "DELETE", f"{JOBS}/{job['metadata']['name']}?propagationPolicy=Background"
        )
        (second,) = until(
            lambda: [j for j in jobs() if j["metadata"]["uid"] != job["metadata"]["uid"]]
        )
        assert second["metadata"]["name"] == job["metadata"]["name"]

        apiserver.request("DELETE", f"{MODELS}/real")
        until(lambda: apiserver.request("GET", f"{MODELS}/real")[0] == 404, 15)
        assert process.end() == 0
        log = process.log.read_text()
        assert "Traceback" not in log
        assert "serving image serving:1" in log, "it tells its settings"
        assert "Handler" not in log, "a line for each event of each child would hide the rest"
    finally:
        clean(apiserver, "real")


def test_a_wrong_environment_ends_with_words_and_exit_code_2() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PRISM_")}
    command = [sys.executable, "-m", "prism_operator"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "PRISM_SERVING_IMAGE is not set" in done.stderr and "Traceback" not in done.stderr
