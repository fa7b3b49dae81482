"""When things happened in one request, and the events that follow from it.

Knows: the definition of attainment. TTFT is one event per request, counted from receipt: shed and
failed requests are misses, client-cancelled ones no event. ITL is one event per gap between tokens.
Must not know: HTTP, text.

One decision worth arguing about: without a target nothing is counted. "No target" must not look
like "always met".
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from prism_serving.control import Slo
from prism_serving.gateway.metrics import Metrics


@dataclass(slots=True)
class RequestMeter:
    """One HTTP request; `slo` gives the targets at the time of an event."""

    metrics: Metrics
    slo: Callable[[], Slo]
    received_s: float
    prompt_tokens: int
    produced: int = 0
    first_s: float | None = None
    _last_s: dict[int, float] = field(default_factory=dict)
    _gaps: int = 0
    _gap_sum_s: float = 0.0
    _ended: bool = False

    def token(self, choice: int, now_s: float) -> None:
        """A token of one of the choices arrived."""
        self.produced += 1
        self.metrics.generation_tokens.inc()
        if self.first_s is None:
            self.first_s = now_s
            ttft_s = now_s - self.received_s
            self.metrics.ttft.observe(ttft_s)
            target_s = self.slo().ttft_s
            if target_s is not None:
                self.metrics.slo_event("ttft", ttft_s <= target_s)
        if choice in self._last_s:
            self._gap(now_s - self._last_s[choice])
        self._last_s[choice] = now_s

    def _gap(self, gap_s: float) -> None:
        self._gaps += 1
        self._gap_sum_s += gap_s
        self.metrics.itl.observe(gap_s)
        target_s = self.slo().itl_s
        if target_s is not None:
            self.metrics.slo_event("itl", gap_s <= target_s)

    def times(self, queued_s: float, prefill_s: float) -> None:
        """What the engine reported with a first token."""
        self.metrics.queue_time.observe(queued_s)
        self.metrics.prefill_time.observe(prefill_s)

    def shed(self, reason: str) -> None:
        """Refused for load: a miss."""
        self.metrics.shed(reason)
        self._miss()
        self._ended = True

    def failed(self) -> None:
        """Ended by our fault; a miss unless the first token was out."""
        if not self._ended:
            self._miss()
            self.metrics.finished("error")
            self._ended = True

    def cancelled(self) -> None:
        """Ended by the client: no event."""
        if not self._ended:
            self.metrics.finished("abort")
            self._ended = True

    def finished(self, reason: str, now_s: float) -> None:
        """Ended well."""
        if self._ended:
            return
        self._ended = True
        m = self.metrics
        m.finished(reason)
        m.e2e.observe(now_s - self.received_s)
        m.request_prompt.observe(self.prompt_tokens)
        m.request_generation.observe(self.produced)
        if self.first_s is not None:
            m.decode_time.observe(now_s - self.first_s)
        if self._gaps:
            m.tpot.observe(self._gap_sum_s / self._gaps)

    def _miss(self) -> None:
        if self.first_s is None and self.slo().ttft_s is not None:
            self.metrics.slo_event("ttft", False)
