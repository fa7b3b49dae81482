"""Claims: waited for, made, kept, deleted and adopted."""

from collections.abc import Callable
from typing import Any

from .harness import Operator

Json = dict[str, Any]
Make = Callable[..., Json]


def test_a_claim_that_does_not_exist_is_named_and_waited_for(
    operator: Operator, make_body: Make
) -> None:
    operator.apply(make_body(model={"uri": "pvc://elsewhere/m"}))
    operator.settle(finish=False)
    assert operator.condition("Refactored")[1] == "ClaimNotFound"
    assert "elsewhere" in operator.condition("Ready")[2]
    assert not operator.cluster.list("jobs")
    operator.claim("elsewhere")
    operator.settle()
    assert operator.status["phase"] == "Serving"


def test_a_made_claim_is_kept_or_deleted_with_its_object(
    operator: Operator, make_body: Make
) -> None:
    create = {"pvc": None, "create": {"size": "5Gi", "accessModes": ["ReadWriteMany"]}}
    operator.apply(make_body(cache=create))
    operator.settle()
    claim = operator.cluster.get("persistentvolumeclaims", "llm", "tiny-cache")
    assert claim and "ownerReferences" not in claim["metadata"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "5Gi"
    operator.edit_spec(cache={"reclaimPolicy": "Delete"})
    operator.settle()
    claim = operator.cluster.get("persistentvolumeclaims", "llm", "tiny-cache")
    assert claim and claim["metadata"]["ownerReferences"][0]["uid"] == "uid-tiny"
    operator.edit_spec(cache={"reclaimPolicy": "Retain"})
    operator.settle()
    operator.cluster.remove("prismmodels", "llm", "tiny")
    assert not operator.cluster.list("deployments") and not operator.cluster.list("jobs")
    assert operator.cluster.get("persistentvolumeclaims", "llm", "tiny-cache")


def test_a_retained_claim_is_adopted_by_a_namesake(operator: Operator, make_body: Make) -> None:
    create = {"pvc": None, "create": {"size": "5Gi"}}
    operator.apply(make_body(cache=create))
    operator.settle()
    operator.cluster.remove("prismmodels", "llm", "tiny")
    again = make_body(cache=create)
    again["metadata"]["uid"] = "uid-second"
    operator.restart()
    operator.apply(again)
    operator.settle()
    assert operator.status["phase"] == "Serving"
