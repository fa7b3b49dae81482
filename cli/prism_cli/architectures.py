"""`prism architectures`: every MoE architecture of transformers, and what Prism can do with it."""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from prism.contract import ExitCode

if TYPE_CHECKING:  # it loads torch and every model class: only when the command runs
    from prism.architectures.catalogue import Architecture

_HEADER: Final = ("architecture", "model type", "refactored", "served", "why not")
_INTRODUCTION: Final = """# Architectures

<!-- Made by `prism architectures --markdown`; a test holds it equal to what the code answers. -->

Every class of experts behind transformers' experts interface (version {version}), and whether Prism
refactors and serves the model around it. Of {all} classes {refactored} are refactored, and {served}
of those served. What is refactored and not served can be measured (`prism eval`) and used with any
other program that reads Hugging Face checkpoints.

The answer is for the class's default configuration. A checkpoint's own is asked again before any
work, and may be told otherwise: one that turns on sliding-window attention is not served, one that
carries a `quantization_config` (FP8, AWQ, GPTQ, MXFP4, …) is not refactored; use the original
weights. A multimodal checkpoint counts as its text model where AutoModelForCausalLM builds that.
Models of other libraries, and code from the hub (`trust_remote_code`), are refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prism architectures`."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as a list of objects")
    form.add_argument("--markdown", action="store_true", help="as the page docs/architectures.md")


def run(arguments: argparse.Namespace) -> int:
    """Print the catalogue of the installed transformers."""
    import transformers
    from prism.architectures.catalogue import catalogue

    transformers.logging.set_verbosity_error()  # models tell which fast kernels they miss
    found = sorted(catalogue(), key=lambda one: one.name.lower())
    if arguments.json:
        print(json.dumps([_plain(one) for one in found], indent=1))
    elif arguments.markdown:
        print(markdown(found, transformers.__version__), end="")
    else:
        print(_table(found))
    return ExitCode.OK


def _plain(one: "Architecture") -> dict[str, object]:
    return {
        "architecture": one.name,
        "model_type": one.model_type,
        "experts": one.experts,
        "refactorable": one.refactorable,
        "servable": one.servable,
        "refactor_obstacle": one.examined.refactor_obstacle,
        "serve_obstacle": one.examined.serve_obstacle,
    }


def _cells(one: "Architecture") -> tuple[str, ...]:
    states = ("yes" if state else "no" for state in (one.refactorable, one.servable))
    return (one.name, one.model_type, *states, one.examined.serve_obstacle or "")


def _table(found: Iterable["Architecture"]) -> str:
    rows: list[Sequence[str]] = [_HEADER, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown(found: Sequence["Architecture"], version: str) -> str:
    """The page docs/architectures.md."""
    introduction = _INTRODUCTION.format(
        version=version,
        all=len(found),
        refactored=sum(one.refactorable for one in found),
        served=sum(one.servable for one in found),
    )
    lines = [_HEADER, ("---",) * len(_HEADER), *map(_cells, found)]
    return introduction + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
