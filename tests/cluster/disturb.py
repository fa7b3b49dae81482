"""Ways to disturb a cluster, and a client that notices every wrong answer meanwhile.

kill -9 is meant literally: the container's first process is found on this machine by the
container's id in its cgroup, so it works where the node shares our kernel (the local cluster, kind
as root).
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from hack.demo import ask
from hack.demo.kube import Json, Kube, wait_until


def container_status(pod: Json, container: str) -> Json | None:
    """Status of a container, sidecar or not."""
    status = pod.get("status", {})
    found = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return next((c for c in found if c["name"] == container), None)


def first_process(container_id: str) -> int | None:
    """Pid on this machine of the process that is 1 inside the container."""
    name = container_id.rsplit("/", 1)[-1]
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if name not in (folder / "cgroup").read_text():
                continue
            spaces = next(
                line for line in (folder / "status").read_text().splitlines()
                if line.startswith("NSpid:")
            )  # fmt: skip
        except OSError:
            continue  # it has ended meanwhile
        if spaces.split()[-1] == "1":
            return int(folder.name)
    return None


def pods(kube: Kube, selector: str) -> list[Json]:
    """Pods that are not on their way out, oldest first."""
    items: list[Json] = kube.get("pods", "-l", selector)["items"]
    alive = [p for p in items if "deletionTimestamp" not in p["metadata"]]
    return sorted(alive, key=lambda p: str(p["metadata"]["creationTimestamp"]))


def kill(kube: Kube, selector: str, container: str, timeout_s: float = 400) -> str:
    """kill -9 of the container's first process once it runs; the killed container's id."""

    def running() -> tuple[str, int] | None:
        for pod in pods(kube, selector):
            status = container_status(pod, container)
            if status and "running" in status["state"]:
                process = first_process(status["containerID"])
                if process is not None:
                    return status["containerID"], process
        return None

    name, process = wait_until(running, timeout_s, f"running container {container}")
    os.kill(process, signal.SIGKILL)
    return name


def wait_replaced(kube: Kube, selector: str, container: str, old: str, timeout_s: float) -> None:
    """Until another container runs in the killed one's place and its pod is ready."""

    def replaced() -> bool | None:
        for pod in pods(kube, selector):
            status = container_status(pod, container)
            ready = any(
                c["type"] == "Ready" and c["status"] == "True"
                for c in pod.get("status", {}).get("conditions", [])
            )
            if status and ready and status.get("containerID") not in (None, old):
                return True
        return None

    wait_until(replaced, timeout_s, f"new container {container} in a ready pod", every_s=1)


@dataclass(slots=True)
class Answers:
    """What the client got; ``wrong`` holds (prompt, wanted, got) of whole answers that differ."""

    good: int = 0
    refused: int = 0  # 429, 503
    broken: int = 0  # no connection, or cut off
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    other: list[str] = field(default_factory=list)  # errors that no client should see


class Questioner(threading.Thread):
    """Asks the same questions again and again and compares with the first answers."""

    def __init__(self, url: str, model: str, prompts: Sequence[str], reference: Sequence[str]):
        super().__init__(daemon=True)
        self.url, self.model = url, model
        self.pairs = list(zip(prompts, reference, strict=True))
        self.answers = Answers()
        self.ended = threading.Event()

    def run(self) -> None:
        api = ask.client(self.url)
        while not self.ended.is_set():
            for prompt, wanted in self.pairs:
                if self.ended.is_set():
                    return
                self._ask(api, prompt, wanted)

    def _ask(self, api: openai.OpenAI, prompt: str, wanted: str) -> None:
        try:
            got = answer(api, self.model, prompt)
        except openai.APIStatusError as refusal:
            if refusal.status_code in (429, 503):
                self.answers.refused += 1
            else:
                self.answers.other.append(f"{refusal.status_code} {refusal.message}")
            time.sleep(0.2)
        except (openai.APIError, ConnectionError):
            self.answers.broken += 1
            time.sleep(0.2)
        else:
            if got == wanted:
                self.answers.good += 1
            else:
                self.answers.wrong.append((prompt, wanted, got))


class CutOff(ConnectionError):
    """A stream ended before it said why."""


def answer(api: openai.OpenAI, model: str, prompt: str, tokens: int = 12) -> str:
    """The greedy answer at level 100, streamed; raises CutOff unless it came to its end."""
    extra: dict[str, Any] = {"prism": {"level": 100}}
    pieces, finished = [], False
    stream = api.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body=extra
    )
    try:
        for chunk in stream:
            for choice in chunk.choices:
                pieces.append(choice.text or "")
                finished = finished or choice.finish_reason is not None
    except openai.APIError:
        raise
    except Exception as problem:  # the HTTP library under the client has its own errors
        if type(problem).__module__.split(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2"}:
            raise CutOff(str(problem)) from problem
        raise
    if not finished:
        raise CutOff("the stream ended without a finish_reason")
    return "".join(pieces)


@contextmanager
def questions(url: str, model: str, prompts: Sequence[str]) -> Iterator[Answers]:
    """Keeps asking in the background; the answers are complete after the block."""
    reference = [answer(ask.client(url), model, prompt) for prompt in prompts]
    thread = Questioner(url, model, prompts, reference)
    thread.start()
    try:
        yield thread.answers
    finally:
        thread.ended.set()
        thread.join(90)
    assert not thread.is_alive(), "a question has not been answered for 90 s"
