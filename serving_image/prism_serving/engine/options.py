"""The engine's command line, and the environment that must be set before torch is imported.

Knows: flags, defaults, cores. Must not know (import): torch.

One decision worth arguing about: one core is left to the gateway and the engine's own I/O thread.
With as many OpenMP threads as cores, one busy neighbour makes every parallel region wait for a
descheduled thread (measured: 0.1 ms becomes 8 ms at p90).
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from prism import contract


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What `python -m prism_serving.engine` was asked."""

    artifact: Path
    socket: Path
    control_dir: Path
    dtype: str
    device: str
    kernel: str
    threads: int
    max_running: int
    kv_tokens: int | None
    batch_tokens: int
    drain_s: float
    measure_s: float
    reproducible: bool


def usable_cores() -> int:
    """Cores this process may use: affinity, and the cgroup's CPU quota where there is one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else max(min(cores, round(int(quota) / int(period))), 1)


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 86400:
        raise argparse.ArgumentTypeError(f"must be 0 or more seconds, got {text}")
    return value


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `prism serve` passes on to the engine unchanged."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--kernel", default="auto", help="sub-expert kernel (default: chosen)")
    parser.add_argument(
        "--threads", type=_positive, default=None, help="compute threads (default: cores - 1)"
    )
    parser.add_argument("--max-running", type=_positive, default=64, help="sequences at once")
    parser.add_argument(
        "--kv-tokens", type=_positive, default=None, help="KV memory in tokens (default: by memory)"
    )
    parser.add_argument("--batch-tokens", type=_positive, default=512, help="rows per step")
    parser.add_argument("--drain-seconds", type=_seconds, default=30.0)
    parser.add_argument(
        "--measure-seconds", type=_seconds, default=4.0, help="time to measure step costs at start"
    )
    parser.add_argument(
        "--reproducible",
        action="store_true",
        help="fix each request's level at admission, so that its result does not depend on load "
        "(in float32; sums in bfloat16 still round by who shares the batch)",
    )


def parse(argv: list[str] | None = None) -> EngineOptions:
    """Exits with code 2 on wrong use."""
    parser = argparse.ArgumentParser(prog="prism_serving.engine", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=Path(contract.ARTIFACT_DIR))
    parser.add_argument("--socket", type=Path, default=Path(contract.SOCKET_PATH))
    parser.add_argument("--control-dir", type=Path, default=Path(contract.CONTROL_DIR))
    add_engine_arguments(parser)
    args = parser.parse_args(argv)
    return EngineOptions(
        artifact=args.artifact,
        socket=args.socket,
        control_dir=args.control_dir,
        dtype=args.dtype,
        device=args.device,
        kernel=args.kernel,
        threads=args.threads or max(usable_cores() - 1, 1),
        max_running=args.max_running,
        kv_tokens=args.kv_tokens,
        batch_tokens=args.batch_tokens,
        drain_s=args.drain_seconds,
        measure_s=args.measure_seconds,
        reproducible=args.reproducible,
    )


def prepare_environment(options: EngineOptions) -> None:
    """Set what OpenMP and transformers read once, at import."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # an artifact is complete; nothing is fetched
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
