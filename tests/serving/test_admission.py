"""Who gets in: names of the model."""

import pytest
from prism_serving.gateway.admission import split_alias
from prism_serving.gateway.errors import ApiError


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
