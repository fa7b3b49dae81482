"""Asks the model as any client of an OpenAI API does: with the official library."""

from collections.abc import Callable

import openai

QUESTION = "The for statement is used to iterate over"


def client(url: str) -> openai.OpenAI:
    """For a cluster of this machine: no key, no proxy."""
    http = openai.DefaultHttpxClient(trust_env=False, timeout=60)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", http_client=http, max_retries=0)


def first_token(url: str, model: str) -> None:
    """Returns when the first token of a completion has come; raises openai.OpenAIError."""
    stream = client(url).completions.create(
        model=model, prompt=QUESTION, max_tokens=4, temperature=0, stream=True
    )
    next(iter(stream))


def show(url: str, model: str, tell: Callable[[str], None]) -> None:
    """A completion, a chat, and a streamed chat, printed."""
    api = client(url)
    tell("models: " + ", ".join(m.id for m in api.models.list()))
    done = api.completions.create(model=model, prompt=QUESTION, max_tokens=32, temperature=0)
    tell(f"completion: {QUESTION!r} -> {done.choices[0].text!r}")
    chat = api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What does the with statement do?"}],
        max_tokens=32,
        temperature=0,
    )
    tell(f"chat: {chat.choices[0].message.content!r}")
    pieces = []
    for chunk in api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Explain lambda expressions."}],
        max_tokens=24,
        temperature=0,
        stream=True,
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
    tell(f"streamed chat, {len(pieces)} pieces: {''.join(pieces)!r}")
