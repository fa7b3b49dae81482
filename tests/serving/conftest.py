"""A small random OLMoE with a byte tokenizer, made into an artifact by hand.

Sub-routers are the true log-norms of a few tokens fitted by nothing at all: random directions with
thresholds at the wanted quantiles. Quality means nothing here; shares, speed and plumbing do.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prism.artifact import (
    SCHEMA_VERSION,
    Calibration,
    Knot,
    LayerTensors,
    Manifest,
    Source,
    write_prism_folder,
)
from prism.blocks import block_digest, block_names
from prism.checkpoint import file_digest, open_checkpoint
from prism.experts import find_expert_modules
from prometheus_client.parser import text_string_to_metric_families
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

KNOTS = (75, 50, 25)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def checkpoint(
    path: Path,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    experts: int,
    context: int = 256,
    top_k: int = 2,
) -> Path:
    """A random OLMoE checkpoint with a byte-level tokenizer."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.05,
    )
    OlmoeForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class _Scores:
    """An experts function that computes the plain experts and keeps log g + x·w + b."""

    def __init__(self, routers: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.routers = routers
        self.seen: dict[int, torch.Tensor] = {}

    def __call__(self, module: Any, x: Any, index: Any, weights: Any) -> Any:
        weight, bias = self.routers[id(module)]
        score = torch.einsum("th,tknh->tkn", x.float(), weight[index]) + bias[index]
        self.seen[id(module)] = score + weights.float().log().unsqueeze(-1)
        gate_up, down = module.gate_up_proj[index], module.down_proj[index]
        gate, up = torch.einsum("th,tkih->tki", x, gate_up).chunk(2, -1)
        each = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, down)
        return (each * weights.unsqueeze(-1)).sum(1)


def prism_folder(path: Path, sub_experts: int = 8) -> Path:
    """Make the checkpoint at `path` an artifact."""
    from transformers.integrations.moe import ExpertsInterface

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    modules = find_expert_modules(model)
    draw = torch.Generator().manual_seed(1)
    experts, hidden, _ = modules[0][1].down_proj.shape
    layers, routers = [], {}
    for _, module in modules:
        weight = torch.randn(experts, sub_experts, hidden, generator=draw) * 0.3
        bias = torch.zeros(experts, sub_experts)
        routers[id(module)] = (weight, bias)
        knots = len(KNOTS)
        means = torch.zeros(knots, experts, sub_experts, hidden)
        layers.append(
            LayerTensors(
                weight,
                bias,
                means,
                torch.ones(knots, experts, sub_experts + 1),
                torch.full((experts,), 1 / experts),
            )
        )
    scores = _Scores(routers)
    ExpertsInterface.register("test_scores", scores)
    model.set_experts_implementation("test_scores")
    with torch.inference_mode():
        model(torch.randint(0, model.config.vocab_size, (1, 128), generator=draw))
    theta = [
        tuple(scores.seen[id(m)].flatten().quantile(1 - level / 100).item() for _, m in modules)
        for level in KNOTS
    ]
    entries = open_checkpoint(path)
    digests = {
        f"{name}.{e}": block_digest(*(entries[n].read() for n in block_names(entries, name, e)))
        for name, _ in modules
        for e in range(experts)
    }
    config = model.config
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source=Source(str(path), None, {f.name: file_digest(f) for f in path.glob("*.json")}),
        architecture=config.architectures[0],
        model_type=config.model_type,
        sub_experts=sub_experts,
        num_experts=experts,
        experts_per_token=config.num_experts_per_tok,
        layers=tuple(name for name, _ in modules),
        seed=0,
        calibration=Calibration("random", "0" * 64, 128),
        knots=tuple(Knot(level, t) for level, t in zip(KNOTS, theta, strict=True)),
        operating_points=(),
        batch_curves={},
        methods={},
        block_digests=digests,
    )
    write_prism_folder(path, manifest, layers)
    return path


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small layers: fast to load, nothing to measure."""
    path = tmp_path_factory.mktemp("artifact")
    checkpoint(path, hidden=64, intermediate=64, layers=2, experts=8)
    return prism_folder(path)


@pytest.fixture(scope="session")
def heavy_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts dominate: what a level saves must show in the time of a step."""
    path = tmp_path_factory.mktemp("heavy")
    checkpoint(path, hidden=256, intermediate=1024, layers=2, experts=8, context=512, top_k=4)
    return prism_folder(path)


class Server:
    """`prism serve` as a child process."""

    def __init__(self, artifact: Path, log: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        self.url = f"http://127.0.0.1:{self.port}"
        program = "import sys; from prism_serving.app import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, str(artifact), "--port", str(self.port)]
        defaults = ["--model-name", "m", "--dtype", "float32", "--measure-seconds", "0.5"]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *defaults, *flags], stdout=out, stderr=subprocess.STDOUT
            )

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a series with these labels."""
        total, found = 0.0, False
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total, found = total + sample.value, True
        assert found, f"no {name} {labels}"
        return total

    def admin(self) -> tuple[str, str]:
        """(url, token) of the admin port."""
        line = re.search(r"admin: (\S+)/admin/level, bearer token in (\S+)", self.log.read_text())
        assert line, self.log.read_text()
        return line[1], Path(line[2]).read_text()

    def engine_pid(self) -> int:
        """Process id of the engine that is connected now."""
        return int(re.findall(r"engine connected pid=(\d+)", self.log.read_text())[-1])

    def wait_ready(self, timeout_s: float = 90) -> None:
        """Until an engine takes requests (readyz alone also says yes in the grace period)."""
        wait_for(lambda: self.is_serving(), timeout_s, lambda: self.log.read_text())

    def is_serving(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}: {self.log.read_text()}")
        try:
            return self.metric("prism:engine_up") == 1
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def wait_for(
    condition: Callable[[], bool], timeout_s: float = 20, what: Callable[[], str] = lambda: ""
) -> None:
    """Until `condition` holds; fails with `what()` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what() or condition
        time.sleep(0.05)


@pytest.fixture(scope="session")
def wait() -> Callable[..., None]:
    return wait_for


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start servers; all are ended with the session."""
    started: list[Server] = []

    def start(artifact: Path, *flags: str) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        started.append(Server(artifact, log, *flags))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server], artifact: Path) -> Server:
    """One running server for all tests that leave it as they found it."""
    one = start_server(
        artifact,
        "--min-level",
        "25",
        "--max-waiting",
        "8",
        "--max-body-bytes",
        "20000",
        "--ttft-ms",
        "5000",
        "--itl-ms",
        "5000",
        "--kv-tokens",
        "2048",
        "--batch-tokens",
        "64",
    )
    one.wait_ready()
    return one
