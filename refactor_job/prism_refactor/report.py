"""``prism/report.html``: one self-contained page of what was measured, for the person who decides
the lowest level they accept.

Knows the order of sections and the words between them. The decision worth arguing about: the page
answers first (lowest level within a bound on the loss) and shows the evidence below, because most
readers come with one question. It may differ between runs that make the same artifact: it carries
times and memory, which must not enter the manifest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from prism.artifact import Artifact

from prism_refactor import report_quality as quality
from prism_refactor import report_record as record
from prism_refactor import report_served
from prism_refactor.evaluation_pass import Measured
from prism_refactor.findings import ERROR_TOKENS, LayerFindings
from prism_refactor.options import Options
from prism_refactor.reading import Text
from prism_refactor.report_style import STYLE
from prism_refactor.stage_costs import StageCost


@dataclass(frozen=True, slots=True)
class Material:
    """All that the page is made from."""

    artifact: Artifact
    measured: Measured
    layers: Sequence[LayerFindings]
    costs: Sequence[StageCost]
    text: Text
    options: Options
    machine: Sequence[tuple[str, str]]


def render(material: Material) -> str:
    """The page as HTML."""
    manifest, measured = material.artifact.manifest, material.measured
    name = manifest.source.uri.rstrip("/").rsplit("/", 1)[-1]
    warnings = "".join(
        f'<p class="warning">{escape(warning)}</p>' for warning in manifest.calibration.warnings
    )
    sections = "".join(
        f"<section><h2>{title}</h2>{f'<p class=note>{note}</p>' if note else ''}{body}</section>"
        for title, note, body in _sections(material)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Prism report: {escape(name)}</title><style>{STYLE}</style></head><body>
<h1>{escape(name)}</h1>
<p class="note">{escape(manifest.architecture)}: {len(manifest.layers)} MoE layers of
{manifest.num_experts} experts, {manifest.experts_per_token} for each token, every expert cut into
{manifest.sub_experts} sub-experts. Loss is the increase of perplexity over level 100 on
{material.text.evaluation.tokens} tokens that the calibration never saw.</p>
{warnings}{quality.cards(measured.points, manifest.batch_curves)}
{sections}</body></html>
"""


def _sections(m: Material) -> list[tuple[str, str, str]]:
    """(title, a sentence or two, body) in the order of the page."""
    manifest, measured = m.artifact.manifest, m.measured
    return [
        (
            "Quality and cost",
            "Lower and further left is better. Bars are two standard errors each way, from paired "
            "differences on the same tokens. The dashed line is what the model loses by using "
            "fewer of its experts, weighed by its own router: what one could do without Prism. "
            "What lies below the scale is drawn on its floor.",
            quality.plot(measured.points, measured.top_k),
        ),
        (
            "Operating points",
            "Own: what a token selects for itself; active: with sub-routers and means. ± is two "
            "standard errors.",
            quality.table(measured.points, measured.top_k),
        ),
        (
            "As served in decode batches",
            "A batch reads the union of what its tokens select. Riding along, each token also "
            "computes what its neighbours make the batch read anyway: more compute, the same "
            "weights, less loss than above. The table is measured on the text of the operating "
            "points, whole conversations at their level; the curves are counted on calibration "
            "text (where it has fewer sequences than a batch, the last size that fits is "
            "repeated). Overheads are included.",
            report_served.losses(measured.points, manifest.batch_curves)
            + report_served.shares(manifest.batch_curves),
        ),
        (
            "Layer by layer",
            "Left: how far the reduced experts' output is from that of whole experts on the same "
            f"input, as squared error over squared length, on up to {ERROR_TOKENS} tokens. It says "
            "where a level hurts, not how much in the end. Right: kept mass of the partition, on "
            "held-out text: the higher, the fewer sub-experts do most of the work.",
            quality.by_layer(m.layers, manifest.sub_experts),
        ),
        ("Use of experts and sub-experts", "", record.usage(m.layers)),
        (
            "Time and memory",
            "Of all runs that worked at this artifact, shards added up. Anonymous memory is what "
            "cannot be given back; resident includes mapped files. Sampled five times a second.",
            record.costs(m.costs),
        ),
        ("Calibration text", "", record.calibration(m.text, manifest, m.layers)),
        (
            "How to make it again",
            "The same inputs give the same artifact on one type of machine; this page may differ.",
            record.reproduce(manifest, m.artifact.digest, m.options, m.machine),
        ),
    ]
