"""A random two-layer OLMoE with a byte tokenizer, text for it, and one finished refactoring."""

import os
import random
from pathlib import Path

import pytest
import torch
from prism_refactor.options import Options
from prism_refactor.progress import Progress, Stage

EXPERTS = 6
HIDDEN = 32
WIDTH = 48
LAYERS = 2


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread: sums are then the same in this process and in those the tests start."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again() -> None:
    """Commands set the threads of their process, which here is the tests' own."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, so that the index is exercised too."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


def write_checkpoint(path: Path, layers: int = LAYERS) -> Path:
    """A random OLMoE whose tokens are bytes, with the files that come along with a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=257,
        eos_token_id=256,
        pad_token_id=256,
        bos_token_id=256,
        initializer_range=0.2,
    )
    model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="60KB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    (path / "README.md").write_text("# a model card")
    (path / "LICENSE").write_text("a licence")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "pytorch_model.bin").write_bytes(b"a pickle that must stay behind")
    return path


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of random words: 200-400 characters each."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(80)]
    return [" ".join(rng.choices(words, k=60)) for _ in range(count)]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(24)))
    return path


def silent(stages: list[Stage]) -> Progress:
    """Progress that nobody watches."""
    return Progress(stages, [])


@pytest.fixture(scope="session")
def make_options(checkpoint: Path, corpus_file: Path):  # type: ignore[no-untyped-def]
    """Options of a small refactoring into a directory."""

    def make(out: Path, **changes: object) -> Options:
        given: dict[str, object] = {
            "source": str(checkpoint),
            "out": out,
            "calibration": corpus_file,
            "sub_experts": 4,
            "tokens": 2048,
        }
        return Options(**(given | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory, make_options):  # type: ignore[no-untyped-def]
    """One finished refactoring; tests must not change it."""
    from prism_refactor.job import refactor

    return refactor(make_options(tmp_path_factory.mktemp("out") / "artifact"), silent)
