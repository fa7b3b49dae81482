"""Text to tokens and back: tokenizer, chat template, incremental decoding.

Knows: tokenizer.json, chat_template. Must not know: requests, engine; torch is never imported
unless a model ships no tokenizer.json.

A model without a chat template gets `FALLBACK_TEMPLATE`: "System: …", "User: …", "Assistant: …" in
lines, ended by "Assistant:", with "\\nUser:" as an extra stop string. It is meant for base models.

One decision worth arguing about: the `tokenizers` library alone, not transformers' AutoTokenizer.
That one loads torch: 500 MB and four seconds in a container that must be up before the engine.
"""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

FALLBACK_TEMPLATE: Final = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
FALLBACK_STOPS: Final = ("\nUser:",)
_CONTEXT_TOKENS: Final = 8  # prompt tokens the decoder sees, so that a leading space survives


class TemplateFailed(ValueError):
    """The chat template refused these messages; the message says why."""


@dataclass(slots=True)
class Text:
    """Tokenizer and chat template of one artifact."""

    tokenizer: Tokenizer
    template: str | None
    special: dict[str, str]

    @property
    def chat_stops(self) -> tuple[str, ...]:
        """Stop strings that come with the template."""
        return () if self.template else FALLBACK_STOPS

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens the tokenizer adds."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a rendered conversation. Raises TemplateFailed."""
        text = render(self.template or FALLBACK_TEMPLATE, messages, self.special)
        # A template writes its own special tokens; the fallback leaves them to the tokenizer.
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=self.template is None).ids
        return ids

    def spelled(self, tokens: list[int]) -> str:
        """Text of these tokens, special ones spelled out."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def token_text(self, token: int) -> str:
        """One token on its own, special tokens spelled out."""
        return self.spelled([token])

    def decoder(self, prompt: list[int]) -> "Decoder":
        """An incremental decoder for what follows `prompt`."""
        return Decoder(self.tokenizer, DecodeStream(prompt[-_CONTEXT_TOKENS:], True), [])


@dataclass(slots=True)
class Decoder:
    """Tokens of one sequence to text, whole characters at a time."""

    tokenizer: Tokenizer
    stream: Any  # DecodeStream has no stubs
    pending: list[int]

    def feed(self, tokens: list[int]) -> str:
        """Text that these tokens complete."""
        text = ""
        for token in tokens:
            self.pending.append(token)
            piece = self.stream.step(self.tokenizer, token)
            if piece is not None:
                text += piece
                self.pending.clear()
        return text

    def flush(self) -> str:
        """What an unfinished character decodes to, at the end."""
        if not self.pending:
            return ""
        text: str = self.tokenizer.decode(self.pending, skip_special_tokens=True)
        self.pending.clear()
        return text


def _refuse(message: str) -> None:
    raise TemplateFailed(message)


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def render(template: str, messages: list[dict[str, Any]], special: dict[str, str]) -> str:
    """Render a chat template in a sandbox. Raises TemplateFailed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=True, **special)
    except TemplateError as error:
        raise TemplateFailed(f"the model's chat template failed: {error}") from error


def load(artifact: Path) -> Text:
    """Read tokenizer and template of an artifact. Raises OSError or ValueError naming the file."""
    config_file = artifact / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    return Text(_tokenizer(artifact), _template(artifact, config), _special(config))


def _tokenizer(artifact: Path) -> Tokenizer:
    file = artifact / "tokenizer.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(artifact, local_files_only=True)
    backend: Tokenizer | None = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{artifact}: no tokenizer.json, and its tokenizer converts to none")
    return backend


def _template(artifact: Path, config: dict[str, Any]) -> str | None:
    file = artifact / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special(config: dict[str, Any]) -> dict[str, str]:
    special = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            special[key] = value
    return special
