"""Running commands and writing files: the few lines that every other part uses."""

import subprocess
from pathlib import Path


def run(*command: object, stdin: str | None = None, silent: bool = False) -> None:
    """Runs a command. Raises CalledProcessError when it fails."""
    out = subprocess.DEVNULL if silent else None
    subprocess.run([str(word) for word in command], check=True, text=True, input=stdin, stdout=out)


def output(*command: object) -> str:
    """What a command prints. Raises CalledProcessError when it fails."""
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE).stdout


def succeeds(*command: object) -> bool:
    """Runs a command that may fail: a question, or work that may be done already."""
    words = [str(word) for word in command]
    devnull = subprocess.DEVNULL
    return subprocess.run(words, stdout=devnull, stderr=devnull).returncode == 0


def write(path: Path, text: str) -> Path:
    """Writes what changed. NB: kube-proxy ends when its file is written to, whatever the text."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path
