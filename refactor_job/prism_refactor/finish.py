"""What the stages left, put together: the manifest, the tensors beside it, the report.

Knows the schema of an artifact and the names of stage files. The decision worth arguing about: the
manifest is written twice, before and after evaluation, because what is evaluated is what lies on
disk; everything but the measured points is the same both times.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from prism import artifact as artifacts
from prism.artifact import (
    Artifact,
    Calibration,
    Knot,
    LayerTensors,
    Manifest,
    Source,
)
from prism.contract import PRISM_SUBFOLDER, REPORT_FILE
from prism.places import Block, block_templates

from prism_refactor import machine, report
from prism_refactor.evaluation_pass import Measured
from prism_refactor.findings import Findings
from prism_refactor.layers import LayerFiles
from prism_refactor.options import KNOTS, METHODS, Options
from prism_refactor.reading import Text
from prism_refactor.reduce import batch_curves
from prism_refactor.source import Checkpoint
from prism_refactor.stage_costs import kept_costs
from prism_refactor.store import PartialFolder, write_atomically

STAGES: Final = ("granularity", "partition", "knots", "write", "digests", "evaluate")


@dataclass(frozen=True, slots=True)
class Origin:
    """What an artifact was made from."""

    checkpoint: Checkpoint
    files: dict[str, str]  # sha256 of each
    calibration: Calibration


def manifest_of(
    origin: Origin,
    options: Options,
    layers: LayerFiles,
    places: Mapping[str, Block],
    digests: dict[str, str],
) -> Manifest:
    """The manifest of finished stages, without operating points."""
    checkpoint = origin.checkpoint
    config = checkpoint.config.get_text_config()
    numbers = range(len(checkpoint.layers))
    knots = [[layers.knot_of(level, number) for number in numbers] for level in KNOTS]
    first = layers.cut_of(0)
    experts, sub_experts = first.router_bias.shape
    return Manifest(
        schema_version=artifacts.SCHEMA_VERSION,
        source=Source(checkpoint.uri, checkpoint.revision, origin.files),
        architecture=(checkpoint.config.architectures or [type(config).__name__])[0],
        model_type=checkpoint.config.model_type,
        sub_experts=sub_experts,
        num_experts=experts,
        experts_per_token=checkpoint.experts_per_token,
        layers=checkpoint.layers,
        seed=options.seed,
        calibration=origin.calibration,
        knots=tuple(
            Knot(level, tuple(float(knot.log_theta) for knot in row))
            for level, row in zip(KNOTS, knots, strict=True)
        ),
        operating_points=(),
        batch_curves=batch_curves(knots, first.permutations.shape[1] // sub_experts),
        methods=METHODS
        | {
            "tokens_asked": str(options.tokens),
            "sub_experts_asked": str(options.sub_experts or "auto"),
        },
        block_digests=digests,
        block_tensors=block_templates(places, checkpoint.layers),
    )


def write_prism_folder(
    folder: PartialFolder,
    layers: LayerFiles,
    manifest: Manifest,
    measured: Measured | None = None,
) -> Artifact:
    """Write ``prism/`` of the artifact with what was measured, and open it."""
    if measured is not None:
        curves = {
            level: curve | measured.served.get(int(level), {})
            for level, curve in manifest.batch_curves.items()
        }
        manifest = replace(manifest, operating_points=measured.points, batch_curves=curves)
    tensors = []
    for number in range(len(manifest.layers)):
        cut = layers.cut_of(number)
        knots = [layers.knot_of(level, number) for level in KNOTS]
        tensors.append(
            LayerTensors(
                cut.router_weight,
                cut.router_bias,
                torch.stack([knot.means for knot in knots]),
                torch.stack([knot.scalars for knot in knots]),
                cut.usage,
            )
        )
    artifacts.write_prism_folder(folder.artifact, manifest, tensors)
    return artifacts.open_artifact(folder.artifact)


def write_report(
    folder: PartialFolder, artifact: Artifact, measured: Measured, text: Text, options: Options
) -> None:
    """Write the page beside the manifest, from what all stages have kept."""
    findings = Findings(folder)
    material = report.Material(
        artifact=artifact,
        measured=measured,
        layers=[findings.of(number) for number in range(len(artifact.manifest.layers))],
        costs=kept_costs(folder, STAGES),
        text=text,
        options=options,
        machine=machine.description(),
    )
    page = folder.artifact / PRISM_SUBFOLDER / REPORT_FILE
    write_atomically(page, report.render(material).encode())
