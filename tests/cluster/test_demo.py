"""The demo's path on a real cluster: what a user is promised, held to the figures of the issue."""

import openai
import pytest

from hack.cluster.made import SYSTEM
from hack.demo import ask, marks
from hack.demo.journey import MODEL, Served
from hack.demo.marks import elastic, off
from hack.demo.record import Record
from hack.demo.site import Site

FIRST_TOKEN_S = 240
# The mark is 90 s on two free cores; here the node, the tests and the refactoring share them.
REFACTOR_S = 180


def test_phases_pass_in_order(served: Served) -> None:
    phases = list(dict.fromkeys(p.phase for p in served.phases if p.phase))
    expected = ["Pending", "Refactoring", "Deploying", "Serving"]
    assert [p for p in phases if p in expected] == [p for p in expected if p in phases]
    assert {"Refactoring", "Serving"} <= set(phases), phases
    assert "Failed" not in phases


def test_first_token_comes_in_time(place: Site, served: Served) -> None:
    artifact = place.kube.get("prismmodel", MODEL)["status"]["artifact"]
    assert served.apply_to_first_token_s <= FIRST_TOKEN_S
    assert artifact["refactorSeconds"] <= REFACTOR_S


def test_every_pod_runs_in_a_namespace_that_enforces_restricted(place: Site) -> None:
    for namespace in (place.kube.namespace, SYSTEM):
        labels = place.kube.get("namespace", namespace)["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
        pods = place.inside(namespace).get("pods")["items"]
        assert pods and all(p["spec"]["securityContext"]["runAsNonRoot"] for p in pods)


def test_the_official_client_gets_completions_chats_and_streams(served: Served) -> None:
    lines: list[str] = []
    ask.show(served.watched.url, MODEL, lines.append)
    assert MODEL in lines[0] and len(lines) == 4


def test_the_official_client_sees_errors_in_its_own_terms(served: Served) -> None:
    api = ask.client(served.watched.url)
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="no-such-model", prompt="a", max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model=MODEL, prompt="a", max_tokens=1, extra_body={"nonsense": 1})


def test_quality_at_each_level_is_within_the_promise(place: Site) -> None:
    points = {
        p["levelPercent"]: p
        for p in place.kube.get("prismmodel", MODEL)["status"]["artifact"]["points"]
    }
    for level, most in ((75, 0.3), (50, 1.2), (25, 6.0)):
        assert points[level]["lossBasisPoints"] / 100 <= most
        assert abs(points[level]["ownSharePermille"] / 10 - level) <= 1.5


@pytest.mark.parametrize("mark", marks.MARKS)
def test_the_load_step_shows_what_elasticity_is_for(demo: Record, mark: str) -> None:
    held, text = marks.MARKS[mark](demo)
    assert held, text


def test_the_pod_follows_the_ceiling(demo: Record) -> None:
    run = elastic(demo)
    lowest = min(s.applied for s in run.samples if s.applied is not None)
    assert lowest == run.lowest_ceiling >= demo.targets.floor


def test_off_never_leaves_level_100(demo: Record) -> None:
    run = off(demo)
    assert {(s.floor, s.ceiling) for s in run.samples} == {(100, 100)}
    assert {s.level for s in run.sent if s.ok} == {100}


def test_no_request_fails_in_the_elastic_run(demo: Record) -> None:
    assert [s for s in elastic(demo).sent if not s.ok] == []


def test_each_move_of_the_ceiling_has_a_reason(demo: Record) -> None:
    levels = [d for d in demo.decisions if d["kind"] == "Level"]
    assert levels
    assert all(d["reason"] and d["observed"] for d in levels)
