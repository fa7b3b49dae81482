"""Stop strings, templates, incremental decoding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prism_serving.gateway import text
from prism_serving.gateway.stops import StopFinder


def test_a_stop_string_split_over_pieces_is_found_and_not_sent():
    finder = StopFinder(["END"])
    assert [finder.feed(p) for p in ("abcE", "N", "Dxyz", "more")] == ["abc", "", "", ""]
    assert finder.found


def test_text_that_only_looked_like_a_stop_is_sent():
    finder = StopFinder(["END"])
    assert finder.feed("an EN") == "an "
    assert finder.feed("VY") == "ENVY"
    assert finder.feed("E") == "" and finder.flush() == "E"


def test_the_stop_that_is_complete_first_wins():
    finder = StopFinder(["bb", "a"])
    assert finder.feed("xxbba") == "xx"


@given(
    st.text("ab", max_size=30),
    st.lists(st.integers(1, 5), max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_pieces_give_what_the_whole_text_gives(whole, sizes, stops):
    finder, out, at = StopFinder(stops), "", 0
    for size in [*sizes, len(whole)]:
        out += finder.feed(whole[at : at + size])
        at += size
    out += finder.flush()
    found = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    assert out == (whole[: min(found)[1]] if found else whole)
    assert finder.found == bool(found)


def test_decoding_token_by_token_gives_the_whole_text(artifact):
    loaded = text.load(artifact)
    for sample in ("plain words", "naïve — 日本語 🎉 done", " leading"):
        ids = loaded.encode(sample)
        decoder = loaded.decoder([])
        out = "".join(decoder.feed([i]) for i in ids) + decoder.flush()
        assert out == sample


def test_an_unfinished_character_is_flushed_as_replacement(artifact):
    loaded = text.load(artifact)
    decoder = loaded.decoder([])
    assert decoder.feed(loaded.encode("é")[:1]) == ""
    assert decoder.flush() == "\ufffd"


def test_a_model_without_template_gets_the_documented_one(artifact):
    loaded = text.load(artifact)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    ids = loaded.encode_chat(messages)
    assert loaded.tokenizer.decode(ids) == "System: Be kind.\nUser: Hi\nAssistant:"
    assert loaded.chat_stops == ("\nUser:",)


def test_a_template_that_refuses_or_breaks_says_so():
    with pytest.raises(text.TemplateFailed, match="roles must alternate"):
        text.render("{{ raise_exception('roles must alternate') }}", [], {})
    with pytest.raises(text.TemplateFailed, match="template failed"):
        text.render("{% if %}", [], {})


def test_a_template_cannot_reach_out_of_its_sandbox():
    with pytest.raises(text.TemplateFailed):
        text.render("{{ ''.__class__.__mro__[1].__subclasses__() }}", [], {})
