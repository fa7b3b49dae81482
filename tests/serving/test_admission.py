"""Who gets in: names of the model."""

from types import SimpleNamespace

import pytest
from prism_serving.control import Slo
from prism_serving.gateway.admission import Admission, split_alias
from prism_serving.gateway.errors import ApiError
from prism_serving.gateway.schema import CompletionRequest


@pytest.mark.parametrize(
    ("asked", "level"), [("m", None), ("m@10", 10), ("m@50", 50), ("m@100", 100)]
)
def test_an_alias_names_its_level(asked, level):
    assert split_alias(asked, "m") == level


@pytest.mark.parametrize(
    "asked",
    [
        "m@",
        "m@9",
        "m@101",
        "m@1000",
        "m@-50",
        "m@5O",
        "m@\u0665\u0660",
        "m@\uff15\uff10",
        "other@50",
        "m@50@50",
    ],
)
def test_what_is_no_alias_is_an_unknown_model(asked):
    with pytest.raises(ApiError) as refused:
        split_alias(asked, "m")
    assert refused.value.status == 404
    assert refused.value.body["error"]["code"] == "model_not_found"


def admission(lowest: int) -> Admission:
    tokenizer = SimpleNamespace(get_vocab_size=lambda: 100)
    text = SimpleNamespace(tokenizer=tokenizer)
    client = SimpleNamespace(slo=Slo(lowest_level=lowest), state=None)
    return Admission("m", text, client, None, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"model": "m@49"}, "model"), ({"model": "m", "prism": {"level": 10}}, "prism.level")],
)
def test_a_level_that_the_quality_gate_bars_is_refused_whoever_asks(fields, param):
    request = CompletionRequest(prompt=[1, 2], **fields)
    with pytest.raises(ApiError) as refused:
        admission(50).ask(request, "r", 0.0)
    assert refused.value.status == 400
    error = refused.value.body["error"]
    assert error["param"] == param and "quality gate allows 50 to 100" in error["message"]
    assert admission(10).ask(request, "r", 0.0).level in (49, 10)


def test_a_level_at_the_gate_and_none_at_all_pass():
    for model, level in (("m@50", 50), ("m", None)):
        request = CompletionRequest(prompt=[1, 2], model=model)
        assert admission(50).ask(request, "r", 0.0).level == level
