"""A small random OLMoE on disk, and an artifact made from it with random sub-routers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prism import artifact
from prism.blocks import block_digest, block_names
from prism.checkpoint import file_digest, open_checkpoint

SUB_EXPERTS = 4
EXPERTS = 6
HIDDEN = 32
LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=64,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.3,
    )
    OlmoeForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def curves() -> dict[str, list[float]]:
    """What one level reads, computes and loses in decode batches."""
    shares = ("bytes_share", "ride_along_bytes_share")
    shares += ("computed_share", "ride_along_computed_share")
    found = {"batch": [1.0, 8.0]} | {name: [0.5, 0.7] for name in shares}
    measured = ("bytes_share", "computed_share", "loss_percent", "loss_se", "kl")
    return found | {"measured_batch": [8.0]} | {f"measured_{name}": [0.6] for name in measured}


def make_manifest(path: Path) -> artifact.Manifest:
    """A manifest that fits the checkpoint at `path`; two knots."""
    entries = open_checkpoint(path)
    digests = {
        f"{layer}.{e}": block_digest(*(entries[n].read() for n in block_names(entries, layer, e)))
        for layer in LAYERS
        for e in range(EXPERTS)
    }
    point = {name: 0.5 for name in artifact.OperatingPoint.__dataclass_fields__ if name != "level"}
    return artifact.Manifest(
        schema_version=artifact.SCHEMA_VERSION,
        source=artifact.Source(
            "pvc://claim/model", None, {"config.json": file_digest(path / "config.json")}
        ),
        architecture="OlmoeForCausalLM",
        model_type="olmoe",
        sub_experts=SUB_EXPERTS,
        num_experts=EXPERTS,
        experts_per_token=2,
        layers=LAYERS,
        seed=7,
        calibration=artifact.Calibration("pydoc topics", "00", 1000),
        knots=(artifact.Knot(75, (-1.8, -1.7)), artifact.Knot(50, (-1.2, -1.1))),
        operating_points=tuple(artifact.OperatingPoint(x, **point) for x in (100, 50)),
        batch_curves={"50": curves()},
        methods={"partition": "swap"},
        block_digests=digests,
    )


def make_layers() -> list[artifact.LayerTensors]:
    """Random tensors of both layers; routers weak enough that selection keeps about half."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return [
        artifact.LayerTensors(
            router_weight=normal(EXPERTS, SUB_EXPERTS, HIDDEN, scale=0.1),
            router_bias=normal(EXPERTS, SUB_EXPERTS, scale=0.3),
            means=normal(2, EXPERTS, SUB_EXPERTS, HIDDEN, scale=0.5),
            scalars=1 + normal(2, EXPERTS, SUB_EXPERTS + 1, scale=0.1).abs(),
            usage=torch.full((EXPERTS,), 1 / EXPERTS),
        )
        for _ in LAYERS
    ]


@pytest.fixture(scope="session")
def whole_artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "whole"
    shutil.copytree(checkpoint, path)
    artifact.write_prism_folder(path, make_manifest(path), make_layers())
    return path


@pytest.fixture
def copied_artifact(whole_artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole_artifact, tmp_path / "copy"))


@pytest.fixture
def edit_manifest(copied_artifact: Path) -> Callable[[Callable[[dict], None]], Path]:
    """Change the copy's prism.json by a function over its parsed JSON."""
    import json

    def edit(change: Callable[[dict], None]) -> Path:
        file = copied_artifact / "prism/prism.json"
        raw = json.loads(file.read_text())
        change(raw)
        file.write_text(json.dumps(raw))
        return copied_artifact

    return edit
