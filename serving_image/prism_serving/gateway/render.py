"""The JSON of OpenAI's responses.

Knows: the shapes of both APIs, streamed and whole. Must not know: where the text comes from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_serving.gateway.generation import Piece, Usage
from prism_serving.gateway.text import Text
from prism_serving.protocol import TokenLogprobs

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Renderer:
    """Names what every object of one response carries. `chat` chooses between the two APIs."""

    request: str
    model: str
    created: int
    chat: bool
    text: Text
    include_usage: bool = False

    def opening(self, choices: int) -> list[Json]:
        """Chunks before any text: chat announces the role."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
            for i in range(choices)
        ]

    def chunk(self, piece: Piece) -> Json:
        """One streamed piece."""
        logprobs = self._logprobs([piece])
        choice: Json = {"index": piece.choice, "logprobs": logprobs, "finish_reason": piece.finish}
        if self.chat:
            choice["delta"] = {"content": piece.text} if piece.text else {}
        else:
            choice["text"] = piece.text
        return self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> Json:
        """The last chunk when usage was asked for."""
        return {**self._chunk([]), "usage": usage_json(usage)}

    def whole(self, pieces: Sequence[Piece], choices: int, usage: Usage) -> Json:
        """A response that is not streamed."""
        out = []
        for index in range(choices):
            mine = [p for p in pieces if p.choice == index]
            text = "".join(p.text for p in mine)
            choice: Json = {
                "index": index,
                "logprobs": self._logprobs(mine),
                "finish_reason": next(p.finish for p in reversed(mine) if p.finish),
            }
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            out.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._base(kind), "choices": out, "usage": usage_json(usage)}

    def _base(self, kind: str) -> Json:
        return {
            "id": self.request,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        base = self._base("chat.completion.chunk" if self.chat else "text_completion")
        nothing_yet = {"usage": None} if self.include_usage else {}
        return {**base, "choices": choices, **nothing_yet}

    def _logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        given = [p for p in pieces if p.logprobs is not None]
        if not given:
            return None
        rows = [row for p in given for row in zip(p.tokens, p.logprobs or (), strict=True)]
        if self.chat:
            return {"content": [self._chat_logprob(t, v) for t, v in rows]}
        return {
            "tokens": [self.text.token_text(t) for t, _ in rows],
            "token_logprobs": [v.chosen for _, v in rows],
            "top_logprobs": [{self.text.token_text(t): lp for t, lp in v.top} for _, v in rows],
            "text_offset": [offset for p in given for offset in p.offsets],
        }

    def _chat_logprob(self, token: int, value: TokenLogprobs) -> Json:
        def entry(token: int, logprob: float) -> Json:
            text = self.text.token_text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            **entry(token, value.chosen),
            "top_logprobs": [entry(t, lp) for t, lp in value.top],
        }


def usage_json(usage: Usage) -> Json:
    """OpenAI's usage with ours inside."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prism": {"mean_level": usage.mean_level, "lowest_level": usage.lowest_level},
    }
