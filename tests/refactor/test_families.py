"""Other families than OLMoE: other names on disk, dense layers, shared experts, other routers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prism.artifact import verify
from prism_refactor.job import refactor
from prism_refactor.options import Options
from prism_refactor.progress import Progress

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "bos_token_id": 256,
    "initializer_range": 0.2,
}


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**COMMON, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    )


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON,
            head_dim=8,
            intermediate_size=64,
            moe_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        )
    )


def deepseek_v3() -> Any:
    """First layer dense, a shared expert, sigmoid router with groups."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **(COMMON | {"num_hidden_layers": 3}),
            intermediate_size=64,
            moe_intermediate_size=48,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=8,
            qk_nope_head_dim=8,
        )
    )


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, deepseek_v3])
def test_family_keeps_its_logits_and_its_levels(
    make: Callable[[], Any], checkpoint: Path, corpus_file: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = tmp_path / "source"
    model = make().to(torch.bfloat16)
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, source / name)
    options = Options(str(source), tmp_path / "artifact", corpus_file, sub_experts=4, tokens=2048)
    artifact = refactor(options, lambda stages: Progress(stages, []))
    assert verify(artifact.path) == []
    assert len(artifact.manifest.layers) == 2
    for point in artifact.manifest.operating_points:
        assert point.own_share == pytest.approx(point.level / 100, abs=0.08), point.level
