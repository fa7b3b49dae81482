"""Which cluster is used, and that nobody else's is touched."""

import json
from pathlib import Path

import pytest

from hack.cluster import choice, kind
from hack.cluster.choice import Machine, decide, look
from hack.cluster.errors import ClusterError
from hack.cluster.kind import Kind
from hack.cluster.local import Local
from hack.cluster.named import Named

DOCKER = Machine(has_kind=True, engine="docker", linux=True, root=True)
BARE = Machine(has_kind=False, engine=None, linux=True, root=True)
MAC = Machine(has_kind=False, engine=None, linux=False, root=False)


@pytest.mark.parametrize(
    ("environment", "machine", "expected", "word"),
    [
        ({"PRISM_KUBECONTEXT": "mine"}, DOCKER, Named, "PRISM_KUBECONTEXT=mine"),
        ({"PRISM_KUBECONTEXT": "mine", "PRISM_CLUSTER": "kind"}, DOCKER, Named, "mine"),
        ({}, DOCKER, Kind, "docker answers"),
        ({}, BARE, Local, "kind is not installed"),
        ({}, Machine(True, None, True, True), Local, "neither docker nor podman answers"),
        ({"PRISM_CLUSTER": "local"}, DOCKER, Local, "PRISM_CLUSTER=local"),
        ({"PRISM_CLUSTER": "kind"}, DOCKER, Kind, "PRISM_CLUSTER=kind"),
        ({"PRISM_KUBECONTEXT": ""}, BARE, Local, "kind is not installed"),
    ],
)
def test_cluster_is_the_named_one_then_kind_then_the_local_one(
    environment: dict[str, str], machine: Machine, expected: type, word: str
) -> None:
    chosen = decide(environment, machine)
    assert type(chosen) is expected
    assert word in chosen.reason


@pytest.mark.parametrize(
    ("environment", "machine", "word"),
    [
        ({}, MAC, "PRISM_KUBECONTEXT"),
        ({}, Machine(False, None, True, False), "needs Linux and root"),
        ({"PRISM_CLUSTER": "kind"}, BARE, "kind is not installed"),
        ({"PRISM_CLUSTER": "local"}, MAC, "needs Linux and root"),
        ({"PRISM_CLUSTER": "minikube"}, DOCKER, "expected kind or local"),
    ],
)
def test_where_there_is_no_cluster_the_error_says_what_to_do(
    environment: dict[str, str], machine: Machine, word: str
) -> None:
    with pytest.raises(ClusterError, match=word):
        decide(environment, machine)


def test_an_engine_whose_daemon_does_not_answer_is_none(programs) -> None:
    programs.add("kind")
    programs.add("docker", "exit 1")
    assert look().engine is None
    programs.add("podman")
    assert look().engine == "podman"
    assert programs.calls == ["docker info", "docker info", "podman info"]


def test_engines_are_not_asked_where_kind_is_not_installed(programs) -> None:
    programs.add("docker")
    assert not look().has_kind
    assert programs.calls == []


@pytest.fixture
def kind_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kind"
    monkeypatch.setattr(kind, "FOLDER", folder)
    monkeypatch.setattr(kind, "KUBECONFIG", folder / "kubeconfig")
    monkeypatch.setattr(kind, "CREATED", folder / "created-by-prism")
    return folder


def test_kind_creates_once_and_deletes_what_it_created(programs, kind_folder: Path) -> None:
    programs.add("kubectl")
    programs.add("helm")
    programs.add("kind", 'if [ "$1" = get ] && [ -e created ]; then echo prism-demo; fi')
    cluster = Kind("docker", "test")
    access = cluster.up()
    assert access.context == "kind-prism-demo"
    assert access.kubeconfig == str(kind_folder / "kubeconfig")
    assert any(call.startswith("kind create cluster") for call in programs.calls)
    assert all("--kubeconfig" in call for call in programs.calls if "cluster " in call)
    cluster.down(purge=True)
    assert any(call.startswith("kind delete cluster") for call in programs.calls)
    assert not kind_folder.exists()


