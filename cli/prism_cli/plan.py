"""`prism plan`: what a refactoring would need, before anything starts."""

import argparse
import json
import os
import sys

from prism.contract import DEFAULT_SUB_EXPERTS, SUB_EXPERT_CHOICES, ExitCode

from prism_cli.refactor import tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prism plan`."""
    from prism_refactor.options import CALIBRATION_TOKENS

    parser.add_argument("source", metavar="SRC", help="a checkpoint directory or hub id")
    parser.add_argument(
        "--sub-experts", type=int, choices=SUB_EXPERT_CHOICES, default=DEFAULT_SUB_EXPERTS
    )
    parser.add_argument("--tokens", type=tokens, default=CALIBRATION_TOKENS)
    parser.add_argument("--json", action="store_true", help="one object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Read headers, time this machine for a moment, print; 3 for a source that cannot work."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from prism_refactor import machine, resources, speed
    from prism_refactor.errors import RefactorError
    from prism_refactor.source import open_source

    torch.set_num_threads(machine.cores())
    try:
        checkpoint = open_source(arguments.source)
        dtype = machine.compute_dtype(checkpoint)
        needs = resources.Needs.of(checkpoint, arguments.tokens, arguments.sub_experts, dtype)
    except RefactorError as error:
        print(f"prism plan: {error.reason}: {error.message}", file=sys.stderr)
        return error.exit_code
    device = machine.device()
    stages = speed.seconds(needs, dtype, device, machine.cores(), arguments.sub_experts)
    plan = {
        "memory_bytes": needs.memory_bytes,
        "memory_available_bytes": machine.available_bytes(),
        "disk_bytes": needs.disk_bytes,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "seconds": {stage: round(value, 1) for stage, value in stages.items()},
        "seconds_in_all": round(sum(stages.values()), 1),
    }
    print(json.dumps(plan, indent=1) if arguments.json else _table(plan, stages))
    return ExitCode.OK


def _table(plan: dict[str, object], stages: dict[str, float]) -> str:
    def gigabytes(name: str) -> str:
        return f"{plan[name] / 1e9:.2f} GB"  # type: ignore[operator]

    there = gigabytes("memory_available_bytes")
    rows = [
        ("memory", f"{gigabytes('memory_bytes')} ({there} are available)"),
        ("disk", f"{gigabytes('disk_bytes')} beside the source"),
        ("runs in", f"{plan['dtype']} on {plan['device']}"),
        *((f"time, {stage}", _time(value)) for stage, value in stages.items()),
        ("time in all", f"about {_time(sum(stages.values()))}, within a factor of two"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
