"""The gateway process: two HTTP ports, the engine client, signals and drain.

Knows: the order of start and end. Must not know: requests.

On SIGTERM: new requests get 503, /readyz says no, what runs is finished up to the drain time, then
the ports close. A second signal ends at once.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn
from prism.contract import ExitCode

from prism_serving import logs
from prism_serving.control import Bounds, ControlError, Slo, read_bounds, read_slo
from prism_serving.gateway import admin as admin_port
from prism_serving.gateway import api as api_port
from prism_serving.gateway import text as text_module
from prism_serving.gateway.admission import Admission
from prism_serving.gateway.client import EngineClient
from prism_serving.gateway.metrics import Metrics
from prism_serving.gateway.options import GatewayOptions
from prism_serving.gateway.watch import ControlWatch

_log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: drain is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(slots=True)
class Gateway:
    """Builds all parts. `run` returns the exit code."""

    options: GatewayOptions
    admission: Admission
    client: EngineClient
    _signals: int = 0
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _now: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> int:
        """Until a signal, or until a part fails."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._signalled)
        o = self.options
        api = api_port.Api(self.admission, o.max_body_bytes, int(time.time()))
        admin = admin_port.Admin(self.client, o.admin_token_sha256)
        servers = [
            _server(api_port.build_app(api), o.host, o.port),
            _server(admin_port.build_app(admin), o.admin_host, o.admin_port),
        ]
        watch = ControlWatch(o.control_dir, self.client)
        background = [asyncio.create_task(self.client.run()), asyncio.create_task(watch.run())]
        serving = [asyncio.create_task(server.serve()) for server in servers]
        stop = asyncio.create_task(self._stop.wait())
        _log.info(
            logs.fields(
                "listening", host=o.host, port=o.port, admin_port=o.admin_port, model=o.model_name
            )
        )
        await asyncio.wait([*background, *serving, stop], return_when=asyncio.FIRST_COMPLETED)
        clean = stop.done()
        if clean:
            await self._drain()
        for server in servers:
            server.should_exit = True
        await asyncio.wait(serving, timeout=5)
        for task in (*background, *serving, stop):
            task.cancel()
        results = await asyncio.gather(*background, *serving, return_exceptions=True)
        return _exit_code(clean, results)

    def _signalled(self) -> None:
        self._signals += 1
        self.admission.is_draining = True
        (self._stop if self._signals == 1 else self._now).set()

    async def _drain(self) -> None:
        deadline_s = time.monotonic() + self.options.drain_s
        _log.info(logs.fields("draining", in_flight=self.admission.in_flight))
        while self.admission.in_flight and time.monotonic() < deadline_s:
            if self._now.is_set():
                break
            await asyncio.sleep(0.05)
        _log.info(logs.fields("drained", cut_off=self.admission.in_flight))


def _exit_code(clean: bool, results: Sequence[object]) -> int:
    errors = [r for r in results if isinstance(r, BaseException)]
    errors = [e for e in errors if not isinstance(e, asyncio.CancelledError)]
    for error in errors:
        _log.error("a part of the gateway failed", exc_info=error)
    return int(ExitCode.OK if clean and not errors else ExitCode.FAILED)


def _server(app: object, host: str, port: int) -> _Server:
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]  # an ASGI application
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    return _Server(config)


def build(options: GatewayOptions) -> Gateway:
    """Raises OSError or ValueError when the artifact's tokenizer cannot be read."""
    slo, bounds = _initial(options)
    text = text_module.load(options.artifact)
    metrics = Metrics(options.model_name, options.prism_model, slo)
    metrics.set_bounds(bounds)
    client = EngineClient(options.socket, metrics, bounds, slo)
    admission = Admission(options.model_name, text, client, metrics, options.max_waiting)
    return Gateway(options, admission, client)


def _initial(options: GatewayOptions) -> tuple[Slo, Bounds]:
    try:
        slo, bounds = read_slo(options.control_dir), read_bounds(options.control_dir)
    except ControlError as error:
        _log.error(logs.fields("control file ignored", reason=error))
        return Slo(), Bounds()
    return slo or Slo(), bounds or Bounds()


async def run(options: GatewayOptions) -> int:
    """Run the gateway in this process; returns the exit code."""
    try:
        gateway = build(options)
    except (OSError, ValueError) as error:
        _log.error(logs.fields("cannot read the artifact", path=options.artifact, reason=error))
        return int(ExitCode.BAD_INPUT)
    return await gateway.run()
