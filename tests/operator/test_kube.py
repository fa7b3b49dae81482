"""The gateway: which answer of the API server becomes which error, and what goes over the wire."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from prism_operator.kube import Conflict, Kube, Refused, Unavailable

from .pods_and_prometheus import listen

Json = dict[str, Any]


class Api:
    """Answers everything with ``code`` and remembers the last request."""

    code = 200
    text = '{"metadata": {"name": "x"}}'
    last: Json = {}  # noqa: RUF012 - replaced, never changed

    async def answer(self, request: web.Request) -> web.Response:
        self.last = {
            "method": request.method,
            "path": request.path,
            "query": dict(request.query),
            "type": request.content_type,
            "body": await request.text(),
        }
        return web.Response(status=self.code, text=self.text, content_type="application/json")


@pytest_asyncio.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Api, Kube]]:
    api, app = Api(), web.Application()
    app.router.add_route("*", "/{any:.*}", api.answer)
    runner, port = await listen(app)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "t",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": "t", "context": {"cluster": "c", "user": "u"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    kube = await Kube.connect()
    yield api, kube
    await kube.close()
    await runner.cleanup()


JOB = {"kind": "Job", "metadata": {"namespace": "n", "name": "j"}}


@pytest.mark.parametrize(
    ("code", "error"),
    [(400, Refused), (401, Unavailable), (403, Refused), (409, Conflict), (422, Refused),
     (429, Unavailable), (500, Unavailable), (503, Unavailable)],
)  # fmt: skip
async def test_the_type_of_an_error_says_what_to_do(
    api: tuple[Api, Kube], code: int, error: type[Exception]
) -> None:
    server, kube = api
    server.code, server.text = code, '{"message": "because"}'
    with pytest.raises(error, match=f"POST /apis/batch/v1/namespaces/n/jobs: {code} because"):
        await kube.create(JOB)
    assert kube.requests["POST", code] == 1


async def test_an_error_that_is_not_json_is_shown_as_it_is(api: tuple[Api, Kube]) -> None:
    server, kube = api
    server.code, server.text = 502, "<html>bad gateway"
    with pytest.raises(Unavailable, match="bad gateway"):
        await kube.create(JOB)


async def test_what_is_absent_is_none_and_deleting_it_is_fine(api: tuple[Api, Kube]) -> None:
    server, kube = api
    server.code, server.text = 404, "{}"
    assert await kube.get("Job", "n", "j") is None
    await kube.delete("Job", "n", "j")
    assert server.last["query"] == {"propagationPolicy": "Background"}
    assert not await kube.serves("PrismModel")


async def test_apply_takes_over_and_names_its_manager(api: tuple[Api, Kube]) -> None:
    server, kube = api
    await kube.apply(JOB, "prism-operator")
    assert server.last["method"] == "PATCH"
    assert server.last["path"] == "/apis/batch/v1/namespaces/n/jobs/j"
    assert server.last["type"] == "application/apply-patch+yaml"
    assert server.last["query"] == {"fieldManager": "prism-operator", "force": "true"}
    assert json.loads(server.last["body"]) == JOB
    await kube.apply_status(JOB, "prism-operator")
    assert server.last["path"].endswith("/jobs/j/status")


async def test_lists_ask_by_label(api: tuple[Api, Kube]) -> None:
    server, kube = api
    server.text = '{"items": [{"a": 1}]}'
    assert await kube.select("Pod", "n", "x=y") == [{"a": 1}]
    assert server.last["query"] == {"labelSelector": "x=y"}


async def test_nobody_there_is_unavailable(api: tuple[Api, Kube]) -> None:
    _, kube = api
    kube.api.configuration.host = "http://127.0.0.1:1"
    with pytest.raises(Unavailable):
        await kube.get("Job", "n", "j")
    assert not await kube.serves("Job")
