"""The small decisions of the demo's path, without a cluster."""

import io
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from hack.demo import journey, prompts, site
from hack.demo.kube import TookTooLong, wait_until
from hack.demo.observe import condition, gauge, total
from hack.demo.record import Targets
from hack.demo.story import Story

PAGE = """# TYPE prism:level_ceiling_ratio gauge
prism:level_ceiling_ratio_total 7
prism:level_ceiling_ratio{model_name="m",prism_model="a/b"} 0.75
prism:level_seq 3
"""


def test_gauge_takes_the_series_of_exactly_this_name() -> None:
    assert gauge(PAGE, "prism:level_ceiling_ratio") == 0.75
    assert gauge(PAGE, "prism:level_seq") == 3
    assert gauge(PAGE, "prism:level") is None


def test_total_adds_the_series_of_exactly_this_name() -> None:
    page = 'writes_total{kind="Job"} 2.0\nwrites_total{kind="status"} 3.0\nwrites_total_x 9\n'
    assert total(page, "writes_total") == 5
    assert total(page, "reads_total") == 0


def test_condition_by_type() -> None:
    document = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    assert condition(document, "Ready")["status"] == "True"
    assert condition(document, "SLOMet") == {} == condition({}, "Ready")
    assert journey.is_ready(document) and not journey.is_ready({})


def test_helm_values_name_each_image_as_it_was_built() -> None:
    words = site.values(
        {
            "operator": "r.example:5000/a/prism-operator:1",
            "serving": "r.example:5000/a/prism-serving:2",
            "refactor": "r.example:5000/a/prism-refactor:12e4",
        }
    )
    assert "image.registry=r.example:5000/a" in words
    assert "image.serving.repository=prism-serving" in words
    # A tag of digits and an e would be a number to plain --set.
    assert words[words.index("image.refactor.tag=12e4") - 1] == "--set-string"


def test_targets_are_the_example_s() -> None:
    documents = yaml.safe_load_all(journey.EXAMPLE.read_text())
    model = next(d for d in documents if d["kind"] == "PrismModel")
    targets = journey.targets_of(model)
    assert isinstance(targets, Targets)
    assert targets.floor == model["spec"]["elasticity"]["minLevelPercent"] == 25
    assert model["metadata"]["name"] == journey.MODEL


def test_passages_are_long_enough_different_and_seeded() -> None:
    found = prompts.passages(20)
    tokenizer = Tokenizer.from_file(str(prompts.TOKENIZER))
    lengths = [len(tokenizer.encode(text).ids) for text in found]
    assert min(lengths) >= 400 and max(lengths) <= 440
    assert len(set(found)) == 20
    assert found == prompts.passages(20) != prompts.passages(20, seed=1)


def test_story_tells_elapsed_time_and_how_long_a_failed_step_took() -> None:
    clock = iter([0.0, 1.0, 1.0, 3.5, 3.5])
    out = io.StringIO()
    story = Story(out=out, clock=lambda: next(clock))
    with pytest.raises(ValueError), story.step("try"):
        raise ValueError
    assert out.getvalue() == "[   1.0 s] try\n[   3.5 s]   failed after 2.5 s\n"
    assert story.steps == {"try": 2.5}


def test_waiting_ends_with_what_was_waited_for() -> None:
    with pytest.raises(TookTooLong, match="no blue moon within 0 s"):
        wait_until(lambda: None, 0, "blue moon", every_s=0.01)


def test_examples_named_by_the_path_exist() -> None:
    assert journey.EXAMPLE.exists()
    assert (Path(site.ROOT) / "examples" / "prometheus" / "targets.yaml").exists()
