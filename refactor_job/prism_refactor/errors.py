"""How a refactoring can end badly: the reasons a person or the operator reads, and their exit
codes.

Knows the closed list of reasons. Must not know where they are written (the shell does that). The
decision worth arguing about: "no space left" and "out of memory" exit with 1, because freeing space
or raising a limit makes the same command succeed; bad input exits with 3, because it never will.
"""

import errno
from enum import StrEnum

from prism.checkpoint import CheckpointError
from prism.contract import ExitCode


class Reason(StrEnum):
    """CamelCase, as Kubernetes conditions want it."""

    SOURCE_NOT_FOUND = "SourceNotFound"
    SOURCE_UNREACHABLE = "SourceUnreachable"
    UNSUPPORTED_ARCHITECTURE = "UnsupportedArchitecture"
    QUANTISED_CHECKPOINT = "QuantisedCheckpoint"
    CORRUPT_CHECKPOINT = "CorruptCheckpoint"
    TOO_LITTLE_TEXT = "TooLittleCalibrationText"
    BAD_INPUT = "BadInput"
    NO_SPACE_LEFT = "NoSpaceLeft"
    OUT_OF_MEMORY = "OutOfMemory"
    INTERRUPTED = "Interrupted"
    INTERNAL_ERROR = "InternalError"


_RETRY_MAY_HELP = {
    Reason.SOURCE_UNREACHABLE,
    Reason.NO_SPACE_LEFT,
    Reason.OUT_OF_MEMORY,
    Reason.INTERRUPTED,
    Reason.INTERNAL_ERROR,
}
# The volume or its permissions must change before the same command can succeed.
_PLACE_IS_WRONG = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


class RefactorError(Exception):
    """A refactoring that cannot go on; the message is a sentence a person can act on."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def exit_code(self) -> ExitCode:
        """1 where a retry may help, else 3."""
        return ExitCode.FAILED if self.reason in _RETRY_MAY_HELP else ExitCode.BAD_INPUT


def from_exception(error: BaseException) -> RefactorError | None:
    """The RefactorError that stands for ``error``; None where ``error`` is a bug of ours."""
    if isinstance(error, RefactorError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return RefactorError(
            Reason.NO_SPACE_LEFT,
            f"No space left on the volume{where}; enlarge it or free space, "
            "then run again: work continues where it stopped.",
        )
    if isinstance(error, CheckpointError):
        return RefactorError(Reason.CORRUPT_CHECKPOINT, f"{error}.")
    if isinstance(error, OSError) and error.errno in _PLACE_IS_WRONG:
        return RefactorError(
            Reason.BAD_INPUT,
            f"{error.filename or 'A file'}: {error.strerror}; check the path and who may use it.",
        )
    if isinstance(error, MemoryError) or _is_allocation_failure(error):
        return RefactorError(
            Reason.OUT_OF_MEMORY,
            "Out of memory; give the Job more memory (spec.refactor.resources) or fewer "
            "calibration tokens (--tokens), then run again: work continues where it stopped.",
        )
    return None


def _is_allocation_failure(error: BaseException) -> bool:
    """torch reports a failed allocation on the CPU as a RuntimeError with this text."""
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
