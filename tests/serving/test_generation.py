"""From the engine's deltas to the pieces and the JSON of a response."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prism_serving.control import Slo
from prism_serving.gateway import text
from prism_serving.gateway.generation import Ask, Generation, Piece
from prism_serving.gateway.meter import RequestMeter
from prism_serving.gateway.metrics import Metrics
from prism_serving.gateway.render import Renderer
from prism_serving.protocol import Delta, Sampling, Submit, TokenLogprobs


class FakeClient:
    """Answers each sequence with `said`, so many tokens a delta."""

    def __init__(self, said: list[int], at_once: int) -> None:
        self.said, self.at_once = said, at_once

    def submit(self, sequence: Submit, sink: Callable[[Delta], None]) -> None:
        for at in range(0, len(self.said), self.at_once):
            tokens = self.said[at : at + self.at_once]
            sink(
                Delta(
                    request=sequence.request,
                    tokens=tokens,
                    levels=[100] * len(tokens),
                    logprobs=[TokenLogprobs(chosen=-1.0)] * len(tokens),
                    finish="stop" if at + self.at_once >= len(self.said) else None,
                )
            )

    def cancel(self, requests: list[str]) -> None:
        pass


@pytest.fixture(scope="module")
def loaded(artifact):
    return text.load(artifact)


def answer(
    loaded: text.Text, said: list[int], at_once: int, stops: tuple[str, ...] = ()
) -> tuple[Renderer, Generation, list[Piece]]:
    """All pieces of a request with a prompt of 4 characters and one of 2."""
    ask = Ask(
        request="r",
        prompts=[loaded.encode("né: "), loaded.encode("ab")],
        prompt_chars=[4, 2],
        choices=2,
        max_tokens=[64, 64],
        sampling=Sampling(temperature=0, logprobs=0),
        stops=list(stops),
        level=None,
        min_level=None,
        received_s=0.0,
    )
    meter = RequestMeter(Metrics("m", "local/m", Slo()), Slo, 0.0, ask.prompt_tokens)
    client: Any = FakeClient(said, at_once)
    generation = Generation(ask, client, meter, loaded)

    async def run() -> list[Piece]:
        generation.start()
        return [piece async for piece in generation.pieces()]

    renderer = Renderer("r", "m", 0, False, loaded)
    return renderer, generation, asyncio.run(run())


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_text_offsets_count_characters_from_the_prompt_and_go_on_over_chunks(loaded, at_once):
    said = [*loaded.encode("aï日b"), 0]  # 1, 2, 3 and 1 bytes, each a token; then the end token
    expected = [0, 1, 1, 2, 2, 2, 3, 4]
    renderer, generation, pieces = answer(loaded, said, at_once)
    whole = renderer.whole(pieces, 4, generation.usage)["choices"]
    assert [c["text"] for c in whole] == ["aï日b"] * 4
    for index, start in enumerate((4, 4, 2, 2)):  # two choices of each prompt
        offsets = [start + o for o in expected]
        assert whole[index]["logprobs"]["text_offset"] == offsets
        chunks = [renderer.chunk(p)["choices"][0] for p in pieces if p.choice == index]
        streamed = [o for c in chunks for o in c["logprobs"]["text_offset"]]
        assert streamed == offsets
        assert len(offsets) == len(whole[index]["logprobs"]["tokens"])


def test_held_back_text_moves_no_offset(loaded):
    """A stop string that may begin keeps text back; its tokens are where they are."""
    renderer, _, pieces = answer(loaded, loaded.encode("abENx"), 1, stops=("END",))
    first = [renderer.chunk(p)["choices"][0] for p in pieces if p.choice == 0]
    assert [c["text"] for c in first] == ["a", "b", "", "", "ENx"]
    assert [c["logprobs"]["text_offset"] for c in first] == [[4], [5], [6], [7], [8]]
