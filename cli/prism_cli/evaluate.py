"""`prism eval`: an artifact's quality at given levels, on text (alone or as served) or on tasks."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from prism.artifact import ArtifactError, OperatingPoint
from prism.checkpoint import CheckpointError
from prism.contract import ExitCode
from prism.levels import parse_levels
from prism_refactor.options import EVALUATION_TOKENS, MIN_EVALUATION_TOKENS

from prism_cli.tables import points_table, served_table, tasks_table

if TYPE_CHECKING:
    from prism_refactor.served import ServedPoint

_BATCHES = (1, 2, 4, 8, 16, 32, 64)  # as the artifact's own curves have them
_FIELDS = (
    *("level", "own_share", "active_share", "perplexity", "quality_loss_percent"),
    *("quality_loss_se", "kl", "top1_agreement"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prism eval`."""
    parser.add_argument("directory", type=Path, metavar="DIR")
    measured_on = parser.add_mutually_exclusive_group(required=True)
    measured_on.add_argument(
        "--data", type=Path, metavar="FILE", help='JSON lines of {"text": ...} or plain text'
    )
    measured_on.add_argument(
        "--tasks",
        type=Path,
        metavar="FILE_OR_DIR",
        help="lm-eval tasks (.yaml), their data as files beside them",
    )
    parser.add_argument("--levels", type=_levels, default=(100, 75, 50, 25), metavar="100,75,…")
    parser.add_argument(
        "--tokens", type=_tokens, default=EVALUATION_TOKENS, help="at most this many"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--batch",
        type=_batches,
        default=(),
        metavar="8,32,…",
        help="measure as decode batches of these sizes are served",
    )
    parser.add_argument(
        "--ride-along",
        action="store_true",
        help="tokens also compute what their neighbours make the batch read",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="beside it: whole experts shared by the batch at equal bytes, and lower top-k",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")


def _levels(text: str) -> tuple[int, ...]:
    try:
        return parse_levels(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _tokens(text: str) -> int:
    value = int(text)
    if value < MIN_EVALUATION_TOKENS:
        raise argparse.ArgumentTypeError(f"{value} is less than {MIN_EVALUATION_TOKENS}")
    return value


def _batches(text: str) -> tuple[int, ...]:
    sizes = {part.strip() for part in text.split(",")}
    bad = sorted(sizes - {str(size) for size in _BATCHES})
    if bad:
        allowed = ", ".join(map(str, _BATCHES))
        raise argparse.ArgumentTypeError(f"batch {', '.join(bad) or text!r}: one of {allowed}")
    return tuple(sorted(map(int, sizes)))


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 2 for flags that do not go together, 3 for a bad artifact or text."""
    if not arguments.batch and (arguments.ride_along or arguments.baselines):
        print("prism eval: --ride-along and --baselines need --batch", file=sys.stderr)
        return ExitCode.USAGE
    if arguments.batch and arguments.tasks:
        print("prism eval: --batch measures on --data, not on --tasks", file=sys.stderr)
        return ExitCode.USAGE
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from prism_refactor.errors import RefactorError

    try:
        print(_on_tasks(arguments) if arguments.tasks else _on_text(arguments))
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        print("prism eval: --tasks needs lm-eval; install moe-prism[eval]", file=sys.stderr)
        return ExitCode.USAGE
    except (ArtifactError, CheckpointError) as error:
        print(f"prism eval: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except RefactorError as error:
        # Without the reason: those are named for the operator, after the refactoring's own text.
        print(f"prism eval: {error.message}", file=sys.stderr)
        return error.exit_code
    return ExitCode.OK


def _on_tasks(arguments: argparse.Namespace) -> str:
    from prism_refactor.lm_harness import run_tasks

    results = run_tasks(
        arguments.directory, arguments.tasks, arguments.levels, dtype=arguments.dtype
    )
    if arguments.json:
        return _json([asdict(result) for result in results])
    return tasks_table(results)


def _on_text(arguments: argparse.Namespace) -> str:
    """What there is to print. Imports here, because they load torch."""
    given = arguments.directory, arguments.data, arguments.levels
    how = {"tokens": arguments.tokens, "dtype": arguments.dtype}
    if arguments.batch:
        from prism_refactor.served import measure_served

        served = measure_served(
            *given,
            arguments.batch,
            ride_along=arguments.ride_along,
            baselines=arguments.baselines,
            **how,
        )
        return (
            _json([_served_row(point) for point in served])
            if arguments.json
            else served_table(served)
        )
    from prism_refactor.measure import measure

    points = measure(*given, **how)
    return _json([_row(point) for point in points]) if arguments.json else points_table(points)


def _row(point: OperatingPoint) -> dict[str, object]:
    return {name: asdict(point)[name] for name in _FIELDS}


def _served_row(point: "ServedPoint") -> dict[str, object]:
    """The fields of every row, and what a batch adds; baselines have no level."""
    return _row(point.point) | {
        "level": point.level,
        "method": point.method,
        "batch": point.batch,
        "ride_along": point.ride_along,
        "computed_share": point.computed_share,
        "bytes_share": point.bytes_share,
    }


def _json(rows: list[dict[str, object]]) -> str:
    return json.dumps(rows, indent=1)
