"""The operator's settings: all problems at once."""

import pytest
from prism_operator.config import Config, ConfigError, from_env

GOOD = {
    "PRISM_SERVING_IMAGE": "serving:1",
    "PRISM_REFACTOR_IMAGE": "refactor:1",
    "PRISM_ADMIN_KEY_FILE": "/key",
    "PRISM_NAMESPACE": "prism-system",
}


def key(_: str) -> bytes:
    return b"x" * 32 + b"\n"


def test_a_whole_environment() -> None:
    env = {
        **GOOD,
        "PRISM_PROMETHEUS_URL": "http://prom:9090/",
        "PRISM_WATCH_NAMESPACES": "a, b",
        "PRISM_IMAGE_PULL_SECRETS": "one two",
        "PRISM_TICK_SECONDS": "2",
    }
    config = from_env(env, key)
    assert config.prometheus_url == "http://prom:9090"
    assert config.watch_namespaces == ("a", "b") and config.image_pull_secrets == ("one", "two")
    assert config.admin_key == b"x" * 32 and config.tick_s == 2
    assert "xxx" not in config.describe() and "a,b" in config.describe()


def test_the_least_environment_has_defaults() -> None:
    config = from_env(GOOD, key)
    assert isinstance(config, Config)
    assert (config.prometheus_url, config.watch_namespaces) == ("", ())
    assert config.image_pull_policy == "IfNotPresent"


def test_every_problem_is_told_at_once() -> None:
    env = {
        "PRISM_ADMIN_KEY_FILE": "/key",
        "PRISM_PROMETHEUS_URL": "prom:9090",
        "PRISM_IMAGE_PULL_POLICY": "Sometimes",
        "PRISM_TICK_SECONDS": "soon",
        "PRISM_LOG_FORMAT": "xml",
        "PRISM_HEALTH_PORT": "70000",
    }
    with pytest.raises(ConfigError) as error:
        from_env(env, lambda _: b"short")
    for name in (
        "PRISM_SERVING_IMAGE is not set",
        "PRISM_REFACTOR_IMAGE is not set",
        "PRISM_NAMESPACE is not set",
        "prom:9090",
        "Sometimes",
        "soon",
        "xml",
        "70000",
        "holds 5 bytes",
    ):
        assert name in str(error.value)


def test_a_key_that_cannot_be_read_is_told() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        from_env({**GOOD, "PRISM_ADMIN_KEY_FILE": "/nowhere/key"})
