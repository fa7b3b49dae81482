"""Child objects: the contracts between the programs, and what a real API server accepts."""

import hashlib
import hmac
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prism import contract
from prism_operator import api, manifests
from prism_operator.kube import PATHS
from prism_operator.pods import Context

from .real_apiserver import ApiServer

Json = dict[str, Any]
Make = Callable[..., Json]
APPLY = "application/apply-patch+yaml"


def all_children(body: Json, context: Context) -> list[Json]:
    model = api.parse(body)
    return [
        manifests.claim(model),
        manifests.job(model, context),
        manifests.control(model, {"seq": 1, "floor": 25, "ceiling": 100}, {"seq": 1}),
        manifests.service(model),
        manifests.network_policy(model, context),
        manifests.deployment(model, context, "abc"),
    ]


def pods(body: Json, context: Context) -> list[Json]:
    return [
        child["spec"]["template"]
        for child in all_children(body, context)
        if child["kind"] in ("Job", "Deployment")
    ]


@pytest.fixture
def made(make_body: Make) -> Json:
    """An object that makes its claim and asks for everything."""
    return make_body(
        "rich",
        model={"uri": "hf://a/b", "revision": "v1", "credentials": {"secretRef": {"name": "hf"}}},
        cache={"pvc": None, "create": {"size": "5Gi"}},
        refactor={
            "calibration": {"uri": "pvc://text/c4.jsonl", "tokens": 4096},
            "resources": {"limits": {"memory": "2Gi"}},
            "parallelism": 3,
        },
        serving={"accelerator": {"resourceName": "nvidia.com/gpu", "count": 2}},
    )


