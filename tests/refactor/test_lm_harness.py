"""lm-eval on an artifact: what the harness is told is what the model says, and tasks are files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prism.loading import load_model
from prism_refactor.errors import RefactorError

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

from prism_refactor.lm_harness import ArtifactLM, run_tasks

CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PERPLEXITY = """
task: whole_texts
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
GENERATION = """
task: goes_on
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [" "], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, content in (("a", CHOICE), ("b", PERPLEXITY), ("c", GENERATION)):
        (folder / f"{name}.yaml").write_text(content)
    rows = [
        {"question": f"abc {letter}", "choices": ["ab", "ba", "ji"], "answer": number % 3}
        for number, letter in enumerate("abcdefgh")
    ]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": "abc def ghi " * n} for n in (3, 9, 60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


@pytest.fixture(scope="module")
def stock(artifact: Any) -> Any:
    return load_model(artifact.path, torch.float32)


def test_all_kinds_of_tasks_run_at_every_level(
    artifact: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    results = run_tasks(artifact.path, tasks, (100, 10), dtype="float32")
    found = {(r.level, r.task): r for r in results}
    assert {task for _, task in found} == {"letters", "whole_texts", "goes_on"}
    assert found[100, "letters"].samples == 8
    assert found[100, "letters"].se is not None
    high, low = found[100, "whole_texts"].value, found[10, "whole_texts"].value
    assert high != low
    assert 1 < high < 1000


def test_scores_are_the_models_own(stock: Any) -> None:
    model, tokenizer = stock
    lm = ArtifactLM(model, tokenizer, 100)
    pairs = [("abc", " de"), ("a longer context than that", "f"), ("", "gh")]
    found = lm.loglikelihood([_Request(pair) for pair in pairs], disable_tqdm=True)
    for (context, more), (score, greedy) in zip(pairs, found, strict=True):
        before = lm.tok_encode(context) or [lm.eot_token_id]
        ids = torch.tensor([before + lm.tok_encode(more)])
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
        target = ids[0, len(before) :]
        rows = logits[len(before) - 1 : -1]
        assert score == pytest.approx(float(rows.gather(1, target[:, None]).sum()), abs=1e-4)
        assert greedy == bool((rows.argmax(-1) == target).all())


def test_texts_longer_than_the_model_takes_are_cut_into_windows(stock: Any) -> None:
    lm = ArtifactLM(*stock, 100)
    text = "abc def " * 20
    whole = lm.loglikelihood_rolling([_Request((text,))])[0]
    lm.max_length = 64
    cut = lm.loglikelihood_rolling([_Request((text,))])[0]
    assert cut != whole
    assert cut == pytest.approx(whole, rel=0.2)


def test_generation_ends_before_the_stop_string(stock: Any) -> None:
    lm = ArtifactLM(*stock, 100)
    asked = {"max_gen_toks": 12}
    free = lm.generate_until([_Request(("abc", asked))])[0]
    assert 0 < len(free) <= 12  # a byte each, and some bytes are no characters
    stop = next(letter for letter in free[1:] if letter.isascii())
    ended = lm.generate_until([_Request(("abc", {**asked, "until": [stop]}))])[0]
    assert ended == free[: free.find(stop)]


def test_what_is_no_task_is_refused(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(RefactorError, match="No task file"):
        run_tasks(artifact.path, tmp_path / "none.yaml", (100,), dtype="float32")
    bad = tmp_path / "bad.yaml"
    bad.write_text("output_type: multiple_choice\n")
    with pytest.raises(RefactorError, match="lm-eval cannot run it"):
        run_tasks(artifact.path, bad, (100,), dtype="float32")


class _Request:
    """What lm-eval wraps its arguments in."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
