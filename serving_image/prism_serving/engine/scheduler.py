"""What the next step computes: decode first, then prompts in the order they came.

Knows: sequences, the KV ranges they hold, the token budget, the policy. Must not know: torch,
sockets, clocks (time is handed in).

Decode rows always run. Prompts fill what is left of the token budget; a prompt that fits into one
step is not cut merely to fill the last rows of another's: that would delay the first token of both.

One decision worth arguing about: a request is admitted when its first chunk is scheduled, not when
memory would allow it. So its level is fixed as late as possible, with the queue behind it known.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from prism_serving.control import Bounds, Slo
from prism_serving.engine import policy
from prism_serving.engine.costs import CostModel, StepShape, pairs_of
from prism_serving.engine.policy import Ahead, Waiting, Wish
from prism_serving.engine.ranges import RangePool
from prism_serving.protocol import Sampling

_QUEUE_LOOKED_AT: Final = 256  # requests behind the head that the policy considers


@dataclass(slots=True, eq=False)
class Running:
    """One sequence: `tokens` are prompt and output, the first `computed` of them are in the KV."""

    request: str
    tokens: list[int]
    prompt: int  # tokens of the prompt
    max_tokens: int
    sampling: Sampling
    wish: Wish
    received_s: float
    computed: int = 0
    kv_start: int | None = None
    prefill_level: int = 0
    admitted_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def kv_needed(self) -> int:
        """Tokens to reserve; the last produced token is never computed."""
        return self.prompt + self.max_tokens - 1

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens are still to compute."""
        return self.computed < self.prompt


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one sequence in a step: tokens[start : start + count], all at `level`."""

    sequence: Running
    start: int
    count: int
    level: int

    @property
    def samples(self) -> bool:
        """Whether the last row yields a token."""
        return self.start + self.count >= self.sequence.prompt

    @property
    def is_decode(self) -> bool:
        """Whether this is one produced token, not prompt."""
        return self.start >= self.sequence.prompt


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The chunks of one step, decode first; what the policy chose for decode."""

    chunks: tuple[Chunk, ...]
    decode_level: int = 0

    @property
    def rows(self) -> int:
        """Rows of the step."""
        return sum(c.count for c in self.chunks)

    @property
    def phase(self) -> str:
        """prefill, decode or mixed."""
        decode = [c.is_decode for c in self.chunks]
        return "decode" if all(decode) else "mixed" if any(decode) else "prefill"

    def shape(self) -> StepShape:
        """What the cost model needs to know."""
        rows: dict[int, int] = {}
        pairs = keys = 0
        for c in self.chunks:
            rows[c.level] = rows.get(c.level, 0) + c.count
            if c.count == 1:
                keys += c.start + 1
            else:
                pairs += pairs_of(c.count, c.start)
        return StepShape(rows, len(self.chunks), pairs, keys)


@dataclass(frozen=True, slots=True)
class Token:
    """One produced token, with the reason the sequence ended (None: it goes on)."""

    sequence: Running
    token: int
    level: int
    finish: str | None


