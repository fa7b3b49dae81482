"""`down` ends the clusters that were brought up, whatever would be chosen by now."""

import json
from pathlib import Path

import pytest

from hack.cluster import __main__ as command
from hack.cluster import kind, leftovers, memory, tools
from hack.cluster.errors import ClusterError
from hack.cluster.kind import Kind
from hack.cluster.local import Local
from hack.cluster.named import Named
from hack.demo import site
from hack.demo.story import Story

# A kubectl that tells which file it was given, in whose cluster nothing of the demo is left.
KUBECTL = 'echo "KUBECONFIG=$KUBECONFIG" >> "$0.log"; case "$*" in *gone*) exit 1;; esac'
LOCAL = """import os, sys
with open({log!r}, "a") as log:
    print("local-cluster", *sys.argv[1:], os.environ.get("PRISM_LOCAL_CLUSTER", "unset"), file=log)
print({config!r})
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, programs, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, tools that only tell, and no images of anybody's; the cache."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(memory, "FILE", cache / "demo-clusters.jsonl")
    monkeypatch.setattr(kind, "FOLDER", cache / "kind")
    monkeypatch.setattr(kind, "KUBECONFIG", cache / "kind" / "kubeconfig")
    monkeypatch.setattr(kind, "CREATED", cache / "kind" / "created-by-prism")
    local = tmp_path / "local-cluster"
    local.write_text(LOCAL.format(log=str(programs.log), config=str(cache / "pki" / "config")))
    monkeypatch.setattr(tools, "LOCAL_CLUSTER", local)
    monkeypatch.setattr(leftovers, "remove_images", lambda: None)
    monkeypatch.setattr(leftovers, "remove_or_name_caches", lambda remove: None)
    for name in ("KUBECONFIG", "PRISM_KUBECONTEXT", "PRISM_CLUSTER", "PRISM_LOCAL_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    programs.add("kubectl", KUBECTL)
    programs.add("helm")
    programs.add("kind")
    programs.add("docker", "exit 1")  # it answered when the demo was made, and no more
    return cache


def ends(programs) -> list[str]:
    """The calls that end something, or look for what there is to end."""
    words = ("delete", "namespaces", "down")
    return [call for call in programs.calls if any(word in call.split() for word in words)]


LOCAL_DOWN = "local-cluster down --purge "
KIND_DOWN = "kind delete cluster --kubeconfig {}/kind/kubeconfig --name prism-demo"
NAMED_DOWN = "kubectl --context {} get namespaces -l moeprism.io/demo -o json"


def test_the_cluster_of_the_demo_is_ended_although_another_would_be_chosen_now(
    programs, machine: Path
) -> None:
    memory.up(Kind("docker", "test"))
    command.down(purge=True, caches=False)
    assert ends(programs) == [KIND_DOWN.format(machine)]
    assert not memory.FILE.exists()


def test_in_a_named_context_only_what_the_demo_made_goes_and_the_file_is_the_same(
    programs,
) -> None:
    memory.up(Named("mine", "registry.example", "test", "/of/mine"))
    command.down(purge=True, caches=False)
    assert ends(programs) == [NAMED_DOWN.format("mine")]
    told = (programs.folder / "kubectl.log").read_text().splitlines()
    assert told == ["KUBECONFIG=/of/mine"] * 2


def test_the_local_cluster_is_ended_in_the_folder_it_was_made_in(programs) -> None:
    memory.up(Local("test", "/elsewhere"))
    command.down(purge=True, caches=False)
    assert ends(programs) == [LOCAL_DOWN + "/elsewhere"]


def test_every_cluster_that_was_used_is_ended_once(programs, machine: Path) -> None:
    for cluster in (Local("test"), Kind("docker", "test"), Local("again")):
        memory.up(cluster)
    command.down(purge=True, caches=False)
    assert ends(programs) == [KIND_DOWN.format(machine), LOCAL_DOWN]


def test_one_that_cannot_be_reached_keeps_no_other_and_stays_remembered(programs) -> None:
    memory.FILE.parent.mkdir()
    entry = {"kind": "named", "context": "gone", "registry": None, "kubeconfig": None}
    memory.FILE.write_text(json.dumps(entry) + "\n")
    memory.up(Local("test"))
    with pytest.raises(ClusterError, match=r"gone .*demo-clusters.jsonl has a line for each"):
        command.down(purge=True, caches=False)
    assert ends(programs)[-1] == LOCAL_DOWN
    assert [json.loads(line) for line in memory.FILE.read_text().splitlines()] == [entry]


def test_the_environment_has_the_last_word(programs, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.up(Local("test"))
    monkeypatch.setenv("PRISM_KUBECONTEXT", "mine")
    command.down(purge=True, caches=False)
    assert ends(programs) == [NAMED_DOWN.format("mine")]
    monkeypatch.delenv("PRISM_KUBECONTEXT")
    command.down(purge=True, caches=False)
    assert ends(programs)[1:] == [LOCAL_DOWN]


def test_without_purge_it_can_go_on_so_it_is_not_forgotten(programs) -> None:
    memory.up(Local("test"))
    command.down(purge=False, caches=False)
    command.down(purge=True, caches=False)
    assert [call.split()[1:] for call in ends(programs)] == [["down"], ["down", "--purge"]]


def test_what_failed_half_way_is_remembered_and_a_context_that_never_answered_is_not(
    programs, machine: Path
) -> None:
    with pytest.raises(ClusterError):
        memory.up(Named("gone", None, "test"))
    assert not memory.FILE.exists()
    programs.add("kind", '[ "$1" = get ] || exit 1')
    with pytest.raises(Exception, match="returned non-zero"):
        memory.up(Kind("docker", "test"))
    assert json.loads(memory.FILE.read_text()) == {"kind": "kind", "provider": "docker"}


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "minikube"}', '{"kind": "local"}'])
def test_a_line_that_names_no_cluster_is_an_error_with_its_file(line: str) -> None:
    memory.FILE.parent.mkdir()
    memory.FILE.write_text(line + "\n")
    with pytest.raises(ClusterError, match=r"jsonl has a line that names no cluster"):
        command.down(purge=True, caches=False)


@pytest.mark.parametrize("stays", [True, False])
def test_the_demo_is_remembered_and_a_test_session_is_not(
    programs, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    monkeypatch.setattr(site, "build", lambda registry: {})
    programs.add("docker")
    made = site.bring_up(Story(), Named("mine", "registry.example", "test"), stays=stays)
    assert made.kube.context == "mine"
    assert memory.FILE.exists() == stays
