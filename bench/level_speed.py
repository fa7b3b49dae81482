"""Does a lower level save time? One MoE layer's step time by level, against stock transformers.

    python bench/level_speed.py [--threads 1] [--rounds 9] [--out bench/results/level_speed.json]

Runs the whole experts function (sub-routers, selection, kernel, means) on random weights of two
shapes. Thresholds are set so that the mean own share is the level. All variants of one row are
timed in turn, round by round, in one process; a figure is the median over rounds of thread CPU time
with one thread (which hides other jobs' time slices, not their use of caches and memory), of wall
time with more. Layers are rotated where one would fit the cache.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from prism.expert_weights import expert_weights
from prism.experts import BatchContext, LayerData, batch_context, forward
from prism.kernels import choose
from prism.selection import select
from torch import Tensor

LEVELS = (100, 75, 50, 25)
TOKENS = (1, 8, 32, 512)
SUB_EXPERTS = 8


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    experts: int
    slots: int
    layers: int  # rotated, so that weights come from memory


SHAPES = (
    Shape("OLMoE-1B-7B layer", 2048, 1024, 64, 8, 1),
    Shape("tiny-moe layer", 256, 256, 16, 4, 6),
)


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds a layer, stock is grouped_mm at full level."""

    shape: str
    dtype: str
    tokens: int
    stock_ms: float
    level_ms: dict[int, float]
    own_share: dict[int, float]


def make_module(shape: Shape, dtype: torch.dtype) -> Any:
    """Random experts of transformers' own class."""
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeExperts

    config = OlmoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.slots,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = OlmoeExperts(config)
    module = module.to(dtype).to_empty(device="cpu").requires_grad_(False)
    for weight in module.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5)
    return module


def attach_random(module: Any, shape: Shape, dtype: torch.dtype) -> None:
    """Sub-routers, means, scalars of the real sizes; thresholds at quantiles of the scores."""
    e, n, h = shape.experts, SUB_EXPERTS, shape.hidden
    kernel = choose(torch.device("cpu"), dtype, h, shape.intermediate // n)
    router, bias = torch.randn(e, n, h) * h**-0.5, torch.zeros(e, n)
    x, index, weights = make_batch(shape, 512, dtype)
    scores = torch.einsum("th,enh->ten", x.float(), router)
    scores = scores.gather(1, index.unsqueeze(-1).expand(-1, -1, n)) + weights.log().unsqueeze(-1)
    theta = torch.full((101,), -torch.inf)
    for level in LEVELS[1:]:
        theta[level] = scores.quantile(1 - level / 100)
    module._prism = LayerData(
        layer=0,
        kernel=kernel,
        packed=kernel.pack(expert_weights(module), n),
        router_weight=router,
        router_bias=bias,
        means=torch.randn(3, e, n, h) * 0.01,
        log_theta=theta,
        knot=torch.tensor([2] * 38 + [1] * 25 + [0] * 38),
        scalars=torch.ones(101, e + 1, n + 1),
    )


def make_batch(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and weights as a router with softmax would hand them over."""
    x = torch.randn(tokens, shape.hidden).to(dtype)
    weights, index = torch.randn(tokens, shape.experts).softmax(-1).topk(shape.slots)
    return x, index, weights


def measure(shape: Shape, dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> list[Row]:
    modules = [make_module(shape, dtype) for _ in range(shape.layers)]
    for module in modules:
        attach_random(module, shape, dtype)
    rows = []
    for tokens in TOKENS:
        x, index, weights = make_batch(shape, tokens, dtype)
        given = weights.to(dtype)
        stock, ours = [], {level: [] for level in LEVELS}
        contexts = {level: BatchContext.of([level] * tokens) for level in LEVELS}

        def timed(run: Callable[[Any], Tensor], modules: list[Any] = modules) -> float:
            start = clock()
            for module in modules:
                run(module)
            return (clock() - start) * 1e3 / len(modules)

        for i in range(rounds + 1):  # the first round warms up
            stock.append(timed(lambda m: m(x, index, given)))  # noqa: B023
            for level, context in contexts.items():
                with batch_context(context):
                    ours[level].append(timed(lambda m: forward(m, x, index, given)))  # noqa: B023
            if i == 0:
                stock.clear()
                for times in ours.values():
                    times.clear()
        shares = {level: own_share(modules[0], level, x, index, given) for level in LEVELS}
        median = {level: statistics.median(times) for level, times in ours.items()}
        name = str(dtype).removeprefix("torch.")
        rows.append(Row(shape.name, name, tokens, statistics.median(stock), median, shares))
        print(line(rows[-1]), flush=True)
    return rows


def own_share(module: Any, level: int, x: Tensor, index: Tensor, weights: Tensor) -> float:
    data: LayerData = module._prism
    theta = data.log_theta[level].expand(x.shape[0])
    state = select(x, index, weights.float(), data.router_weight, data.router_bias, theta)
    return state.float().mean().item()


HEAD = (
    f"{'shape':18} {'dtype':9} {'T':>4} {'stock ms':>9}"
    + "".join(f"{f'{level} ms':>9}" for level in LEVELS)
    + f"{'stock/100':>11}"
    + "".join(f"{f'100/{level}':>8}" for level in LEVELS[1:])
)


def line(row: Row) -> str:
    full = row.level_ms[100]
    return (
        f"{row.shape:18} {row.dtype:9} {row.tokens:4} {row.stock_ms:9.3f}"
        + "".join(f"{row.level_ms[level]:9.3f}" for level in LEVELS)
        + f"{row.stock_ms / full:11.2f}"
        + "".join(f"{full / row.level_ms[level]:8.2f}" for level in LEVELS[1:])
    )


def cpu_name() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("bench/results/level_speed.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    print(HEAD)
    rows: list[Row] = []
    with torch.inference_mode():
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                rows += measure(shape, dtype, given.rounds, clock)
    kernel = choose(torch.device("cpu"), torch.float32, 256, 32).name
    report = {
        "command": f"python bench/level_speed.py --threads {given.threads} --rounds {given.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "clock": "thread CPU time" if given.threads == 1 else "wall time",
        "kernel": kernel,
        "sub_experts": SUB_EXPERTS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": [asdict(row) for row in rows],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
