"""The catalogue lists every experts class once, and docs/architectures.md says what it says."""

import argparse
import json
from pathlib import Path

import pytest
import transformers
from prism.architectures import catalogue as catalogues
from prism.architectures import examine, find_expert_modules
from prism.architectures.catalogue import Architecture, catalogue, causal_models, experts_classes
from prism.architectures.small import small_config
from prism_cli import architectures as command

PAGE = Path(__file__).parents[2] / "docs/architectures.md"


@pytest.fixture(scope="module")
def found() -> list[Architecture]:
    return sorted(catalogue(), key=lambda one: one.name.lower())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Architecture]:
    """Two entries, in the place of all."""
    entries = [
        Architecture("GptOssExperts", "gpt_oss", examine(small_config("gpt_oss"))),
        Architecture("ZayaExperts", "zaya", examine(small_config("zaya"))),
    ]
    monkeypatch.setattr(catalogues, "catalogue", lambda: entries)
    return entries


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(flags)) == 0
    return capsys.readouterr().out


def test_every_experts_class_is_listed_once(found: list[Architecture]) -> None:
    classes = [name for names in experts_classes().values() for name in names]
    assert len(classes) >= 65
    assert sorted(one.experts for one in found) == sorted(classes)


def test_most_are_refactorable_and_every_no_has_its_reason(found: list[Architecture]) -> None:
    causal = sum(len(models) for models in causal_models().values())
    refactorable = [one for one in found if one.refactorable]
    assert len(refactorable) >= causal - 5  # what is refused is five that share more than a stream
    assert all(one.examined.layers for one in refactorable)
    assert not any(one.servable for one in found if not one.refactorable)
    for one in found:
        assert one.servable or one.examined.serve_obstacle, one.name


def test_page_says_what_the_code_answers(found: list[Architecture]) -> None:
    page = command.markdown(found, transformers.__version__)
    assert PAGE.read_text(encoding="utf-8") == page, (
        "make it anew: prism architectures --markdown > docs/architectures.md"
    )


def test_json_has_both_states_and_reasons(
    few: list[Architecture], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = json.loads(run(capsys, "--json"))
    assert (first["refactorable"], first["servable"]) == (True, False)
    assert first["refactor_obstacle"] is None and "sinks" in first["serve_obstacle"]
    assert (second["refactorable"], second["servable"]) == (False, False)
    assert "return more than a hidden state" in second["refactor_obstacle"]


def test_table_has_a_line_for_each(
    few: list[Architecture], capsys: pytest.CaptureFixture[str]
) -> None:
    header, *lines = run(capsys).splitlines()
    assert header.split()[:2] == ["architecture", "model"]
    assert [line.split()[0] for line in lines] == [one.name for one in few]


@pytest.mark.parametrize("model_type", ["gemma4_text", "nemotron_h", "deepseek_v3"])
def test_small_configs_keep_the_class_and_shrink_it(model_type: str) -> None:
    import torch

    config = small_config(model_type)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    for _, experts in find_expert_modules(model):
        assert experts.down_proj.shape == (8, 64, 32)
