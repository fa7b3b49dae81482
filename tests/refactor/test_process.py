"""The command as a process: signals at any moment, terminal and Job output, metrics."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prism.artifact import Artifact
from prism.contract import ExitCode, Metric
from prism_refactor.options import Options

MakeOptions = Callable[..., Options]


def start(options: Options, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prism_cli", "refactor", options.source]
    command += ["--out", str(options.out), "--calibration", str(options.calibration)]
    command += ["--sub-experts", str(options.sub_experts), "--tokens", str(options.tokens), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def layer_files(options: Options) -> int:
    work = options.out.with_name(options.out.name + ".partial") / "work"
    return len([file for file in work.glob("*.safetensors") if "hidden" not in file.name])


def test_sigterm_ends_quickly_with_words_and_the_next_run_goes_on(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path
) -> None:
    options = make_options(tmp_path / "artifact")
    message = tmp_path / "message"
    process = start(options, "--termination-message", str(message))
    wait_for(lambda: layer_files(options) >= 2, process)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert process.returncode == ExitCode.FAILED
    assert json.loads(message.read_text())["reason"] == "Interrupted"
    assert "run the same command again" in errors
    kept = layer_files(options)
    process = start(options, "--termination-message", str(message))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitCode.OK, errors
    assert json.loads(message.read_text())["digest"] == artifact.digest
    assert kept >= 2
    assert "total=" in errors  # one line per layer where there is no terminal


def _killed(options: Options, moments: int, seed: int) -> str:
    """Kill -9 at random moments, then let it end; returns the digest it reports."""
    rng = random.Random(seed)
    message = options.out.with_name("message")
    for _ in range(moments):
        process = start(options, "--termination-message", str(message))
        before = layer_files(options)
        wait_for(
            lambda before=before: layer_files(options) > before or options.out.exists(), process
        )
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate(timeout=30)
        if options.out.exists():
            break  # killed after the artifact had appeared, while the work was being dropped
        assert layer_files(options) > before  # what was finished is kept
    process = start(options, "--termination-message", str(message))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitCode.OK, errors
    return str(json.loads(message.read_text())["digest"])


def test_kill_nine_loses_at_most_a_layer(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path
) -> None:
    assert _killed(make_options(tmp_path / "artifact"), moments=2, seed=1) == artifact.digest


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_kill_nine_at_twenty_moments(
    artifact: Artifact, make_options: MakeOptions, tmp_path: Path, seed: int
) -> None:
    assert _killed(make_options(tmp_path / "artifact"), moments=4, seed=seed) == artifact.digest


def test_progress_is_served_while_it_works(make_options: MakeOptions, tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = make_options(tmp_path / "artifact")
    process = start(options, "--metrics-port", str(port))
    try:
        wait_for(lambda: layer_files(options) >= 2, process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        process.kill()
        process.communicate(timeout=30)
    share = next(line for line in text.splitlines() if line.startswith(Metric.REFACTOR_PROGRESS))
    assert 0 < float(share.split()[1]) <= 1
    assert f'{Metric.REFACTOR_STEPS}{{stage="partition"}}' in text
