"""What all parts agree on: API group, labels, ports, paths, metrics, headers, exit codes.

Standard library only, so that the operator can import it without torch. A name that appears in two
packages, in the chart or in a dashboard belongs here; a test holds the chart and the CRD to it.
"""

from enum import IntEnum
from typing import Final

GROUP: Final = "moeprism.io"
VERSION: Final = "v1alpha1"
KIND: Final = "PrismModel"
PLURAL: Final = "prismmodels"
API_VERSION: Final = f"{GROUP}/{VERSION}"

# Labels and annotations of child objects.
LABEL_MODEL: Final = f"{GROUP}/model"  # value: the PrismModel's metadata.name
LABEL_ROLE: Final = f"{GROUP}/role"  # value: ROLE_SERVING or ROLE_REFACTOR
ROLE_SERVING: Final = "serving"
ROLE_REFACTOR: Final = "refactor"
MANAGED_BY: Final = "prism-operator"
# Labels of the operator's own pod, by which NetworkPolicies let it reach the admin port.
OPERATOR_POD_LABELS: Final = {
    "app.kubernetes.io/part-of": "prism",
    "app.kubernetes.io/component": "operator",
}
ANNOTATION_HASH: Final = f"{GROUP}/spec-hash"
ANNOTATION_ARTIFACT: Final = f"{GROUP}/artifact"  # hash of the inputs of the artifact
FIELD_MANAGER: Final = "prism-operator"  # everything but replicas
FIELD_MANAGER_SCALER: Final = "prism-scaler"  # replicas alone

# The serving pod.
API_PORT: Final = 8000  # OpenAI API, /metrics, /healthz, /readyz
ADMIN_PORT: Final = 8001  # /admin/level, /admin/profile: bearer token, operator only
JOB_METRICS_PORT: Final = 9090  # the refactor Job's progress
OPERATOR_METRICS_PORT: Final = 9091
OPERATOR_HEALTH_PORT: Final = 8080
PATH_LEVEL: Final = "/admin/level"
PATH_PROFILE: Final = "/admin/profile"
PATH_HEALTH: Final = "/healthz"
PATH_READY: Final = "/readyz"
PATH_METRICS: Final = "/metrics"

# Paths inside the containers.
ARTIFACT_DIR: Final = "/artifact"
CACHE_DIR: Final = "/cache"
SOURCE_DIR: Final = "/source"
CALIBRATION_DIR: Final = "/calibration"
CONTROL_DIR: Final = "/etc/prism/control"
SOCKET_PATH: Final = "/run/prism/engine.sock"
LEVEL_FILE: Final = "level.json"  # {"seq", "floor", "ceiling"}
MEMORY_FILE: Final = "memory.json"  # the scaler's, beside them in the ConfigMap, not mounted
SLO_FILE: Final = "slo.json"  # {"ttft_ms", "itl_ms"}; null where there is no target
TERMINATION_MESSAGE_PATH: Final = "/dev/termination-log"
TERMINATION_MESSAGE_BYTES: Final = 4096
ENV_JOB_INDEX: Final = "JOB_COMPLETION_INDEX"  # Kubernetes sets it in an Indexed Job's pods

# Environment of the serving pod.
ENV_ADMIN_TOKEN_SHA256: Final = "PRISM_ADMIN_TOKEN_SHA256"

# Environment of everything that computes.
ENV_CPU_EXTENSION: Final = "PRISM_CPU_EXTENSION"  # path of a prebuilt C++ extension
ENV_CACHE: Final = "PRISM_CACHE"  # derived caches; ~/.cache/prism where it is not set

# The artifact.
PRISM_SUBFOLDER: Final = "prism"
MANIFEST_FILE: Final = "prism.json"
TENSORS_FILE: Final = "prism.safetensors"
REST_DIGEST: Final = "rest"  # key in block_digests of all tensors outside the experts
REPORT_FILE: Final = "report.html"

# Levels, in percent.
MIN_LEVEL: Final = 10
MAX_LEVEL: Final = 100
PREFILL_LEVELS: Final = (100, 75, 50, 25)  # prefill is fixed to one of these at admission
SUB_EXPERT_CHOICES: Final = (4, 8, 16, 32)
DEFAULT_SUB_EXPERTS: Final = 8

# HTTP.
HEADER_LEVEL: Final = "x-prism-level"  # the level at admission
HEADER_REQUEST_ID: Final = "x-request-id"


class ExitCode(IntEnum):
    """Exit codes of the command line and of the Job; the Job's podFailurePolicy reads them."""

    OK = 0
    FAILED = 1  # a retry may help
    USAGE = 2
    BAD_INPUT = 3  # do not retry


class Metric:
    """Names of the series that more than one part reads or writes.

    All engine series carry the constant label ``prism_model="namespace/name"`` and ``model_name``.
    """

    LABEL_PRISM_MODEL: Final = "prism_model"

    RUNNING: Final = "vllm:num_requests_running"
    WAITING: Final = "vllm:num_requests_waiting"
    KV_USAGE: Final = "vllm:kv_cache_usage_perc"
    TTFT: Final = "vllm:time_to_first_token_seconds"
    ITL: Final = "vllm:inter_token_latency_seconds"
    TPOT: Final = "vllm:request_time_per_output_token_seconds"
    E2E: Final = "vllm:e2e_request_latency_seconds"
    PROMPT_TOKENS: Final = "vllm:prompt_tokens_total"
    GENERATION_TOKENS: Final = "vllm:generation_tokens_total"
    REQUEST_SUCCESS: Final = "vllm:request_success_total"

    RECEIVED: Final = "prism:requests_received_total"
    RECEIVED_PROMPT_TOKENS: Final = "prism:prompt_tokens_received_total"
    SHED: Final = "prism:requests_shed_total"  # label: reason
    SLO_TOTAL: Final = "prism:slo_events_total"  # label: objective = ttft | itl
    SLO_GOOD: Final = "prism:slo_good_events_total"  # label: objective
    LEVEL_CEILING: Final = "prism:level_ceiling_ratio"
    LEVEL_FLOOR: Final = "prism:level_floor_ratio"
    LEVEL_SEQ: Final = "prism:level_seq"
    # Served mean level = rate(LEVEL_WEIGHTED_TOKENS) / rate(LEVEL_TOKENS).
    LEVEL_TOKENS: Final = "prism:level_tokens_total"  # label: phase = prefill | decode
    LEVEL_WEIGHTED_TOKENS: Final = (
        "prism:level_weighted_tokens_total"  # label: phase; token x level ratio
    )
    OWN_SLICES: Final = "prism:own_sub_experts_total"  # selected by tokens for themselves
    CANDIDATE_SLICES: Final = "prism:candidate_sub_experts_total"
    BUSY_SECONDS: Final = "prism:engine_busy_seconds_total"
    STEP_SECONDS: Final = "prism:engine_step_seconds"  # histogram; label: phase

    # The refactor Job.
    REFACTOR_PROGRESS: Final = "prism:refactor_progress_ratio"
    REFACTOR_REMAINING: Final = "prism:refactor_remaining_seconds"
    REFACTOR_STEPS: Final = "prism:refactor_steps_done"  # label: stage
