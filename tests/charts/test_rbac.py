"""Rights are no wider than used: the roles are compared with the list the operator states."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from prism_operator import kube

from .conftest import Rendering

Render = Callable[..., Rendering]
Rights = dict[tuple[str, str], set[str]]  # (API group, resource) -> verbs

OPERATOR = "prism-operator.prism-system"
EDIT_VERBS = {"create", "delete", "patch", "update"}
READ_VERBS = {"get", "list", "watch"}


def rights_of(role: dict[str, Any]) -> Rights:
    rights: Rights = {}
    for rule in role["rules"]:
        assert set(rule) == {"apiGroups", "resources", "verbs"}, f"unusual rule {rule}"
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                rights.setdefault((group, resource), set()).update(rule["verbs"])
    return rights


def stated(text: str) -> Rights:
    """Reads lines such as ``- ``apps`` deployments: get list`` or ``- core events: create``."""
    rights: Rights = {}
    for group, rest in re.findall(r"^- (?:``([\w.]+)``|core) (.+)$", text, re.MULTILINE):
        for clause in rest.split(";"):
            resources, verbs = clause.split(":")
            for resource in resources.split(","):
                rights[group, resource.strip()] = set(verbs.split())
    return rights


def test_the_parser_of_the_stated_list() -> None:
    text = "- ``a.io`` things: get list; things/status: patch\n- core pods, services: get\n"
    assert stated(text) == {
        ("a.io", "things"): {"get", "list"},
        ("a.io", "things/status"): {"patch"},
        ("", "pods"): {"get"},
        ("", "services"): {"get"},
    }


def used() -> Rights:
    return stated(re.sub(r"\n  +", " ", kube.__doc__ or ""))


def test_operator_gets_what_it_uses_and_no_more(render: Render) -> None:
    assert rights_of(render().one("ClusterRole", OPERATOR)) == used()


def test_operator_may_touch_every_kind_it_has_a_path_for(render: Render) -> None:
    granted = {resource for _, resource in rights_of(render().one("ClusterRole", OPERATOR))}
    assert {plural for _, plural in kube.PATHS.values()} <= granted


def cluster_names(rendering: Rendering) -> set[str]:
    """Names outside all namespaces, but for the kind's own, which is one for all releases."""
    objects = rendering.all("ClusterRole") + rendering.all("ClusterRoleBinding")
    return {one["metadata"]["name"] for one in objects}


LONG = "a" * 60
RELEASES = [  # (release, namespace): pairs that a plain join with "-" or a plain cut would confuse
    ("prism", "one"), ("prism", "two"), ("prism", "one-two"),
    ("prism", f"{LONG}-x"), ("prism", f"{LONG}-y"), ("r" * 53, f"{LONG}-x"), ("r" * 53, "one"),
    ("prism-operator-prism", "one"), ("prism", "prism-operator-one"),
]  # fmt: skip


def test_no_two_releases_share_a_name_outside_their_namespaces(render: Render) -> None:
    seen: set[str] = set()
    for release, namespace in RELEASES:
        names = cluster_names(render(release=release, namespace=namespace))
        assert len(names) == 4 and not names & seen
        assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", name) for name in names)
        seen |= names


def test_the_operator_s_account_is_bound_to_the_role_of_its_own_release(render: Render) -> None:
    for release, namespace in RELEASES:
        rendering = render(release=release, namespace=namespace)
        binding = rendering.one("ClusterRoleBinding")
        role = rendering.one("ClusterRole", binding["roleRef"]["name"])
        assert rights_of(role) == used()
        (subject,) = binding["subjects"]
        account = rendering.one("ServiceAccount", subject["name"])
        assert account["metadata"]["namespace"] == subject["namespace"] == namespace


@pytest.mark.parametrize("namespaces", ["", "a"])
def test_operator_reads_no_secret_and_holds_no_wildcard(render: Render, namespaces: str) -> None:
    rendering = render(*([f"watchNamespaces={{{namespaces}}}"] if namespaces else []))
    for role in rendering.all("Role") + rendering.all("ClusterRole"):
        for (group, resource), verbs in rights_of(role).items():
            assert "*" not in {group, resource, *verbs}
            assert resource not in {"secrets", "pods/exec", "roles", "clusterroles"}
            assert not verbs & {"escalate", "bind", "impersonate"}


def test_watched_namespaces_get_roles_and_the_cluster_none(render: Render) -> None:
    rendering = render("watchNamespaces={a,b}")
    assert rendering.env["PRISM_WATCH_NAMESPACES"] == "a,b"
    assert rendering.all("ClusterRoleBinding") == []
    assert [r["metadata"]["namespace"] for r in rendering.all("Role")] == ["a", "b"]
    for role, binding in zip(rendering.all("Role"), rendering.all("RoleBinding"), strict=True):
        assert rights_of(role) == used()
        assert role["metadata"]["namespace"] == binding["metadata"]["namespace"]
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        (subject,) = binding["subjects"]
        assert subject == {
            "kind": "ServiceAccount",
            "name": "prism-operator",
            "namespace": "prism-system",
        }


def test_user_roles_grow_from_viewer_to_admin(render: Render) -> None:
    def verbs(role: str, resource: str = "prismmodels") -> set[str]:
        return rights_of(render().one("ClusterRole", f"prism-{role}.prism-system"))[
            "moeprism.io", resource
        ]

    assert verbs("viewer") == READ_VERBS
    assert verbs("editor") == READ_VERBS | EDIT_VERBS
    assert verbs("admin") == READ_VERBS | EDIT_VERBS | {"deletecollection"}
    for role in ("viewer", "editor", "admin"):
        assert verbs(role, "prismmodels/status") <= READ_VERBS, "status is the operator's"
    assert "patch" in verbs("editor", "prismmodels/scale")
    assert not verbs("viewer", "prismmodels/scale") & EDIT_VERBS


def test_user_roles_join_the_default_ones_where_wished(render: Render) -> None:
    def targets(rendering: Rendering, role: str) -> set[str]:
        labels = rendering.one("ClusterRole", f"prism-{role}.prism-system")["metadata"]["labels"]
        return {label.rsplit("-", 1)[1] for label in labels if "aggregate-to" in label}

    assert targets(render(), "viewer") == {"view", "edit", "admin"}
    assert targets(render(), "editor") == {"edit", "admin"}
    assert targets(render(), "admin") == {"admin"}
    apart = render("rbac.aggregateToDefaultRoles=false")
    assert all(targets(apart, role) == set() for role in ("viewer", "editor", "admin"))
