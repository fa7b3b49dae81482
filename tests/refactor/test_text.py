"""Reading, splitting and cutting calibration text."""

import json
from pathlib import Path

import pytest
from prism_refactor import text
from prism_refactor.errors import Reason, RefactorError


def by_byte(document: str) -> list[int]:
    return list(document.encode())


def test_default_text_is_pydoc_and_splits_by_topic() -> None:
    corpus = text.read_corpus(None)
    calibration, evaluation = text.split(corpus)
    assert "pydoc" in corpus.name
    assert not set(calibration) & set(evaluation)
    assert set(calibration) | set(evaluation) == set(corpus.documents)
    held_out = sum(map(len, evaluation)) / sum(map(len, corpus.documents))
    assert 0.2 < held_out < 0.3


def test_split_does_not_depend_on_the_order_of_the_file() -> None:
    documents = tuple(f"document {i} " * (i + 1) for i in range(20))
    forwards = text.split(text.Corpus("a", documents))
    backwards = text.split(text.Corpus("a", documents[::-1]))
    assert forwards == backwards


def test_a_repeated_document_is_never_on_both_sides() -> None:
    documents = tuple(f"document {i % 7}" for i in range(70))
    calibration, evaluation = text.split(text.Corpus("a", documents))
    assert len(calibration) + len(evaluation) == 7
    assert not set(calibration) & set(evaluation)


def test_one_document_is_split_at_its_tail() -> None:
    calibration, evaluation = text.split(text.Corpus("a", ("abcdefgh",)))
    assert (calibration, evaluation) == (["abcdef"], ["gh"])


def test_digest_follows_the_text() -> None:
    assert text.Corpus("a", ("x",)).digest == text.Corpus("b", ("x",)).digest
    assert text.Corpus("a", ("x",)).digest != text.Corpus("a", ("y",)).digest
    assert text.Corpus("a", ("xy",)).digest != text.Corpus("a", ("x", "y")).digest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "a"}\n\n{"body": "b"}\n', 'line 3: no string under "text"'),
        ('"text"\n', "line 1: no string"),
        ('{"text": 5}\n', "line 1: no string"),
        ("x\n" * 9, "and 4 more"),
    ],
)
def test_malformed_json_lines_are_named_by_line(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(RefactorError, match=words) as caught:
        text.read_corpus(file)
    assert caught.value.reason is Reason.BAD_INPUT
    assert str(file) in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", b"", Reason.TOO_LITTLE_TEXT),
        ("blank.txt", b" \n ", Reason.TOO_LITTLE_TEXT),
        ("hollow.jsonl", b'{"text": "  "}\n', Reason.TOO_LITTLE_TEXT),
        ("latin.txt", b"caf\xe9", Reason.BAD_INPUT),
    ],
)
def test_text_that_is_no_text(tmp_path: Path, name: str, content: bytes, reason: Reason) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(RefactorError) as caught:
        text.read_corpus(file)
    assert caught.value.reason is reason


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RefactorError) as caught:
        text.read_corpus(tmp_path / "none.jsonl")
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND


def test_unicode_line_separators_do_not_split_a_json_line(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert text.read_corpus(file).documents == ("a\u2028b\x85c",)


def test_windows_overlap_by_one_target_and_cover_the_text() -> None:
    found = text.windows(["a" * 256, "b" * 300], by_byte, 7, tokens=10_000, minimum=256)
    assert found.ids.shape == (2, text.WINDOW + 1)
    assert found.tokens == 512
    assert found.ids[0, 256] == 7  # the separator after the first document
    assert found.ids[1, -1] == 7


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(RefactorError, match="gives 299 tokens where at least 2048") as caught:
        text.windows(["a" * 300], by_byte, None, tokens=4096, minimum=2048)
    assert caught.value.reason is Reason.TOO_LITTLE_TEXT
