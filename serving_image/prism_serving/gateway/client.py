"""The gateway's side of the socket: submit, cancel, deltas, and whether an engine is there.

Knows: the handshake, heartbeat, reconnect. Must not know: HTTP, text, metrics names.

The connection is watched twice: libzmq's monitor reports a closed socket at once (a killed engine),
heartbeats find one that hangs. When the engine is lost every open request ends with an error; a new
engine gets the level bounds and targets before any request.

One decision worth arguing about: the session id is kept over reconnects of the same engine, but
requests are not resumed. A connection over a unix socket does not break unless a process dies.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from prism_serving import logs, protocol
from prism_serving.control import Bounds, Slo, wins

_log = logging.getLogger(__name__)

GRACE_S: Final = 15.0  # the pod stays ready this long without its engine
LOST: Final = "the engine went away while this request ran; retry"

Sink = Callable[[protocol.Delta], None]


class Reports(Protocol):
    """Who keeps the numbers."""

    def engine_stats(self, stats: protocol.Stats) -> None:
        """The engine reported."""

    def engine_lost(self) -> None:
        """There is no engine to report."""


@dataclass(slots=True)
class EngineClient:
    """One engine behind one socket. All methods run in the event loop."""

    socket_path: Path
    reports: Reports
    bounds: Bounds = field(default_factory=Bounds)
    slo: Slo = field(default_factory=Slo)
    state: protocol.State | None = None
    stats: protocol.Stats | None = None
    lost_at_s: float | None = None
    was_ready: bool = False
    _session: str = field(default_factory=lambda: uuid.uuid4().hex)
    _engine: str | None = None
    _heard_s: float = 0.0
    _sinks: dict[str, Sink] = field(default_factory=dict)
    _socket: Any = None  # zmq.asyncio.Socket; its stubs are incomplete
    _refused: str | None = None

    @property
    def is_ready(self) -> bool:
        """An engine is connected and takes requests."""
        return self.state is not None and self.state.phase == "ready"

    @property
    def is_ready_or_in_grace(self) -> bool:
        """Ready, or was until a moment ago: short enough to keep the pod in its Service."""
        if self.is_ready:
            return True
        lost_s = self.lost_at_s
        return self.was_ready and lost_s is not None and time.monotonic() - lost_s < GRACE_S

    @property
    def why_not_ready(self) -> str:
        """One sentence for the 503."""
        if self._refused:
            return self._refused
        if self.state is None:
            return "the engine is not connected"
        if self.state.phase == "failed":
            return f"the engine cannot serve: {self.state.detail}"
        return f"the engine is {self.state.phase}"

    async def run(self) -> None:
        """Until cancelled."""
        context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.immediate = 1  # never queue for an engine that is not there
        self._socket.sndhwm = self._socket.rcvhwm = 100_000
        self._socket.reconnect_ivl = 50
        self._socket.reconnect_ivl_max = 1000
        monitor = self._socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(f"ipc://{self.socket_path}")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(monitor))
                tasks.create_task(self._receive())
                tasks.create_task(self._beat())
        finally:
            self._socket.disable_monitor()
            monitor.close(linger=0)  # the context waits for every socket
            self._socket.close(linger=0)
            context.term()

    def submit(self, request: protocol.Submit, sink: Sink) -> None:
        """Send a request; its deltas go to `sink`. The last one has `finish`."""
        self._sinks[request.request] = sink
        if not self._send(request):
            self._lose("the socket does not take messages")

    def cancel(self, requests: list[str]) -> None:
        """Stop requests whose end has not come; unknown ones are ignored."""
        known = [r for r in requests if self._sinks.pop(r, None) is not None]
        if known:
            self._send(protocol.Cancel(requests=known))

    def set_bounds(self, bounds: Bounds) -> bool:
        """Take bounds with a higher seq and pass them on; False when the current ones win."""
        if not wins(bounds, self.bounds):
            return False
        self.bounds = bounds
        self._send_bounds()
        return True

    def set_slo(self, slo: Slo) -> None:
        """Pass new targets on."""
        self.slo = slo
        self._send(protocol.SetSlo(ttft_ms=slo.ttft_ms, itl_ms=slo.itl_ms))

    def _send_bounds(self) -> None:
        b = self.bounds
        self._send(protocol.SetLevel(seq=b.seq, floor=b.floor, ceiling=b.ceiling))

    def _send(self, message: protocol.ToEngine) -> bool:
        if self._socket is None:
            return False
        # With NOBLOCK the future is done on return. NB: not the plain base class's send: libzmq
        # signals by edges, and a bare send would swallow the one a receive waits for.
        sent = self._socket.send(protocol.encode(message), zmq.NOBLOCK)
        failure = sent.exception()
        if failure is None:
            return True
        if isinstance(failure, zmq.Again):
            return False
        raise failure

    async def _watch(self, monitor: Any) -> None:
        while True:
            event = await recv_monitor_message(monitor)
            if event["event"] == zmq.EVENT_CONNECTED:
                hello = protocol.Hello(version=protocol.PROTOCOL_VERSION, session=self._session)
                self._heard_s = time.monotonic()
                for _ in range(200):  # connected, but the pipe may not be up yet
                    if self._send(hello):
                        break
                    await asyncio.sleep(0.01)
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                self._lose("the socket closed")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(protocol.HEARTBEAT_S)
            if self._engine is None:
                continue
            silent_s = time.monotonic() - self._heard_s
            if silent_s > protocol.LOST_AFTER_S:
                self._lose(f"silent for {silent_s:.0f} s")
            self._send(protocol.Ping(sent_s=time.monotonic()))

    async def _receive(self) -> None:
        while True:
            data = await self._socket.recv()
            self._heard_s = time.monotonic()
            try:
                self._handle(protocol.decode_to_gateway(data))
            except protocol.ProtocolError as error:
                _log.error(logs.fields("message dropped", reason=error))

    def _handle(self, message: protocol.ToGateway) -> None:
        match message:
            case protocol.Deltas(items=items):
                for delta in items:
                    self._deliver(delta)
            case protocol.Stats():
                self.stats = message
                self.reports.engine_stats(message)
            case protocol.Welcome():
                self._welcome(message)
            case protocol.State():
                self._set_state(message)
            case protocol.Pong():
                pass

    def _welcome(self, message: protocol.Welcome) -> None:
        try:
            protocol.require_same_version(message.version, "the engine")
        except protocol.ProtocolError as error:
            self._refused = str(error)
            _log.error(logs.fields("engine refused", reason=error))
            return
        self._refused = None
        if self._engine not in (None, message.engine):
            self._lose("another engine answered")
        self._engine = message.engine
        _log.info(logs.fields("engine connected", pid=message.pid))
        self._send_bounds()
        self._send(protocol.SetSlo(ttft_ms=self.slo.ttft_ms, itl_ms=self.slo.itl_ms))

    def _set_state(self, state: protocol.State) -> None:
        if self._refused:
            return
        self.state = state
        if state.phase == "ready":
            self.was_ready, self.lost_at_s = True, None
        detail = state.detail or None
        _log.info(logs.fields("engine state", phase=state.phase, detail=detail))

    def _deliver(self, delta: protocol.Delta) -> None:
        sink = self._sinks.get(delta.request)
        if sink is None:
            return  # cancelled here; the engine had not heard yet
        if delta.finish is not None:
            del self._sinks[delta.request]
        sink(delta)

    def _lose(self, why: str) -> None:
        if self._engine is None and not self._sinks:
            return
        _log.warning(logs.fields("engine lost", why=why, requests=len(self._sinks)))
        was_draining = self.state is not None and self.state.phase == "draining"
        self._engine, self.state = None, None
        self.reports.engine_lost()
        if self.lost_at_s is None:
            self.lost_at_s = time.monotonic()
        if was_draining:
            self.was_ready = False  # it left on purpose: no grace
        sinks, self._sinks = self._sinks, {}
        for request, sink in sinks.items():
            with contextlib.suppress(asyncio.QueueFull):
                sink(protocol.Delta(request=request, finish="lost", error=LOST))
