"""``python -m prism_operator``: read the settings, start Kopf, end with its result."""

import asyncio
import logging
import os
import sys

import kopf
from prism import contract

from prism_operator import config, handlers


def main() -> int:
    """Exit code 2 for settings that are wrong, 1 for a failure, 0 after a stop."""
    try:
        settings = config.from_env(os.environ)
    except config.ConfigError as error:
        print(f"prism-operator: {error}", file=sys.stderr)
        return int(contract.ExitCode.USAGE)
    kind = kopf.LogFormat.JSON if settings.log_format == "json" else kopf.LogFormat.FULL
    kopf.configure(verbose=False, log_format=kind, log_refkey="object")
    for noisy in ("kopf.activities", "kopf.objects", "aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    registry = kopf.OperatorRegistry()
    handlers.register(registry, settings)
    try:
        import uvloop  # optional speed; the operator image has it
    except ImportError:
        run = asyncio.run
    else:
        run = uvloop.run
    run(
        kopf.operator(
            registry=registry,
            standalone=True,
            clusterwide=not settings.watch_namespaces,
            namespaces=list(settings.watch_namespaces),
            liveness_endpoint=f"http://0.0.0.0:{settings.health_port}{contract.PATH_HEALTH}",
        )
    )
    return int(contract.ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
