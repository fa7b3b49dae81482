"""The chart renders what it promises, and every value does something."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prism import contract
from prism_operator import config

from .conftest import CHART, Rendering

Render = Callable[..., Rendering]
CRDS = sorted((Path(__file__).parents[2] / "crds").glob("*.yaml"))


def test_lint_finds_nothing_at_all(helm: str) -> None:
    done = subprocess.run(
        [helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[ERROR]" not in done.stdout and "[WARNING]" not in done.stdout


def test_defaults_render_these_objects(render: Render) -> None:
    kinds = sorted((o["kind"], o["metadata"]["name"]) for o in render().objects)
    assert kinds == [
        ("ClusterRole", "prism-admin.prism-system"),
        ("ClusterRole", "prism-editor.prism-system"),
        ("ClusterRole", "prism-operator.prism-system"),
        ("ClusterRole", "prism-viewer.prism-system"),
        ("ClusterRoleBinding", "prism-operator.prism-system"),
        ("CustomResourceDefinition", "prismmodels.moeprism.io"),
        ("Deployment", "prism-operator"),
        ("NetworkPolicy", "prism-operator"),
        ("Secret", "prism-admin-key"),
        ("ServiceAccount", "prism-operator"),
    ]


def test_one_operator_never_two(render: Render) -> None:
    spec = render().one("Deployment")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}


def test_operator_pod_is_restricted(render: Render) -> None:
    pod = render().pod
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    assert render().one("ServiceAccount")["automountServiceAccountToken"] is False


def test_probes_and_ports_are_the_contract_s(render: Render) -> None:
    (container,) = render().pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "health": contract.OPERATOR_HEALTH_PORT,
        "metrics": contract.OPERATOR_METRICS_PORT,
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": contract.PATH_HEALTH, "port": "health"}


def test_chart_sets_the_variables_the_operator_reads(render: Render) -> None:
    known = {value for name, value in vars(config).items() if name.startswith("ENV_")}
    optional = {  # by extraEnv, where wanted
        "PRISM_LOG_FORMAT",
        "PRISM_TICK_SECONDS",
        "PRISM_HEALTH_PORT",
        "PRISM_METRICS_PORT",
    }
    assert set(render().env) == known - optional


def test_operator_accepts_what_the_chart_sets(render: Render) -> None:
    rendering = render("prometheus.url=http://p:9090", "imagePullSecrets[0].name=regcred")
    env = rendering.env | {"PRISM_NAMESPACE": "prism-system"}
    read = config.from_env(env, lambda _: b"k" * 48)
    assert read.image_pull_secrets == ("regcred",)
    assert read.prometheus_url == "http://p:9090"
    mounts = {m["mountPath"] for m in rendering.pod["containers"][0]["volumeMounts"]}
    assert str(Path(env["PRISM_ADMIN_KEY_FILE"]).parent) in mounts


def test_crd_copy_is_the_source(helm: str) -> None:
    copies = sorted((CHART / "files" / "crds").glob("*.yaml"))
    assert [c.name for c in copies] == [c.name for c in CRDS]
    for source, copy in zip(CRDS, copies, strict=True):
        assert copy.read_bytes() == source.read_bytes(), "run hack/sync-crd"


def test_crd_survives_uninstall_and_is_otherwise_the_source(render: Render) -> None:
    (source,) = (yaml.safe_load(path.read_text()) for path in CRDS)
    keep = {"annotations": {"helm.sh/resource-policy": "keep"}}
    kept = source | {"metadata": source["metadata"] | keep}
    assert render().one("CustomResourceDefinition") == kept
    assert render("crds.keep=false").one("CustomResourceDefinition") == source


def test_crd_can_be_left_out(render: Render) -> None:
    assert render("crds.enabled=false").all("CustomResourceDefinition") == []


def test_admin_key_is_kept_and_long_enough(render: Render) -> None:
    secret = render().one("Secret")
    assert secret["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert len(secret["data"]["key"]) >= 48


def test_own_admin_key_replaces_the_made_one(render: Render) -> None:
    rendering = render("adminKey.existingSecret=mine")
    assert rendering.all("Secret") == []
    assert rendering.pod["volumes"][0]["secret"]["secretName"] == "mine"


DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("sets", "image"),
    [
        ((), "localhost/prism-serving:0.1.0"),
        (("image.registry=r.example:5000/a",), "r.example:5000/a/prism-serving:0.1.0"),
        (("image.tag=t1",), "localhost/prism-serving:t1"),
        (("image.tag=t1", "image.serving.tag=t2"), "localhost/prism-serving:t2"),
        (("image.tag=t1", f"image.serving.digest={DIGEST}"), f"localhost/prism-serving@{DIGEST}"),
        (("image.serving.repository=other/serving",), "localhost/other/serving:0.1.0"),
    ],
)
def test_image_references(render: Render, sets: tuple[str, ...], image: str) -> None:
    assert render(*sets).env["PRISM_SERVING_IMAGE"] == image


def test_each_image_is_set_by_its_own_values(render: Render) -> None:
    rendering = render("image.operator.tag=o", "image.serving.tag=s", "image.refactor.tag=r")
    assert rendering.pod["containers"][0]["image"] == "localhost/prism-operator:o"
    assert rendering.env["PRISM_SERVING_IMAGE"] == "localhost/prism-serving:s"
    assert rendering.env["PRISM_REFACTOR_IMAGE"] == "localhost/prism-refactor:r"


def test_pull_policy_reaches_the_operator_and_its_pods(render: Render) -> None:
    rendering = render("image.pullPolicy=Never")
    assert rendering.pod["containers"][0]["imagePullPolicy"] == "Never"
    assert rendering.env["PRISM_IMAGE_PULL_POLICY"] == "Never"


def test_pull_secrets_reach_the_operator_and_its_pods(render: Render) -> None:
    rendering = render("imagePullSecrets[0].name=a", "imagePullSecrets[1].name=b")
    assert rendering.pod["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
    assert rendering.env["PRISM_IMAGE_PULL_SECRETS"] == "a,b"


POD_VALUES: list[tuple[str, Any]] = [
    ("priorityClassName", "high"),
    ("nodeSelector", {"disk": "ssd"}),
    ("tolerations", [{"key": "spot", "operator": "Exists"}]),
    ("affinity", {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}),
]


@pytest.mark.parametrize(("name", "value"), POD_VALUES, ids=[name for name, _ in POD_VALUES])
def test_pod_values_are_passed_on(render: Render, name: str, value: Any) -> None:
    assert name not in render().pod
    assert render(values=yaml.safe_dump({name: value})).pod[name] == value


def test_pod_labels_annotations_resources_and_environment(render: Render) -> None:
    rendering = render(
        values=yaml.safe_dump(
            {
                "podLabels": {"team": "a"},
                "podAnnotations": {"note": "b"},
                "resources": {"limits": {"memory": "1Gi"}, "requests": {"cpu": 1}},
                "extraEnv": [{"name": "PRISM_LOG_FORMAT", "value": "plain"}],
            }
        )
    )
    meta = rendering.one("Deployment")["spec"]["template"]["metadata"]
    container = rendering.pod["containers"][0]
    assert meta["labels"]["team"] == "a"
    assert meta["annotations"] == {"note": "b"}
    assert container["resources"]["limits"] == {"memory": "1Gi"}
    assert rendering.env["PRISM_LOG_FORMAT"] == "plain"


def test_service_account_values(render: Render) -> None:
    made = render(
        "serviceAccount.name=mine",
        values=yaml.safe_dump({"serviceAccount": {"annotations": {"a": "b"}}}),
    )
    assert made.one("ServiceAccount")["metadata"]["annotations"] == {"a": "b"}
    assert made.pod["serviceAccountName"] == "mine"
    given = render("serviceAccount.create=false", "serviceAccount.name=theirs")
    assert given.all("ServiceAccount") == []
    assert given.pod["serviceAccountName"] == "theirs"
    assert given.one("ClusterRoleBinding")["subjects"][0]["name"] == "theirs"


@pytest.mark.parametrize(
    ("release", "sets", "name"),
    [
        ("prism", (), "prism-operator"),
        ("my-prism", (), "my-prism-operator"),
        ("x", (), "x-prism-operator"),
        ("x", ("fullnameOverride=p",), "p-operator"),
    ],
)
def test_names(render: Render, release: str, sets: tuple[str, ...], name: str) -> None:
    assert render(*sets, release=release).one("Deployment")["metadata"]["name"] == name


def test_new_chart_version_alone_restarts_no_operator(render: Render) -> None:
    labels = render().one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(labels)


def test_every_value_is_in_the_schema_and_is_used() -> None:
    """A value that no template reads would be a promise without effect."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    templates = "\n".join(p.read_text() for p in (CHART / "templates").iterdir())

    def leaves(tree: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        if isinstance(tree, dict) and tree and path != ("resources",):
            return [leaf for key, sub in tree.items() for leaf in leaves(sub, (*path, key))]
        return [path]

    for path in leaves(values, ()):
        # The three images are read by one helper, through a variable.
        used = ".Values." + ".".join(path) in templates or (
            path[0] == "image" and len(path) == 3 and f"$image.{path[2]}" in templates
        )
        assert used, f"{'.'.join(path)} is read by no template"


def test_notes_tell_the_next_step_and_warn(helm: str, tmp_path: Path) -> None:
    """Helm prints notes only beside a cluster, so a copy of the chart shows them in a ConfigMap."""
    chart = tmp_path / "prism"
    shutil.copytree(CHART, chart)
    (chart / "templates" / "NOTES.txt").rename(chart / "files" / "notes")
    (chart / "templates" / "notes.yaml").write_text(
        'kind: ConfigMap\ndata:\n  notes: {{ tpl (.Files.Get "files/notes") . | toJson }}\n'
    )

    def notes(*sets: str) -> str:
        command = [helm, "template", "prism", str(chart), "--kube-version", "1.34.0"]
        command += ["--show-only", "templates/notes.yaml"]
        command += [word for one in sets for word in ("--set", one)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return str(yaml.safe_load(done.stdout)["data"]["notes"])

    plain = notes("image.registry=r.example", "prometheus.url=http://p:9090")
    assert "kubectl get prismmodels" in plain
    assert "prometheus.url is empty" not in plain and 'is "localhost"' not in plain
    assert "delete the PrismModels" in plain and "moeprism.io/operator" in plain
    warned = notes("crds.enabled=false", "watchNamespaces={llm}")
    assert "prometheus.url is empty" in warned
    assert 'image.registry is "localhost"' in warned
    assert "crds.enabled is false" in warned
    assert "watched namespaces: llm" in warned
