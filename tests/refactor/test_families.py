"""Every architecture of transformers: refactored as a small random checkpoint, or refused.

A third of them, one for each layout, naming in files and kind of router, in every test run; all of
them in `make test-long`, which writes bench/results/architectures.json.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prism.architectures import UnsupportedModel, examine, require_servable
from prism.architectures.catalogue import causal_models
from prism.architectures.small import small_config
from prism.artifact import Artifact, open_artifact, verify
from prism.experts import BatchContext, attach, batch_context
from prism.loading import load_model
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.job import refactor
from prism_refactor.options import Options
from prism_refactor.progress import Progress
from prism_serving.engine import loading
from prism_serving.engine.policy import Wish
from prism_serving.engine.runner import Runner
from prism_serving.engine.sampler import Sampling
from prism_serving.engine.scheduler import Chunk, Running, StepPlan
from transformers import AutoModelForCausalLM

RESULTS = Path(__file__).parents[2] / "bench/results/architectures.json"
SAME = 1e-4  # share of the largest logit, in fp32
REPRESENTATIVE = [
    "olmoe",  # a tensor for each projection of each expert
    "mixtral",  # w1, w3, w2 under block_sparse_moe
    "granitemoe",  # all experts in one tensor under another name
    "aria_text",  # transposed
    "gpt_oss",  # transposed, interleaved, biased; a gate of its own; sinks
    "nemotron_h",  # no gate; recurrent layers; layers of one kind each
    "gemma4_text",  # gelu; experts beside the dense part; other heads in some layers
    "minimax_m3_vl_text",  # a clamped gate
    "deepseek_v2",  # compressed keys, rotary embedding in complex numbers
    "deepseek_v3",  # sigmoid router with groups, shared experts, a dense first layer
    "deepseek_v32",  # attention that needs its own mask
    "jamba",  # state-space layers, experts under feed_forward
    "lfm2_moe",  # convolutions
    "qwen3_next",  # linear attention
    "phimoe",  # sparse mixer router
    "hunyuan_v1_moe",  # top-k router with its own names in the config
    "ernie4_5_moe",  # router with a correction bias
    "zaya",  # refused: router states go from layer to layer
]
EVERY = sorted(model_type for models in causal_models().values() for model_type in models)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Models tell which fast kernels they miss and how far their weights are loaded."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A directory with the byte tokenizer, for weights."""
    path = tmp_path / "source"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, path / name)
    return path


@pytest.fixture
def options(source: Path, corpus_file: Path, tmp_path: Path) -> Options:
    return Options(str(source), tmp_path / "artifact", corpus_file, sub_experts=4, tokens=2048)


def save_random(config: Any, path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)


def stock_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers alone computes, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def check(config: Any, options: Options) -> dict[str, Any]:
    """Refactor a small random model of the architecture, or see it refused; its states."""
    source = Path(options.source)
    save_random(config, source)
    examined = examine(config)
    began = time.monotonic()
    if examined.refactor_obstacle is not None:
        check_refused(options)
        obstacle = examined.refactor_obstacle
        return {"refactorable": False, "servable": False, "obstacle": obstacle}
    artifact = refactor(options, lambda stages: Progress(stages, []))
    seconds = time.monotonic() - began
    assert artifact is not None
    check_artifact(artifact, source)
    servable = check_served(artifact.path)
    assert servable == (examined.serve_obstacle is None)
    obstacle = examined.serve_obstacle
    states = {"refactorable": True, "servable": servable, "obstacle": obstacle}
    return states | {"refactor_seconds": round(seconds, 1)}


def check_refused(options: Options) -> None:
    """Before any work: nothing is left beside the target."""
    with pytest.raises(RefactorError) as caught:
        refactor(options, lambda stages: Progress(stages, []))
    assert caught.value.reason == Reason.UNSUPPORTED_ARCHITECTURE
    assert [file.name for file in options.out.parent.iterdir()] == ["source"]


