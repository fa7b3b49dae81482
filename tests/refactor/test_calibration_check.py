"""Calibration text that a person should think about again."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prism.artifact import Artifact, Manifest, open_artifact
from prism_refactor import outcome
from prism_refactor.calibration_check import FAR_BITS, distance_bits, warnings
from prism_refactor.job import refactor
from prism_refactor.options import CALIBRATION_TOKENS, Options
from prism_refactor.progress import Progress
from prism_refactor.text import pydoc_topics


def test_distance_is_nothing_from_itself_and_one_bit_from_what_shares_no_token() -> None:
    ids = torch.randint(0, 50, (4000,), generator=torch.Generator().manual_seed(0))
    assert distance_bits(ids, ids) == pytest.approx(0.0, abs=1e-9)
    assert distance_bits(ids, ids + 50) == pytest.approx(1.0, abs=1e-9)


def test_distance_of_two_known_distributions() -> None:
    """(1, 0) against (1/2, 1/2): the middle is (3/4, 1/4)."""
    one, other = torch.zeros(400, dtype=torch.int64), torch.arange(400) % 2
    expected = (torch.tensor(4 / 3).log2() + 0.5 * torch.tensor(2 / 3).log2() + 0.5) / 2
    assert distance_bits(one, other) == pytest.approx(float(expected), abs=1e-3)


def _words(documents: list[str]) -> torch.Tensor:
    """Hashed words: a vocabulary large enough for the measure to mean something."""
    words = [word for document in documents for word in document.split()]
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(w, len(numbers)) for w in words])


def test_other_topics_of_the_default_text_are_near_and_noise_is_far() -> None:
    topics = list(pydoc_topics().documents)
    rng = random.Random(0)
    noise = [" ".join(str(rng.randrange(10**6)) for _ in range(20_000))]
    half = len(topics) // 2
    ids = _words(topics[:half] + topics[half:] + noise)
    first = sum(len(topic.split()) for topic in topics[:half])
    second = sum(len(topic.split()) for topic in topics)
    assert distance_bits(ids[:first], ids[first:second]) < FAR_BITS
    assert distance_bits(ids[second:], ids[:second]) > FAR_BITS


@pytest.mark.parametrize(
    ("tokens", "experts", "distance", "words"),
    [
        (CALIBRATION_TOKENS, 64, None, []),
        (CALIBRATION_TOKENS, 64, FAR_BITS, []),
        (CALIBRATION_TOKENS - 256, 64, None, ["where the default is"]),
        (8192, 256, None, ["give an expert 256 on average"]),
        (CALIBRATION_TOKENS, 64, FAR_BITS + 0.01, ["far from the default's"]),
        (8192, 256, 0.9, ["give an expert 256", "differ by 0.90 bits"]),
    ],
)
def test_what_is_said(tokens: int, experts: int, distance: float | None, words: list[str]) -> None:
    found = warnings(tokens, 8, experts, distance)
    assert len(found) == len(words)
    for sentence, expected in zip(found, words, strict=True):
        assert expected in sentence


def test_a_manifest_from_before_the_warnings_is_still_read(artifact: Artifact) -> None:
    raw = json.loads(artifact.manifest.to_json())
    del raw["calibration"]["warnings"]
    assert Manifest.from_json(json.dumps(raw)).calibration.warnings == ()


def test_odd_text_is_told_in_log_manifest_message_and_report(
    make_options: Callable[..., Options],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(1)
    numbers = "".join(
        json.dumps({"text": " ".join(str(rng.randrange(10**9)) for _ in range(60))}) + "\n"
        for _ in range(24)
    )
    text = tmp_path / "numbers.jsonl"
    text.write_text(numbers)
    with caplog.at_level("WARNING"):
        found = refactor(
            make_options(tmp_path / "artifact", calibration=text),
            lambda stages: Progress(stages, []),
        )
    assert found is not None
    told = open_artifact(found.path).manifest.calibration.warnings
    assert [word in one for word, one in zip(("short", "far"), told, strict=True)] == [True, True]
    assert [
        record.getMessage() for record in caplog.records if record.name.endswith("reading")
    ] == [*told]
    assert outcome.success(found, 1.0)["warnings"] == list(told)
    page = (found.path / "prism" / "report.html").read_text()
    assert page.count('<p class="warning">') == 2
