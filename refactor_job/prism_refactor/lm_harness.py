"""EleutherAI's lm-eval on an artifact in this process, at any level, on tasks given as local files.

Knows lm-eval's interface and attached models; nothing of ours imports this module but the command
line, because lm-eval and what it needs weigh half a gigabyte and are an extra of their own. The
decision worth arguing about: we implement lm-eval's interface instead of handing our model to its
own wrapper, which would bring two more packages for what is one forward pass and one call of
generate. Nothing is fetched: tasks and their data are files, and paths in a task count from it.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before datasets: a task that is no file is an error

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from prism.artifact import open_artifact
from prism.experts import BatchContext, attach, batch_context
from prism.loading import load_model
from torch import Tensor

from prism_refactor.errors import Reason, RefactorError

_SEQUENCES: Final = 8  # per forward pass
_NEW_TOKENS: Final = 256  # unless the task says
_BOOTSTRAP: Final = 1_000

Scored = tuple[float, bool]  # log-likelihood of a continuation, and whether it is the greedy one


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One metric of one task at one level."""

    level: int
    task: str
    metric: str
    value: float
    se: float | None
    samples: int


def run_tasks(
    directory: Path, tasks: Path, levels: Sequence[int], *, dtype: str, limit: int | None = None
) -> list[TaskResult]:
    """Every task of a YAML file, or of all those in a directory, at each level.

    Raises ArtifactError and RefactorError (a task that is missing or wrong).
    """
    directory, tasks = directory.resolve(), tasks.resolve()
    files = sorted(tasks.glob("*.yaml")) if tasks.is_dir() else [tasks]
    if not files or not all(file.is_file() for file in files):
        raise RefactorError(Reason.SOURCE_NOT_FOUND, f"No task file (.yaml) at {tasks}.")
    artifact = open_artifact(directory)
    model, tokenizer = load_model(directory, getattr(torch, dtype))
    attach(model, artifact)
    found: list[TaskResult] = []
    for level in levels:
        lm = ArtifactLM(model, tokenizer, level)
        with contextlib.chdir(files[0].parent):
            found += _at_level(lm, level, [str(file) for file in files], limit)
    return found


def _at_level(
    lm: "ArtifactLM", level: int, files: list[str], limit: int | None
) -> list[TaskResult]:
    try:
        manager = TaskManager(include_defaults=False)
        given = {"task_manager": manager, "limit": limit, "bootstrap_iters": _BOOTSTRAP}
        results: Any = simple_evaluate(model=lm, tasks=files, log_samples=False, **given)
    except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise RefactorError(
            Reason.BAD_INPUT,
            f"{', '.join(files)}: lm-eval cannot run it: {type(error).__name__}: {error}",
        ) from error
    return [
        result
        for task, metrics in results["results"].items()
        for result in _results(level, task, metrics, results["n-samples"])
    ]


def _results(
    level: int, task: str, metrics: dict[str, Any], samples: dict[str, Any]
) -> Iterator[TaskResult]:
    """lm-eval names a metric `acc,filter` and its error `acc_stderr,filter`."""
    count = int(samples.get(task, {}).get("effective", 0))
    for key, value in metrics.items():
        name, _, which = key.partition(",")
        if not which or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{name}_stderr,{which}")
        shown = name if which == "none" else f"{name} ({which})"
        se = float(error) if isinstance(error, int | float) else None
        yield TaskResult(level, task, shown, float(value), se, count)


class ArtifactLM(TemplateLM):  # type: ignore[misc]  # lm-eval carries no types
    """An attached model at one level, as lm-eval asks for it."""

    def __init__(self, model: Any, tokenizer: Any, level: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.level = level
        config = model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", 2048))

    @property
    def eot_token_id(self) -> int:
        """Ends a text, and stands before one that has no context."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; special tokens only where they are asked for."""
        ids: list[int] = self.tokenizer(
            string, add_special_tokens=bool(add_special_tokens)
        ).input_ids
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        """Scores of continuations; requests are (text, context ids, continuation ids)."""
        by_length = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        scored: dict[int, Scored] = {}
        for start in range(0, len(by_length), _SEQUENCES):
            places = by_length[start : start + _SEQUENCES]
            pairs = [requests[place][1:] for place in places]
            scored.update(zip(places, self._score(pairs), strict=True))
        return [scored[place] for place in range(len(requests))]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[Scored]:
        rows = [(context + more)[-self.max_length - 1 :] for context, more in pairs]
        width = max(len(row) for row in rows) - 1
        inputs = torch.full((len(rows), width), self.eot_token_id)
        for place, row in enumerate(rows):  # padded behind, where causal attention does not look
            inputs[place, : len(row) - 1] = torch.tensor(row[:-1])
        with torch.inference_mode(), batch_context(BatchContext(self.level)):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        for place, (row, (_, more)) in enumerate(zip(rows, pairs, strict=True)):
            target = torch.tensor(more[-len(row) + 1 :])
            end = len(row) - 1
            these = logits[place, end - len(target) : end].float().log_softmax(-1)
            score = float(these.gather(1, target.unsqueeze(1)).sum())
            yield score, bool((these.argmax(-1) == target).all())

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows where they are longer than the model takes."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts, each up to the first of its stop strings."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, asked: dict[str, Any]) -> str:
        stops = asked.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        new = int(asked.get("max_gen_toks", asked.get("max_new_tokens", _NEW_TOKENS)))
        prompt = self.tok_encode(context) or [self.eot_token_id]
        ids = torch.tensor([prompt[-max(1, self.max_length - new) :]])
        sampled = bool(asked.get("do_sample", False))
        how = {
            key: asked[key] for key in ("temperature", "top_p", "top_k") if sampled and key in asked
        }
        with torch.inference_mode(), batch_context(BatchContext(self.level)):
            out: Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(new, self.max_length - ids.shape[1]),
                do_sample=sampled,
                pad_token_id=self.eot_token_id,
                stop_strings=stops or None,
                tokenizer=self.tokenizer,
                **how,
            )
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        ends = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text
