"""Operating points as a table for people."""

from collections.abc import Iterable

from prism.manifest import OperatingPoint

_HEADER = ("level", "own %", "active %", "perplexity", "loss %", "± (2 SE)", "KL", "top-1 %")


def points_table(points: Iterable[OperatingPoint]) -> str:
    """One line per operating point under a header, columns aligned right."""
    rows = [
        (
            str(p.level),
            f"{100 * p.own_share:.1f}",
            f"{100 * p.active_share:.1f}",
            f"{p.perplexity:.3f}",
            f"{p.quality_loss_percent:+.2f}",
            f"{2 * p.quality_loss_se:.2f}",
            f"{p.kl:.4f}",
            f"{100 * p.top1_agreement:.1f}",
        )
        for p in points
    ]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [_HEADER, *rows]
    )