def check_artifact(artifact: Artifact, source: Path) -> None:
    """Stock transformers and level 100 compute what the source does; level 50 something else."""
    assert verify(artifact.path) == []
    for point in open_artifact(artifact.path).manifest.operating_points:
        assert point.own_share == pytest.approx(point.level / 100, abs=0.08), point.level
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = stock_logits(source, ids)
    assert difference(stock_logits(artifact.path, ids), expected) < SAME
    model, _ = load_model(artifact.path, torch.float32)
    attach(model, artifact)
    with torch.inference_mode():
        assert difference(model(input_ids=ids, use_cache=False).logits, expected) < SAME
        with batch_context(BatchContext.of([50] * ids.numel())):
            half = model(input_ids=ids, use_cache=False).logits
    assert torch.isfinite(half).all()
    assert difference(half, expected) > 100 * SAME


def check_served(path: Path) -> bool:
    """Whether the engine takes the artifact; if so, its steps give what stock transformers gives:
    two prompts in one step, then the rest of one of them after its cached keys."""
    try:
        require_servable(loading.load_config(path))
    except UnsupportedModel:
        with pytest.raises(UnsupportedModel):
            loading.load(path, "float32", "cpu")
        return False
    loaded = loading.load(path, "float32", "cpu")
    runner = Runner(loaded.model, loading.kv_buffers(loaded, 256), loaded.device)
    generator = torch.Generator().manual_seed(3)
    long, short = (torch.randint(0, 256, (1, n), generator=generator) for n in (33, 21))
    first, second = (running(ids, start) for ids, start in ((long, 0), (short, 100)))
    both = runner.logits(StepPlan((Chunk(second, 0, 21, 100), Chunk(first, 0, 20, 100))))
    rest = runner.logits(StepPlan((Chunk(first, 20, 13, 100),)))
    assert difference(both[0], stock_logits(path, short)[0, -1]) < SAME
    assert difference(rest[0], stock_logits(path, long)[0, -1]) < SAME
    return True


def running(ids: torch.Tensor, kv_start: int) -> Running:
    tokens = ids[0].tolist()
    return Running("r", tokens, len(tokens), 4, Sampling(), Wish(), 0.0, kv_start=kv_start)


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_family_keeps_its_logits_and_its_levels(model_type: str, options: Options) -> None:
    check(small_config(model_type), options)


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Any]]:
    """Collected, and written when every architecture has its entry."""
    found: dict[str, Any] = {}
    began = time.monotonic()
    yield found
    if set(found) == set(EVERY):
        page = {
            "command": "make test-long",
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - began, 1),
            "refactorable": sum(one["refactorable"] for one in found.values()),
            "servable": sum(one["servable"] for one in found.values()),
            "architectures": found,
        }
        RESULTS.write_text(json.dumps(page, indent=1) + "\n")


@pytest.mark.long
@pytest.mark.parametrize("model_type", EVERY)
def test_every_architecture(model_type: str, options: Options, results: dict[str, Any]) -> None:
    results[model_type] = check(small_config(model_type), options)


def gemma4() -> Any:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    text = small_config("gemma4_text").to_dict()
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text, vision_config=vision | sizes, audio_config=None)
    )


def qwen3_5_moe() -> Any:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16, "patch_size": 4}
    text = small_config("qwen3_5_moe_text").to_dict()
    return Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    )


@pytest.mark.parametrize("make", [gemma4, qwen3_5_moe])
def test_text_model_inside_a_multimodal_checkpoint(make: Any, options: Options) -> None:
    """Its experts are permuted where the multimodal names have them; all the rest comes along."""
    torch.manual_seed(0)
    whole, source = make().to(torch.bfloat16), Path(options.source)
    whole.save_pretrained(source)
    artifact = refactor(options, lambda stages: Progress(stages, []))
    assert artifact is not None
    check_artifact(artifact, source)
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(1))
    reloaded = type(whole).from_pretrained(artifact.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = reloaded(input_ids=ids, use_cache=False).logits
    assert difference(found, stock_logits(source, ids)) < SAME
