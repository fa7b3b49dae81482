"""Every Kopf decorator and nothing else: no ``if`` about the domain lives here.

One daemon per PrismModel runs the level-triggered loop; events only wake it. The daemon must never
return or raise before it is told to stop, because Kopf would not start it again. Nothing is kept in
annotations, and status is written by our own gateway: Kopf's ``patch`` in a daemon ends it for good
when a write fails.
"""

import asyncio
import contextlib
import copy
import functools
import itertools
import logging
import random
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import kopf
from aiohttp import web
from prism import contract

from prism_operator.config import Config
from prism_operator.kube import Kube
from prism_operator.meters import Meters
from prism_operator.pods import Context
from prism_operator.reconcile import Reconciler
from prism_operator.telemetry import Telemetry
from prism_operator.wake import Wakes

BACKOFF_S = (1, 2, 5, 10, 20, 40, 60)
STUCK_S = 600.0  # a loop that has not come round for this long is reported by the probe
CHILDREN = (("batch", "v1", "jobs"), ("apps", "v1", "deployments"), ("", "v1", "pods"))

log = logging.getLogger("prism.handlers")


class _Backoffs:
    """Kopf's waits between tries, without end: an API server's upgrade is to be sat out."""

    def __iter__(self) -> Iterator[float]:
        for wait in itertools.chain((1, 1, 2, 3, 5, 8, 13), itertools.repeat(20)):
            yield wait * random.uniform(0.8, 1.2)


def configure(settings: kopf.OperatorSettings) -> None:
    """Settings whose defaults would write annotations, join other operators or wait for ever."""
    settings.persistence.finalizer = f"{contract.GROUP}/operator"
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = _Backoffs()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.chunk_size = 500
    for child in CHILDREN:
        settings.watching.label_selectors[child] = contract.LABEL_MODEL
    settings.background.cancellation_polling = 5
    settings.process.ultimate_exiting_timeout = 30


def register(registry: kopf.OperatorRegistry, config: Config, health: bool = True) -> None:
    """Put all handlers into the registry; tests use one of their own."""

    @kopf.on.startup(errors=kopf.ErrorsMode.PERMANENT, registry=registry)
    async def startup(
        settings: kopf.OperatorSettings, memo: kopf.Memo, logger: Any, **_: Any
    ) -> None:
        configure(settings)
        log.info("%s", config.describe())  # Kopf's own logger is set to warnings
        memo.kube = await Kube.connect()
        while not await memo.kube.serves(contract.KIND):
            # Scanning is off, so a kind that appears later would never be noticed.
            logger.warning("the kind %s is not there yet; is the CRD installed?", contract.KIND)
            await asyncio.sleep(2)
        memo.session = aiohttp.ClientSession()
        memo.telemetry = Telemetry(config.prometheus_url, memo.session, config.tick_s)
        memo.meters = Meters()
        memo.reconciler = Reconciler(
            memo.kube, memo.telemetry, context(config), memo.meters, config.tick_s
        )
        memo.wakes = Wakes()
        memo.rounds = {}  # key -> when its loop last came round
        memo.tasks = []
        if config.prometheus_url:
            memo.tasks.append(asyncio.create_task(memo.telemetry.run()))
        memo.web = await _serve_metrics(memo.meters, config.metrics_port) if health else None

    @kopf.on.cleanup(registry=registry)
    async def cleanup(memo: kopf.Memo, **_: Any) -> None:
        for task in memo.tasks:
            task.cancel()
        await asyncio.gather(*memo.tasks, return_exceptions=True)
        if memo.web:
            await memo.web.cleanup()
        await memo.session.close()
        await memo.kube.close()

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.probe(id="loops", errors=kopf.ErrorsMode.PERMANENT, registry=registry)
    async def probe(memo: kopf.Memo, **_: Any) -> int:
        now = time.monotonic()
        stuck = [key for key, seen in memo.rounds.items() if now - seen > STUCK_S]
        if stuck:
            raise kopf.PermanentError(f"loops that do not come round: {stuck}")
        return len(memo.rounds)

    @kopf.on.event(contract.GROUP, contract.VERSION, contract.PLURAL, registry=registry)
    async def on_object(memo: kopf.Memo, namespace: str, name: str, meta: Any, **_: Any) -> None:
        mark = (meta.get("uid"), meta.get("generation"), meta.get("deletionTimestamp"))
        memo.wakes.changed((namespace, name), mark)

    async def on_child(memo: kopf.Memo, namespace: str, meta: Any, **_: Any) -> None:
        if name := (meta.get("labels") or {}).get(contract.LABEL_MODEL):
            memo.wakes.now((namespace, name))

    for group, version, plural in CHILDREN:
        kopf.on.event(group, version, plural, id=f"on-{plural}", registry=registry)(on_child)

    @kopf.daemon(
        contract.GROUP,
        contract.VERSION,
        contract.PLURAL,
        cancellation_timeout=10,
        registry=registry,
    )
    async def keep(
        memo: kopf.Memo,
        body: kopf.Body,
        uid: str,
        namespace: str,
        name: str,
        stopped: Any,
        logger: Any,
        **_: Any,
    ) -> None:
        key = (namespace, name)
        try:
            with memo.wakes.subscribe(key) as event:
                await _loop(memo, body, key, event, stopped, logger)
        finally:
            memo.rounds.pop(key, None)
            memo.reconciler.forget(namespace, name, uid)


async def _loop(
    memo: kopf.Memo,
    body: kopf.Body,
    key: tuple[str, str],
    event: asyncio.Event,
    stopped: Any,
    logger: Any,
) -> None:
    failures, woken = 0, True
    while not stopped:
        memo.rounds[key] = time.monotonic()
        event.clear()  # before the snapshot, or a change would be lost
        try:
            # ``body`` is a live view: one snapshot per pass.
            delay = await memo.reconciler.step(copy.deepcopy(dict(body)), woken=woken)
            failures = 0
        except Exception as error:  # nothing may escape: the daemon would not come back
            memo.meters.errors.labels(*key).inc()
            delay = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
            failures += 1
            logger.warning("pass failed, again in %s s: %s", delay, error or type(error).__name__)
        woken = False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), delay)
            woken = True
            await asyncio.sleep(0.05)  # a burst of events is one pass
        woken = woken or failures > 0


def context(config: Config) -> Context:
    """What the manifests need of the settings."""
    return Context(
        refactor_image=config.refactor_image,
        serving_image=config.serving_image,
        namespace=config.namespace,
        admin_key=config.admin_key,
        pull_policy=config.image_pull_policy,
        pull_secrets=config.image_pull_secrets,
    )


async def _serve_metrics(meters: Meters, port: int) -> web.AppRunner:
    async def answer(meters: Meters, _: web.Request) -> web.Response:
        kind = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=meters.text(), headers=kind)

    app = web.Application()
    app.router.add_get(contract.PATH_METRICS, functools.partial(answer, meters))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port).start()
    return runner
