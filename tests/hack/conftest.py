from pathlib import Path

import pytest


class FakePath:
    """A PATH of tiny shell scripts that answer as told and record what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.log = folder / "calls"

    def add(self, name: str, script: str = "exit 0") -> None:
        """A program of this name that runs this shell text, with `$@` its words."""
        program = self.folder / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.log}\n{script}\n')
        program.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePath:
    """A PATH that has the programs that a test adds, and no other."""
    path = FakePath(tmp_path)
    monkeypatch.setenv("PATH", str(path.folder))
    return path
