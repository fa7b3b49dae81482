"""The shell around a refactoring: signals, progress views, the termination message, the exit code.

Knows processes; must not know the method. The decision worth arguing about: SIGTERM becomes an
exception in the main thread, so a stop takes the same path as any failure, and since every stage
file appears by rename there is nothing to clean up.
"""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from prism.contract import ExitCode

from prism_refactor import outcome
from prism_refactor.errors import Reason, RefactorError, from_exception
from prism_refactor.options import Options
from prism_refactor.progress import Progress, Stage, View, log_view, metrics_view, terminal_view

_log = logging.getLogger(__name__)


def run(options: Options) -> ExitCode:
    """Refactor, report, and say how it went."""
    started = time.monotonic()
    try:
        with _interruptible(), ExitStack() as stack:
            metrics = _metrics_views(options)
            from prism_refactor.job import refactor

            _use_allowed_cores()

            def progress_of(stages: list[Stage]) -> Progress:
                return Progress(stages, [_view_for_people(stack), *metrics])

            artifact = refactor(options, progress_of)
    except BaseException as error:  # the shell is where every failure gets its words
        return _failed(error, options)
    seconds = time.monotonic() - started
    if artifact is None:
        outcome.write(outcome.part(options.shard, seconds), options.termination_message)
        _log.info("shard %d of %d is done in %.1f s", *options.shard, seconds)
        return ExitCode.OK
    outcome.write(outcome.success(artifact, seconds), options.termination_message)
    _log.info("done in %.1f s: %s %s", seconds, options.out, artifact.digest)
    return ExitCode.OK


def _use_allowed_cores() -> None:
    """As many threads as the container has cores, unless the user has set a number."""
    import torch

    from prism_refactor.machine import cores

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    _log.info("threads: %d", torch.get_num_threads())


def _failed(error: BaseException, options: Options) -> ExitCode:
    known = from_exception(error)
    if known is None:
        traceback.print_exception(error)
        if isinstance(error, KeyboardInterrupt):
            known = RefactorError(Reason.INTERRUPTED, "Interrupted; run again to go on.")
        else:
            known = RefactorError(
                Reason.INTERNAL_ERROR, f"{type(error).__name__}: {error} (a defect in Prism)."
            )
    print(f"prism refactor: {known.reason}: {known.message}", file=sys.stderr)
    outcome.write(outcome.failure(known), options.termination_message)
    return known.exit_code


def _view_for_people(stack: ExitStack) -> View:
    return stack.enter_context(terminal_view()) if sys.stderr.isatty() else log_view


def _metrics_views(options: Options) -> list[View]:
    """Served from the start: a port that cannot be had must not be found out after a download."""
    port = options.metrics_port
    try:
        return [] if port is None else [metrics_view(port)]
    except OSError as error:
        raise RefactorError(
            Reason.BAD_INPUT,
            f"Cannot serve metrics on port {port} ({error.strerror}); choose another "
            "--metrics-port.",
        ) from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGINT raise RefactorError (Interrupted) while this is open."""

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not break the way out
        raise RefactorError(
            Reason.INTERRUPTED,
            f"Stopped by {signal.Signals(number).name}; run the same command again to go on "
            "where it stopped.",
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
