"""The compute thread: commands in, steps, deltas out.

Knows: the loop and its counters. Must not know: sockets (it is given a function to send with).

One decision worth arguing about: exactly one thread touches scheduler, model and sampler, so none
of them needs a lock. The I/O thread hands commands over in a queue, and the worker looks at it
between steps: a cancellation frees memory after at most one step.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch

from prism_serving import logs, protocol
from prism_serving.control import Bounds, Slo, wins
from prism_serving.engine import sampler
from prism_serving.engine.policy import Wish
from prism_serving.engine.runner import Runner
from prism_serving.engine.sampler import Draw
from prism_serving.engine.scheduler import Running, Scheduler, StepPlan, Token
from prism_serving.engine.stats import StatsWindow

_log = logging.getLogger(__name__)

_IDLE_WAIT_S: Final = 0.5
_FAILURES_BEFORE_EXIT: Final = 3


@dataclass(frozen=True, slots=True)
class NewSession:
    """A gateway said hello: requests of the one before it are nobody's any more."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what runs and waits, until `deadline_s`; then stop."""

    deadline_s: float


Command = (
    protocol.Submit | protocol.Cancel | protocol.SetLevel | protocol.SetSlo | NewSession | Drain
)
Send = Callable[[protocol.ToGateway], None]


