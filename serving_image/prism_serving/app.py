"""`prism serve DIR`: gateway and engine on one machine, without any cluster.

Knows: the two child processes, how they are told what to do, when to restart one. Must not know:
what they compute. It imports neither torch nor FastAPI.

The children get the same arguments as in a pod: a socket and a control directory, here in a private
temporary directory, with level.json and slo.json written from the flags. A child that dies is
restarted with growing delay; one that says the artifact is bad (exit code 3) ends everything.
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from prism import contract
from prism.contract import ExitCode

from prism_serving.engine.options import add_engine_arguments
from prism_serving.gateway.options import add_gateway_arguments

_BACKOFF_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STABLE_S: Final = 60.0  # a child that lived this long starts over at the first delay
_POLL_S: Final = 0.1
_PR_SET_PDEATHSIG: Final = 1


class UsageError(ValueError):
    """Wrong use; the message says what to do."""


class BadArtifact(ValueError):
    """The directory cannot be served; the message says what to do."""


def parser() -> argparse.ArgumentParser:
    """The arguments of `prism serve`."""
    p = argparse.ArgumentParser(prog="prism serve", description="Serve an artifact over HTTP.")
    p.add_argument("artifact", type=Path, help="an artifact made by `prism refactor`")
    p.add_argument("--port", type=int, default=contract.API_PORT)
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--admin-port", type=int, default=0, help="on 127.0.0.1; default: a free one")
    p.add_argument("--level", type=int, default=contract.MAX_LEVEL, help="ceiling, 10 to 100")
    p.add_argument("--min-level", type=int, default=None, help="floor (default: --level)")
    p.add_argument("--ttft-ms", type=int, default=None, help="target for the first token")
    p.add_argument("--itl-ms", type=int, default=None, help="target for each further token")
    add_engine_arguments(p)
    add_gateway_arguments(p)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises UsageError or BadArtifact before anything is started."""
    floor = args.level if args.min_level is None else args.min_level
    low, high = contract.MIN_LEVEL, contract.MAX_LEVEL
    problems = []
    if not low <= args.level <= high:
        problems.append(f"--level must be between {low} and {high}, got {args.level}")
    if not low <= floor <= args.level:
        problems.append(f"--min-level must be between {low} and --level, got {floor}")
    for flag in ("ttft_ms", "itl_ms"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            problems.append(f"--{flag.replace('_', '-')} must be positive, got {value}")
    for flag in ("port", "admin_port"):
        if not 0 <= getattr(args, flag) < 65536:
            problems.append(f"--{flag.replace('_', '-')} must be below 65536")
    if problems:
        raise UsageError("; ".join(problems))
    _check_artifact(args.artifact)
    _check_port(args.host, args.port)


def _check_artifact(path: Path) -> None:
    if not path.is_dir():
        raise BadArtifact(f"{path}: no such directory")
    manifest = path / contract.PRISM_SUBFOLDER / contract.MANIFEST_FILE
    if manifest.is_file():
        return
    if (path / "config.json").is_file():
        raise BadArtifact(
            f"{path} is a plain checkpoint, not an artifact. Make one with:\n"
            f"  prism refactor {path} --out {path}-prism"
        )
    raise BadArtifact(f"{path}: no {manifest.relative_to(path)} and no config.json in it")


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(slots=True)
class Child:
    """One process that is restarted with growing delay."""

    name: str
    command: list[str]
    environment: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    started_s: float = 0.0
    restart_at_s: float = 0.0
    failures: int = 0

    def start(self, now_s: float) -> None:
        """Start it; it is killed when this process is."""
        self.process = subprocess.Popen(
            self.command, env=self.environment, preexec_fn=_die_with_parent, start_new_session=True
        )
        self.started_s = now_s

    def poll(self, now_s: float) -> int | None:
        """Restart when due; exit code of a process that just ended."""
        if self.process is None:
            if now_s >= self.restart_at_s:
                self.start(now_s)
            return None
        code = self.process.poll()
        if code is None:
            return None
        self.process = None
        if now_s - self.started_s > _STABLE_S:
            self.failures = 0
        delay_s = _BACKOFF_S[min(self.failures, len(_BACKOFF_S) - 1)]
        self.failures += 1
        self.restart_at_s = now_s + delay_s
        return code

    def stop(self, signum: int) -> None:
        """Send a signal if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signum)

    def wait(self, timeout_s: float) -> None:
        """Wait for its end; kill it when it takes longer."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(slots=True)
class Supervisor:
    """Runs both children until told to stop. `run` returns the exit code."""

    engine: Child
    gateway: Child
    drain_s: float
    _signals: int = field(default=0)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end now."""
        self._signals += 1

    def run(self) -> int:
        """Until a signal, or until a child says it can never work."""
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGINT, self.on_signal)
        children = (self.engine, self.gateway)
        for child in children:
            child.start(time.monotonic())
        while not self._signals:
            for child in children:
                code = child.poll(time.monotonic())
                if code is not None and not self._signals:
                    if code in (ExitCode.BAD_INPUT, ExitCode.USAGE):
                        self._end(signal.SIGKILL)
                        return code
                    delay_s = max(child.restart_at_s - time.monotonic(), 0)
                    print(
                        f"prism serve: the {child.name} ended with {code}; "
                        f"starting it again in {delay_s:.1f} s",
                        file=sys.stderr,
                    )
            time.sleep(_POLL_S)
        return self._drain()

    def _drain(self) -> int:
        self.gateway.stop(signal.SIGTERM)
        deadline_s = time.monotonic() + self.drain_s + 10
        while self.gateway.process is not None and self.gateway.process.poll() is None:
            if self._signals > 1 or time.monotonic() > deadline_s:
                self.gateway.stop(signal.SIGTERM)
                break
            time.sleep(_POLL_S)
        self._end(signal.SIGTERM)
        return int(ExitCode.OK)

    def _end(self, signum: int) -> None:
        for child in (self.engine, self.gateway):
            child.stop(signum)
        for child in (self.engine, self.gateway):
            child.wait(5)


def _write_control(directory: Path, args: argparse.Namespace) -> None:
    floor = args.level if args.min_level is None else args.min_level
    level = {"seq": 1, "floor": floor, "ceiling": args.level}
    (directory / contract.LEVEL_FILE).write_text(json.dumps(level))
    slo = {"ttft_ms": args.ttft_ms, "itl_ms": args.itl_ms}
    (directory / contract.SLO_FILE).write_text(json.dumps(slo))


def _engine_command(args: argparse.Namespace, runtime: Path) -> list[str]:
    command = [sys.executable, "-m", "prism_serving.engine", *_common(args, runtime)]
    command += ["--dtype", args.dtype, "--device", args.device, "--kernel", args.kernel]
    command += ["--max-running", str(args.max_running), "--batch-tokens", str(args.batch_tokens)]
    command += ["--measure-seconds", str(args.measure_seconds)]
    if args.threads is not None:
        command += ["--threads", str(args.threads)]
    if args.kv_tokens is not None:
        command += ["--kv-tokens", str(args.kv_tokens)]
    return [*command, "--reproducible"] if args.reproducible else command


def _gateway_command(args: argparse.Namespace, runtime: Path, admin_port: int) -> list[str]:
    name = args.model_name or args.artifact.resolve().name
    return [
        *(sys.executable, "-m", "prism_serving.gateway", *_common(args, runtime)),
        *("--model-name", name, "--prism-model", f"local/{name}"),
        *("--host", args.host, "--port", str(args.port)),
        *("--admin-host", "127.0.0.1", "--admin-port", str(admin_port)),
        *("--max-waiting", str(args.max_waiting), "--max-body-bytes", str(args.max_body_bytes)),
    ]


def _common(args: argparse.Namespace, runtime: Path) -> list[str]:
    return [
        *("--artifact", str(args.artifact), "--socket", str(runtime / "engine.sock")),
        *("--control-dir", str(runtime), "--drain-seconds", str(args.drain_seconds)),
    ]


def _say(args: argparse.Namespace, admin_port: int, token_file: Path) -> None:
    name = args.model_name or args.artifact.resolve().name
    host = f"[{args.host}]" if ":" in args.host else args.host
    floor = args.level if args.min_level is None else args.min_level
    base = f"http://{host}:{args.port}"
    targets = f"ttft {args.ttft_ms or 'none'}, itl {args.itl_ms or 'none'} (ms)"
    body = json.dumps({"model": name, "prompt": "Once", "max_tokens": 32})
    print(
        f"serving {args.artifact} as {name!r} at {base}/v1 "
        f"(levels {floor}-{args.level}, {args.dtype}, targets: {targets})\n"
        f"ready when {base}{contract.PATH_READY} answers 200; then ask:\n"
        f"  curl {base}/v1/completions -H 'content-type: application/json' -d '{body}'\n"
        f"admin: http://127.0.0.1:{admin_port}{contract.PATH_LEVEL}, bearer token in {token_file}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    """`prism serve`; returns an ExitCode."""
    args = parser().parse_args(argv)
    try:
        check(args)
    except UsageError as error:
        print(f"prism serve: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    except BadArtifact as error:
        print(f"prism serve: {error}", file=sys.stderr)
        return int(ExitCode.BAD_INPUT)
    runtime = Path(tempfile.mkdtemp(prefix="prism-serve-"))
    try:
        return _serve(args, runtime)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(runtime)


def _serve(args: argparse.Namespace, runtime: Path) -> int:
    _write_control(runtime, args)
    token, token_file = secrets.token_urlsafe(24), runtime / "admin-token"
    with open(os.open(token_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(token)
    digest = hashlib.sha256(token.encode()).hexdigest()
    environment = {**os.environ, contract.ENV_ADMIN_TOKEN_SHA256: digest}
    admin_port = args.admin_port or _free_port()
    _say(args, admin_port, token_file)
    engine = Child("engine", _engine_command(args, runtime), dict(os.environ))
    gateway = Child("gateway", _gateway_command(args, runtime, admin_port), environment)
    return Supervisor(engine, gateway, args.drain_seconds).run()
