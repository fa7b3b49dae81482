"""The place the demo happens in: a cluster with Prism, Prometheus and the images, made once.

It touches only what it makes: three namespaces with its label on, one Helm release, one
Prometheus. A namespace of the same name without the label is somebody else's and ends the demo.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hack.cluster import Cluster, memory
from hack.cluster.made import LABEL, RELEASE, SYSTEM
from hack.demo.kube import Json, Kube, KubectlFailed
from hack.demo.story import Story
from hack.images import build

ROOT = Path(__file__).parents[2]
MONITORING, MODELS = "prism-monitoring", "prism-demo"
PROMETHEUS_URL = f"http://prometheus.{MONITORING}:9090"


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster that is up, and the images it was given: name -> full reference."""

    kube: Kube  # in the models' namespace
    kind: str
    images: Mapping[str, str]
    story: Story

    def inside(self, namespace: str) -> Kube:
        kube = self.kube
        return Kube(kube.kubectl, kube.helm, kube.environment, kube.context, namespace)


def bring_up(
    story: Story, cluster: Cluster, namespace: str = MODELS, *, stays: bool = True
) -> Site:
    """Cluster and images, made and said. `stays`: `make demo-down` has to find it afterwards."""
    with story.step("Bring up a cluster"):
        access = memory.up(cluster) if stays else cluster.up()
        story.say(f"{access.kind}: {access.reason}")
    with story.step("Build the images"):
        images = build(registry=access.registry)
        for reference in images.values():
            story.say(str(reference))
    with story.step("Give the images to the nodes"):
        cluster.load(list(images.values()))
    kube = Kube(access.kubectl, access.helm, access.environment(), access.context, namespace)
    return Site(kube, access.kind, images, story)


def install(site: Site) -> None:
    """Prometheus and the chart, and both ready."""
    with site.story.step("Install Prometheus"):
        make_namespace(site.inside(MONITORING))
        text = (ROOT / "examples" / "prometheus" / "prometheus.yaml").read_text()
        text = text.replace("localhost/prism-prometheus:demo", site.images["prometheus"])
        text = text.replace(MODELS, site.kube.namespace)
        site.inside(MONITORING).run("apply", "-f", "-", stdin=text)
    with site.story.step("helm install prism charts/prism"):
        make_namespace(site.inside(SYSTEM))
        site.kube.run_helm(
            "upgrade", "--install", RELEASE, str(ROOT / "charts" / "prism"),
            "--namespace", SYSTEM, "--wait", "--timeout", "3m", *values(site.images),
        )  # fmt: skip
    with site.story.step("Wait for Prometheus"):
        site.inside(MONITORING).run(
            "rollout", "status", "deployment/prometheus", "--timeout=180s", timeout_s=200
        )


def values(images: Mapping[str, str]) -> list[str]:
    """Helm's arguments for these images and the demo's Prometheus."""
    words = ["--set", f"prometheus.url={PROMETHEUS_URL}"]
    for name in ("operator", "serving", "refactor"):
        path, tag = images[name].rsplit(":", 1)
        registry, repository = path.rsplit("/", 1)
        words += ["--set", f"image.registry={registry}"]
        words += ["--set", f"image.{name}.repository={repository}"]
        words += ["--set-string", f"image.{name}.tag={tag}"]
    return words


def make_namespace(kube: Kube) -> None:
    """A namespace that enforces restricted pods; raises KubectlFailed where it is not ours."""
    found = find_namespace(kube)
    if found is not None and LABEL not in found["metadata"].get("labels", {}):
        raise KubectlFailed(
            f"namespace {kube.namespace} exists and was not made by the demo (no label {LABEL}); "
            "remove it or point PRISM_KUBECONTEXT at another cluster"
        )
    if found is None:
        kube.run("create", "namespace", kube.namespace)
    # Not by `apply`: the example that names its namespace would then take the label off again.
    restricted = "pod-security.kubernetes.io/enforce=restricted"
    kube.run("label", "--overwrite", "namespace", kube.namespace, f"{LABEL}=true", restricted)


def fresh_namespace(kube: Kube) -> None:
    """The namespace without anything an earlier demo left in it."""
    if find_namespace(kube) is not None:
        make_namespace(kube)  # refuses what is not ours
        kube.run("delete", "prismmodels", "--all", "--wait", "--timeout=60s", timeout_s=90)
        kube.run("delete", "namespace", kube.namespace, "--wait", timeout_s=180)
    make_namespace(kube)


def find_namespace(kube: Kube) -> Json | None:
    text = kube.run("get", "namespace", kube.namespace, "--ignore-not-found", "-o", "json")
    return json.loads(text) if text.strip() else None


def is_installed(site: Site) -> bool:
    """Whether somebody has the release in this cluster already."""
    listed = site.kube.run_helm("list", "--namespace", SYSTEM, "--short", "--all")
    return RELEASE in listed.split()


def leave(site: Site, keep_release: bool) -> None:
    """Removes what was made, in the order that lets the operator finish its part."""
    with site.story.step("Remove what was installed"):
        if find_namespace(site.kube) is not None:
            site.kube.run("delete", "prismmodels", "--all", "--timeout=90s", timeout_s=120)
            site.kube.run("delete", "namespace", site.kube.namespace, "--wait", timeout_s=180)
        if keep_release:
            return
        site.kube.run_helm("uninstall", RELEASE, "--namespace", SYSTEM, "--wait")
        for namespace in (SYSTEM, MONITORING):
            site.inside(namespace).run("delete", "namespace", namespace, "--wait", timeout_s=180)
