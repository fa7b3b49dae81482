"""`prism eval`: an artifact's quality on a given text at given levels."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from prism.artifact import ArtifactError, OperatingPoint
from prism.checkpoint import CheckpointError
from prism.contract import ExitCode
from prism.levels import parse_levels
from prism_refactor.options import EVALUATION_TOKENS, MIN_EVALUATION_TOKENS

from prism_cli.tables import points_table

_FIELDS = (
    *("level", "own_share", "active_share", "perplexity", "quality_loss_percent"),
    *("quality_loss_se", "kl", "top1_agreement"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prism eval`."""
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines of {"text": ...} or plain text',
    )
    parser.add_argument("--levels", type=_levels, default=(100, 75, 50, 25), metavar="100,75,…")
    parser.add_argument(
        "--tokens", type=_tokens, default=EVALUATION_TOKENS, help="at most this many"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
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


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 3 for a bad artifact or text."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from prism_refactor.errors import RefactorError
    from prism_refactor.measure import measure

    try:
        points = measure(
            arguments.directory,
            arguments.data,
            arguments.levels,
            tokens=arguments.tokens,
            dtype=arguments.dtype,
        )
    except (ArtifactError, CheckpointError) as error:
        print(f"prism eval: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except RefactorError as error:
        # Without the reason: those are named for the operator, after the refactoring's own text.
        print(f"prism eval: {error.message}", file=sys.stderr)
        return error.exit_code
    print(_json(points) if arguments.json else points_table(points))
    return ExitCode.OK


def _json(points: list[OperatingPoint]) -> str:
    rows = [{name: asdict(point)[name] for name in _FIELDS} for point in points]
    return json.dumps(rows, indent=1)
