"""What was asked for: the key of its work, and the place and state of its result.

Knows options, digests and the manifest. The decision worth arguing about: a result made from other
inputs is refused by naming what differs, never overwritten; deleting is the user's act.
"""

import errno
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

from prism import artifact as artifacts
from prism.artifact import Artifact

from prism_refactor.errors import Reason, RefactorError
from prism_refactor.options import (
    EVALUATION_LEVELS,
    EVALUATION_TOKENS,
    KNOT_STRIDE,
    KNOTS,
    METHOD_VERSION,
    SERVED_BATCHES,
    SERVED_LEVELS,
    TOP_K_SHARES,
    WINDOW,
    Options,
)
from prism_refactor.store import PartialFolder

_log = logging.getLogger(__name__)


def confirm(
    options: Options, files: dict[str, str], calibration: str, folder: PartialFolder
) -> Artifact:
    """A result is there already: it must be the one asked for, and whole."""
    try:
        found = artifacts.open_artifact(options.out)
    except artifacts.ArtifactError as error:
        raise RefactorError(
            Reason.BAD_INPUT,
            f"{options.out} exists and is no whole artifact ({str(error).splitlines()[0]}); it is "
            "not overwritten: remove it or choose another --out.",
        ) from error
    manifest = found.manifest
    asked = {
        "source files": files,
        "sub-experts": str(options.sub_experts or "auto"),
        "seed": options.seed,
        "calibration text": calibration,
        "calibration tokens": str(options.tokens),
    }
    held = {
        "source files": manifest.source.files,
        "sub-experts": manifest.methods.get("sub_experts_asked", str(manifest.sub_experts)),
        "seed": manifest.seed,
        "calibration text": manifest.calibration.digest,
        "calibration tokens": manifest.methods.get("tokens_asked"),
    }
    differing = [name for name in asked if asked[name] != held[name]]
    if differing:
        raise RefactorError(
            Reason.BAD_INPUT,
            f"{options.out} holds an artifact made with other {', '.join(differing)}; it is not "
            "overwritten: remove it or choose another --out.",
        )
    problems = artifacts.verify(options.out)
    if problems:
        raise RefactorError(
            Reason.BAD_INPUT,
            f"{options.out} is damaged ({problems[0]}; {len(problems)} in all); remove it and run "
            "again.",
        )
    folder.remove()
    _log.info("%s is complete and whole: nothing to do", options.out)
    return found


def require_place(options: Options) -> None:
    """Raise RefactorError (BadInput) where no result can be made, before anything long is done.

    A folder is made and taken away again: permission bits do not tell of a read-only or a virtual
    file system. Nothing stays behind, because the source may still turn out to be bad.
    """
    out = options.out.absolute()
    if not options.out.name:
        raise RefactorError(Reason.BAD_INPUT, f"--out {options.out} is no name for a new folder.")
    try:
        if out.exists():
            return  # only read and compared
        _require_folder_or_nothing(out, PartialFolder(out).path)
        # A dangling link among the parents is found out here too: nothing can be made in it.
        place = next(parent for parent in out.parents if os.path.lexists(parent))
        with tempfile.TemporaryDirectory(dir=place, prefix=".prism-"):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # has words of its own, and may be tried again
        raise RefactorError(
            Reason.BAD_INPUT,
            f"--out {options.out}: no folder can be made there ({error.strerror}); choose a place "
            "that can be written to.",
        ) from error


def _require_folder_or_nothing(out: Path, partial: Path) -> None:
    # A dangling link would take all the work and then refuse the last rename.
    for path in (out, partial):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise RefactorError(
                Reason.BAD_INPUT,
                f"{path} is in the way of --out {out} and is no folder of its own; remove it.",
            )


def key_of(options: Options, files: dict[str, str], calibration: str) -> str:
    """Digest of all that the stage files depend on."""
    inputs = {
        "files": files,
        "calibration": calibration,
        "sub_experts": options.sub_experts,
        "seed": options.seed,
        "tokens": options.tokens,
        "source_uri": options.source_uri,
        "method": METHOD_VERSION,
        "knots": KNOTS,
        "levels": EVALUATION_LEVELS,
        "top_k": TOP_K_SHARES,
        "served": [SERVED_LEVELS, SERVED_BATCHES],
        "stride": KNOT_STRIDE,
        "evaluation_tokens": EVALUATION_TOKENS,
        "window": WINDOW,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
