"""The report: what a person reads off it is what was measured."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from prism.artifact import Artifact, OperatingPoint
from prism_refactor import report_quality as quality
from prism_refactor.findings import LayerFindings
from prism_refactor.options import Options
from prism_refactor.report_charts import Chart, Line, Scale, decades, heat_map, percent_ticks
from prism_refactor.report_record import command, costs, usage
from prism_refactor.stage_costs import StageCost


def point(level: int, loss: float, se: float = 0.05, share: float | None = None) -> OperatingPoint:
    own = level / 100 if share is None else share
    return OperatingPoint(level, own, own, 10.0, loss, se, 0.01, 0.001, 0.9, 0.01)


POINTS = [point(100, 0, 0), point(75, 0.1), point(50, 0.45), point(25, 2.0), point(10, 9.0, 0.3)]


class Page(HTMLParser):
    """Tags, attributes and words of a page; a tag that is never closed is found out."""

    VOID = ("meta", "br", "hr", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def html(artifact: Artifact) -> str:
    return (artifact.path / "prism" / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_page_is_well_formed_and_fetches_nothing(page: Page, html: str) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "image", "use"}
    for tag, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "srcset"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert not re.search(r"\b(nan|inf)\b", html)


@pytest.mark.parametrize(
    "heading",
    [
        *("Quality and cost", "Operating points", "As served in decode batches"),
        *("Layer by layer", "Use of experts and sub-experts", "Time and memory"),
        *("Calibration text", "How to make it again"),
    ],
)
def test_every_section_is_there(page: Page, heading: str) -> None:
    assert heading in page.words


def test_page_shows_what_the_manifest_says(artifact: Artifact, page: Page, html: str) -> None:
    words = " ".join(page.words)
    for measured in artifact.manifest.operating_points:
        assert f"<td>{measured.level}</td>" in html
        assert f"{measured.quality_loss_percent:+.2f} ± {2 * measured.quality_loss_se:.2f}" in words
    assert artifact.digest in words
    assert artifact.manifest.calibration.digest in words
    for sha in artifact.manifest.source.files.values():
        assert sha in words
    for stage in ("partition", "knots", "write", "evaluate"):
        assert stage in page.words
    assert "top-1" in page.words  # two experts per token: one baseline


def test_times_and_memory_stay_out_of_the_manifest(artifact: Artifact) -> None:
    text = (artifact.path / "prism" / "prism.json").read_text()
    assert "seconds" not in text
    assert "memory" not in text


@pytest.mark.parametrize(
    ("bound", "level"), [(0.5, 75), (0.55, 50), (1.0, 50), (2.1, 25), (9.5, 25), (9.6, 10)]
)
def test_a_bound_is_met_with_two_standard_errors_to_spare(bound: float, level: int) -> None:
    found = quality.lowest_within(POINTS, bound)
    assert found is not None
    assert found.level == level


def test_a_level_below_one_that_fails_is_not_recommended() -> None:
    dip = [point(100, 0, 0), point(75, 3.0), point(50, 0.4)]
    found = quality.lowest_within(dip, 1.0)
    assert found is not None
    assert found.level == 100
    assert "none" in quality.cards(dip, {})


def test_bytes_of_a_level_lie_between_those_of_its_neighbours() -> None:
    curves = {
        str(level): {"batch": [1.0, 8.0], "ride_along_bytes_share": [0.0, share]}
        for level, share in ((50, 0.6), (35, 0.3))
    }
    assert quality.bytes_share(curves, 40, 8.0) == pytest.approx(0.4)
    assert quality.bytes_share(curves, 50, 8.0) == pytest.approx(0.6)
    assert quality.bytes_share(curves, 25, 8.0) is None


def test_baselines_are_compared_at_equal_cost() -> None:
    """At 60 % active the levels lose 0.1 + (0.45 - 0.1) * 15 / 25 = 0.31 %."""
    words = quality.comparison(POINTS, {3: point(100, 3.1, 0.2, share=0.6)})
    assert "top-3 loses 3.10 %, a level of its cost 0.31 %, 10 times less" in words.replace(
        "\u00a0", " "
    )
    noise = {3: point(100, 0.1, 0.2, share=0.6)}
    assert quality.comparison(POINTS, noise) == ""


@pytest.mark.parametrize("losses", [(0.0, 0.0), (-0.4, -0.2), (1e-7, 900.0), (0.05, 0.06)])
def test_plot_of_any_losses_stays_inside_its_frame(losses: tuple[float, float]) -> None:
    found = [point(100, 0, 0), point(50, losses[0]), point(10, losses[1], 400.0)]
    drawing = quality.plot(found, {1: point(100, losses[1], share=0.25)})
    root = ElementTree.fromstring(f"<div>{drawing}</div>")
    circles = list(root.iter("circle"))
    assert len(circles) == 3
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= 720
        assert 0 <= float(circle.attrib["cy"]) <= 380


def test_a_line_is_drawn_where_its_values_are() -> None:
    x, y = Scale("x", (0.0, 10.0)), Scale("y", (0.1, 1.0, 10.0), log=True)
    chart = Chart("t & u", x, y, [Line("<one>", "a", [(5.0, 1.0), (10.0, 100.0)], [(0.1, 10.0)])])
    root = ElementTree.fromstring(chart.svg())
    first, second = list(root.iter("circle"))
    left, right, top, floor = 58, 720 - 24, 12, 380 - 46
    assert float(first.attrib["cx"]) == pytest.approx((left + right) / 2)
    assert float(first.attrib["cy"]) == pytest.approx((top + floor) / 2)
    assert float(second.attrib["cy"]) == pytest.approx(top)  # clamped to the end of the scale
    bar = next(element for element in root.iter("path"))
    assert bar.attrib["d"].startswith(f"M{(left + right) / 2:.1f} {floor:.1f}V{top:.1f}")
    assert "<one>" in "".join(root.itertext())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, (0, 2, 4, 6, 8, 10)),
        (84.0, 100.0, (80, 85, 90, 95, 100)),
        (0.0, 0.1, (0, 0.02, 0.04, 0.06, 0.08, 0.1)),
    ],
)
def test_ticks_are_round_and_cover_what_is_drawn(
    low: float, high: float, expected: tuple[float, ...]
) -> None:
    assert percent_ticks(low, high) == pytest.approx(expected)


def test_decades_cover_and_are_at_least_two() -> None:
    assert decades(0.02, 30.0) == pytest.approx((0.01, 0.1, 1.0, 10.0, 100.0))
    assert decades(1.0, 1.0) == pytest.approx((1.0, 10.0))


def test_heat_map_has_one_cell_per_value_and_dark_is_much() -> None:
    root = ElementTree.fromstring(heat_map("t", [[0.0, 1.0], [0.5, 2.0]], (4, 4)))
    cells = {path.attrib["class"]: path.attrib["d"] for path in root.iter("path")}
    assert cells == {
        "s0": "M0 0h1v1h-1z",
        "s7": "M1 0h1v1h-1zM1 1h1v1h-1z",
        "s4": "M0 1h1v1h-1z",
    }


def layer(experts: int = 4, n: int = 4) -> LayerFindings:
    shares = torch.full((experts,), 2 / experts)
    return LayerFindings(0.95, 0.85, {75: 0.0, 50: 0.1, 25: 0.4}, shares, torch.rand(experts, n))


def test_maps_of_a_large_model_are_thinned_and_the_page_says_so() -> None:
    assert usage([layer()] * 6).count("<figure>") == 6
    found = usage([layer(256, 32)] * 20)
    assert found.count("<figure>") == 7
    assert "Every 3th" not in found
    assert "One layer in 3 is shown" in found


def test_a_model_of_one_layer_has_a_page_too() -> None:
    ElementTree.fromstring(quality.by_layer([layer()], 4))


def test_cost_of_shards_is_named_and_unknown_memory_is_no_zero() -> None:
    found = costs([StageCost("cut", 60.0, 3, 2**30, 0), StageCost("knots", 20.0, 1, 2**29, 2**30)])
    assert "cut (3 shards)" in found
    assert "<td>1.00 GiB</td><td>not known</td>" in found
    assert "<td>75 %</td>" in found
    assert "<td>80.0</td>" in found


def test_command_can_be_pasted_into_a_shell(artifact: Artifact) -> None:
    options = Options("a model", Path("/tmp/out dir"), Path("it's.txt"), None, 7, 4096)
    manifest = replace(artifact.manifest, seed=7)
    assert command(manifest, options) == (
        "prism refactor 'a model' --out '/tmp/out dir' --calibration 'it'\"'\"'s.txt' "
        "--sub-experts auto --seed 7 --tokens 4096"
    )
