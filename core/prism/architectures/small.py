"""The smallest config of a model type that still has everything its models have.

Knows sizes and the names configs give them; knows no rule about what we support. Decision: a
class's own defaults are shrunk, field by field, and only what cannot be shrunk so is told by model
type; so the list of architectures and its tests follow transformers as it grows. Every size is
small enough that all models together are built, run and refactored in minutes.
"""

from collections.abc import Iterator
from typing import Any, Final

LAYERS: Final = 3
VOCABULARY: Final = 257  # a byte each, and the end of a text
NEURONS: Final = 32

# Given where the class's default has a value: size -> names.
_SIZES: Final[dict[float, str]] = {
    64: "hidden_size",
    VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings model_max_length",
    48: "dense_intermediate_size",
    NEURONS: """intermediate_size shared_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size mamba_d_head
        mamba_head_dim""",
    16: """head_dim kv_lora_rank q_lora_rank o_lora_rank router_hidden_size v_head_dim
        index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim
        rel_extent""",
    8: """sliding_window sliding_window_size qk_rope_head_dim qk_nope_head_dim mamba_d_state
        ssm_state_size mamba_chunk_size chunk_size block_size hidden_size_per_layer_input""",
    4: """num_attention_heads mamba_n_heads mamba_num_heads mamba_dt_rank swa_num_attention_heads
        d_rel index_topk""",
    2: """index_n_heads linear_num_heads linear_num_key_heads linear_num_value_heads
        layer_group_size swa_num_key_value_heads n_layers_per_attn_res_block""",
    1: "first_k_dense_replace num_dense_layers n_groups",
    0.2: "initializer_range",
}
# Given even where the default is None.
_ALWAYS: Final[dict[float, str]] = {
    VOCABULARY - 1: "pad_token_id bos_token_id eos_token_id",
    NEURONS: "moe_intermediate_size",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts",
    2: """num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts n_group
        num_expert_group""",
    1: "topk_group",
}
_SPECIAL: Final[dict[str, dict[str, Any]]] = {
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 16,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_qk_nope_head_dim": 8,
        "head_dim": 16,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "laguna": {"num_attention_heads_per_layer": [4] * LAYERS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": None,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(model_type: str) -> Any:
    """The default config of a text model type, shrunk; its models have about 0.3 M parameters.

    Raises what the config class raises for values it does not take.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    default = config_class().to_dict()
    known = default.keys() | config_class.attribute_map.keys()
    names = {name: config_class.attribute_map.get(name, name) for name in known}
    given: dict[str, Any] = {}
    given |= {k: v for k, v in _named(_SIZES) if k in known and default.get(names[k]) is not None}
    given |= {name: value for name, value in _named(_ALWAYS) if name in known}
    given |= _heads(default) | _layers(default)
    if "qk_rope_head_dim" in given:
        given.pop("head_dim", None)  # follows from the others
    given |= _SPECIAL.get(model_type, {})
    return config_class(**{name: value for name, value in given.items() if value is not None})


def _named(sizes: dict[float, str]) -> Iterator[tuple[str, float]]:
    return ((name, size) for size, names in sizes.items() for name in names.split())


def _heads(default: dict[str, Any]) -> dict[str, Any]:
    """Grouped queries where the class groups them."""
    groups = default.get("num_key_value_heads")
    if groups is None:
        return {}
    return {"num_key_value_heads": 4 if groups == default.get("num_attention_heads") else 2}


def _layers(default: dict[str, Any]) -> dict[str, Any]:
    """Few layers, of every kind that the class's default has."""
    given: dict[str, Any] = {"num_hidden_layers": LAYERS}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(default.get(name), list):
            kinds = list(dict.fromkeys(default[name]))
            given[name] = (kinds + kinds[-1:] * LAYERS)[:LAYERS]
    if isinstance(default.get("indexer_types"), list):
        given["indexer_types"] = None  # made anew from the number of layers
    return given
