"""The gateway's command line and environment."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from prism import contract


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What `python -m prism_serving.gateway` was asked."""

    artifact: Path
    socket: Path
    control_dir: Path
    model_name: str
    prism_model: str
    host: str
    port: int
    admin_host: str
    admin_port: int
    admin_token_sha256: str
    drain_s: float
    max_waiting: int
    max_body_bytes: int


def add_gateway_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `prism serve` passes on to the gateway unchanged."""
    parser.add_argument("--model-name", default=None, help="name clients ask for")
    parser.add_argument(
        "--max-waiting", type=int, default=256, help="requests without a first token; more get 429"
    )
    parser.add_argument("--max-body-bytes", type=int, default=4 * 1024 * 1024)


def parse(argv: list[str] | None = None) -> GatewayOptions:
    """Exits with code 2 on wrong use."""
    parser = argparse.ArgumentParser(prog="prism_serving.gateway", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=Path(contract.ARTIFACT_DIR))
    parser.add_argument("--socket", type=Path, default=Path(contract.SOCKET_PATH))
    parser.add_argument("--control-dir", type=Path, default=Path(contract.CONTROL_DIR))
    parser.add_argument("--prism-model", default="", help="namespace/name, for the metrics")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=contract.API_PORT)
    parser.add_argument("--admin-host", default="0.0.0.0")
    parser.add_argument("--admin-port", type=int, default=contract.ADMIN_PORT)
    parser.add_argument("--drain-seconds", type=float, default=30.0)
    add_gateway_arguments(parser)
    args = parser.parse_args(argv)
    return GatewayOptions(
        artifact=args.artifact,
        socket=args.socket,
        control_dir=args.control_dir,
        model_name=args.model_name or args.artifact.resolve().name,
        prism_model=args.prism_model,
        host=args.host,
        port=args.port,
        admin_host=args.admin_host,
        admin_port=args.admin_port,
        admin_token_sha256=os.environ.get(contract.ENV_ADMIN_TOKEN_SHA256, ""),
        drain_s=args.drain_seconds,
        max_waiting=args.max_waiting,
        max_body_bytes=args.max_body_bytes,
    )
