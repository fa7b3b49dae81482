"""`prism inspect`: what an artifact is and what it offers; `--verify` reads every byte."""

import argparse
import sys
from pathlib import Path

from prism.artifact import ArtifactError, open_artifact, verify
from prism.contract import ExitCode

from prism_cli.tables import points_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prism inspect`."""
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--verify", action="store_true", help="check all digests")


def run(arguments: argparse.Namespace) -> int:
    """Print facts and operating points; 3 when the directory is no whole artifact."""
    try:
        artifact = open_artifact(arguments.directory)
    except ArtifactError as error:
        print(f"prism inspect: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    m = artifact.manifest
    revision = f" @ {m.source.revision}" if m.source.revision else ""
    facts = {
        "artifact": str(artifact.path),
        "digest": artifact.digest,
        "source": f"{m.source.uri}{revision}",
        "architecture": m.architecture,
        "experts": f"{m.num_experts} per layer in {len(m.layers)} layers, "
        f"top-{m.experts_per_token}, {m.sub_experts} sub-experts each",
        "calibration": f"{m.calibration.name}, {m.calibration.tokens} tokens",
        "knots": ", ".join(str(knot.level) for knot in m.knots),
    }
    for name, value in facts.items():
        print(f"{name:<13} {value}")
    print(f"\n{points_table(m.operating_points)}")
    return _verified(artifact.path) if arguments.verify else ExitCode.OK


def _verified(path: Path) -> int:
    problems = verify(path)
    for problem in problems:
        print(f"prism inspect: {problem}", file=sys.stderr)
    if problems:
        return ExitCode.BAD_INPUT
    print("\nverified: every digest is as recorded")
    return ExitCode.OK