@dataclass(slots=True)
class Scheduler:
    """`eos` ends a sequence; `budget` is rows per step."""

    pool: RangePool
    costs: CostModel
    eos: frozenset[int] = frozenset()
    budget: int = 512
    max_running: int = 64
    bounds: Bounds = field(default_factory=Bounds)
    slo: Slo = field(default_factory=Slo)
    reproducible: bool = False
    waiting: deque[Running] = field(default_factory=deque)
    running: list[Running] = field(default_factory=list)
    decode_level: int = 0

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.running and not self.waiting

    def add(self, sequence: Running) -> None:
        """Queue a sequence. Raises ValueError when it could never run."""
        if sequence.kv_needed > self.pool.size:
            raise ValueError(
                f"prompt of {sequence.prompt} plus {sequence.max_tokens} new tokens does not fit "
                f"into the KV memory of {self.pool.size} tokens"
            )
        self.waiting.append(sequence)

    def cancel(self, requests: Iterable[str]) -> int:
        """Forget these sequences and free their memory; returns how many there were."""
        gone = set(requests)
        before = len(self.waiting) + len(self.running)
        self.waiting = deque(s for s in self.waiting if s.request not in gone)
        for sequence in [s for s in self.running if s.request in gone]:
            self._finish(sequence)
        return before - len(self.waiting) - len(self.running)

    def cancel_all(self) -> int:
        """Forget everything; returns how many sequences there were."""
        return self.cancel([s.request for s in (*self.waiting, *self.running)])

    def plan(self, now_s: float) -> StepPlan:
        """The next step. Admits requests; empty when there is nothing to do."""
        decoding = [s for s in self.running if not s.is_prefilling]
        beside = [(s.wish, s.computed + 1) for s in decoding]
        pending = [s for s in self.running if s.is_prefilling]
        chunk_level = self._chunk_level(pending)
        level = policy.decode_level(beside, self.bounds, self.slo, self.costs, chunk_level)
        self.decode_level = level if beside else self.bounds.ceiling
        chunks = [Chunk(s, s.computed, 1, s.wish.clip(level)) for s in decoding]
        room = policy.prefill_room(
            beside, level, chunk_level, max(self.budget - len(chunks), 1), self.slo, self.costs
        )
        prefill = self._prefill(pending, room, now_s, self._drag_s(beside, level))
        return StepPlan((*chunks, *prefill), level)

    def complete(self, plan: StepPlan, tokens: Sequence[int], now_s: float) -> list[Token]:
        """Record a computed step; `tokens` are one per sampling chunk, in order."""
        produced: list[Token] = []
        sampled = iter(tokens)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed += chunk.count
            if not chunk.samples:
                continue
            token = next(sampled)
            if sequence.kv_start is None:
                continue  # cancelled while the step ran
            sequence.tokens.append(token)
            if not sequence.first_token_s:
                sequence.first_token_s = now_s
            finish = self._finish_reason(sequence, token)
            if finish:
                self._finish(sequence)
            produced.append(Token(sequence, token, chunk.level, finish))
        return produced

    def _finish_reason(self, sequence: Running, token: int) -> str | None:
        made = len(sequence.tokens) - sequence.prompt
        if token in self.eos and not sequence.sampling.ignore_eos:
            return "stop"
        return "length" if made >= sequence.max_tokens else None

    def _finish(self, sequence: Running) -> None:
        self.running.remove(sequence)
        if sequence.kv_start is not None:
            self.pool.release(sequence.kv_start)
            sequence.kv_start = None

    def _chunk_level(self, pending: Sequence[Running]) -> int:
        """Level of the prompt rows this step will carry, as far as known now; 0: there are none."""
        if pending:
            return pending[0].prefill_level
        return policy.allowed_prefill_levels(self.bounds)[0] if self.waiting else 0

    def _drag_s(self, beside: Sequence[tuple[Wish, int]], level: int) -> float:
        """What decode adds to a full prefill step."""
        if not beside:
            return 0.0
        keys = sum(k for _, k in beside)
        full = {100: self.budget}
        both = StepShape({**full, level: full.get(level, 0) + len(beside)}, len(beside), 0, keys)
        return max(self.costs.step_s(both) - self.costs.step_s(StepShape(full)), 0.0)

    def _prefill(
        self, pending: list[Running], room: int, now_s: float, drag_s: float
    ) -> list[Chunk]:
        chunks: list[Chunk] = []
        left = room
        while left > 0:
            if pending:
                sequence = pending.pop(0)
            elif self._can_admit(left, room):
                sequence = self._admit(now_s, drag_s)
            else:
                break
            count = min(sequence.prompt - sequence.computed, left)
            chunks.append(Chunk(sequence, sequence.computed, count, sequence.prefill_level))
            left -= count
        return chunks

    def _can_admit(self, left: int, room: int) -> bool:
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        head = self.waiting[0]
        would_be_cut_for_nothing = left < head.prompt <= room and left < room
        return not would_be_cut_for_nothing and self.pool.can_reserve(head.kv_needed)

    def _admit(self, now_s: float, drag_s: float) -> Running:
        queue = [
            Waiting(now_s - s.received_s, s.prompt, s.wish)
            for s in islice(self.waiting, _QUEUE_LOOKED_AT)
        ]
        ahead_s = sum(
            self.costs.prefill_s(s.prefill_level, s.prompt - s.computed, s.computed, self.budget)
            for s in self.running
            if s.is_prefilling
        )
        sequence = self.waiting.popleft()
        sequence.kv_start = self.pool.reserve(sequence.kv_needed)
        if self.reproducible or sequence.sampling.seed is not None:
            pinned = sequence.wish.pinned
            level = sequence.wish.clip(self.bounds.ceiling) if pinned is None else pinned
            sequence.wish = Wish(pinned=level)
        sequence.prefill_level = policy.prefill_level(
            [Waiting(queue[0].waited_s, sequence.prompt, sequence.wish), *queue[1:]],
            Ahead(ahead_s, drag_s, self.budget),
            self.bounds,
            self.slo,
            self.costs,
        )
        sequence.admitted_s = now_s
        self.running.append(sequence)
        return sequence
