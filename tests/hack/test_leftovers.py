"""What `down --purge` leaves in the cache folder, and what it never touches there."""

from pathlib import Path

import pytest

from hack.cluster import leftovers


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    (folder / "images" / "storage").mkdir(parents=True)
    (folder / "programs").mkdir()
    monkeypatch.setattr(leftovers, "CACHE", folder)
    monkeypatch.setattr(leftovers.engines, "RUN", tmp_path / "run")
    return folder


def test_kept_caches_are_named(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leftovers.remove_or_name_caches(False)
    assert f"{cache} (images, programs)" in "".join(capsys.readouterr())
    assert (cache / "images" / "storage").is_dir()


def test_caches_go_when_asked(cache: Path) -> None:
    leftovers.remove_or_name_caches(True)
    assert not cache.exists()


def test_what_is_not_ours_stays(cache: Path) -> None:
    (cache / "somebody-elses").mkdir()
    leftovers.remove_or_name_caches(True)
    assert [path.name for path in cache.iterdir()] == ["somebody-elses"]
