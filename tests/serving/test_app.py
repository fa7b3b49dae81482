"""`prism serve` refuses what cannot work, in words, before it starts anything."""

import json
import shutil
import socket

import pytest
from prism.contract import ExitCode
from prism_serving.app import Child, main


def refused(capsys, *argv):
    code = main([str(a) for a in argv])
    return code, capsys.readouterr().err


def test_a_missing_directory(capsys, tmp_path):
    code, text = refused(capsys, tmp_path / "nothing")
    assert code == ExitCode.BAD_INPUT and "no such directory" in text


def test_a_plain_checkpoint_names_the_command_to_run(capsys, artifact, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(artifact, plain, ignore=shutil.ignore_patterns("prism"))
    code, text = refused(capsys, plain)
    assert code == ExitCode.BAD_INPUT
    assert f"prism refactor {plain} --out {plain}-prism" in text


def test_a_port_in_use(capsys, artifact):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, text = refused(capsys, artifact, "--port", taken.getsockname()[1])
    assert code == ExitCode.USAGE and "choose another --port" in text


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--level", "5"), "--level must be between 10 and 100, got 5"),
        (("--level", "50", "--min-level", "60"), "--min-level must be between 10 and --level"),
        (("--ttft-ms", "0"), "--ttft-ms must be positive"),
        (("--port", "99999"), "--port must be below 65536"),
    ],
)
def test_wrong_flags(capsys, artifact, flags, message):
    code, text = refused(capsys, artifact, *flags)
    assert code == ExitCode.USAGE and message in text


def test_a_broken_artifact_ends_both_processes_with_its_exit_code(start_server, artifact, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    manifest = broken / "prism" / "prism.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    server = start_server(broken)
    assert server.process.wait(60) == ExitCode.BAD_INPUT
    assert "schema_version is 99" in server.log.read_text()


def test_a_dying_child_is_restarted_with_growing_delay():
    child = Child("child", ["false"], {"PATH": "/usr/bin:/bin"})
    child.start(0.0)
    delays = []
    now = 0.0
    for _ in range(3):
        assert child.process is not None
        child.process.wait(10)
        assert child.poll(now) == 1
        delays.append(child.restart_at_s - now)
        assert child.poll(child.restart_at_s - 0.01) is None and child.process is None
        now = child.restart_at_s
        child.poll(now)
    assert delays == sorted(delays) and delays[0] < delays[-1]
    assert child.process is not None
    child.wait(10)
