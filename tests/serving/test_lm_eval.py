"""lm-eval against the served API gives what it gives on the artifact in process, at any level."""

import json
from pathlib import Path

import pytest
import torch
from prism.artifact import open_artifact
from prism.experts import attach
from prism.loading import load_model

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from prism_refactor.lm_harness import ArtifactLM

TASK = """
task: goes_on
dataset_path: json
dataset_kwargs: {data_files: {test: goes_on.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["the"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    questions = ["The quick brown fox", "jumps over", "the lazy dog and the"]
    rows = [{"question": question, "answer": ""} for question in questions]
    (tmp_path / "goes_on.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "goes_on.yaml").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "goes_on.yaml")


@pytest.mark.parametrize("level", [100, 50])
def test_the_api_and_the_artifact_answer_alike(server, artifact, task: str, level: int) -> None:
    api = {
        "model": f"m@{level}",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(artifact),
        "tokenizer_backend": "huggingface",
    }
    model, tokenizer = load_model(artifact, torch.float32)
    attach(model, open_artifact(artifact))
    lm = ArtifactLM(model, tokenizer, level)
    answers = [_answers("local-completions", task, api), _answers(lm, task, None)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3
    assert any(answers[0])


def _answers(model, task: str, arguments: dict[str, str] | None) -> list[str]:
    given = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    found = simple_evaluate(model=model, model_args=arguments, tasks=[task], **given)
    samples = sorted(found["samples"]["goes_on"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]
