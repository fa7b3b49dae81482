"""Building and finding the extension: cache, prebuilt library, machines without a compiler."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prism import contract
from prism.kernels import build

COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo fake 1; exit 0; }
echo run >> "$FAKE_LOG"
while [ "$1" != -o ]; do shift; done
sleep 0.05
echo made > "$2"
"""


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment whose compiler writes a file and counts its runs."""
    path = tmp_path / "fakecxx"
    path.write_text(COMPILER)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return {"CXX": str(path), contract.ENV_CACHE: str(tmp_path / "cache")}


def test_library_is_built_once_and_then_found(
    fake_compiler: dict[str, str], tmp_path: Path
) -> None:
    first = build.cached_library(fake_compiler)
    runs = (tmp_path / "log").read_text()
    assert first.read_text() == "made\n"
    assert build.cached_library(fake_compiler) == first
    assert (tmp_path / "log").read_text() == runs
    assert torch.__version__ in str(first)


def test_processes_that_want_it_at_once_build_it_once(
    fake_compiler: dict[str, str], tmp_path: Path
) -> None:
    code = "import os; from prism.kernels import build; print(build.cached_library(os.environ))"
    environ = os.environ | fake_compiler
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    paths = {run.communicate(timeout=60)[0] for run in runs}
    assert len(paths) == 1
    sources = len(list((Path(build.__file__).parent / "cpu").glob("*.cpp")))
    assert len((tmp_path / "log").read_text().splitlines()) == sources + 1


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found"):
        build.cached_library({})


def test_failing_compiler_leaves_nothing_and_says_why(
    fake_compiler: dict[str, str], tmp_path: Path
) -> None:
    Path(fake_compiler["CXX"]).write_text("#!/bin/sh\necho 'x.cpp: error: no luck' >&2\nexit 1\n")
    with pytest.raises(build.BuildError, match="error: no luck"):
        build.cached_library(fake_compiler)
    assert not list(tmp_path.rglob("*.so"))


def test_unwritable_cache_is_a_reason(fake_compiler: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(build.BuildError, match="cannot write the kernel cache"):
        build.cached_library(fake_compiler)


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


CHOOSE = """
import logging, torch
logging.basicConfig(level="INFO", format="%(message)s")
from prism.kernels import choose
print(type(choose(torch.device("cpu"), torch.float32, 64, 8)).__name__)
"""


def test_named_library_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    result = python(CHOOSE, **{contract.ENV_CPU_EXTENSION: str(tmp_path / "none.so")})
    assert result.returncode != 0
    assert "OSError" in result.stderr
    assert "none.so" in result.stderr


def test_without_a_compiler_torch_computes_and_the_log_says_why(tmp_path: Path) -> None:
    result = python(CHOOSE, **{contract.ENV_CACHE: str(tmp_path), "PATH": "/nonexistent"})
    assert result.stdout.strip() == "ReferenceKernel"
    assert "lower levels will save no time: no C++ extension: no C++ compiler" in result.stderr


def test_prebuilt_library_is_used_without_a_compiler() -> None:
    library = build.cached_library(os.environ)
    environ = {contract.ENV_CPU_EXTENSION: str(library), "PATH": "/nonexistent"}
    result = python(CHOOSE, **environ)
    assert result.stdout.strip() == "CpuKernel"
    assert f"prebuilt {library}" in result.stderr


@pytest.mark.long
def test_command_for_images_builds_a_library_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "prism.so"
    command = [sys.executable, "-m", "prism.kernels.build", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "loads" in result.stdout
    assert out.exists()


def test_command_for_images_wants_one_path() -> None:
    assert build.main([]) == contract.ExitCode.USAGE
