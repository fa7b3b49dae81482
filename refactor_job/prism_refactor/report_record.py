"""The report's half about the work: usage, time and memory, the text, how to do it again.

Knows what the Job recorded. The decision worth arguing about: the command is the whole command, not
a hint, with the source's revision and all digests beside it; a result nobody can make again is a
claim.
"""

import shlex
from collections.abc import Sequence
from html import escape
from typing import Final

from prism.artifact import Manifest

from prism_refactor.calibration_check import FAR_BITS, TOKENS_PER_EXPERT
from prism_refactor.findings import USAGE_LEVEL, LayerFindings
from prism_refactor.options import Options
from prism_refactor.reading import Text
from prism_refactor.report_charts import SHADES, heat_map
from prism_refactor.stage_costs import StageCost

_MOST_CELLS: Final = 60_000


def usage(layers: Sequence[LayerFindings]) -> str:
    """A heat map per layer: experts from left to right, sub-experts from top to bottom."""
    cells = layers[0].selected.numel() * len(layers)
    step = max(1, -(-cells // _MOST_CELLS))
    shown = range(0, len(layers), step)
    left_out = "" if step == 1 else f" One layer in {step} is shown."
    key = "".join(f'<i class="s{shade}"></i>' for shade in range(SHADES))
    maps = "".join(_layer_map(number, layers[number]) for number in shown)
    return (
        f'<p class="note">Columns are experts, rows sub-experts: the share of an expert\'s tokens '
        f"that select the sub-expert at level {USAGE_LEVEL}, from none "
        f'<span class="key">{key}</span> to all. The line above: how often the expert itself is '
        "chosen, dark at twice the mean or more. One dark row and pale ones below is what a good "
        f"cut looks like; an even shade saves nothing.{left_out}</p>"
        f'<div class="maps">{maps}</div>'
    )


def _layer_map(number: int, layer: LayerFindings) -> str:
    experts, n = layer.selected.shape
    mean = float(layer.routed.mean())
    often = [[float(v) / (2 * mean) for v in layer.routed]]
    rows = layer.selected.t().tolist()
    unused = int((layer.routed == 0).sum())
    words = f"; {unused} of {experts} experts unused" if unused else ""
    width = 320 / experts
    return (
        f"<figure>{heat_map(f'Use of experts, layer {number}', often, (width, 9))}"
        f"{heat_map(f'Use of sub-experts, layer {number}', rows, (width, 100 / n))}"
        f"<figcaption>layer {number}{words}</figcaption></figure>"
    )


def costs(found: Sequence[StageCost]) -> str:
    """Seconds and memory per stage, interrupted runs included."""
    total = sum(cost.seconds for cost in found) or 1.0
    longest = max((cost.seconds for cost in found), default=1.0) or 1.0
    rows = "".join(
        f"<tr><td>{escape(cost.name)}{f' ({cost.shards} shards)' if cost.shards > 1 else ''}</td>"
        f"<td>{cost.seconds:.1f}</td><td>{100 * cost.seconds / total:.0f} %</td>"
        f'<td class="bar"><i style="width:{100 * cost.seconds / longest:.1f}%"></i></td>'
        f"<td>{_bytes(cost.anonymous_bytes)}</td><td>{_bytes(cost.resident_bytes)}</td></tr>"
        for cost in found
    )
    return (
        '<div class="wide"><table><thead><tr><th>stage</th><th>seconds</th><th>share</th><th></th>'
        "<th>peak memory, anonymous</th><th>peak memory, resident</th></tr></thead>"
        f"<tbody>{rows}<tr><td>all</td><td>{total:.1f}</td><td></td><td></td><td></td><td></td>"
        "</tr></tbody></table></div>"
    )


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count else "not known"


def calibration(text: Text, manifest: Manifest, layers: Sequence[LayerFindings]) -> str:
    """What was read, how much of it, and how it compares with the default."""
    tokens, experts = manifest.calibration.tokens, manifest.num_experts
    each = tokens * manifest.experts_per_token / experts
    rarest = min(float(layer.routed.min()) for layer in layers)
    poor = sum(int((layer.routed * tokens < TOKENS_PER_EXPERT).sum()) for layer in layers)
    distance = "it is the default text"
    if text.distance_bits is not None:
        distance = (
            f"{text.distance_bits:.2f} bits (Jensen-Shannon divergence of token frequencies; "
            f"0 is the same, 1 has nothing in common, warned about above {FAR_BITS:.2f})"
        )
    return facts(
        [
            ("text", f"{manifest.calibration.name}, {text.documents} documents"),
            ("digest", manifest.calibration.digest),
            ("calibrated on", f"{tokens} tokens"),
            ("measured on", f"{text.evaluation.tokens} others, split by document"),
            (
                "tokens per expert",
                f"{each:.0f} on average, about {rarest * tokens:.0f} for the rarest; {poor} of "
                f"{experts * len(layers)} experts see fewer than {TOKENS_PER_EXPERT}",
            ),
            ("distance from the default", distance),
            (
                "new tokens",
                f"{100 * text.unseen_share:.1f} % of the tokens measured on do not occur in what "
                "was calibrated on",
            ),
        ]
    )


def command(manifest: Manifest, options: Options) -> str:
    """The command that makes this artifact again, as for a shell."""
    words = ["prism", "refactor", options.source, "--out", str(options.out)]
    if options.calibration is not None:
        words += ["--calibration", str(options.calibration)]
    words += ["--sub-experts", str(options.sub_experts or "auto")]
    words += ["--seed", str(options.seed), "--tokens", str(options.tokens)]
    if options.source_uri is not None:
        words += ["--source-uri", manifest.source.uri]
    return shlex.join(words)


def reproduce(
    manifest: Manifest, digest: str, options: Options, machine: Sequence[tuple[str, str]]
) -> str:
    """The command, what it ran on, and every digest."""
    files = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{sha}</code></td></tr>"
        for name, sha in sorted(manifest.source.files.items())
    )
    rows = [
        ("artifact", digest),
        ("source", manifest.source.uri),
        ("revision", manifest.source.revision or "none recorded"),
        ("calibrated levels", ", ".join(str(knot.level) for knot in manifest.knots)),
        *((name.replace("_", " "), value) for name, value in sorted(manifest.methods.items())),
        *machine,
    ]
    return (
        f"<pre>{escape(command(manifest, options))}</pre>{facts(rows)}"
        f"<details><summary>sha256 of {len(manifest.source.files)} source files</summary>"
        f'<table class="facts">{files}</table></details>'
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values as a table."""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f'<table class="facts">{body}</table>'
