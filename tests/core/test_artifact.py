"""Artifacts: what is written is read back; every kind of damage is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prism.artifact import ArtifactError, Manifest, open_artifact, verify

Edit = Callable[[Callable[[dict], None]], Path]


def test_written_artifact_reads_back_whole(whole_artifact: Path) -> None:
    opened = open_artifact(whole_artifact)
    assert opened.digest.startswith("sha256:")
    assert opened.manifest.levels == (100, 50)
    assert Manifest.from_json(opened.manifest.to_json()) == opened.manifest
    assert verify(whole_artifact) == []


def test_layer_tensors_come_in_model_order(whole_artifact: Path) -> None:
    opened = open_artifact(whole_artifact)
    first, second = opened.layer(0), opened.layer(1)
    assert first.router_weight.shape == (6, 4, 32)
    assert first.means.shape == (2, 6, 4, 32)
    assert not torch.equal(first.router_weight, second.router_weight)


def test_digest_follows_the_manifest(whole_artifact: Path, edit_manifest: Edit) -> None:
    changed = edit_manifest(lambda raw: raw.update(seed=8))
    assert open_artifact(changed).digest != open_artifact(whole_artifact).digest


def test_all_schema_problems_come_at_once(edit_manifest: Edit) -> None:
    def change(raw: dict) -> None:
        raw["sub_experts"] = "8"
        raw["knots"][0]["log_theta"][1] = None
        raw["extra"] = 1
        del raw["source"]["uri"]

    with pytest.raises(ArtifactError) as caught:
        open_artifact(edit_manifest(change))
    message = str(caught.value)
    for part in (
        "$.sub_experts: expected int, found '8'",
        "$.knots[0].log_theta[1]: expected float, found None",
        "$.extra: unknown field",
        "$.source.uri: missing",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema_version", 3, "schema_version is 3, this Prism reads 2"),
        ("sub_experts", 5, "$.sub_experts: 5 is not one of"),
        ("layers", [], "$.layers: empty"),
        ("knots", [], "$.knots: 0 knots"),
        ("num_experts", 0, "$.num_experts: 0 is not positive"),
        ("num_experts", True, "$.num_experts: expected int, found True"),
    ],
)
def test_bad_manifest_value_is_named(
    edit_manifest: Edit, field: str, value: object, message: str
) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        open_artifact(edit_manifest(lambda raw: raw.update({field: value})))


def set_at(path: str, value: object) -> Callable[[dict], None]:
    """Change one place, "a.0.b"; None takes it away."""

    def change(raw: dict) -> None:
        *before, last = path.split(".")
        for key in before:
            raw = raw[int(key) if isinstance(raw, list) else key]
        if value is None:
            del raw[last]
        else:
            raw[int(last) if isinstance(raw, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("experts_per_token", 7, "$.experts_per_token: 7 of 6 experts"),
        ("num_experts", 10**400, "more than any model has"),
        ("calibration.tokens", -1, "$.calibration.tokens: -1 is no count"),
        ("knots.0.log_theta.1", 1e9, "$.knots[0].log_theta[1]: 1e+09 is outside -200 to 200"),
        ("operating_points.1.own_share", 1.01, ".own_share: 1.01 is outside 0 to 1"),
        ("operating_points.1.active_share", -0.1, ".active_share: -0.1 is outside 0 to 1.5"),
        ("operating_points.1.top1_agreement", 2.0, ".top1_agreement: 2 is outside 0 to 1"),
        ("operating_points.1.quality_loss_se", -0.1, ".quality_loss_se: -0.1 is below 0"),
        ("operating_points.1.quality_loss_percent", -101, "_percent: -101 is below -100"),
        ("operating_points.1.perplexity", 0.0, ".perplexity: 0 is not positive"),
        ("operating_points.1.kl", -1.0, ".kl: -1 is below"),
        ("batch_curves", {"50": {"batch": [1]}}, "$.batch_curves.50.bytes_share: missing"),
        ("batch_curves", {"9": {}}, "$.batch_curves.9: '9' is no level from 10 to 100"),
        ("batch_curves", {"050": {}}, "'050' is no level"),
        ("batch_curves.50.bytes_share", [0.5], "bytes_share: 1 values for 2 batches"),
        ("batch_curves.50.bytes_share.1", 1.6, "bytes_share[1]: 1.6 is outside 0 to 1.5"),
        ("batch_curves.50.batch.0", 0, "batch[0]: 0 is below 1"),
        ("batch_curves.50.batch", [8, 1], "batch sizes must be whole numbers that rise"),
        ("batch_curves.50.batch", [1.5, 8], "batch sizes must be whole numbers that rise"),
        ("batch_curves.50.measured_batch", None, "$.batch_curves.50.measured_batch: missing"),
        ("batch_curves.50.measured_loss_se", [-1.0], "measured_loss_se: -1 is below 0"),
        ("batch_curves.50.bites_share", [0.5, 0.5], "$.batch_curves.50.bites_share: unknown curve"),
    ],
)
def test_a_value_that_no_refactoring_makes_is_named(
    edit_manifest: Edit, path: str, value: object, message: str
) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        open_artifact(edit_manifest(set_at(path, value)))


def test_a_level_without_curves_or_without_divergences_is_fine(edit_manifest: Edit) -> None:
    def change(raw: dict) -> None:
        raw["batch_curves"]["25"] = {}
        del raw["batch_curves"]["50"]["measured_kl"]

    assert open_artifact(edit_manifest(change)).manifest.batch_curves["25"] == {}


def test_levels_out_of_order_or_range_are_named(edit_manifest: Edit) -> None:
    def change(raw: dict) -> None:
        raw["knots"][0]["level"] = 40
        raw["operating_points"][0]["level"] = 101

    with pytest.raises(ArtifactError) as caught:
        open_artifact(edit_manifest(change))
    assert "$.knots: levels [40, 50] do not fall" in str(caught.value)
    assert "$.operating_points[0].level: 101 is outside 10-100" in str(caught.value)


def test_missing_folder_says_what_to_do(checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="make one with `prism refactor`"):
        open_artifact(checkpoint)


def test_broken_json_is_an_artifact_error(copied_artifact: Path) -> None:
    (copied_artifact / "prism/prism.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        open_artifact(copied_artifact)


@pytest.mark.parametrize("name", ["model.safetensors", "prism/prism.safetensors"])
def test_truncated_tensors_are_named_before_any_is_read(copied_artifact: Path, name: str) -> None:
    file = copied_artifact / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=f"{file.name}.*truncated"):
        open_artifact(copied_artifact)


def test_shapes_must_fit_the_manifest(edit_manifest: Edit) -> None:
    with pytest.raises(ArtifactError, match=r"means: F32 \(2, 6, 4, 32\), expected F32 \(1, 6"):
        open_artifact(edit_manifest(lambda raw: raw["knots"].pop()))


def test_every_expert_needs_a_digest(edit_manifest: Edit) -> None:
    with pytest.raises(ArtifactError, match="no digest for"):
        open_artifact(
            edit_manifest(lambda raw: raw["block_digests"].pop("model.layers.1.mlp.experts.3"))
        )


def test_verify_names_the_flipped_expert(copied_artifact: Path) -> None:
    from prism.checkpoint import open_checkpoint

    entry = open_checkpoint(copied_artifact)["model.layers.1.mlp.experts.2.up_proj.weight"]
    data = bytearray(entry.file.read_bytes())
    data[entry.start] ^= 1
    entry.file.write_bytes(data)
    (problem,) = verify(copied_artifact)
    assert "model.layers.1.mlp.experts.2: digest differs" in problem


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_verify_finds_a_flipped_bit_outside_the_experts(copied_artifact: Path, name: str) -> None:
    from prism.checkpoint import open_checkpoint

    assert verify(copied_artifact) == []
    entry = open_checkpoint(copied_artifact)[name]
    data = bytearray(entry.file.read_bytes())
    data[entry.start] ^= 1
    entry.file.write_bytes(data)
    (problem,) = verify(copied_artifact)
    assert "outside the experts: digest differs" in problem


def test_verify_names_a_changed_configuration(copied_artifact: Path) -> None:
    file = copied_artifact / "config.json"
    file.write_text(
        file.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1')
    )
    (problem,) = verify(copied_artifact)
    assert "config.json: digest differs from the source's" in problem


def test_an_artifact_from_before_the_rest_had_a_digest_is_whole(edit_manifest: Edit) -> None:
    path = edit_manifest(lambda raw: raw["block_digests"].pop("rest"))
    assert verify(path) == []


def test_all_files_of_an_artifact_are_equally_readable(whole_artifact: Path) -> None:
    modes = {file.name: file.stat().st_mode for file in (whole_artifact / "prism").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_verify_names_changed_prism_tensors_and_lost_files(copied_artifact: Path) -> None:
    file = copied_artifact / "prism/prism.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    manifest = copied_artifact / "prism/prism.json"
    raw = json.loads(manifest.read_text())
    raw["source"]["files"]["chat_template.jinja"] = "00"
    manifest.write_text(json.dumps(raw))
    problems = verify(copied_artifact)
    assert len(problems) == 2
    assert "chat_template.jinja: missing" in problems[0]
    assert "prism.safetensors: digest differs" in problems[1]


def test_verify_of_no_artifact_gives_the_reason(tmp_path: Path) -> None:
    assert "not an artifact" in verify(tmp_path)[0]
