"""Checkpoints as files: headers, shards, names of an expert's tensors."""

import json
from pathlib import Path

import pytest
from prism.blocks import block_names
from prism.checkpoint import CheckpointError, open_checkpoint, read_header


def write_safetensors(file: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return file


def entry(start: int, end: int, shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def test_header_gives_place_and_bytes(tmp_path: Path) -> None:
    header = {"v": entry(0, 4, [1]), "w": entry(4, 12, [2])}
    file = write_safetensors(tmp_path / "a", header, b"....12345678")
    tensor = read_header(file)["w"]
    assert (tensor.shape, tensor.read()) == ((2,), b"12345678")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot hold a header"),
        (b"\xff" * 40, "cannot hold a header"),
        ((2).to_bytes(8, "little") + b"xx", "header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        ((10).to_bytes(8, "little") + b'{"w": 1  }', "malformed"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_size_and_shape_must_agree(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "a", {"w": entry(0, 8, [3])}, b"12345678")
    with pytest.raises(CheckpointError, match=r"8 bytes for shape \(3,\)"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 4, [1]), "b": entry(2, 8, [])}, "b: 6 bytes for shape"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, "b overlaps a"),
        ({"a": entry(4, 8, [1])}, "a leaves a hole behind the header"),
        ({"a": entry(0, 4, [1])}, "truncated"),
        ({"a": entry(-4, 8, [3])}, "a: header entry is malformed"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, "malformed"),
    ],
)
def test_tensors_must_cover_the_file_once(tmp_path: Path, header: dict, words: str) -> None:
    file = write_safetensors(tmp_path / "a", header, b"12345678")
    with pytest.raises(CheckpointError, match=words):
        read_header(file)


def test_a_name_twice_in_one_header_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 4, [1]))
    raw = f'{{"w": {one}, "w": {one}}}'.encode()
    (tmp_path / "a").write_bytes(len(raw).to_bytes(8, "little") + raw + b"1234")
    with pytest.raises(CheckpointError, match="names w twice"):
        read_header(tmp_path / "a")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(tmp_path / "one.safetensors", {"a": entry(0, 4, [1])}, b"1234")
    both = {"a": entry(0, 4, [1]), "b": entry(4, 8, [1])}
    write_safetensors(tmp_path / "two.safetensors", both, b"12345678")
    with pytest.raises(CheckpointError, match=r"a is in one\.safetensors and in two\.safetensors"):
        open_checkpoint(tmp_path)


def test_all_bad_shards_are_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "two.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "one.safetensors: No such file" in str(caught.value)
    assert "two.safetensors: 1 bytes" in str(caught.value)


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, key in (("one", "a"), ("two", "b")):
        write_safetensors(tmp_path / f"{name}.safetensors", {key: entry(0, 4, [1])}, b"1234")
    assert sorted(open_checkpoint(tmp_path)) == ["a", "b"]


def test_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [
        ("model.layers.3.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ("model.layers.3.block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_expert_tensors_are_found_under_both_namings(prefix: str, parts: tuple[str, ...]) -> None:
    names = {f"{prefix}.5.{part}.weight" for part in parts}
    found = block_names(names, "model.layers.3.mlp.experts", 5)
    assert found == tuple(f"{prefix}.5.{part}.weight" for part in parts)


def test_unknown_expert_naming_is_refused() -> None:
    with pytest.raises(CheckpointError, match="under any known naming"):
        block_names({"model.layers.0.mlp.experts.gate_up_proj"}, "model.layers.0.mlp.experts", 0)
