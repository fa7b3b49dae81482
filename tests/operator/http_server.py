"""The fake cluster behind HTTP, in its own thread: enough of an API server for Kopf and kube.py."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aiohttp import web
from prism_operator.kube import PATHS, Conflict, Refused, Unavailable

from .cluster import FakeCluster, matches

Json = dict[str, Any]
# Kopf waits for these two to be discovered, even where it never reads them.
DISCOVERED = {
    **PATHS,
    "Namespace": ("/api/v1", "namespaces"),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions"),
}
PLURALS = {plural: kind for kind, (_, plural) in PATHS.items()}


class FakeApiServer:
    """``url`` is set once it listens. One thread answers, so the store needs no lock."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.url = ""
        self.watches: list[tuple[str, str, str, asyncio.Queue[Json | None]]] = []
        self.others: list[web.AppRunner] = []  # servers that share the thread

    @contextmanager
    def running(self) -> Iterator["FakeApiServer"]:
        ready, loop = threading.Event(), asyncio.new_event_loop()
        done = asyncio.Event()

        async def serve() -> None:
            self.cluster.listeners.append(self._told)
            runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=0.2)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self.loop = loop
            ready.set()
            await done.wait()
            for *_, queue in self.watches:
                queue.put_nowait(None)  # the end of the stream
            for one in (runner, *self.others):
                await one.cleanup()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(done.set)
            thread.join(10)
            loop.close()

    def call(self, work: Any) -> Any:
        """Run ``work()`` in the server's thread, where the store is safe to touch."""

        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/version", lambda _: _json({"major": "1", "minor": "34"}))
        app.router.add_get("/api", lambda _: _json({"versions": ["v1"]}))
        app.router.add_get("/apis", self._groups)
        for base in ("/api/{version}", "/apis/{group}/{version}"):
            app.router.add_get(base, self._discover)
            for path in ("/{plural}", "/namespaces/{ns}/{plural}"):
                app.router.add_get(base + path, self._list)
                app.router.add_post(base + path, self._create)
            one = base + "/namespaces/{ns}/{plural}/{name}"
            app.router.add_get(one, self._get)
            app.router.add_delete(one, self._delete)
            app.router.add_patch(one, self._patch)
            app.router.add_patch(one + "/{sub}", self._patch)
        return app

    async def _groups(self, _: web.Request) -> web.Response:
        groups: dict[str, set[str]] = {}
        for prefix, _plural in DISCOVERED.values():
            if prefix.startswith("/apis/"):
                _, _, group, version = prefix.split("/")
                groups.setdefault(group, set()).add(version)
        rows = []
        for group, versions in groups.items():
            named = [{"groupVersion": f"{group}/{v}", "version": v} for v in versions]
            rows.append({"name": group, "versions": named, "preferredVersion": named[0]})
        return _json({"kind": "APIGroupList", "groups": rows})

    async def _discover(self, request: web.Request) -> web.Response:
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        rows: list[Json] = []
        for kind, (prefix, plural) in DISCOVERED.items():
            if prefix == request.path:
                row = {"kind": kind, "namespaced": True, "verbs": verbs, "singularName": ""}
                rows.append({**row, "name": plural})
                rows.append({**row, "name": f"{plural}/status"})
        return _json({"kind": "APIResourceList", "resources": rows})

    async def _list(self, request: web.Request) -> web.StreamResponse:
        plural, namespace = request.match_info["plural"], request.match_info.get("ns", "")
        selector = request.query.get("labelSelector", "")
        if request.query.get("watch") in ("true", "1"):
            return await self._watch(request, plural, namespace, selector)
        items = self.cluster.list(plural, namespace, selector)
        meta = {"resourceVersion": self.cluster.version}
        return _json({"kind": PLURALS[plural] + "List", "metadata": meta, "items": items})

    async def _watch(
        self, request: web.Request, plural: str, namespace: str, selector: str
    ) -> web.StreamResponse:
        queue: asyncio.Queue[Json | None] = asyncio.Queue()
        entry = (plural, namespace, selector, queue)
        since = int(request.query.get("resourceVersion") or 0)
        for body in self.cluster.list(plural, namespace, selector):
            if int(body["metadata"]["resourceVersion"]) > since:
                queue.put_nowait({"type": "MODIFIED", "object": body})
        self.watches.append(entry)
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        try:
            with suppress(ConnectionError):
                while (event := await queue.get()) is not None:
                    await answer.write(json.dumps(event).encode() + b"\n")
        finally:
            self.watches.remove(entry)
        return answer

    def _told(self, event: str, plural: str, body: Json) -> None:
        for kind, namespace, selector, queue in self.watches:
            where = body["metadata"]["namespace"]
            if kind == plural and namespace in ("", where) and matches(body, selector):
                queue.put_nowait({"type": event, "object": body})

    async def _get(self, request: web.Request) -> web.Response:
        info = request.match_info
        found = self.cluster.get(info["plural"], info["ns"], info["name"])
        return _json(found) if found else _failure(404, "not found")

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        plural = request.match_info["plural"]
        return self._answer(lambda: self.cluster.create(plural, body), 201)

    async def _delete(self, request: web.Request) -> web.Response:
        info = request.match_info
        if self.cluster.get(info["plural"], info["ns"], info["name"]) is None:
            return _failure(404, "not found")
        self.cluster.delete(info["plural"], info["ns"], info["name"])
        return _json({"kind": "Status", "status": "Success"})

    async def _patch(self, request: web.Request) -> web.Response:
        info, sub = request.match_info, request.match_info.get("sub", "")
        body = json.loads(await request.text())
        if request.content_type == "application/apply-patch+yaml":
            manager = request.query["fieldManager"]
            return self._answer(lambda: self.cluster.apply(info["plural"], body, manager, sub))
        where = (info["plural"], info["ns"], info["name"])
        return self._answer(lambda: self.cluster.patch(*where, body, sub))

    def _answer(self, work: Any, code: int = 200) -> web.Response:
        try:
            return _json(work(), code)
        except Conflict as error:
            return _failure(409, str(error))
        except Unavailable as error:
            return _failure(503, str(error))
        except Refused as error:
            return _failure(404 if str(error).startswith("404") else 422, str(error))


def _json(value: Any, code: int = 200) -> web.Response:
    return web.json_response(value, status=code)


def _failure(code: int, message: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": code, "message": message}
    return web.json_response(body, status=code)
