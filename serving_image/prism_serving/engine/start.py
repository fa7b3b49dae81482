"""Build a worker: load, size the KV buffers, measure, log what was chosen and why.

Knows: the order of these steps. Must not know: sockets, requests.
"""

import logging
import time

import torch
from prism.contract import MAX_LEVEL

from prism_serving import logs, protocol
from prism_serving.control import Bounds, Slo
from prism_serving.engine import loading
from prism_serving.engine.costs import CostModel
from prism_serving.engine.measure import Measuring, measure
from prism_serving.engine.options import EngineOptions, usable_cores
from prism_serving.engine.ranges import RangePool
from prism_serving.engine.runner import Runner
from prism_serving.engine.scheduler import Scheduler
from prism_serving.engine.worker import Send, Worker

_log = logging.getLogger(__name__)


def choose_device(asked: str) -> str:
    """cuda where torch has a device, else cpu; what was asked otherwise."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(
    options: EngineOptions, bounds: Bounds, slo: Slo, send: Send
) -> tuple[Worker, protocol.State]:
    """Worker and ready state. Raises what `loading.load` raises."""
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    began = time.monotonic()
    loaded = loading.load(options.artifact, options.dtype, device, options.kernel)
    tokens = loading.kv_tokens(loaded, options.kv_tokens, options.max_running)
    runner = Runner(loaded.model, loading.kv_buffers(loaded, tokens), loaded.device)
    _log.info(
        logs.fields(
            "loaded",
            artifact=loaded.artifact.digest,
            architecture=loaded.artifact.manifest.architecture,
            dtype=options.dtype,
            device=device,
            device_why="asked" if options.device != "auto" else "what torch found",
            threads=options.threads,
            threads_why=f"{usable_cores()} cores usable, one left for gateway and I/O",
            kv_tokens=tokens,
            kv_bytes_per_token=loaded.kv.bytes_per_token(loaded.device),
            seconds=time.monotonic() - began,
        )
    )
    costs = _measure(options, loaded, runner, tokens)
    scheduler = Scheduler(
        pool=RangePool(tokens),
        costs=costs,
        eos=loaded.eos,
        budget=options.batch_tokens,
        max_running=options.max_running,
        bounds=bounds,
        slo=slo,
        reproducible=options.reproducible,
        decode_level=bounds.ceiling,
    )
    state = protocol.State(
        phase="ready",
        max_context=min(loaded.max_context, tokens),
        kv_tokens=tokens,
        max_running=options.max_running,
        levels=[MAX_LEVEL, *(k.level for k in loaded.artifact.manifest.knots)],
        reproducible=options.reproducible,
    )
    return Worker(scheduler, runner, send), state


def _measure(
    options: EngineOptions, loaded: loading.Loaded, runner: Runner, tokens: int
) -> CostModel:
    began = time.monotonic()
    costs = measure(
        Measuring(
            runner.logits,
            loaded.vocab,
            tokens,
            loaded.max_context,
            options.batch_tokens,
            options.measure_s,
        )
    )
    runner.own = runner.candidates = 0
    rows = min(options.batch_tokens, 512)
    _log.info(
        logs.fields(
            "measured",
            seconds=time.monotonic() - began,
            rows=rows,
            **{f"step_ms_at_{level}": costs.rows_s(level, rows) * 1000 for level in costs.curves},
            unused=",".join(str(x) for x in costs.curves if not costs.is_useful(x, rows)) or "none",
        )
    )
    return costs
