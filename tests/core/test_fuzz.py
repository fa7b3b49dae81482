"""What strangers put into prism.json, a safetensors header or the weight index: opening answers
with an artifact or an error that names the file; it never crashes and never runs anything."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prism import artifact
from prism.checkpoint import INDEX_FILE, CheckpointError, open_checkpoint, read_header

FORBIDDEN = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect"}
_seen: list[str] = []
_watching = [False]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**30), 2**63, 1e308, float("nan"), float("inf"), -0.0])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "..", "../../etc/passwd", "/dev/zero", "F32", "BF16", "\0", "\ud800"])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
relaxed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _note(event: str, _: object) -> None:
    if _watching[0] and event in FORBIDDEN:
        _seen.append(event)


sys.addaudithook(_note)  # cannot be taken away again; silent outside these tests


@pytest.fixture(autouse=True)
def nothing_runs() -> Iterator[None]:
    _seen.clear()
    _watching[0] = True
    yield
    _watching[0] = False
    assert not _seen


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value, the root left out."""
    if not isinstance(value, dict | list):
        return []
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    return [path for key, v in inside for path in [(*at, key), *paths_of(v, (*at, key))]]


def replaced(value: Any, path: tuple[Any, ...], new: Any, drop: bool) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return copy


def sane(manifest: artifact.Manifest) -> None:
    """What every reader of a manifest counts on, said once more and in other words."""
    for knot in manifest.knots:
        assert all(-200 <= theta <= 200 for theta in knot.log_theta)
    for point in manifest.operating_points:
        assert 0 <= point.own_share <= 1
        assert 0 <= point.active_share <= 1.5
        assert point.perplexity > 0
    for level, curves in manifest.batch_curves.items():
        assert 10 <= int(level) <= 100
        for by, prefix in (("batch", ""), ("measured_batch", "measured_")):
            if by not in curves:
                assert not any(name.startswith("measured") == bool(prefix) for name in curves)
                continue
            assert curves[by] == sorted(curves[by])
            shares = [curves[f"{prefix}bytes_share"], curves[f"{prefix}computed_share"]]
            for batch, *both in zip(curves[by], *shares, strict=True):
                assert batch >= 1
                assert all(0 <= share <= 1.5 for share in both)


def opened(path: Path) -> None:
    try:
        found = artifact.open_artifact(path)
    except artifact.ArtifactError as error:
        assert str(path) in str(error)
        return
    assert found.digest.startswith("sha256:")
    sane(found.manifest)
    assert all(isinstance(problem, str) for problem in artifact.verify(path))


@pytest.fixture(scope="module")
def victim(whole_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "artifact"
    shutil.copytree(whole_artifact, path)
    return path


@relaxed
@given(data=st.data())
def test_a_manifest_with_any_value_anywhere(whole_artifact: Path, victim: Path, data: Any) -> None:
    good = json.loads((whole_artifact / "prism/prism.json").read_text())
    path = data.draw(st.sampled_from(paths_of(good)))
    bad = replaced(good, path, data.draw(anything), data.draw(st.booleans()))
    (victim / "prism/prism.json").write_text(json.dumps(bad))
    opened(victim)


numbers = st.sampled_from([0, -1, 1, 0.5, 1.4999, 1.5001, 200.1, 1e9, 1e300, 2**40 + 1])
NUMERIC = ("batch_curves", "knots", "operating_points")


@relaxed
@given(data=st.data())
def test_a_manifest_with_any_number_where_a_number_is(
    whole_artifact: Path, victim: Path, data: Any
) -> None:
    good = json.loads((whole_artifact / "prism/prism.json").read_text())
    places = [path for path in paths_of(good) if path[0] in NUMERIC and len(path) > 2]
    bad = good
    for path in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True)):
        value = data.draw(numbers | st.floats() | st.lists(numbers, max_size=3))
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier one took its place
            bad = replaced(bad, path, value, data.draw(st.booleans()))
    (victim / "prism/prism.json").write_text(json.dumps(bad))
    opened(victim)


@relaxed
@given(data=st.data())
def test_a_manifest_of_any_bytes(whole_artifact: Path, victim: Path, data: Any) -> None:
    good = (whole_artifact / "prism/prism.json").read_bytes()
    at = data.draw(st.integers(0, len(good)))
    cut = data.draw(st.integers(0, 40))
    junk = data.draw(st.binary(max_size=20) | st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000]))
    (victim / "prism/prism.json").write_bytes(good[:at] + junk + good[at + cut :])
    opened(victim)


def opened_header(file: Path) -> None:
    try:
        entries = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)
        return
    size = file.stat().st_size
    for name, entry in entries.items():
        assert 8 <= entry.start <= entry.end <= size, name
        assert len(entry.read()) == entry.end - entry.start


@relaxed
@given(data=st.data())
def test_a_header_with_any_value_anywhere(checkpoint: Path, tmp_path: Path, data: Any) -> None:
    content = (checkpoint / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    good = json.loads(content[8:end])
    path = data.draw(st.sampled_from(paths_of(good)))
    bad = replaced(good, path, data.draw(anything), data.draw(st.booleans()))
    raw = json.dumps(bad).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[end:])
    opened_header(file)


@relaxed
@given(data=st.data())
def test_a_header_of_any_bytes(checkpoint: Path, tmp_path: Path, data: Any) -> None:
    content = (checkpoint / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(0, end))
    cut = data.draw(st.integers(0, 16))
    file = tmp_path / "model.safetensors"
    file.write_bytes(content[:at] + data.draw(st.binary(max_size=16)) + content[at + cut :])
    opened_header(file)


def test_a_header_nested_beyond_all_measure(tmp_path: Path) -> None:
    raw = b"[" * 1_000_000
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CheckpointError, match="not JSON"):
        read_header(file)


@relaxed
@given(content=anything | st.fixed_dictionaries({"weight_map": anything}))
def test_an_index_of_any_content(tmp_path: Path, content: Any) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps(content))
    try:
        found = open_checkpoint(tmp_path)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
    else:
        assert not found  # an index of no files


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "..", "a\\b", ""])
def test_an_index_never_leads_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="no name of a file beside it"):
        open_checkpoint(tmp_path)
