"""The local cluster's tool: arguments, archives, the choice of Go; nothing is started."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hack import host

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "hack/local-cluster/local-cluster"


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, words)]
    surroundings = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=surroundings)


def call(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python beside the tool's modules (its folder is no importable package)."""
    code = f"import sys; sys.path[:0] = [{str(TOOL.parent)!r}, {str(ROOT)!r}]; {code}"
    surroundings = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=surroundings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "required"),
        (("destroy",), "invalid choice"),
        (("down", "--force"), "unrecognized arguments"),
        (("gpus", "-1"), "is not a count"),
        (("gpus", "many"), "is not a count"),
        (("pack", "only-one"), "required"),
    ],
)
def test_wrong_arguments_are_refused(words: tuple[str, ...], message: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert message in done.stderr or message in done.stdout


def test_state_lies_where_the_environment_says(tmp_path: Path) -> None:
    done = run("kubeconfig", PRISM_LOCAL_CLUSTER=str(tmp_path))
    assert done.stdout.strip() == str(tmp_path / "conf/admin.kubeconfig")


def test_status_of_no_cluster_lists_every_program_as_not_running(tmp_path: Path) -> None:
    lines = run("status", PRISM_LOCAL_CLUSTER=str(tmp_path)).stdout.splitlines()
    assert len(lines) == 9
    assert all("does not run" in line for line in lines)


def test_an_archive_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run("load-image", tmp_path / "none.tar", PRISM_LOCAL_CLUSTER=str(tmp_path))
    assert done.returncode == 1
    assert f"no archive {tmp_path}/none.tar" in done.stderr


def test_packed_archive_is_one_image_with_the_binary_as_entrypoint(tmp_path: Path) -> None:
    binary = tmp_path / "tool"
    binary.write_bytes(b"\x7fELF")
    assert run("pack", binary, "localhost/tool:1", tmp_path / "tool.tar").returncode == 0
    assert run("pack", binary, "localhost/tool:1", tmp_path / "again.tar").returncode == 0
    assert (tmp_path / "tool.tar").read_bytes() == (tmp_path / "again.tar").read_bytes()
    with tarfile.open(tmp_path / "tool.tar") as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    (manifest,) = json.loads(content["manifest.json"])
    assert manifest["RepoTags"] == ["localhost/tool:1"]
    config = json.loads(content[manifest["Config"]])
    assert config["config"]["Entrypoint"] == ["/tool"]
    layer = content[manifest["Layers"][0]]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        member = tar.getmember("tool")
        assert member.mode == 0o755 and tar.extractfile(member).read() == b"\x7fELF"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("go1.26.1", "{}"),
        ("go1.25.0", "{}"),
        ("go1.22.3", "{'GOTOOLCHAIN': 'go1.25.0+auto'}"),
    ],
)
def test_go_new_enough_is_used_and_an_older_one_asked_to_fetch(
    programs, answer: str, expected: str
) -> None:
    programs.add("go", f"echo {answer}; echo local")
    done = call("from node import programs as p; print(p.toolchain())")
    assert done.stdout.strip() == expected


def test_go_too_old_to_fetch_another_is_refused_with_both_versions(programs) -> None:
    programs.add("go", "echo go1.19.8; echo")
    done = call("from node import programs as p; p.toolchain()")
    assert "CannotBuild: Go 1.25 or later is needed" in done.stderr and "go1.19.8" in done.stderr


def test_missing_go_is_an_error_with_what_to_do(programs, tmp_path: Path) -> None:
    done = run("build", PRISM_CACHE=str(tmp_path), PRISM_LOCAL_CLUSTER=str(tmp_path / "state"))
    assert done.returncode == 1
    assert "Go 1.25 or later is not installed" in done.stderr


def test_programs_built_before_are_linked_and_not_built_again(programs, tmp_path: Path) -> None:
    digest = call("from node import programs as p; print(p.digest())").stdout.strip()
    built = tmp_path / "programs" / digest
    built.mkdir(parents=True)
    (built / "built").touch()
    programs.add("go", "exit 1")
    for state in ("one", "two"):
        folder = tmp_path / state
        done = run("build", PRISM_CACHE=str(tmp_path), PRISM_LOCAL_CLUSTER=str(folder))
        assert done.stdout.strip() == str(folder / "bin")
        assert (folder / "bin").resolve() == built
    assert programs.calls == []


def test_layout_gives_the_node_only_the_blobs_that_it_lacks(programs, tmp_path: Path) -> None:
    blobs = tmp_path / "layout/blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(content: bytes) -> dict[str, object]:
        name = hashlib.sha256(content).hexdigest()
        (blobs / name).write_bytes(content)
        return {"digest": f"sha256:{name}", "size": len(content)}

    known, new, config = blob(b"torch"), blob(b"code"), blob(b"{}")
    manifest = blob(json.dumps({"config": config, "layers": [known, new]}).encode())
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "localhost/prism-x:1"}
    (tmp_path / "layout/index.json").write_text(json.dumps({"manifests": [manifest]}))
    script = f"""case "$*" in
*content*) echo {known["digest"]} ;;
*import*) /bin/cat > {tmp_path}/sent.tar ;;
esac"""
    programs.add("ctr", script)
    archive = f"{tmp_path}/layout:localhost/prism-x:1"
    done = run("load-image", archive, PRISM_LOCAL_CLUSTER=str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "sent.tar") as tar:
        sent = {Path(name).name for name in tar.getnames()}
        index = json.load(tar.extractfile("index.json"))  # type: ignore[arg-type]
    assert str(known["digest"])[7:] not in sent
    assert {str(b["digest"])[7:] for b in (new, config, manifest)} <= sent
    (entry,) = index["manifests"]
    assert entry["annotations"]["io.containerd.image.name"] == "localhost/prism-x:1"
    done = run("load-image", f"{tmp_path}/layout:none", PRISM_LOCAL_CLUSTER=str(tmp_path))
    assert "no image none in the layout" in done.stderr


def test_missing_packages_are_installed_only_as_root_and_after_saying_so(
    programs, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    with pytest.raises(host.MissingPackages, match="there is no apt-get: nftables"):
        host.require({"nft": "nftables"})
    programs.add("apt-get", f'[ "$1" = update ] || /bin/cp /bin/true {programs.folder}/nft')
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(host.MissingPackages, match=r"sudo apt-get install .*nftables"):
        host.require({"nft": "nftables"})
    assert programs.calls == []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    host.require({"nft": "nftables"})
    assert programs.calls == [
        "apt-get update -qq",
        "apt-get install --no-install-recommends nftables -qy",
    ]
    assert "installing Debian packages" in capfd.readouterr().err


def test_a_package_that_brings_no_such_program_is_an_error(programs, monkeypatch) -> None:
    programs.add("apt-get")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(host.MissingPackages, match="not found: nftables"):
        host.require({"nft": "nftables"})
