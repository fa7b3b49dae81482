"""Every layout of experts has one normal form, which computes and permutes as the module would."""

from typing import Any

import pytest
import torch
from prism.expert_weights import SWIGLU, add_down_bias, expert_weights, layout_obstacles
from prism.kernels import pack
from torch import Tensor

E, H, WIDTH, K, T = 5, 24, 32, 2, 9


def module(name: str, *, device: str = "cpu", **more: Any) -> Any:
    """A random experts module of transformers' class `name`, e.g. "gpt_oss.GptOss"."""
    from importlib import import_module

    package, prefix = name.split(".")
    models = f"transformers.models.{package}"
    configs = import_module(f"{models}.configuration_{package}")
    config_class = getattr(configs, f"{prefix}TextConfig", None) or getattr(
        configs, f"{prefix}Config"
    )
    sizes = {"hidden_size": H, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = dict.fromkeys(names, E)
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    config = config_class(**{k: v for k, v in (sizes | counts | more).items() if k in known})
    config._experts_implementation = "eager"
    with torch.device(device):
        made = getattr(import_module(f"{models}.modeling_{package}"), f"{prefix}Experts")(config)
    made.requires_grad_(False)
    if device == "cpu":
        torch.manual_seed(0)
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    return torch.randn(T, H, generator=g) * 3, index, torch.rand(T, K, generator=g)


def computed(experts: Any, kernel: str = "reference") -> Tensor:
    x, index, weights = batch()
    held = expert_weights(experts)
    chosen, packed = pack(held, 4, kernel)
    out = chosen.forward(packed, x, index, weights, None)
    if held.down_bias is not None:
        add_down_bias(out, index, weights, held.down_bias)
    return out


LAYOUTS = [
    ("aria.Aria", {}, SWIGLU),  # transposed
    ("olmoe.Olmoe", {}, SWIGLU),
    ("olmoe.Olmoe", {"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh(gate) · up"),
    ("gpt_oss.GptOss", {}, "the gate of GptOssExperts"),  # interleaved, transposed, biased
    ("nemotron_h.NemotronH", {}, "relu2(up), no gate"),
    ("minimax_m3_vl.MiniMaxM3VL", {}, "the gate of MiniMaxM3VLExperts"),
]


@pytest.mark.parametrize(("name", "more", "activation"), LAYOUTS)
def test_normal_form_computes_what_the_module_computes(
    name: str, more: dict[str, Any], activation: str
) -> None:
    experts = module(name, **more)
    assert layout_obstacles(experts) == []
    assert expert_weights(experts).activation == activation
    x, index, weights = batch()
    torch.testing.assert_close(computed(experts), experts(x, index, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["olmoe.Olmoe", "aria.Aria"])
def test_fast_kernels_take_plain_experts_of_any_layout(name: str) -> None:
    experts = module(name)
    torch.testing.assert_close(computed(experts, "cpu"), computed(experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["olmoe.Olmoe", "gpt_oss.GptOss", "nemotron_h.NemotronH"])
def test_permuted_neurons_change_the_weights_and_not_the_output(name: str) -> None:
    experts = module(name)
    x, index, weights = batch()
    before, first = experts(x, index, weights), experts.down_proj.clone()
    held = expert_weights(experts)
    generator = torch.Generator().manual_seed(2)
    for expert in range(E):
        held.permute(expert, torch.randperm(WIDTH, generator=generator))
    assert not torch.equal(first, experts.down_proj)
    torch.testing.assert_close(experts(x, index, weights), before, rtol=1e-4, atol=1e-4)


def test_sentinel_expert_adds_no_bias() -> None:
    out = torch.zeros(1, 3)
    add_down_bias(out, torch.tensor([[0, 2]]), torch.tensor([[0.5, 9.0]]), torch.ones(2, 3))
    assert out.tolist() == [[0.5] * 3]


def test_shapes_and_gates_are_asked_on_the_meta_device_too() -> None:
    assert layout_obstacles(module("gpt_oss.GptOss", device="meta")) == []
    experts = module("olmoe.Olmoe", device="meta")
    experts.down_proj = torch.nn.Parameter(torch.empty(E, H, WIDTH - 1, device="meta"))
    assert "do not fit" in layout_obstacles(experts)[0]


def test_what_neurons_share_is_an_obstacle() -> None:
    experts = module("olmoe.Olmoe")
    experts.has_post_expert_norm = True
    assert "norm after each expert" in layout_obstacles(experts)[0]
    for mixing in (torch.softmax, torch.cumsum):  # the first follows the neurons' order
        experts = module("olmoe.Olmoe")
        experts._apply_gate = lambda both, mixing=mixing: mixing(both.chunk(2, -1)[0], -1)
        assert "mixes neurons" in layout_obstacles(experts)[0]