def test_the_job_says_what_the_command_line_understands(made: Json, context: Context) -> None:
    job = manifests.job(api.parse(made), context)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    wanted = manifests.artifact_hash(api.parse(made))
    assert container["command"] == ["prism"]
    assert container["args"] == [
        "refactor", "hf://a/b@v1", "--out", f"/cache/artifacts/{wanted}",
        "--sub-experts", "8", "--seed", "0", "--calibration", "/calibration/c4.jsonl",
        "--tokens", "4096", "--shard", "$(JOB_COMPLETION_INDEX)/3",
        "--servable", "--source-uri", "hf://a/b",
        "--termination-message", "/dev/termination-log", "--metrics-port", "9090",
    ]  # fmt: skip
    token = next(e for e in container["env"] if e["name"] == "HF_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "token"}
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [2, 3] and rules[0]["action"] == "FailJob"
    assert job["metadata"]["name"] == f"rich-refactor-{wanted}"


def test_parallelism_shares_the_job_and_leaves_the_artifact_as_it_is(
    make_body: Make, context: Context
) -> None:
    one, four = (api.parse(make_body(refactor={"parallelism": n})) for n in (1, 4))
    alone, shared = manifests.job(one, context), manifests.job(four, context)
    assert alone == manifests.job(api.parse(make_body()), context)
    assert not {"completionMode", "completions", "parallelism"} & set(alone["spec"])
    spec = shared["spec"]
    assert spec["completionMode"] == "Indexed"
    assert (spec["completions"], spec["parallelism"]) == (4, 4)
    args = spec["template"]["spec"]["containers"][0]["args"]
    assert args[args.index("--shard") + 1] == "$(JOB_COMPLETION_INDEX)/4"
    assert shared["metadata"]["name"] == alone["metadata"]["name"]
    assert manifests.artifact_hash(one) == manifests.artifact_hash(four)
    assert manifests.job_hash(one) != manifests.job_hash(four), "a failed Job gets another try"


def test_the_last_pod_of_the_longest_name_has_a_host_name(
    make_body: Make, context: Context
) -> None:
    job = manifests.job(api.parse(make_body("a" * 40, refactor={"parallelism": 64})), context)
    assert len(f"{job['metadata']['name']}-63") <= 63, "Kubernetes refuses such an Indexed Job"


def test_sub_experts_may_be_left_to_the_job(make_body: Make, context: Context) -> None:
    auto = api.parse(make_body(refactor={"subExperts": "auto"}))
    container = manifests.job(auto, context)["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][container["args"].index("--sub-experts") + 1] == "auto"
    made = {manifests.artifact_hash(api.parse(make_body(refactor={"subExperts": n})))
            for n in (8, 16, "auto")}  # fmt: skip
    assert len(made) == 3, "what a trial finds may change, so it is an artifact of its own"


@pytest.mark.parametrize("value", ["many", "8", 1.5, True])
def test_sub_experts_of_another_kind_are_named(make_body: Make, value: Any) -> None:
    with pytest.raises(api.SpecError, match=r"spec\.refactor\.subExperts: .* is not of type int"):
        api.parse(make_body(refactor={"subExperts": value}))


def test_one_claim_for_cache_source_and_text_is_one_volume(
    make_body: Make, context: Context
) -> None:
    body = make_body(refactor={"calibration": {"uri": "pvc://models/text.jsonl"}})
    pod = manifests.job(api.parse(body), context)["spec"]["template"]["spec"]
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": "models"}]
    mounts = {m["mountPath"]: m for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["/source"]["readOnly"] and mounts["/calibration"]["readOnly"]
    assert "readOnly" not in mounts["/cache"]
    args = pod["containers"][0]["args"]
    assert args[1] == "/source/tiny-moe" and args[3].startswith("/cache/prism/artifacts/")


def test_the_gateway_is_a_native_sidecar_in_front_of_the_engine(
    make_body: Make, context: Context
) -> None:
    pod = manifests.deployment(api.parse(make_body()), context, "abc")["spec"]["template"]["spec"]
    (gateway,), (engine,) = pod["initContainers"], pod["containers"]
    assert gateway["restartPolicy"] == "Always"
    assert gateway["command"] == ["python", "-m", "prism_serving.gateway"]
    assert gateway["args"][-4:] == ["--model-name", "tiny", "--prism-model", "llm/tiny"]
    assert engine["command"] == ["python", "-m", "prism_serving.engine"]
    assert engine["args"][-2:] == ["--dtype", "bfloat16"]
    for container in (gateway, engine):
        assert container["args"][:8] == [
            "--artifact", "/artifact", "--socket", "/run/prism/engine.sock",
            "--control-dir", "/etc/prism/control", "--drain-seconds", "60",
        ]  # fmt: skip
        mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
        assert mounts["/artifact"]["readOnly"]
        assert mounts["/artifact"]["subPath"] == "prism/artifacts/abc"
        assert "subPath" not in mounts["/etc/prism/control"]
    (engine,) = pod["containers"]
    wait_s = engine["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert wait_s > 0, "requests still routed to a pod that goes would be refused"
    assert pod["terminationGracePeriodSeconds"] > wait_s + 60
    control = next(v for v in pod["volumes"] if v["name"] == "control")["configMap"]
    assert [item["key"] for item in control["items"]] == ["level.json", "slo.json"]


def test_pods_get_only_the_digest_of_the_admin_token(make_body: Make, context: Context) -> None:
    token = hmac.new(context.admin_key, b"uid-tiny", hashlib.sha256).hexdigest()
    text = str(manifests.deployment(api.parse(make_body()), context, "abc"))
    assert hashlib.sha256(token.encode()).hexdigest() in text
    assert token not in text and "kkkk" not in text


def test_a_cpu_limit_bounds_the_threads(make_body: Make, context: Context) -> None:
    for limit, threads in (("2500m", "2"), (3, "3"), ("500m", "1")):
        body = make_body(serving={"resources": {"limits": {"cpu": limit}}})
        pod = manifests.deployment(api.parse(body), context, "a")["spec"]["template"]["spec"]
        assert pod["containers"][0]["args"][-2:] == ["--threads", threads]


def test_a_device_is_asked_for_and_not_surged_onto(made: Json, context: Context) -> None:
    spec = manifests.deployment(api.parse(made), context, "abc")["spec"]
    engine = spec["template"]["spec"]["containers"][0]
    assert engine["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_the_admin_port_is_open_to_the_operator_alone(make_body: Make, context: Context) -> None:
    policy = manifests.network_policy(api.parse(make_body()), context)
    api_rule, admin_rule = policy["spec"]["ingress"]
    assert "from" not in api_rule and api_rule["ports"][0]["port"] == 8000
    (source,) = admin_rule["from"]
    assert source["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "prism-system"
    }
    assert source["podSelector"]["matchLabels"] == contract.OPERATOR_POD_LABELS
    assert admin_rule["ports"] == [{"protocol": "TCP", "port": 8001}]


def test_every_child_is_labelled_and_owned(made: Json, context: Context) -> None:
    for child in all_children(made, context):
        meta = child["metadata"]
        assert meta["labels"][contract.LABEL_MODEL] == "rich", child["kind"]
        owned = child["kind"] != "PersistentVolumeClaim"  # retained
        assert bool(meta.get("ownerReferences")) == owned, child["kind"]


def test_no_container_gets_a_token_or_a_privilege(made: Json, context: Context) -> None:
    for template in pods(made, context):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
        assert pod["securityContext"]["runAsUser"] == 65532
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.fixture(scope="module")
def restricted(apiserver: ApiServer) -> Iterator[ApiServer]:
    """A namespace that admits restricted pods only."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": "restricted", "labels": labels}
    assert apiserver.request("POST", "/api/v1/namespaces", {"metadata": meta})[0] == 201
    yield apiserver


def path_of(child: Json) -> str:
    prefix, plural = PATHS[child["kind"]]
    meta = child["metadata"]
    return f"{prefix}/namespaces/{meta['namespace']}/{plural}/{meta['name']}"


@pytest.mark.apiserver
def test_a_real_api_server_accepts_all_children_as_they_are(
    restricted: ApiServer, made: Json, context: Context
) -> None:
    made["metadata"]["namespace"] = "restricted"
    query = "fieldManager=prism-operator&force=true&fieldValidation=Strict"
    for child in all_children(made, context):
        path = f"{path_of(child)}?{query}"
        code, answer = restricted.request("PATCH", path, child, APPLY)
        assert code == 201, (child["kind"], answer)
        again = [restricted.request("PATCH", path, child, APPLY)[1] for _ in range(2)]
        versions = {one["metadata"]["resourceVersion"] for one in again}
        assert len(versions) == 1, f"{child['kind']} is not stable"


@pytest.mark.apiserver
def test_restricted_pod_security_admits_both_pods(
    restricted: ApiServer, made: Json, context: Context
) -> None:
    for number, template in enumerate(pods(made, context)):
        body = {**template, "metadata": {**template["metadata"], "name": f"probe-{number}"}}
        path = "/api/v1/namespaces/restricted/pods?dryRun=All"
        code, answer = restricted.request("POST", path, body)
        assert code == 201, answer


@pytest.mark.apiserver
def test_two_field_managers_share_a_real_deployment(
    apiserver: ApiServer, make_body: Make, context: Context
) -> None:
    model = api.parse(make_body("shared"))
    whole = manifests.deployment(model, context, "abc")
    path = path_of(whole)

    def apply(manifest: Json, manager: str) -> Json:
        query = f"fieldManager={manager}&force=true"
        code, answer = apiserver.request("PATCH", f"{path}?{query}", manifest, APPLY)
        assert code in (200, 201), answer
        return answer

    apply(whole, contract.FIELD_MANAGER)
    apply(manifests.replicas(model, 4), contract.FIELD_MANAGER_SCALER)
    again = apply(whole, contract.FIELD_MANAGER)
    assert again["spec"]["replicas"] == 4
    assert len(again["spec"]["template"]["spec"]["initContainers"]) == 1
