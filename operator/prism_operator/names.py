"""Names of child objects, and the hashes that stand for their inputs.

Pure. Every name is a function of the PrismModel's name and its inputs, never random, so that a pass
that died half-way finds on the next one what it made. metadata.name has 40 characters at most (a
rule of the CRD), so nothing here needs to be cut.
"""

import hashlib
import hmac
import json
from typing import Any

HASH_LENGTH = 8


def digest(value: Any) -> str:  # Any: whatever JSON can hold
    """Short stable hash of JSON-like data, order of keys aside."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def job(name: str, artifact_hash: str) -> str:
    return f"{name}-refactor-{artifact_hash}"


def control(name: str) -> str:
    return f"{name}-control"


def cache(name: str) -> str:
    return f"{name}-cache"


def artifact_path(sub_path: str, artifact_hash: str) -> str:
    """Path of an artifact inside its claim, without a leading slash."""
    return "/".join(part for part in (*sub_path.split("/"), "artifacts", artifact_hash) if part)


def admin_token(key: bytes, uid: str) -> str:
    """Bearer token of one PrismModel's pods: HMAC-SHA256 of its UID, in hex."""
    return hmac.new(key, uid.encode(), hashlib.sha256).hexdigest()


def admin_token_sha256(key: bytes, uid: str) -> str:
    """What the pods are given, so that a pod's environment does not hold the token itself."""
    return hashlib.sha256(admin_token(key, uid).encode()).hexdigest()
