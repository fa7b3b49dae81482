"""The partial folder: whole files, one worker, one set of inputs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prism_refactor.errors import Reason
from prism_refactor.store import KeptHidden, PartialFolder, write_atomically


def test_kept_tensors_come_back_under_the_same_key(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "out")
    with folder.locked("a"):
        folder.save("x", {"t": torch.arange(3)})
    with folder.locked("a"):
        kept = folder.load("x")
        assert kept is not None
        assert kept["t"].tolist() == [0, 1, 2]
        assert folder.load("y") is None


def test_work_made_from_other_inputs_is_discarded(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "out")
    with folder.locked("a"):
        folder.save("x", {"t": torch.arange(3)})
        (folder.artifact / "model.safetensors").write_bytes(b"old")
    with folder.locked("b"):
        assert folder.load("x") is None
        assert not list(folder.artifact.iterdir())


def test_a_second_worker_is_turned_away(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from prism_refactor.store import PartialFolder\n"
        "from prism_refactor.errors import RefactorError\n"
        "try:\n"
        "    with PartialFolder(Path(sys.argv[1])).locked('a'): print('in')\n"
        "except RefactorError as error: print(error.reason)"
    )
    with PartialFolder(tmp_path / "out").locked("a"):
        command = [sys.executable, "-c", script, str(tmp_path / "out")]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == Reason.INTERRUPTED


def test_left_temporaries_are_removed(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "out")
    with folder.locked("a"):
        (folder.work / "x.safetensors.tmp").write_bytes(b"half")
    with folder.locked("a"):
        assert not list(folder.path.rglob("*.tmp"))


def test_a_broken_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"


def test_hidden_state_after_the_last_layer_is_only_counted(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "out")
    with folder.locked("a"):
        states = KeptHidden(folder, "hidden", layers=2)
        assert states.load() is None
        states.save(1, torch.ones(2, 3))
        done, hidden = states.load() or (0, torch.empty(0))
        assert (done, hidden.shape) == (1, (2, 3))
        states.save(2, torch.ones(2, 3))
        done, hidden = states.load() or (0, torch.empty(0))
        assert (done, hidden.numel()) == (2, 0)


def test_publish_moves_the_artifact_and_drops_the_work(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "out")
    with folder.locked("a"):
        (folder.artifact / "f").write_text("x")
        folder.publish()
    assert (tmp_path / "out" / "f").read_text() == "x"
    assert not folder.path.exists()


def test_a_folder_with_an_unreadable_key_is_started_afresh(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "out")
    folder.work.mkdir(parents=True)
    (folder.work / "x.safetensors").write_bytes(b"whatever")
    (folder.path / "key.json").write_text("{")
    with folder.locked("a"):
        assert folder.load("x") is None
