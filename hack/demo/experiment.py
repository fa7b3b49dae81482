"""The measurements: capacity at pinned levels, and one load step watched from outside.

The step's arrivals are the same for every run (one seed), so what differs is the system. After the
step the light load goes on until quality is back, for three minutes at most.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from hack.demo.load import Client, Target, arrivals, closed_loop, open_loop
from hack.demo.observe import Sample, Watched, sample
from hack.demo.record import Capacity, Run, Targets
from hack.demo.stats import percentile, window

SEED = 20
WARM_UP_S = 5.0
TELL_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Step:
    """A load step: rates in requests per second, lengths in seconds."""

    low_rate: float
    high_rate: float
    before_s: float = 20.0
    step_s: float = 60.0
    after_s: float = 180.0  # at most
    settle_s: float = 10.0  # quality has to be back this long

    def segments(self) -> list[tuple[float, float]]:
        return [
            (self.before_s, self.low_rate),
            (self.step_s, self.high_rate),
            (self.after_s, self.low_rate),
        ]


async def capacity(
    target: Target, prompts: Sequence[str], level: int, clients: int = 8, seconds: float = 12
) -> Capacity:
    """Requests per second at one level, by clients that ask again at once; after a warm-up."""
    async with Client(replace(target, level=level), prompts) as client:
        await closed_loop(client, clients, WARM_UP_S)
        warm = len(client.sent)
        rate = await closed_loop(client, clients, seconds)
        ttfts = [1000 * s.ttft for s in client.sent[warm:] if s.ttft is not None and s.ok]
        failed = [s for s in client.sent if not s.ok]
    if failed:
        raise RuntimeError(
            f"{len(failed)} requests failed while measuring the capacity at level {level}: "
            f"{failed[0].status} {failed[0].error}"
        )
    return Capacity(level, rate, percentile(ttfts, 0.5))


async def load_step(
    title: str,
    mode: str,
    step: Step,
    targets: Targets,
    target: Target,
    watched: Watched,
    prompts: Sequence[str],
    tell: Callable[[str], None],
) -> Run:
    """Offers the step and records what client and cluster showed."""
    samples: list[Sample] = []
    end_of_step = step.before_s + step.step_s
    async with Client(target, prompts) as client:
        looks = asyncio.create_task(sample(watched, lambda: client.now, samples))
        voice = asyncio.create_task(_tell(client, samples, step, targets, tell))
        try:
            times = arrivals(step.segments(), SEED)
            await open_loop(client, times, lambda: _settled(client.now, end_of_step, step, samples))
        finally:
            seconds = client.now
            for task in (looks, voice):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        return Run(
            title,
            mode,
            step.before_s,
            end_of_step,
            round(seconds, 3),
            step.low_rate,
            step.high_rate,
            tuple(sorted(client.sent, key=lambda s: s.due)),
            tuple(samples),
        )


def _settled(now: float, end_of_step: float, step: Step, samples: Sequence[Sample]) -> bool:
    """Whether the step is over and the ceiling has been at 100 long enough since."""
    since = max(now - step.settle_s, end_of_step)
    late = [s for s in samples if s.at >= since]
    return now > end_of_step + step.settle_s and bool(late) and all(s.ceiling == 100 for s in late)


async def _tell(
    client: Client,
    samples: Sequence[Sample],
    step: Step,
    targets: Targets,
    tell: Callable[[str], None],
) -> None:
    """A line every few seconds: what was offered, what came back, where the level is."""
    while True:
        await asyncio.sleep(TELL_EVERY_S)
        now = client.now
        recent = [s for s in client.sent if s.ended > now - TELL_EVERY_S]
        figures = window(recent, 0, now, targets.ttft_ms, targets.itl_ms)
        look = samples[-1] if samples else None
        inside = step.before_s <= now < step.before_s + step.step_s
        ttft = "-" if figures.ttft_p95 is None else f"{figures.ttft_p95:.0f} ms"
        level = "-" if figures.level is None else f"{figures.level:.0f}"
        tell(
            f"{now:5.0f} s {'STEP' if inside else '    '}  in flight {client.in_flight:3d}  "
            f"answered {len(recent):3d}  TTFT p95 {ttft:>9}  level served {level:>3}"
            + (f"  bounds {look.floor}-{look.ceiling}  pods {look.ready}" if look else "")
        )
