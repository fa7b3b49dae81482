"""What does a lower level cost in quality? Loss at each level beside lowering top-k at equal share.

python bench/quality.py [--model DIR] [--calibration FILE] [--validation FILE] [--tokens 16384]
[--sub-experts 8] [--seed 0] [--out bench/results/quality.json]

Refactors the model (default examples/tiny-moe) with the calibration text and measures on text that
the calibration never saw: the validation file, or by default the held-out topics of pydoc's help.
Top-k is lowered in the original model, weights of the kept experts as the model gives them. Losses
are paired with the full model on the same tokens; ± is one standard error. Exits with 1 when a mark
is missed.
"""

import argparse
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: neighbours keep their core

import torch
import transformers
from prism.artifact import OperatingPoint
from prism.loading import load_model
from prism_refactor import text
from prism_refactor.job import refactor
from prism_refactor.measure import measure
from prism_refactor.options import MIN_EVALUATION_TOKENS, Options
from prism_refactor.progress import Progress, log_view
from torch import Tensor
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parent.parent
LEVELS = (100, 90, 75, 60, 50, 40, 35, 25, 15, 10)
MARKS = {75: 0.3, 50: 1.2, 25: 6.0}  # percent of perplexity
SHARE_MARK = 0.015


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        options = Options(
            str(arguments.model),
            Path(scratch) / "artifact",
            arguments.calibration,
            sub_experts=arguments.sub_experts,
            seed=arguments.seed,
        )
        refactor(options, lambda stages: Progress(stages, [log_view]))
        seconds = time.monotonic() - started
        validation = arguments.validation or _held_out(Path(scratch))
        levels = measure(options.out, validation, LEVELS, tokens=arguments.tokens, dtype="float32")
        fewer = lowered_top_k(arguments.model, validation, arguments.tokens)
    _print(levels, fewer, seconds)
    missed = _missed(levels, fewer)
    for line in missed:
        print(f"missed: {line}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps(_record(arguments, levels, fewer, seconds, missed), indent=1) + "\n"
    )
    return 1 if missed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-moe")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--sub-experts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quality.json")
    arguments = parser.parse_args()
    if arguments.calibration and not arguments.validation:
        parser.error("--calibration needs --validation: pydoc's topics may be in your text")
    return arguments


def _held_out(scratch: Path) -> Path:
    _, evaluation = text.split(text.read_corpus(None))
    file = scratch / "held-out.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in evaluation))
    return file


def lowered_top_k(directory: Path, data: Path, tokens: int) -> list[dict[str, float]]:
    """share, loss and its standard error in percent for k = K-1 .. 1 on the same windows."""
    model, tokenizer = load_model(directory, torch.float32)
    windows = text.windows(
        text.read_corpus(data).documents,
        lambda document: tokenizer(document, add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
        tokens,
        MIN_EVALUATION_TOKENS,
    )
    gates = [module for module in model.modules() if isinstance(getattr(module, "top_k", 0), int)]
    gates = [gate for gate in gates if hasattr(gate, "top_k")]
    most = gates[0].top_k
    full = _losses(model, windows)
    found = []
    for k in range(most - 1, 0, -1):
        for gate in gates:
            gate.top_k = k
        difference = (_losses(model, windows) - full).double()
        mean = float(difference.mean())
        error = 100 * math.exp(mean) * float(difference.std()) / math.sqrt(len(difference))
        found.append({"k": k, "share": k / most, "loss": 100 * math.expm1(mean), "se": error})
    return found


def _losses(model: Any, windows: text.Windows) -> Tensor:
    losses = []
    with torch.inference_mode():
        for ids in windows.batches(16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
            losses.append(cross_entropy(logits, ids[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses)


def _print(levels: list[OperatingPoint], fewer: list[dict[str, float]], seconds: float) -> None:
    by_share = {round(100 * row["share"]): row for row in fewer}
    print(f"\nrefactored in {seconds:.1f} s; full perplexity {levels[0].perplexity:.3f}")
    print(f"{'level':>6}{'own %':>8}{'loss % ± SE':>18}{'top-k':>7}{'loss % ± SE':>18}")
    for point in levels:
        row = by_share.get(point.level)
        other = f"{row['k']:>7}{row['loss']:>+11.2f} ± {row['se']:.2f}" if row else ""
        print(
            f"{point.level:>6}{100 * point.own_share:>8.1f}"
            f"{point.quality_loss_percent:>+11.2f} ± {point.quality_loss_se:.2f}{other}"
        )


def _missed(levels: list[OperatingPoint], fewer: list[dict[str, float]]) -> list[str]:
    points = {point.level: point for point in levels}
    missed = []
    for level, mark in MARKS.items():
        point = points[level]
        if point.quality_loss_percent > mark:
            missed.append(f"level {level} loses {point.quality_loss_percent:.2f} %, mark {mark} %")
        if abs(point.own_share - level / 100) > SHARE_MARK:
            missed.append(f"level {level} has an own share of {100 * point.own_share:.1f} %")
    for row in fewer:
        match = points.get(round(100 * row["share"]))
        if match and match.quality_loss_percent >= row["loss"] / 2:
            missed.append(f"level {match.level} loses half as much as top-{row['k']:.0f} or more")
    for high, low in itertools.pairwise(levels):
        slack = 2 * math.hypot(high.quality_loss_se, low.quality_loss_se)
        if low.quality_loss_percent < high.quality_loss_percent - slack:
            missed.append(f"level {low.level} loses less than {high.level}")
    return missed


def _record(
    arguments: argparse.Namespace,
    levels: list[OperatingPoint],
    fewer: list[dict[str, float]],
    seconds: float,
    missed: list[str],
) -> dict[str, object]:
    return {
        "command": " ".join(["python bench/quality.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "model": arguments.model.name,
        "calibration": arguments.calibration.name if arguments.calibration else "pydoc topics",
        "validation": arguments.validation.name if arguments.validation else "held-out topics",
        "tokens": arguments.tokens,
        "sub_experts": arguments.sub_experts,
        "seed": arguments.seed,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "refactor_seconds": round(seconds, 1),
        "levels": [asdict(point) for point in levels],
        "lowered_top_k": fewer,
        "marks_missed": missed,
    }


if __name__ == "__main__":
    sys.exit(main())
