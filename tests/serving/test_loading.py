"""A damaged artifact is refused, by the name of what is damaged, before anything is served."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prism.architectures import UnsupportedModel
from prism.artifact import ArtifactError
from prism.blocks import block_names
from prism.checkpoint import open_checkpoint
from prism.contract import ExitCode
from prism_serving.engine import loading

LAYER = "model.layers.1.mlp.experts"


@pytest.fixture
def copy(artifact, tmp_path):
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def flip_a_bit(path: Path, expert: int) -> None:
    entries = open_checkpoint(path)
    entry = entries[block_names(entries, LAYER, expert).up]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + 100)
        byte = file.read(1)[0]
        file.seek(entry.start + 100)
        file.write(bytes([byte ^ 1]))


def test_one_flipped_bit_is_refused_by_the_name_of_its_block(copy):
    flip_a_bit(copy, 3)
    with pytest.raises(ArtifactError, match=rf"{LAYER}\.3: digest differs") as caught:
        loading.load(copy, "float32", "cpu")
    assert "refactor again" in str(caught.value)
    assert f"{LAYER}.2" not in str(caught.value)


def test_a_flipped_bit_in_the_sub_routers_is_refused(copy):
    file = copy / "prism/prism.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"prism\.safetensors: digest differs"):
        loading.load(copy, "float32", "cpu")


def test_many_damaged_blocks_are_counted_not_all_printed(copy, monkeypatch):
    monkeypatch.setattr(loading, "_SHOWN_PROBLEMS", 2)
    for expert in range(5):
        flip_a_bit(copy, expert)
    with pytest.raises(ArtifactError, match="and 3 more problems"):
        loading.load(copy, "float32", "cpu")


def test_what_the_engine_lacks_is_refused_before_any_weight_is_read(copy):
    """A rope that follows the longest position would need another table for each batch."""
    file = copy / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    file.write_text(json.dumps(config))
    flip_a_bit(copy, 3)  # never found: the refusal comes first
    with pytest.raises(UnsupportedModel, match="rope type 'dynamic' depends on the batch"):
        loading.load(copy, "float32", "cpu")


def test_the_engine_ends_with_bad_input(copy, tmp_path):
    flip_a_bit(copy, 0)
    flags = ["--artifact", str(copy), "--socket", str(tmp_path / "s"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "prism_serving.engine", *flags, "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    assert f"{LAYER}.0: digest differs" in done.stdout + done.stderr
