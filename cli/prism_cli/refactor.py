"""`prism refactor`: parse, then hand over to the refactoring's shell."""

import argparse
import logging
import os
import sys
from pathlib import Path

from prism.contract import DEFAULT_SUB_EXPERTS, SUB_EXPERT_CHOICES
from prism_refactor.options import CALIBRATION_TOKENS, MAX_SEED, MIN_CALIBRATION_TOKENS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prism refactor`."""
    parser.add_argument("source", metavar="SRC", help="directory, org/name, or hf://org/name[@rev]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the artifact")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='JSON lines of {"text": ...} or plain text; default: pydoc\'s topics',
    )
    parser.add_argument(
        "--sub-experts",
        type=_sub_experts,
        default=DEFAULT_SUB_EXPERTS,
        metavar="N",
        help=f"{', '.join(map(str, SUB_EXPERT_CHOICES))}, or auto: the best by a trial "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument(
        "--tokens",
        type=tokens,
        default=CALIBRATION_TOKENS,
        help="to calibrate on (default: %(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="cut only part I (from 0) of N; all parts write to the same DIR, part 0 finishes it",
    )
    parser.add_argument("--source-uri", metavar="URI", help="recorded instead of SRC's path")
    parser.add_argument(
        "--source-wait",
        type=_natural,
        default=0,
        metavar="SECONDS",
        dest="source_wait_s",
        help="wait this long for a directory SRC that another program puts in place",
    )
    parser.add_argument(
        "--servable",
        action="store_true",
        help="refuse a model that `prism serve` cannot serve, before any work",
    )
    parser.add_argument("--termination-message", type=Path, metavar="FILE")
    parser.add_argument("--metrics-port", type=_port, metavar="PORT")


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _seed(text: str) -> int:
    value = _natural(text)
    if value > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{value} is more than {MAX_SEED}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is no port (1 to 65535)")
    return value


def tokens(text: str) -> int:
    value = int(text)
    if value < MIN_CALIBRATION_TOKENS:
        raise argparse.ArgumentTypeError(f"{value} is less than {MIN_CALIBRATION_TOKENS}")
    return value


def _sub_experts(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) not in SUB_EXPERT_CHOICES:
        choices = ", ".join(map(str, SUB_EXPERT_CHOICES))
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {choices} or auto")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isascii() and index.isdigit() and count.isascii() and count.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, for example 0/4")
    if int(index) >= int(count):
        raise argparse.ArgumentTypeError(f"{text}: parts are numbered 0 to {int(count) - 1}")
    return int(index), int(count)


def run(arguments: argparse.Namespace) -> int:
    """Refactor, or confirm that it is done."""
    # Spinning OpenMP threads take the core that a neighbour, or our own search threads, could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    from prism_refactor.options import Options
    from prism_refactor.shell import run as run_shell

    given = {name: value for name, value in vars(arguments).items() if name in _OPTION_NAMES}
    return run_shell(Options(**given))


_OPTION_NAMES = (
    *("source", "out", "calibration", "sub_experts", "seed", "tokens", "shard"),
    *("source_uri", "source_wait_s", "servable", "termination_message", "metrics_port"),
)
