"""What does a whole step of the engine cost, by level, and where does the time go?

    python bench/step_time.py [--artifact DIR] [--rounds 15] [--out bench/results/step_time.json]

Runs the engine's own runner on real text, in one thread: a prompt of 450 tokens, eight decode rows
with 450 cached keys each, and four such rows beside a prompt, in fp32 and bf16. Without --artifact,
examples/tiny-moe is refactored into a temporary directory first (about a minute). Levels take turns
within a round; a figure is the best round's thread CPU time, which hides other jobs' time slices.
Shares of the parts are taken from separate runs, in which every part is timed.
"""

import argparse
import json
import os
import platform
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from prism.experts import find_expert_modules
from prism.kernels import choose
from prism_serving.engine import attention, loading
from prism_serving.engine.policy import Wish
from prism_serving.engine.runner import Runner
from prism_serving.engine.scheduler import Chunk, Running, StepPlan
from prism_serving.protocol import Sampling
from tokenizers import Tokenizer
from transformers import AttentionInterface

LEVELS = (100, 75, 50, 25)
KEYS = 450
ROOM = 512  # KV tokens of each sequence
# (past, rows) of each sequence
STEPS = {
    "prompt of 450": [(0, KEYS)],
    "8 decode rows at 450 keys": [(KEYS, 1)] * 8,
    "4 decode rows and a prompt of 450": [(KEYS, 1)] * 4 + [(0, KEYS)],
}
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds of a step, and of each part of it."""

    dtype: str
    step: str
    level_ms: dict[int, float]
    parts_ms: dict[int, dict[str, float]]  # at the highest and the lowest level


class Parts:
    """Thread CPU seconds by part; parts do not nest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = 0.0

    def begin(self, *_: Any) -> None:
        self._began = time.thread_time()

    def end(self, part: str) -> Callable[..., None]:
        def add(*_: Any) -> None:
            self.seconds[part] += time.thread_time() - self._began

        return add

    def watch(self, module: torch.nn.Module, part: str) -> list[Any]:
        hooks = (
            module.register_forward_pre_hook(self.begin),
            module.register_forward_hook(self.end(part)),
        )
        return list(hooks)

    def wrapped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        end = self.end(part)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin()
            result = function(*args, **kwargs)
            end()
            return result

        return timed


def part_of(name: str, module: torch.nn.Module) -> str | None:
    kind = type(module).__name__
    if name == "lm_head":
        return "lm_head"
    if isinstance(module, torch.nn.Linear):
        return "linears"
    if kind.endswith("RMSNorm"):
        return "norms"
    return "router" if kind.endswith("Router") else None


@contextmanager
def watched(model: Any, parts: Parts) -> Iterator[None]:
    """Time every part of the model's forward."""
    modelling = sys.modules[type(model).__module__]
    rope = modelling.apply_rotary_pos_emb
    hooks = [h for _, module in find_expert_modules(model) for h in parts.watch(module, "experts")]
    for name, module in model.named_modules():
        if part := part_of(name, module):
            hooks += parts.watch(module, part)
    AttentionInterface.register(attention.NAME, parts.wrapped(attention.attention, "attention"))
    modelling.apply_rotary_pos_emb = parts.wrapped(rope, "rope")
    try:
        yield
    finally:
        modelling.apply_rotary_pos_emb = rope
        AttentionInterface.register(attention.NAME, attention.attention)
        for hook in hooks:
            hook.remove()


def plan(step: list[tuple[int, int]], level: int, text: list[int]) -> StepPlan:
    chunks = []
    for i, (past, rows) in enumerate(step):
        begin = 5000 + i * 700
        tokens = text[begin : begin + past + rows]
        running = Running("bench", tokens, past + rows, 1, Sampling(), Wish(), 0.0, past, i * ROOM)
        chunks.append(Chunk(running, past, rows, level))
    return StepPlan(tuple(chunks))


