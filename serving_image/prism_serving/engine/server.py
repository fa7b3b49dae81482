"""The engine's I/O: one unix socket, the handshake, signals; owner of the compute thread.

Knows: sockets, the order of start and end. Must not know: scheduling, tensors.

The socket is bound before the model is loaded, so a gateway learns at once that an engine is there
and why it is not ready yet. A second gateway session replaces the first.

One decision worth arguing about: a gateway that goes silent is not cut off by a timer here. Its
requests are cancelled when it, or its successor, says hello again; a closed pod takes both along.
"""

import asyncio
import logging
import os
import signal
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio
from prism import contract
from prism.architectures import UnsupportedModel
from prism.artifact import ArtifactError
from prism.checkpoint import CheckpointError

from prism_serving import logs, protocol
from prism_serving.control import Bounds, ControlError, Slo, read_bounds, read_slo
from prism_serving.engine.attention import UnsupportedAttention
from prism_serving.engine.options import EngineOptions
from prism_serving.engine.start import build
from prism_serving.engine.worker import Command, Drain, NewSession, Worker

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineServer:
    """Serves one gateway at a time. `run` returns the process's exit code."""

    options: EngineOptions
    engine_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _socket: Any = None  # zmq.asyncio.Socket; its stubs are incomplete
    _loop: asyncio.AbstractEventLoop | None = None
    _peer: bytes | None = None
    _session: str = ""
    _state: protocol.State = field(default_factory=lambda: protocol.State(phase="loading"))
    _worker: Worker | None = None
    _early: list[Command] = field(default_factory=list)
    _done: asyncio.Event = field(default_factory=asyncio.Event)
    _outbox: "asyncio.Queue[bytes]" = field(default_factory=asyncio.Queue)
    _exit: int = contract.ExitCode.OK
    _drain_deadline_s: float | None = None

    async def run(self) -> int:
        """Until drained, stopped or failed."""
        self._loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(signum, self._drain)
        context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = 100_000
        self._socket.maxmsgsize = protocol.MAX_MESSAGE_BYTES
        self.options.socket.parent.mkdir(parents=True, exist_ok=True)
        self.options.socket.unlink(missing_ok=True)  # left by a killed engine
        self._socket.bind(f"ipc://{self.options.socket}")
        compute = threading.Thread(target=self._compute, name="compute", daemon=True)
        compute.start()
        tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._send_all())]
        waiter = asyncio.create_task(self._done.wait())
        finished, _ = await asyncio.wait([*tasks, waiter], return_when=asyncio.FIRST_COMPLETED)
        if waiter in finished:
            await self._flush_outbox()
        for task in (*tasks, waiter):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                _log.error("engine I/O failed", exc_info=result)
                self._exit = contract.ExitCode.FAILED
        self._socket.close()
        context.term()
        self.options.socket.unlink(missing_ok=True)
        return int(self._exit)

    async def _flush_outbox(self) -> None:
        for _ in range(200):
            if self._outbox.empty():
                return
            await asyncio.sleep(0.01)

    # Compute thread.

    def _compute(self) -> None:
        exit_code = contract.ExitCode.OK
        try:
            worker, state = build(self.options, *self._initial_control(), self._post)
            self._in_loop(self._ready, worker, state)
            worker.run()
        except (ArtifactError, CheckpointError, UnsupportedModel, UnsupportedAttention) as error:
            _log.error(logs.fields("cannot serve this artifact", reason=error))
            self._post(protocol.State(phase="failed", detail=str(error)))
            exit_code = contract.ExitCode.BAD_INPUT
        except Exception as error:  # the process ends: this is its last word
            _log.exception("engine failed")
            self._post(protocol.State(phase="failed", detail=str(error)))
            exit_code = contract.ExitCode.FAILED
        self._in_loop(self._finish, exit_code)

    def _initial_control(self) -> tuple[Bounds, Slo]:
        try:
            bounds = read_bounds(self.options.control_dir)
            slo = read_slo(self.options.control_dir)
        except ControlError as error:
            _log.error(logs.fields("control file ignored", reason=error))
            return Bounds(), Slo()
        return bounds or Bounds(), slo or Slo()

    def _post(self, message: protocol.ToGateway) -> None:
        data = protocol.encode(message)
        self._in_loop(self._outbox.put_nowait, data)

    def _in_loop(self, call: Any, *args: Any) -> None:  # any bound method with its arguments
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call, *args)

    # Event loop.

    def _ready(self, worker: Worker, state: protocol.State) -> None:
        self._worker = worker
        for command in self._early:
            worker.inbox.put(command)
        self._early.clear()
        self._set_state(state)
        _log.info(logs.fields("ready", context=state.max_context, kv_tokens=state.kv_tokens))
        if self._drain_deadline_s is not None:
            self._drain()

    def _set_state(self, state: protocol.State) -> None:
        self._state = state
        self._outbox.put_nowait(protocol.encode(state))

    def _finish(self, exit_code: int) -> None:
        self._exit = exit_code
        self._done.set()

    def _drain(self) -> None:
        if self._drain_deadline_s is None:
            self._drain_deadline_s = time.monotonic() + self.options.drain_s
        if self._worker is None:
            _log.info("stopped while loading")
            self._finish(contract.ExitCode.OK)
            return
        state = self._state
        self._set_state(
            protocol.State(
                phase="draining",
                max_context=state.max_context,
                kv_tokens=state.kv_tokens,
                max_running=state.max_running,
                levels=state.levels,
            )
        )
        self._worker.inbox.put(Drain(self._drain_deadline_s))

    async def _send_all(self) -> None:
        while True:
            data = await self._outbox.get()
            if self._peer is not None:
                await self._socket.send_multipart([self._peer, data])

    async def _receive(self) -> None:
        while True:
            peer, data = await self._socket.recv_multipart()
            try:
                message = protocol.decode_to_engine(data)
            except protocol.ProtocolError as error:
                _log.error(logs.fields("message dropped", reason=error))
                continue
            await self._handle(peer, message)

    async def _handle(self, peer: bytes, message: protocol.ToEngine) -> None:
        match message:
            case protocol.Hello(version=version, session=session):
                await self._hello(peer, version, session)
            case protocol.Ping(sent_s=sent_s):
                pong = protocol.encode(protocol.Pong(sent_s=sent_s))
                await self._socket.send_multipart([peer, pong])
            case _:
                if peer == self._peer:
                    self._command(message)

    async def _hello(self, peer: bytes, version: int, session: str) -> None:
        welcome = protocol.Welcome(
            version=protocol.PROTOCOL_VERSION, engine=self.engine_id, pid=os.getpid()
        )
        await self._socket.send_multipart([peer, protocol.encode(welcome)])
        try:
            protocol.require_same_version(version, "the gateway")
        except protocol.ProtocolError as error:
            _log.error(logs.fields("gateway refused", reason=error))
            return
        self._peer = peer
        if session != self._session:
            self._session = session
            self._command(NewSession())
        self._outbox.put_nowait(protocol.encode(self._state))

    def _command(self, command: Command) -> None:
        if self._worker is None:
            self._early.append(command)
        else:
            self._worker.inbox.put(command)


def run(options: EngineOptions) -> int:
    """Run the engine in this process; returns the exit code."""
    return asyncio.run(EngineServer(options).run())
