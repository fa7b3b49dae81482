"""What is a refactoring worth? Quality at each share of the experts, beside everything else one
could do at the same share, and as decode batches are served.

    python -m bench.refactor [--model DIR] [--calibration FILE --validation FILE] [--tokens 102400]
        [--sub-experts 8] [--artifact DIR [--auto-artifact DIR]] [--families top-k,skipping,…]

Refactors the model (default examples/tiny-moe), or takes artifacts made before, and measures on
text that the calibration never saw: the validation file, or by default the held-out topics of
pydoc's help. All baselines run on the original model and are fitted on calibration text. Losses are
percent of perplexity, paired with the full model on the same tokens; ± is one standard error.
Writes bench/results/refactor.json and docs/quality-cost.png; exits with 1 when a mark is missed.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: neighbours keep their core
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from prism_refactor import text
from prism_refactor.job import refactor
from prism_refactor.machine import cores
from prism_refactor.measure import Subject, open_subject
from prism_refactor.options import CALIBRATION_TOKENS, MIN_CALIBRATION_TOKENS, Options
from prism_refactor.progress import Progress, log_view
from torch import Tensor

from bench.baselines import chosen, compared, cutting, marks
from bench.baselines.original import Original
from bench.baselines.plot import draw
from bench.baselines.results import OURS, Record
from bench.baselines.serving import serve
from bench.baselines.timing import StageClock

ROOT = Path(__file__).resolve().parent.parent
SCAN = tuple(range(100, 24, -3))  # 100, 97, … 25
LEVELS = tuple(sorted({*SCAN, 75, 50, 20, 15, 10}, reverse=True))
_SCANNED = tuple(level / 100 for level in SCAN)


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(cores())
    clock = StageClock()
    with tempfile.TemporaryDirectory() as scratch:
        record = _measured(arguments, Path(scratch), clock)
    record = replace(record, seconds=clock.seconds())
    print(f"\n{record.as_text()}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record.as_json(), indent=1) + "\n")
    draw(record, arguments.plot)
    return 1 if any(not mark.holds for mark in record.marks()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-moe")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--artifact", type=Path, help="made from --model with this calibration")
    parser.add_argument("--auto-artifact", type=Path, help="the same with --sub-experts auto")
    parser.add_argument("--tokens", type=int, default=102_400, help="to measure on, at most")
    parser.add_argument("--fit-tokens", type=int, default=CALIBRATION_TOKENS // 2)
    parser.add_argument("--sub-experts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default=",".join(chosen.FAMILIES), help="baselines to run")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "refactor.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "quality-cost.png")
    arguments = parser.parse_args()
    if arguments.calibration and not arguments.validation:
        parser.error("--calibration needs --validation: pydoc's topics may be in your text")
    arguments.families = [name for name in arguments.families.split(",") if name]
    unknown = set(arguments.families) - set(chosen.FAMILIES)
    if unknown:
        parser.error(f"--families: {', '.join(sorted(unknown))}: of {', '.join(chosen.FAMILIES)}")
    return arguments


def _measured(arguments: argparse.Namespace, scratch: Path, clock: StageClock) -> Record:
    artifact = arguments.artifact or _refactored(arguments, scratch, clock)
    validation = arguments.validation or _held_out(scratch)
    clock.begin("load")
    subject = open_subject(artifact, validation, tokens=arguments.tokens, dtype="float32")
    original = Original(arguments.model)
    ids = _calibration(arguments, original)
    _say(f"{subject.windows.tokens} tokens to measure on, {ids.numel()} to fit baselines on")
    n = {f"{OURS}, N = {subject.artifact.manifest.sub_experts}": subject}
    if arguments.auto_artifact:
        auto = open_subject(
            arguments.auto_artifact, validation, tokens=arguments.tokens, dtype="float32"
        )
        n[f"{OURS}, N auto ({auto.artifact.manifest.sub_experts})"] = auto
    clock.begin("fit baselines")
    setting = chosen.Setting(
        original, artifact, subject.artifact.manifest.sub_experts, ids, arguments.seed, cores()
    )
    baselines = chosen.entries(setting, arguments.families, lambda name: _say(f"fitting {name}"))
    clock.begin("measure")
    by_method = {
        name: [compared.of_level(which, name, level) for level in _levels(which, subject)]
        for name, which in n.items()
    }
    ours = [entry for entries in by_method.values() for entry in entries]
    loss, rows = compared.measure(
        original, subject.windows.ids, [*ours, *baselines], lambda share: _say(f"{share:.0%}")
    )
    clock.begin("measure as served")
    served = serve(subject, marks.served_targets(), _say)
    clock.begin("cut some experts")
    cut = cutting.look(original, ids, subject.artifact.manifest.sub_experts)
    scanned = [entry for entry in next(iter(by_method.values())) if entry.asked in _SCANNED]
    return Record(
        command=" ".join(["python -m bench.refactor", *sys.argv[1:]]),
        texts=_texts(arguments),
        tokens=subject.windows.tokens,
        perplexity=math.exp(loss),
        sub_experts={name: which.artifact.manifest.sub_experts for name, which in n.items()},
        rows=rows,
        scan=_SCANNED,
        steps=compared.steps(scanned),
        served=served,
        cut=cut,
    )


def _levels(which: Subject, default: Subject) -> tuple[int, ...]:
    """All for the default artifact; for another the shares that have marks."""
    return LEVELS if which is default else tuple(round(100 * share) for share in marks.SHARES)


def _refactored(arguments: argparse.Namespace, scratch: Path, clock: StageClock) -> Path:
    options = Options(
        str(arguments.model),
        scratch / "artifact",
        arguments.calibration,
        sub_experts=arguments.sub_experts,
        seed=arguments.seed,
    )
    clock.begin("refactor: read")
    refactor(options, lambda stages: Progress(stages, [log_view, clock.refactoring]))
    return options.out


def _held_out(scratch: Path) -> Path:
    _, evaluation = text.split(text.read_corpus(None))
    file = scratch / "held-out.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in evaluation))
    return file


def _calibration(arguments: argparse.Namespace, original: Original) -> Tensor:
    """ids [S, W] of the documents that the refactoring fits on too."""
    documents, _ = text.split(text.read_corpus(arguments.calibration))

    def encode(document: str) -> list[int]:
        ids: list[int] = original.tokenizer(document, add_special_tokens=False).input_ids
        return ids

    end = original.tokenizer.eos_token_id
    found = text.windows(documents, encode, end, arguments.fit_tokens, MIN_CALIBRATION_TOKENS)
    return found.ids[:, :-1]


def _texts(arguments: argparse.Namespace) -> dict[str, str]:
    calibration, validation = arguments.calibration, arguments.validation
    return {
        "model": arguments.model.name,
        "calibration": calibration.name if calibration else "pydoc topics",
        "validation": validation.name if validation else "held-out pydoc topics",
    }


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
