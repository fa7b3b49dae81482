"""Log lines: one per request or decision, `time level program event key=value …` on stderr.

Knows: the format. Must not know: what is logged.

One decision worth arguing about: key=value and not JSON. A person reads these lines first, and
every log collector parses logfmt; values with spaces are quoted as JSON strings.
"""

import json
import logging
import sys
import time


def _quote(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text and not set(text) & set(' "=\n\t') else json.dumps(text)


def fields(event: str, **values: object) -> str:
    """`event key=value …`; None values are left out."""
    pairs = (f"{key}={_quote(value)}" for key, value in values.items() if value is not None)
    return " ".join((event, *pairs))


class _Formatter(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = (
            f"{stamp}.{int(record.msecs):03d}Z {record.levelname.lower()} "
            f"{self._program} {record.getMessage()}"
        )
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(program: str, level: int = logging.INFO) -> None:
    """Send all logging of this process to stderr in the one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(program))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("uvicorn.access", "asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