def test_a_kind_cluster_that_we_did_not_create_is_neither_used_nor_deleted(
    programs, kind_folder: Path
) -> None:
    programs.add("kind", "echo prism-demo")
    cluster = Kind("docker", "test")
    with pytest.raises(ClusterError, match="PRISM_KUBECONTEXT=kind-prism-demo"):
        cluster.up()
    cluster.down(purge=True)
    assert programs.calls == ["kind get clusters"]


def test_a_named_context_without_the_demo_is_asked_and_never_changed(programs) -> None:
    programs.add("kubectl")
    programs.add("helm")
    cluster = Named("mine", "registry.example/team", "test")
    access = cluster.up()
    assert (access.context, access.registry) == ("mine", "registry.example/team")
    cluster.down(purge=False)
    assert programs.calls == ["kubectl --context mine get nodes"]
    cluster.down(purge=True)
    assert programs.calls[1:] == [
        "kubectl --context mine get namespaces -l moeprism.io/demo -o json"
    ]


@pytest.mark.parametrize("others", ["", "prismmodel.moeprism.io/theirs"])
def test_the_demo_goes_from_a_named_context_models_first_and_nothing_else(
    programs, others: str
) -> None:
    items = [{"metadata": {"name": name}} for name in ("prism-demo", "prism-system")]
    programs.add(
        "kubectl",
        f"""case "$*" in
        *namespaces*) echo '{json.dumps({"items": items})}' ;;
        *"get customresource"*) echo crd ;;
        *"get prismmodels -A"*) echo '{others}' ;;
        esac""",
    )
    programs.add("helm")
    Named("mine", None, "test").down(purge=True)
    changes = [call for call in programs.calls if " get " not in call]
    expected = [
        "kubectl --context mine delete prismmodels --all -n prism-demo --timeout=90s",
        "kubectl --context mine delete prismmodels --all -n prism-system --timeout=90s",
        "helm --kube-context mine uninstall prism -n prism-system --wait --ignore-not-found",
        "kubectl --context mine delete namespace prism-demo prism-system --timeout=180s",
    ]
    kind = "customresourcedefinition/prismmodels.moeprism.io"
    kept = [f"kubectl --context mine delete {kind} --ignore-not-found"]
    assert changes == expected + ([] if others else kept)


def test_a_named_context_that_does_not_answer_is_an_error_with_its_words(programs) -> None:
    programs.add("kubectl", "echo no route >&2; exit 1")
    programs.add("helm")
    with pytest.raises(ClusterError, match="mine does not answer: no route"):
        Named("mine", None, "test").up()


def test_images_for_a_named_context_without_a_registry_are_refused(programs) -> None:
    programs.add("docker")
    with pytest.raises(ClusterError, match="PRISM_REGISTRY"):
        Named("mine", None, "test").load(["localhost/prism-operator:1"])


def test_images_for_a_named_context_are_pushed_to_its_registry_and_others_are_not(programs) -> None:
    programs.add("docker")
    ours, public = "registry.example/prism-operator:1", "prom/prometheus:v3"
    Named("mine", "registry.example", "test").load([ours, public])
    assert programs.calls[-1] == f"docker push {ours}"
    assert not any(public in call for call in programs.calls)


def test_images_go_into_the_nodes_of_a_named_kind_cluster(programs) -> None:
    programs.add("docker")
    programs.add("kind")
    Named("kind-mine", None, "test").load(["localhost/prism-operator:1"])
    assert programs.calls[-1].startswith("kind load image-archive ")
    assert programs.calls[-1].endswith(" --name mine")


def test_the_choice_of_this_machine_uses_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRISM_KUBECONTEXT", "mine")
    monkeypatch.delenv("PRISM_REGISTRY", raising=False)
    monkeypatch.setenv("KUBECONFIG", "/of/mine")
    assert choice.choose() == Named("mine", None, "PRISM_KUBECONTEXT=mine", "/of/mine")
