"""The command line: what it loads, what it prints, and how it exits."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import prism
import pytest
from prism.contract import ExitCode
from prism.manifest import OperatingPoint
from prism_cli.main import main
from prism_cli.tables import points_table

FULL = OperatingPoint(100, 1.0, 1.0, 28.51, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
HALF = OperatingPoint(50, 0.502, 0.518, 28.64, 0.47, 0.06, 0.003, 0.0002, 0.966, 0.001)


@pytest.mark.parametrize("arguments", [["version"], ["--help"], ["inspect", "/nowhere"], []])
def test_light_commands_load_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom prism_cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit(17 if 'torch' in sys.modules or 'transformers' in sys.modules else 0)"
    )
    command = [sys.executable, "-c", script, *arguments]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_version_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("prism 0.")


def test_version_is_that_of_the_distribution() -> None:
    """Images carry the sources alone, so the version is in them and not in package metadata."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert prism.__version__ == project["version"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["refactor"],
        ["refactor", "x"],
        ["refactor", "x", "--out", "y", "--sub-experts", "5"],
        ["refactor", "x", "--out", "y", "--seed", "-1"],
        ["refactor", "x", "--out", "y", "--tokens", "100"],
        ["eval", "x", "--data", "y", "--levels", "100,5"],
        ["eval", "x", "--data", "y", "--tokens", "-5"],
        ["eval", "x"],
        ["eval", "x", "--data", "y", "--tasks", "z"],
        ["eval", "x", "--data", "y", "--batch", "3"],
        ["eval", "x", "--data", "y", "--batch", "8,many"],
    ],
)
def test_wrong_use_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == ExitCode.USAGE
    assert "usage: prism" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        *(["--metrics-port", value] for value in ("99999", "0", "-1", "http")),
        *(["--seed", value] for value in ("2147483648", "-1")),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["refactor", "x", "--out", "y", *given])
    assert caught.value.code == ExitCode.USAGE
    flag, value = given
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag}: " in error
    assert value in error


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == ExitCode.USAGE
    assert "refactor" in capsys.readouterr().err


def test_inspect_of_nothing_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path)]) == ExitCode.BAD_INPUT
    assert str(tmp_path) in capsys.readouterr().err


def test_eval_of_nothing_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    assert main(["eval", str(tmp_path), "--data", str(text)]) == ExitCode.BAD_INPUT
    assert "not an artifact" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "  "])
def test_eval_on_no_text_speaks_of_its_own_text(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str | None,
) -> None:
    from prism_refactor import measure

    monkeypatch.setattr(measure, "open_artifact", lambda directory: None)
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content)
    assert main(["eval", str(tmp_path), "--data", str(text)]) == ExitCode.BAD_INPUT
    words = f"No evaluation text at {text}." if content is None else f"{text} holds no text."
    assert capsys.readouterr().err == f"prism eval: {words}\n"


def test_refactor_of_nothing_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["refactor", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert main(arguments) == ExitCode.BAD_INPUT
    assert "SourceNotFound" in capsys.readouterr().err


def test_eval_prints_the_fields_that_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prism_refactor import measure

    asked: dict[str, object] = {}

    def answer(directory: Path, data: Path, levels: object, **more: object) -> list[OperatingPoint]:
        asked.update(more, directory=directory, data=data, levels=levels)
        return [FULL, HALF]

    monkeypatch.setattr(measure, "measure", answer)
    code = main(["eval", "d", "--data", "f.txt", "--levels", "50,100", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert code == ExitCode.OK
    assert asked["levels"] == (100, 50)
    fields = {"level", "own_share", "active_share", "perplexity", "quality_loss_percent"}
    fields |= {"quality_loss_se", "kl", "top1_agreement"}
    assert [set(row) for row in rows] == [fields, fields]
    assert rows[1] == {name: asdict(HALF)[name] for name in fields}


@pytest.mark.parametrize("flag", ["--ride-along", "--baselines"])
def test_what_needs_a_batch_says_so(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "d", "--data", "f.txt", flag]) == ExitCode.USAGE
    assert "need --batch" in capsys.readouterr().err


def test_tasks_have_no_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "d", "--tasks", "t.yaml", "--batch", "8"]) == ExitCode.USAGE
    assert "--batch measures on --data" in capsys.readouterr().err


def test_tasks_without_lm_eval_name_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "prism_refactor.lm_harness", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_NoHarness(), *sys.meta_path])
    assert main(["eval", "d", "--tasks", "t.yaml"]) == ExitCode.USAGE
    assert "moe-prism[eval]" in capsys.readouterr().err


class _NoHarness:
    """A machine without lm-eval, whether this one has it or not."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")


def test_eval_as_served_adds_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prism_refactor import served

    asked: dict[str, object] = {}

    def answer(*given: object, **more: object) -> list[served.ServedPoint]:
        asked.update(more, batches=given[3])
        return [
            served.ServedPoint("level 50", 8, True, 0.74, 0.68, HALF, 50),
            served.ServedPoint("top-2", 8, False, 0.5, 0.72, FULL),
        ]

    monkeypatch.setattr(served, "measure_served", answer)
    arguments = ["eval", "d", "--data", "f.txt", "--batch", "32,8", "--ride-along", "--baselines"]
    assert main([*arguments, "--json"]) == ExitCode.OK
    rows = json.loads(capsys.readouterr().out)
    assert asked["batches"] == (8, 32)
    assert asked["ride_along"] and asked["baselines"]
    assert [row["level"] for row in rows] == [50, None]
    assert rows[0]["kl"] == HALF.kl
    assert (rows[0]["batch"], rows[0]["ride_along"]) == (8, True)
    assert (rows[1]["computed_share"], rows[1]["bytes_share"]) == (0.5, 0.72)
    assert main(arguments) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["batch", "method", "own"]
    assert "level 50 +ride" in lines[1]
    assert len({len(line) for line in lines}) == 1


def test_serve_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def answer(arguments: list[str]) -> int:
        given.extend(arguments)
        return 0

    app = ModuleType("prism_serving.app")
    app.main = answer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prism_serving.app", app)
    assert main(["serve", "dir", "--port", "8000"]) == ExitCode.OK
    assert given == ["dir", "--port", "8000"]


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it now fails
    monkeypatch.delitem(sys.modules, "prism_serving.app", raising=False)
    app = ModuleType("prism_serving.app")

    def fail(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")

    app.main = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prism_serving.app", app)
    assert main(["serve", "dir"]) == ExitCode.USAGE
    assert "uvicorn" in capsys.readouterr().err


def test_table_is_aligned_and_signed() -> None:
    lines = points_table([FULL, HALF]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:3] == ["level", "own", "%"]
    assert "+0.47" in lines[2]
