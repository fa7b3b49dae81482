"""The checkpoint to refactor: find or fetch it, and refuse what cannot work before any long step.

Knows directories, the hub and safetensors headers. The decision worth arguing about: only
tokenizer, configuration, documentation and the weights that the index names come along; pickles and
second copies of the weights stay behind, because an artifact that carries unpermuted weights beside
permuted ones is a trap.
"""

import json
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prism import contract
from prism.architectures import Examined, UnsupportedModel, require_supported
from prism.checkpoint import INDEX_FILE, CheckpointError, TensorEntry, open_checkpoint

from prism_refactor import integrity
from prism_refactor.errors import Reason, RefactorError

_log = logging.getLogger(__name__)
_LOOK_EVERY_S: Final = 0.5
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_WEIGHT_SUFFIXES: Final = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tmp"),
    ".pkl",
}
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_HUB_PATTERNS: Final = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.md",
    "LICENSE*",
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A source that passed all cheap checks."""

    path: Path
    uri: str
    revision: str | None
    config: Any  # transformers' config classes share no useful type
    layers: tuple[str, ...]  # experts modules, in model order
    experts_per_token: int
    entries: dict[str, TensorEntry]
    files: tuple[str, ...]  # names that come along, weights included

    @property
    def shards(self) -> tuple[Path, ...]:
        """Weight files, in name order."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that come along."""
        return sum((self.path / name).stat().st_size for name in self.files)

    def digests(self) -> dict[str, str]:
        """sha256 (hex) of every file that comes along, each read once; raises RefactorError where
        a weight is NaN or infinite."""
        return integrity.digests(self.path, self.files, self.entries)


def open_source(
    source: str, uri: str | None = None, wait_s: int = 0, *, servable: bool = False
) -> Checkpoint:
    """Resolve and check; raises RefactorError with the reason and what to do.

    A directory may be put in place by another Job that was applied together with this one, so it is
    waited for, up to ``wait_s`` seconds. ``servable`` refuses what the serving part would refuse,
    too; without it that is a warning.
    """
    _await_directory(source, wait_s)
    path, revision, found_uri = _locate(source)
    _require_original(path)
    config = _read_config(path)
    examined = _require_supported(config, servable)
    try:
        entries = open_checkpoint(path)
    except CheckpointError as error:
        raise RefactorError(Reason.CORRUPT_CHECKPOINT, str(error)) from error
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise RefactorError(
            Reason.BAD_INPUT,
            f"{path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); calibration needs the "
            "model's own.",
        )
    shards = {entry.file.name for entry in entries.values()}
    others = {
        file.name
        for file in path.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and not _WEIGHT_SUFFIXES.intersection(file.suffixes)
    }
    index = {INDEX_FILE} if (path / INDEX_FILE).exists() else set()
    files = tuple(sorted(shards | others | index))
    found = examined.layers, examined.experts_per_token
    return Checkpoint(path, uri or found_uri, revision, config, *found, entries, files)


def _await_directory(source: str, wait_s: int) -> None:
    end = time.monotonic() + wait_s
    if not source.startswith("/") or Path(source).is_dir() or not wait_s:
        return
    _log.info("waiting up to %d s for %s", wait_s, source)
    while not Path(source).is_dir() and time.monotonic() < end:
        time.sleep(_LOOK_EVERY_S)


def _locate(source: str) -> tuple[Path, str | None, str]:
    """(directory, resolved revision, uri) of a directory or hub id."""
    path = Path(source)
    if path.is_dir():
        return path, None, f"file://{path.resolve()}"
    if source.startswith("pvc://"):
        raise RefactorError(
            Reason.BAD_INPUT,
            f"{source}: a claim can only be read where it is mounted; give the directory and "
            "name the claim with --source-uri.",
        )
    name, _, revision = source.removeprefix("hf://").partition("@")
    if not _HUB_ID.match(name) or source.startswith((".", "/", "~")):
        raise RefactorError(
            Reason.SOURCE_NOT_FOUND,
            f"No directory {source!r}, and it is no hub id (org/name or hf://org/name@revision).",
        )
    return _download(name, revision or None)


def _download(name: str, revision: str | None) -> tuple[Path, str | None, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    _log.info("fetching %s revision %s from the hub", name, revision or "(default branch)")
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise RefactorError(
            Reason.SOURCE_UNREACHABLE,
            f"{name} is no local directory and the hub cannot be reached ({type(error).__name__}); "
            "check the network, or put the checkpoint on a claim and use pvc://.",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            raise RefactorError(
                Reason.SOURCE_NOT_FOUND,
                f"The hub has no {name}{f' at {revision}' if revision else ''} that these "
                f"credentials may read (HTTP {status}).",
            ) from error
        raise RefactorError(
            Reason.SOURCE_UNREACHABLE, f"The hub answered HTTP {status} for {name}."
        ) from error
    path = Path(found)
    return path, path.name, f"hf://{name}"


def _require_original(path: Path) -> None:
    manifest = path / contract.PRISM_SUBFOLDER / contract.MANIFEST_FILE
    if manifest.exists():
        raise RefactorError(
            Reason.BAD_INPUT,
            f"{path} is refactored already ({manifest} is there); serve it as it is, or refactor "
            "the original weights.",
        )


def _read_config(path: Path) -> Any:
    from prism.loading import load_config

    file = path / "config.json"
    if not file.is_file():
        raise RefactorError(
            Reason.SOURCE_NOT_FOUND, f"{path} holds no config.json: not a Hugging Face checkpoint."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RefactorError(Reason.CORRUPT_CHECKPOINT, f"{file} is not JSON: {error}.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise RefactorError(Reason.CORRUPT_CHECKPOINT, f'{file} has no "model_type".')
    if raw.get("quantization_config"):
        raise RefactorError(
            Reason.QUANTISED_CHECKPOINT,
            f"{path} is already quantised; refactor the original weights.",
        )
    try:
        return load_config(path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise RefactorError(
            Reason.UNSUPPORTED_ARCHITECTURE,
            f"transformers does not know the model_type {raw['model_type']!r} of {file}: "
            f"{str(error).splitlines()[0]}",
        ) from error


def _require_supported(config: Any, servable: bool) -> Examined:
    try:
        examined = require_supported(config)
    except UnsupportedModel as error:
        raise RefactorError(Reason.UNSUPPORTED_ARCHITECTURE, f"{error}.") from error
    if examined.serve_obstacle is not None and servable:
        raise RefactorError(
            Reason.UNSUPPORTED_ARCHITECTURE,
            f"{examined.architecture} could be refactored, but Prism's engine cannot serve it: "
            f"{examined.serve_obstacle}.",
        )
    if examined.serve_obstacle is not None:
        _log.warning(
            "%s can be refactored and measured, but `prism serve` will refuse it: %s",
            *(examined.architecture, examined.serve_obstacle),
        )
    return examined


def require_divisible(checkpoint: Checkpoint, sub_experts: int, width: int) -> None:
    """Raise RefactorError (BadInput) where experts of ``width`` neurons cannot be cut evenly."""
    if sub_experts not in contract.SUB_EXPERT_CHOICES or width % sub_experts:
        raise RefactorError(
            Reason.BAD_INPUT,
            f"{checkpoint.path}: experts of {width} neurons cannot be cut into {sub_experts} equal "
            f"sub-experts; choose one of {', '.join(map(str, contract.SUB_EXPERT_CHOICES))} "
            "that divides it.",
        )