@dataclass(slots=True)
class Worker:
    """`run` returns when drained; raises when steps keep failing."""

    scheduler: Scheduler
    runner: Runner
    send: Send
    clock: Callable[[], float] = time.monotonic
    inbox: "queue.SimpleQueue[Command]" = field(default_factory=queue.SimpleQueue)
    _draws: dict[str, random.Random] = field(default_factory=dict)
    _deadline_s: float | None = None
    _failures: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Leave after the step now running."""
        self._stop.set()

    def run(self) -> None:
        """Serve until drained or stopped."""
        window = StatsWindow(self.clock())
        while not self._stop.is_set():
            self._take_commands()
            if self._deadline_s is not None and self._is_drained():
                break
            if self.scheduler.is_idle:
                self._flush(window)
                self._wait()
                continue
            self._step(window)
            if window.is_due(self.clock()):
                self._flush(window)
        self._flush(window)

    def _flush(self, window: StatsWindow) -> None:
        now = self.clock()
        if window.is_due(now) or window.steps:
            self.send(window.take(self.scheduler, self.runner, now))

    def _is_drained(self) -> bool:
        assert self._deadline_s is not None
        if self.scheduler.is_idle:
            return True
        if self.clock() < self._deadline_s:
            return False
        left = [s.request for s in (*self.scheduler.running, *self.scheduler.waiting)]
        _log.warning(logs.fields("drain deadline passed", cut_off=len(left)))
        self._fail(left, "the server is shutting down")
        return True

    def _wait(self) -> None:
        try:
            self._apply(self.inbox.get(timeout=_IDLE_WAIT_S))
        except queue.Empty:
            return

    def _take_commands(self) -> None:
        while True:
            try:
                command = self.inbox.get_nowait()
            except queue.Empty:
                return
            self._apply(command)

    def _apply(self, command: Command) -> None:
        match command:
            case protocol.Submit():
                self._submit(command)
            case protocol.Cancel(requests=requests):
                self._forget(requests)
                _log.info(logs.fields("cancelled", requests=self.scheduler.cancel(requests)))
            case protocol.SetLevel(seq=seq, floor=floor, ceiling=ceiling):
                new = Bounds(seq, floor, ceiling)
                if wins(new, self.scheduler.bounds):
                    self.scheduler.bounds = new
                    _log.info(logs.fields("level bounds", seq=seq, floor=floor, ceiling=ceiling))
            case protocol.SetSlo(ttft_ms=ttft_ms, itl_ms=itl_ms):
                self.scheduler.slo = Slo(ttft_ms, itl_ms)
                _log.info(logs.fields("targets", ttft_ms=ttft_ms, itl_ms=itl_ms))
            case NewSession():
                self._draws.clear()
                gone = self.scheduler.cancel_all()
                _log.info(logs.fields("gateway connected", cancelled=gone))
            case Drain(deadline_s=deadline_s):
                self._deadline_s = deadline_s
                _log.info(
                    logs.fields(
                        "draining",
                        running=len(self.scheduler.running),
                        waiting=len(self.scheduler.waiting),
                    )
                )

    def _submit(self, submit: protocol.Submit) -> None:
        seed = submit.sampling.seed
        sequence = Running(
            request=submit.request,
            tokens=list(submit.prompt),
            prompt=len(submit.prompt),
            max_tokens=submit.max_tokens,
            sampling=submit.sampling,
            wish=Wish(submit.level, submit.min_level),
            received_s=submit.received_s,
        )
        try:
            self.scheduler.add(sequence)
        except ValueError as error:
            self._fail([submit.request], str(error))
            return
        if submit.sampling.temperature > 0:
            self._draws[submit.request] = random.Random(seed)

    def _step(self, window: StatsWindow) -> None:
        began = self.clock()
        plan = self.scheduler.plan(began)
        if not plan.chunks:
            # Nothing fits although something waits: only possible if memory leaked.
            raise RuntimeError("the scheduler planned an empty step while requests wait")
        try:
            produced = self._compute(plan)
        except Exception as error:  # whatever the model raised: its requests get an answer
            self._step_failed(plan, error)
            return
        self._failures = 0
        ended = self.clock()
        window.record(plan, ended - began)
        self.scheduler.costs.observe(plan.shape(), ended - began)
        self._emit(produced)

    def _compute(self, plan: StepPlan) -> list[tuple[Token, protocol.TokenLogprobs | None]]:
        logits = self.runner.logits(plan)
        sampling = [c.sequence for c in plan.chunks if c.samples]
        draws = [self._draw(s) for s in sampling]
        with torch.inference_mode():
            tokens = sampler.sample(logits, draws) if draws else []
            logprobs = sampler.logprobs(logits, tokens, draws)
        produced = self.scheduler.complete(plan, tokens, self.clock())
        by_request = {s.request: lp for s, lp in zip(sampling, logprobs, strict=True)}
        return [(t, by_request[t.sequence.request]) for t in produced]

    def _draw(self, sequence: Running) -> Draw:
        generator = self._draws.get(sequence.request)
        uniform = generator.random() if generator else 0.0
        made = len(sequence.tokens) - sequence.prompt
        is_early = made < sequence.sampling.min_tokens
        return Draw(sequence.sampling, uniform, tuple(self.scheduler.eos) if is_early else ())

    def _emit(self, produced: list[tuple[Token, protocol.TokenLogprobs | None]]) -> None:
        items = [_delta(token, logprobs) for token, logprobs in produced]
        self._forget([d.request for d in items if d.finish])
        if items:
            self.send(protocol.Deltas(items=items))

    def _forget(self, requests: list[str]) -> None:
        for request in requests:
            self._draws.pop(request, None)

    def _fail(self, requests: list[str], message: str) -> None:
        self.scheduler.cancel(requests)
        self._forget(requests)
        failed = [protocol.Delta(request=r, finish="error", error=message) for r in requests]
        self.send(protocol.Deltas(items=failed))

    def _step_failed(self, plan: StepPlan, error: Exception) -> None:
        self._failures += 1
        requests = [c.sequence.request for c in plan.chunks]
        _log.exception(logs.fields("step failed", rows=plan.rows, requests=len(requests)))
        self._fail(requests, f"the engine failed to compute this request: {error}")
        if self._failures >= _FAILURES_BEFORE_EXIT:
            raise RuntimeError(f"{self._failures} steps in a row failed") from error


def _delta(token: Token, logprobs: protocol.TokenLogprobs | None) -> protocol.Delta:
    s = token.sequence
    is_first = len(s.tokens) == s.prompt + 1
    return protocol.Delta(
        request=s.request,
        tokens=[token.token],
        levels=[token.level],
        logprobs=None if logprobs is None else [logprobs],
        prefill_level=s.prefill_level,
        finish=token.finish,
        queued_s=max(s.admitted_s - s.received_s, 0.0) if is_first else 0.0,
        prefill_s=max(s.first_token_s - s.admitted_s, 0.0) if is_first else 0.0,
    )
