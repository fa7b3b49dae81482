"""What is a refactoring worth? Quality at each share of the experts, beside everything else one
could do at the same share, and as decode batches are served.

    python -m bench.refactor [--model DIR] [--calibration FILE --validation FILE] [--tokens 102400]
        [--artifact DIR [--auto-artifact DIR]] [--families top-k,skipping,…] [--alone]

Refactors the model (default examples/tiny-moe) with 8 sub-experts and with as many as the Job
chooses, or takes artifacts made before, and measures on text that the calibration never saw: the
validation file, or by default the held-out topics of pydoc's help. All baselines run on the
original model and are fitted on calibration text. Losses are percent of perplexity, paired with the
full model on the same tokens; ± is one standard error. Writes bench/results/refactor.json and
docs/quality-cost.png; exits with 1 when a mark is missed or could not be judged.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: neighbours keep their core
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from prism_refactor import text
from prism_refactor.job import refactor
from prism_refactor.machine import cores
from prism_refactor.measure import Subject, open_subject
from prism_refactor.options import (
    CALIBRATION_TOKENS,
    MIN_CALIBRATION_TOKENS,
    MIN_EVALUATION_TOKENS,
    Options,
)
from prism_refactor.progress import Progress, Stage, View, log_view
from torch import Tensor

from bench.baselines import chosen, compared, cutting, marks
from bench.baselines.compared import Entry
from bench.baselines.original import Original
from bench.baselines.plot import draw
from bench.baselines.results import AUTO, OURS, Record
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
    return 0 if record.holds else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-moe")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--artifact", type=Path, help="made from --model with this calibration")
    parser.add_argument("--auto-artifact", type=Path, help="the same with --sub-experts auto")
    parser.add_argument("--tokens", type=int, default=102_400, help="to measure on, at most")
    parser.add_argument("--fit-tokens", type=int, default=CALIBRATION_TOKENS // 2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default=",".join(chosen.FAMILIES), help="baselines to run")
    parser.add_argument("--alone", action="store_true", help="without the part as served")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "refactor.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "quality-cost.png")
    arguments = parser.parse_args()
    if arguments.calibration and not arguments.validation:
        parser.error("--calibration needs --validation: pydoc's topics may be in your text")
    for flag, least in (("tokens", MIN_EVALUATION_TOKENS), ("fit_tokens", MIN_CALIBRATION_TOKENS)):
        if (given := getattr(arguments, flag)) < least:
            parser.error(f"--{flag.replace('_', '-')}: {given} is fewer than the {least} it takes")
    arguments.families = [name for name in arguments.families.split(",") if name]
    unknown = set(arguments.families) - set(chosen.FAMILIES)
    if unknown:
        parser.error(f"--families: {', '.join(sorted(unknown))}: of {', '.join(chosen.FAMILIES)}")
    return arguments


def _measured(arguments: argparse.Namespace, scratch: Path, clock: StageClock) -> Record:
    artifacts = _artifacts(arguments, scratch, clock)
    validation = arguments.validation or _held_out(scratch)
    clock.begin("load")
    subjects = [
        open_subject(path, validation, tokens=arguments.tokens, dtype="float32")
        for path in artifacts
    ]
    subject, n = subjects[0], subjects[0].artifact.manifest.sub_experts
    original = Original(arguments.model)
    ids = _calibration(arguments, original)
    _say(f"{subject.windows.tokens} tokens to measure on, {ids.numel()} to fit baselines on")
    clock.begin("fit baselines")
    setting = chosen.Setting(original, artifacts[0], n, ids, arguments.seed, cores())
    baselines = chosen.entries(setting, arguments.families, lambda name: _say(f"fitting {name}"))
    clock.begin("measure")
    ours = [compared.of_level(subject, f"{OURS}, N = {n}", level) for level in LEVELS]
    auto = [entry for other in subjects[1:] for entry in _auto(other)]
    loss, rows = compared.measure(
        original,
        subject.windows.ids,
        [*ours, *auto, *baselines],
        lambda share: _say(f"{share:.0%}"),
    )
    clock.begin("measure as served")
    served = [] if arguments.alone else serve(subject, marks.served_targets(), _say)
    clock.begin("cut some experts")
    cut = cutting.look(original, ids, n)
    return Record(
        command=" ".join(["python -m bench.refactor", *sys.argv[1:]]),
        texts=_texts(arguments),
        tokens=subject.windows.tokens,
        perplexity=math.exp(loss),
        sub_experts=[which.artifact.manifest.sub_experts for which in subjects],
        rows=rows,
        scan=_SCANNED,
        steps=compared.steps([entry for entry in ours if entry.asked in _SCANNED]),
        served=served,
        cut=cut,
    )


def _auto(subject: Subject) -> list[Entry]:
    """The artifact whose N was chosen, at the shares that have marks."""
    name = f"{AUTO} ({subject.artifact.manifest.sub_experts})"
    return [compared.of_level(subject, name, round(100 * share)) for share in marks.SHARES]


def _artifacts(arguments: argparse.Namespace, scratch: Path, clock: StageClock) -> list[Path]:
    """The default one, and the one whose N was chosen where there is one."""
    if arguments.artifact:
        return [path for path in (arguments.artifact, arguments.auto_artifact) if path]
    found = []
    for name, sub_experts in (("N = 8", 8), ("N auto", None)):
        options = Options(
            str(arguments.model),
            scratch / name.replace(" ", ""),
            arguments.calibration,
            sub_experts=sub_experts,
            seed=arguments.seed,
        )
        views: list[View] = [log_view, clock.refactoring(f"refactor, {name}")]
        refactor(options, partial(_progress, views))
        found.append(options.out)
    return found


def _progress(views: list[View], stages: list[Stage]) -> Progress:
    return Progress(stages, views)


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
