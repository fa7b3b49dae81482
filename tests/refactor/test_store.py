"""The partial folder: whole files, one worker, one set of inputs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from prism_refactor import store
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.store import PartialFolder, write_atomically
from prism_refactor.sweep import KeptStreams


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


def test_shards_work_side_by_side_and_the_whole_waits_for_them(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "out")
    with folder.claimed("a", (0, 2)), folder.claimed("a", (1, 2)):
        with pytest.raises(RefactorError, match="Another refactoring"), folder.claimed("a", (1, 2)):
            pass
        with pytest.raises(RefactorError, match="Another refactoring"), folder.claimed("b", (2, 3)):
            pass
    with folder.locked("a"):
        pass


def test_shards_that_begin_at_the_same_moment_let_one_make_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PartialFolder(tmp_path / "out")
    found = store._key_in
    answers = iter([None])  # the second shard looks just before the first has written the key
    with folder.claimed("a", (0, 2)):
        monkeypatch.setattr(store, "_key_in", lambda file: next(answers, found(file)))
        began = time.monotonic()
        with folder.claimed("a", (1, 2)):
            assert time.monotonic() - began < 5


def test_left_temporaries_are_not_published(tmp_path: Path) -> None:
    folder = PartialFolder(tmp_path / "out")
    with folder.locked("a"):
        (folder.artifact / "x.safetensors.tmp").write_bytes(b"half")
        folder.publish()
    assert not list((tmp_path / "out").iterdir())


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


def test_streams_are_kept_with_their_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = PartialFolder(tmp_path / "out")
    with folder.locked("a"):
        kept = KeptStreams(folder, "hidden")
        assert kept.load() is None
        kept.save(1, {"full": torch.ones(2, 3)})
        assert kept.load() is None  # a moment after the start nothing is worth writing
        monkeypatch.setattr("prism_refactor.sweep._SAVE_EVERY_S", 0)
        kept.save(2, {"full": torch.ones(2, 3)})
        done, hidden = kept.load() or (0, {})
        assert (done, hidden["full"].shape) == (2, (2, 3))


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
