"""Refactor a checkpoint of OLMoE-1B-7B's real shape on this machine: time, memory, and a kill -9.

python bench/full_size.py WORK [--layers 16] [--tokens 16384] [--kill-after LAYERS]

Makes the checkpoint with random weights under WORK (13.8 GB, and as much again for the artifact),
runs `prism refactor` on it, kills it with signal 9 after half of the layers were cut, runs the same
command again and writes bench/results/full_size.json. Memory is the process's anonymous pages,
sampled five times a second; seconds count both runs. Exits with 1 when a mark is missed.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from prism.artifact import verify
from prism_refactor.finish import STAGES
from prism_refactor.machine import description
from prism_refactor.stage_costs import StageCost, kept_costs
from prism_refactor.store import PartialFolder

ROOT = Path(__file__).resolve().parent.parent
MARK_SECONDS = 75 * 60
MARK_GIB = 8.0
SAMPLE_S = 0.2


@dataclass(slots=True)
class Watched:
    """What one process showed from start to end; layers are those whose cut lies on disk."""

    seconds: float = 0.0
    anonymous_bytes: int = 0
    layers_at_start: int = 0
    layers_at_end: int = 0
    first_new_layer_s: float | None = None
    killed: bool = False
    costs: dict[str, StageCost] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--kill-after", type=int, help="layers cut; default: half of them")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "full_size.json")
    arguments = parser.parse_args()
    source, out = arguments.work / "source", arguments.work / "artifact"
    if not source.exists():
        make = [sys.executable, str(ROOT / "bench" / "make_checkpoint.py"), str(source)]
        subprocess.run([*make, "--layers", str(arguments.layers)], check=True)
    folder = PartialFolder(out)
    folder.remove()
    if out.exists():
        shutil.rmtree(out)
    command = [sys.executable, "-m", "prism_cli", "refactor", str(source), "--out", str(out)]
    command += ["--tokens", str(arguments.tokens)]
    half = arguments.kill_after or arguments.layers // 2
    runs = [watch(command, folder, kill_after=half), watch(command, folder)]
    problems = verify(out)
    record = recorded(arguments, source, runs, problems)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0 if all(record["marks"].values()) else 1


def watch(command: list[str], folder: PartialFolder, kill_after: int | None = None) -> Watched:
    """Run a refactoring to its end, or kill it once ``kill_after`` layers were cut."""
    seen = Watched(layers_at_start=layers_cut(folder))
    began = time.monotonic()
    process = subprocess.Popen(command)
    while process.poll() is None:
        time.sleep(SAMPLE_S)
        seen.anonymous_bytes = max(seen.anonymous_bytes, anonymous_bytes(process.pid))
        layers = layers_cut(folder)
        if layers > seen.layers_at_start and seen.first_new_layer_s is None:
            seen.first_new_layer_s = time.monotonic() - began
        if folder.work.exists():
            seen.costs |= {cost.name: cost for cost in costs_now(folder)}
        if kill_after is not None and layers >= kill_after:
            time.sleep(20)  # in the middle of the next layer
            process.send_signal(signal.SIGKILL)
            process.wait()
            seen.killed = True
    seen.seconds = time.monotonic() - began
    seen.layers_at_end = layers_cut(folder)
    if not seen.killed and process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return seen


def costs_now(folder: PartialFolder) -> list[StageCost]:
    """Costs of the stages so far; nothing while the folder becomes the artifact."""
    try:
        return kept_costs(folder, STAGES)
    except OSError:
        return []


def layers_cut(folder: PartialFolder) -> int:
    return len(list(folder.work.glob("cut-*.safetensors"))) if folder.work.exists() else 0


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) << 10 if lines else 0


def recorded(
    arguments: argparse.Namespace, source: Path, runs: list[Watched], problems: list[str]
) -> dict[str, Any]:
    """The results file."""
    first, second = runs
    seconds = sum(run.seconds for run in runs)
    peak = max(run.anonymous_bytes for run in runs) / 2**30
    per_layer = (first.first_new_layer_s or 0.0, second.first_new_layer_s or 0.0)
    return {
        "command": " ".join(["python bench/full_size.py WORK", *sys.argv[2:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": dict(description()),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "checkpoint": {
            "layers": arguments.layers,
            "gigabytes": round(sum(f.stat().st_size for f in source.iterdir()) / 1e9, 2),
        },
        "tokens": arguments.tokens,
        "seconds": round(seconds, 1),
        "peak_anonymous_gib": round(peak, 2),
        "stages": [asdict(cost) for cost in second.costs.values()],
        "kill": {
            "layers_cut_before": first.layers_at_end,
            "layers_found_after": second.layers_at_start,
            "seconds_of_each_run": [round(run.seconds, 1) for run in runs],
            "seconds_to_the_first_new_layer": [round(s, 1) for s in per_layer],
        },
        "problems": problems,
        "marks": {
            "at most 75 minutes": seconds <= MARK_SECONDS,
            "at most 8 GiB of anonymous memory": peak <= MARK_GIB,
            "the kill lost no layer that was cut": first.killed
            and second.layers_at_start == first.layers_at_end,
            "the artifact is whole": not problems,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
