"""The operator's own settings, read once from the environment.

It knows names and bounds of the variables; it must not know Kopf or the API server. All problems
are reported at once, because a pod that fails for one variable after the other wastes a person's
time.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prism import contract

ENV_SERVING_IMAGE = "PRISM_SERVING_IMAGE"
ENV_REFACTOR_IMAGE = "PRISM_REFACTOR_IMAGE"
ENV_PROMETHEUS_URL = "PRISM_PROMETHEUS_URL"
ENV_ADMIN_KEY_FILE = "PRISM_ADMIN_KEY_FILE"
ENV_WATCH_NAMESPACES = "PRISM_WATCH_NAMESPACES"
ENV_IMAGE_PULL_SECRETS = "PRISM_IMAGE_PULL_SECRETS"
ENV_IMAGE_PULL_POLICY = "PRISM_IMAGE_PULL_POLICY"
ENV_NAMESPACE = "PRISM_NAMESPACE"
ENV_LOG_FORMAT = "PRISM_LOG_FORMAT"
ENV_HEALTH_PORT = "PRISM_HEALTH_PORT"
ENV_METRICS_PORT = "PRISM_METRICS_PORT"
ENV_TICK_SECONDS = "PRISM_TICK_SECONDS"

PULL_POLICIES = ("IfNotPresent", "Always", "Never")
LOG_FORMATS = ("json", "plain")
MIN_KEY_BYTES = 16


class ConfigError(ValueError):
    """The environment is not usable; the message lists every problem."""


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one operator process.

    ``prometheus_url`` empty: the pods' own metrics are the only source. ``watch_namespaces``
    empty: all namespaces. ``tick_s`` is the fast loop's period; ``admin_key`` makes the pods'
    admin tokens; ``namespace`` is the operator's own.
    """

    serving_image: str
    refactor_image: str
    admin_key: bytes
    namespace: str
    prometheus_url: str = ""
    watch_namespaces: tuple[str, ...] = ()
    image_pull_secrets: tuple[str, ...] = ()
    image_pull_policy: str = "IfNotPresent"
    log_format: str = "json"
    tick_s: float = 5.0
    health_port: int = contract.OPERATOR_HEALTH_PORT
    metrics_port: int = contract.OPERATOR_METRICS_PORT

    def describe(self) -> str:
        """One line for the log, without the key."""
        where = ",".join(self.watch_namespaces) or "all namespaces"
        return (
            f"serving image {self.serving_image}, refactor image {self.refactor_image}, "
            f"prometheus {self.prometheus_url or 'none (the pods are read directly)'}, "
            f"watching {where}"
        )


def from_env(env: Mapping[str, str], read: Callable[[str], bytes] | None = None) -> Config:
    """Read the settings; raises ConfigError naming every variable that is wrong."""
    problems: list[str] = []
    read_bytes = read or (lambda path: Path(path).read_bytes())

    def required(name: str) -> str:
        value = env.get(name, "").strip()
        if not value:
            problems.append(f"{name} is not set")
        return value

    def one_of(name: str, choices: tuple[str, ...]) -> str:
        value = env.get(name, "").strip() or choices[0]
        if value not in choices:
            problems.append(f"{name}={value!r} is not one of {', '.join(choices)}")
        return value

    def port(name: str, default: int) -> int:
        text = env.get(name, "").strip() or str(default)
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
            problems.append(f"{name}={text!r} is not a port")
            return default
        return int(text)

    url = env.get(ENV_PROMETHEUS_URL, "").strip().rstrip("/")
    if url and not re.match(r"^https?://[^/\s]+", url):
        problems.append(f"{ENV_PROMETHEUS_URL}={url!r} is not an http:// or https:// address")
    config = Config(
        serving_image=required(ENV_SERVING_IMAGE),
        refactor_image=required(ENV_REFACTOR_IMAGE),
        admin_key=_key(required(ENV_ADMIN_KEY_FILE), read_bytes, problems),
        namespace=required(ENV_NAMESPACE),
        prometheus_url=url,
        watch_namespaces=_words(env.get(ENV_WATCH_NAMESPACES, "")),
        image_pull_secrets=_words(env.get(ENV_IMAGE_PULL_SECRETS, "")),
        image_pull_policy=one_of(ENV_IMAGE_PULL_POLICY, PULL_POLICIES),
        log_format=one_of(ENV_LOG_FORMAT, LOG_FORMATS),
        tick_s=_seconds(ENV_TICK_SECONDS, env.get(ENV_TICK_SECONDS, "").strip() or "5", problems),
        health_port=port(ENV_HEALTH_PORT, contract.OPERATOR_HEALTH_PORT),
        metrics_port=port(ENV_METRICS_PORT, contract.OPERATOR_METRICS_PORT),
    )
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[,\s]+", text) if word)


def _seconds(name: str, text: str, problems: list[str]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.05 <= value <= 60:
        problems.append(f"{name}={text!r} is not a number of seconds from 0.05 to 60")
    return value


def _key(path: str, read: Callable[[str], bytes], problems: list[str]) -> bytes:
    if not path:
        return b""
    try:
        key = read(path).strip()
    except OSError as error:
        problems.append(f"{ENV_ADMIN_KEY_FILE}={path!r} cannot be read: {error.strerror}")
        return b""
    if len(key) < MIN_KEY_BYTES:
        problems.append(
            f"{ENV_ADMIN_KEY_FILE}={path!r} holds {len(key)} bytes, {MIN_KEY_BYTES} are needed"
        )
    return key
