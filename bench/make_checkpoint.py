"""Write a checkpoint of a real model's shape with random weights: what refactoring a large model
costs does not depend on what the weights say.

python bench/make_checkpoint.py OUT [--layers N] [--tokenizer DIR] [--seed 0]

One shard per decoder layer, so memory holds one layer; bfloat16. The default shape is that of
OLMoE-1B-7B: 16 layers, 64 experts of 1024 neurons, 8 per token, hidden size 2048; 13.8 GB. The
tokenizer (default: examples/tiny-moe) has fewer tokens than the vocabulary, which only means that
the others never occur.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import OlmoeConfig

ROOT = Path(__file__).resolve().parent.parent
SPREAD = 0.02  # standard deviation of a weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "examples" / "tiny-moe")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    out: Path = arguments.out
    out.mkdir(parents=True)
    config = OlmoeConfig(
        intermediate_size=1024, num_hidden_layers=arguments.layers, dtype="bfloat16"
    )
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(arguments.tokenizer / name, out / name)
    places: dict[str, str] = {}
    total = 0
    for number in range(-1, arguments.layers):
        tensors = outside(config) if number < 0 else layer(config, number)
        file = f"model-{number + 2:05d}-of-{arguments.layers + 1:05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        print(f"{file}: {total / 1e9:.2f} GB so far", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def outside(config: OlmoeConfig) -> dict[str, Tensor]:
    """Embedding, last norm and head."""
    shape = config.vocab_size, config.hidden_size
    return {
        "model.embed_tokens.weight": random(*shape),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
        "lm_head.weight": random(*shape),
    }


def layer(config: OlmoeConfig, number: int) -> dict[str, Tensor]:
    """One decoder layer."""
    hidden, width = config.hidden_size, config.intermediate_size
    prefix = f"model.layers.{number}"
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors[f"{prefix}.self_attn.{name}.weight"] = random(hidden, hidden)
    for name in ("self_attn.q_norm", "self_attn.k_norm"):
        tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors[f"{prefix}.mlp.gate.weight"] = random(config.num_experts, hidden)
    for expert in range(config.num_experts):
        place = f"{prefix}.mlp.experts.{expert}"
        tensors[f"{place}.gate_proj.weight"] = random(width, hidden)
        tensors[f"{place}.up_proj.weight"] = random(width, hidden)
        tensors[f"{place}.down_proj.weight"] = random(hidden, width)
    return tensors


def random(*shape: int) -> Tensor:
    """Normal, in bfloat16."""
    return (torch.randn(*shape) * SPREAD).to(torch.bfloat16)


if __name__ == "__main__":
    main()
