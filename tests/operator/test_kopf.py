"""The real operator under Kopf, over HTTP: the way of one object, restarts, deletion, silence."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kopf
import pytest
from prism import contract
from prism_operator import handlers, names
from prism_operator.config import Config

from . import controllers
from .cluster import FakeCluster
from .http_server import FakeApiServer
from .pods_and_prometheus import Pod, Prometheus, listen

Json = dict[str, Any]
Make = Callable[..., Json]
KEY = b"k" * 32


class Stack:
    """Fake API server, one serving pod, Prometheus, and operators that come and go."""

    def __init__(self, server: FakeApiServer, folder: Path) -> None:
        self.server, self.cluster = server, server.cluster
        self.pod = Pod(names.admin_token(KEY, "uid-tiny"))
        self.prometheus = Prometheus()
        self.folder = folder

    async def start(self) -> None:
        pod, self.pod.api_port = await listen(self.pod.app())
        self.pod.admin_port = self.pod.api_port
        prometheus, port = await listen(self.prometheus.app())
        self.server.others += [pod, prometheus]
        self.prometheus.url = f"http://127.0.0.1:{port}"

    @contextmanager
    def operator(self) -> Iterator[None]:
        config = Config(
            serving_image="serving:1",
            refactor_image="refactor:1",
            admin_key=KEY,
            namespace="prism-system",
            prometheus_url=self.prometheus.url,
            tick_s=0.1,
        )
        stop, ready, failure = threading.Event(), threading.Event(), []

        def run() -> None:
            registry = kopf.OperatorRegistry()
            handlers.register(registry, config, health=False)
            try:
                asyncio.run(
                    kopf.operator(
                        registry=registry,
                        standalone=True,
                        clusterwide=True,
                        stop_flag=stop,
                        ready_flag=ready,
                    )
                )
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert ready.wait(20), failure
        try:
            yield
        finally:
            stop.set()
            thread.join(20)
            assert not thread.is_alive() and not failure, failure

    def turn(self) -> None:
        """Controllers of the cluster do their work once."""

        def work() -> None:
            controllers.finish_jobs(self.cluster)
            address = ("127.0.0.1", self.pod.api_port, self.pod.admin_port)
            controllers.run_deployments(self.cluster, address)

        self.server.call(work)

    def until(self, what: Callable[[], Any], seconds: float = 20, turn: bool = True) -> Any:
        """Wait for something true, with the controllers at work."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if turn:
                self.turn()
            if found := self.server.call(what):
                return found
            time.sleep(0.05)
        body = self.server.call(lambda: self.cluster.get("prismmodels", "llm", "tiny"))
        raise AssertionError(f"not reached; status {json.dumps((body or {}).get('status'))}")

    def status(self) -> Json:
        body = self.cluster.get("prismmodels", "llm", "tiny") or {}
        return dict(body.get("status") or {})

    def load(self, requests: float) -> None:
        series = {
            ("prism:requests_received_total", ""): 15 * requests,
            ("prism:prompt_tokens_received_total", ""): 15 * 400 * requests,
        }
        self.prometheus.values = {"llm/tiny": series}


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    with FakeApiServer(FakeCluster()).running() as server:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "t",
            "clusters": [{"name": "c", "cluster": {"server": server.url}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "t", "context": {"cluster": "c", "user": "u"}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(path))
        stack = Stack(server, tmp_path)
        asyncio.run_coroutine_threadsafe(stack.start(), server.loop).result(10)
        stack.load(0)
        meta = {"name": "models", "namespace": "llm"}
        claim = {"metadata": meta, "spec": {}, "status": {"phase": "Bound"}}
        server.call(lambda: stack.cluster.put_new("persistentvolumeclaims", claim))
        yield stack


def quick(make_body: Make) -> Json:
    """A model whose clocks are short enough for a test."""
    behavior = {
        "up": {"stabilizationWindowSeconds": 1, "maxStepPercent": 50},
        "down": {"stabilizationWindowSeconds": 1, "maxStepPercent": 100},
    }
    body = make_body(elasticity={"behavior": behavior})
    del body["metadata"]["uid"]
    return body


def create(stack: Stack, body: Json) -> None:
    def work() -> None:
        body["metadata"]["uid"] = "uid-tiny"
        stack.cluster.put_new("prismmodels", body)

    stack.server.call(work)


def test_the_way_of_an_object_from_apply_to_delete(stack: Stack, make_body: Make) -> None:
    with stack.operator():
        create(stack, quick(make_body))
        stack.until(lambda: stack.status().get("phase") == "Refactoring", turn=False)
        stack.until(lambda: stack.status().get("phase") == "Serving")
        stack.until(lambda: stack.status()["level"]["applied"] == 1)
        stack.load(12)
        stack.until(lambda: stack.status()["level"]["desired"] < 100, 10)
        assert stack.pod.level["ceiling"] < 100
        stack.load(0)
        stack.until(lambda: stack.status()["level"]["desired"] == 100, 15)
        stack.until(lambda: stack.pod.level["ceiling"] == 100, 5)

        # Silence: twenty-five ticks are two minutes of the real operator's.
        stack.turn()
        time.sleep(0.5)
        before = stack.server.call(lambda: len(stack.cluster.writes))
        asked = len(stack.prometheus.queries)
        time.sleep(2.5)
        written = stack.server.call(lambda: stack.cluster.writes[before:])
        assert written == [] and len(stack.prometheus.queries) > asked

        body = stack.cluster.get("prismmodels", "llm", "tiny")
        assert body is not None and "annotations" not in body["metadata"]
        assert body["metadata"]["finalizers"] == ["moeprism.io/operator"]
        assert body["metadata"]["generation"] == 1
        stack.server.call(lambda: stack.cluster.remove("prismmodels", "llm", "tiny"))
        stack.until(lambda: not stack.cluster.get("prismmodels", "llm", "tiny"), 10, turn=False)
        assert not stack.cluster.list("deployments") and not stack.cluster.list("jobs")


def test_nobody_elses_children_are_watched(stack: Stack) -> None:
    """A cluster has thousands of pods; only those of PrismModels are listed and followed."""
    with stack.operator():
        watches = stack.until(lambda: len(stack.server.watches) == 4 and [*stack.server.watches])
        chosen = {plural: selector for plural, _, selector, _ in watches}
        assert chosen.pop("prismmodels") == ""
        assert chosen == dict.fromkeys(("jobs", "deployments", "pods"), contract.LABEL_MODEL)


def test_an_operator_that_restarts_finishes_what_the_last_one_began(
    stack: Stack, make_body: Make
) -> None:
    create(stack, quick(make_body))
    with stack.operator():
        stack.until(lambda: stack.cluster.list("jobs"), turn=False)
    stack.turn()  # the Job ends while nobody looks
    with stack.operator():
        stack.until(lambda: stack.status().get("phase") == "Serving")
        stack.load(12)
        stack.until(lambda: stack.status()["level"]["desired"] < 100)
    low = stack.server.call(lambda: stack.status()["level"]["desired"])
    deployments = [w for w in stack.cluster.writes if w.plural == "deployments"]
    with stack.operator():
        time.sleep(1)
        assert stack.server.call(lambda: stack.status()["level"]["desired"]) == low
        stack.load(0)
        stack.until(lambda: stack.status()["level"]["desired"] == 100)
    assert [w for w in stack.cluster.writes if w.plural == "deployments"] == deployments


def test_a_change_of_the_spec_and_of_a_child_wake_the_loop(stack: Stack, make_body: Make) -> None:
    with stack.operator():
        create(stack, quick(make_body))
        stack.until(lambda: stack.status().get("phase") == "Serving")

        def scale(body: Json) -> None:
            body["spec"]["serving"] = {"replicas": 3}

        stack.server.call(lambda: stack.cluster.edit("prismmodels", "llm", "tiny", scale))
        stack.until(lambda: stack.status().get("readyReplicas") == 3)
        stack.server.call(lambda: stack.cluster.remove("deployments", "llm", "tiny"))
        stack.until(lambda: stack.cluster.get("deployments", "llm", "tiny"), turn=False)


def test_a_failing_api_server_is_sat_out(stack: Stack, make_body: Make) -> None:
    from prism_operator.kube import Unavailable

    until = time.monotonic() + 2

    def fault(write: Any) -> None:
        if time.monotonic() < until:
            raise Unavailable("etcd has no leader")

    with stack.operator():
        stack.cluster.fault = fault
        create(stack, quick(make_body))
        stack.until(lambda: stack.status().get("phase") == "Serving", 30)