def fill_keys(runner: Runner, step: list[tuple[int, int]], text: list[int]) -> None:
    """Compute the cached keys that the step's decode rows will read."""
    for i, (past, _) in enumerate(step):
        if past == 0:
            continue
        tokens = text[5000 + i * 700 :][:past]
        running = Running("bench", tokens, past, 1, Sampling(), Wish(), 0.0, 0, i * ROOM)
        runner.logits(StepPlan((Chunk(running, 0, past, 100),)))


def seconds(run: Callable[[], object]) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


def measure(artifact: Path, dtype: str, text: list[int], rounds: int) -> list[Row]:
    loaded = loading.load(artifact, dtype, "cpu")
    runner = Runner(loaded.model, loading.kv_buffers(loaded, 16 * ROOM), loaded.device)
    rows = []
    for name, step in STEPS.items():
        fill_keys(runner, step, text)
        plans = {level: plan(step, level, text) for level in LEVELS}
        best = dict.fromkeys(LEVELS, float("inf"))
        for _ in range(rounds):
            for level, one in plans.items():
                best[level] = min(best[level], seconds(lambda one=one: runner.logits(one)))
        shares = {
            level: parts_ms(runner, loaded.model, plans[level], rounds) for level in (100, 25)
        }
        milliseconds = {level: round(s * 1e3, 3) for level, s in best.items()}
        rows.append(Row(dtype, name, milliseconds, shares))
        print_row(rows[-1])
    return rows


def parts_ms(runner: Runner, model: Any, one: StepPlan, rounds: int) -> dict[str, float]:
    """The fastest of the watched runs, part by part; "rest" is what no part claims."""
    best, fastest = {}, float("inf")
    for _ in range(max(rounds // 2, 3)):
        parts = Parts()
        with watched(model, parts):
            whole = seconds(lambda: runner.logits(one))
        if whole < fastest:
            fastest = whole
            best = dict(parts.seconds) | {"rest": whole - sum(parts.seconds.values())}
    ordered = sorted(best.items(), key=lambda item: -item[1])
    return {part: round(s * 1e3, 3) for part, s in ordered}


def print_row(row: Row) -> None:
    times = "".join(f"{ms:9.2f}" for ms in row.level_ms.values())
    ratio = row.level_ms[100] / row.level_ms[25]
    print(f"{row.dtype:9} {row.step:34}{times}{ratio:8.2f}", flush=True)
    for level, parts in row.parts_ms.items():
        print(f"  {level:3}  " + "  ".join(f"{part} {ms:.2f}" for part, ms in parts.items()))


def refactor(out: Path) -> None:
    command = [sys.executable, "-m", "prism_cli.main", "refactor", str(ROOT / "examples/tiny-moe")]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=1800)


def report(given: argparse.Namespace, rows: list[Row]) -> dict[str, Any]:
    cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x)
    reused = " --artifact DIR" if given.artifact else ""
    return {
        "command": f"python bench/step_time.py --rounds {given.rounds}{reused}",
        "date": time.strftime("%Y-%m-%d"),
        "model": "examples/tiny-moe",
        "cpu": cpu.split(":", 1)[1].strip(),
        "clock": "thread CPU time, one thread, best of the rounds",
        "kernel": choose(torch.device("cpu"), torch.float32, 256, 32).name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": [asdict(row) for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--artifact", type=Path, help="made from examples/tiny-moe when not given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/step_time.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        artifact = given.artifact or Path(scratch) / "artifact"
        if given.artifact is None:
            refactor(artifact)
        tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
        text = tokenizer.encode("\n".join(pydoc_data.topics.topics.values())).ids
        print(f"{'dtype':9} {'step':34}" + "".join(f"{f'{x} ms':>9}" for x in LEVELS) + "  100/25")
        rows = [
            row
            for dtype in ("float32", "bfloat16")
            for row in measure(artifact, dtype, text, given.rounds)
        ]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report(given, rows), indent=1) + "\n")
    print(f"wrote {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
