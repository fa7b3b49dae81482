"""Read, write and verify an artifact: a stock checkpoint directory with a subfolder prism/.

Knows files and tensor names; knows nothing of models or kernels. torch is imported only when
tensors are read or written, so `prism inspect` starts fast. Decision: opening an artifact checks
all that is cheap (schema, headers, sizes, shapes) and nothing that reads weights; block digests
are `verify`'s, and serving checks them as it loads.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prism import contract
from prism.blocks import block_digest, block_tensors
from prism.checkpoint import (
    CheckpointError,
    TensorEntry,
    file_digest,
    open_checkpoint,
    read_header,
)
from prism.manifest import (
    SCHEMA_VERSION,
    ArtifactError,
    Calibration,
    Knot,
    Manifest,
    OperatingPoint,
    Source,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SCHEMA_VERSION",
    "Artifact",
    "ArtifactError",
    "Calibration",
    "Knot",
    "LayerTensors",
    "Manifest",
    "OperatingPoint",
    "Source",
    "open_artifact",
    "verify",
    "write_prism_folder",
]


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """What serving one layer needs beside its weights. E experts, N sub-experts, H hidden size."""

    router_weight: "Tensor"  # [E, N, H] fp32
    router_bias: "Tensor"  # [E, N] fp32
    means: "Tensor"  # [n_knots, E, N, H] fp32: mean output of a dropped sub-expert
    scalars: "Tensor"  # [n_knots, E, N + 1] fp32, by the number of sub-experts a token keeps
    usage: "Tensor"  # [E] fp32: share of calibration tokens routed to each expert


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact. `digest` ("sha256:…" over prism.json) identifies it everywhere."""

    path: Path
    manifest: Manifest
    digest: str

    def layer(self, index: int) -> LayerTensors:
        """Tensors of the index-th experts module, read now (about N·H·4·(1 + knots)·E bytes)."""
        import torch
        from safetensors import safe_open

        m, name = self.manifest, self.manifest.layers[index]
        with safe_open(_tensors_file(self.path), framework="pt") as tensors:
            prefix = [f"{name}.{e}.gate_proj.slice_router" for e in range(m.num_experts)]
            return LayerTensors(
                torch.stack([tensors.get_tensor(f"{p}.weight") for p in prefix]),
                torch.stack([tensors.get_tensor(f"{p}.bias") for p in prefix]),
                *(tensors.get_tensor(f"{name}.{part}") for part in ("means", "scalars", "usage")),
            )


def _tensors_file(path: Path) -> Path:
    return path / contract.PRISM_SUBFOLDER / contract.TENSORS_FILE


def _manifest_file(path: Path) -> Path:
    return path / contract.PRISM_SUBFOLDER / contract.MANIFEST_FILE


def open_artifact(path: str | Path) -> Artifact:
    """Open and check cheaply: schema, files, sizes, tensor names and shapes.

    Raises ArtifactError naming all problems found.
    """
    path = Path(path)
    file = _manifest_file(path)
    try:
        raw = file.read_bytes()
        manifest = Manifest.from_json(raw.decode("utf-8"), str(file))
    except OSError as error:
        raise ArtifactError(
            f"{file}: {error.strerror}; not an artifact (make one with `prism refactor`)"
        ) from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file}: not UTF-8 ({error.reason}); refactor again") from error
    problems = _tensor_problems(path, manifest) + _checkpoint_problems(path, manifest)
    if problems:
        raise ArtifactError("\n".join(problems))
    return Artifact(path, manifest, f"sha256:{hashlib.sha256(raw).hexdigest()}")


def _tensor_problems(path: Path, m: Manifest) -> list[str]:
    """prism.safetensors: every tensor there with the shape the manifest implies."""
    file = _tensors_file(path)
    try:
        entries = read_header(file)
    except CheckpointError as error:
        return [str(error)]
    n, e, knots = m.sub_experts, m.num_experts, len(m.knots)
    router = entries.get(f"{m.layers[0]}.0.gate_proj.slice_router.weight")
    hidden = router.shape[-1] if router and router.shape else 0
    expected: dict[str, tuple[int, ...]] = {}
    for layer in m.layers:
        for i in range(e):
            expected[f"{layer}.{i}.gate_proj.slice_router.weight"] = (n, hidden)
            expected[f"{layer}.{i}.gate_proj.slice_router.bias"] = (n,)
        expected[f"{layer}.means"] = (knots, e, n, hidden)
        expected[f"{layer}.scalars"] = (knots, e, n + 1)
        expected[f"{layer}.usage"] = (e,)
    problems = []
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{file}: {name}: missing; refactor again")
        elif entry.shape != shape or entry.dtype != "F32":
            problems.append(f"{file}: {name}: {entry.dtype} {entry.shape}, expected F32 {shape}")
    return problems


def _rest_digest(path: Path, m: Manifest) -> str:
    """sha256 (hex) over names and bytes of all tensors outside the experts: attention, embeddings,
    norms, routers. They lie in the artifact as in the source, but a copy can damage them too."""
    entries = open_checkpoint(path)
    blocks = {
        (part.file, part.start)
        for layer in m.layers
        for expert in range(m.num_experts)
        for part in block_tensors(entries, layer, expert, m.block_tensors.get(layer, ()))
    }
    total = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        if (entry.file, entry.start) not in blocks:
            total.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
            total.update(entry.read())
    return total.hexdigest()


def _rest_problems(path: Path, m: Manifest) -> list[str]:
    recorded = m.block_digests.get(contract.REST_DIGEST)  # older artifacts have none
    try:
        if recorded in (None, _rest_digest(path, m)):
            return []
    except CheckpointError as error:
        return [str(error)]
    return [f"{path}: a tensor outside the experts: digest differs from the manifest's; corrupt"]


def _file_problem(file: Path, digest: str) -> list[str]:
    if not file.is_file():
        return [f"{file}: missing; the source had it"]
    if file_digest(file) == digest:
        return []
    return [f"{file}: digest differs from the source's; changed or corrupt"]


def _checkpoint_problems(path: Path, m: Manifest) -> list[str]:
    """The checkpoint itself: config, whole files, a digest for every expert."""
    problems = [] if (path / "config.json").is_file() else [f"{path}: config.json is missing"]
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        problems.append(str(error))
    keys = [f"{layer}.{e}" for layer in m.layers for e in range(m.num_experts)]
    missing = [key for key in [*keys, contract.TENSORS_FILE] if key not in m.block_digests]
    if missing:
        problems.append(f"{_manifest_file(path)}: $.block_digests: no digest for {missing[:3]} …")
    return problems


def verify(path: str | Path) -> list[str]:
    """Every problem of the artifact, digests of all blocks included; [] when it is whole.

    Reads all weights once.
    """
    path = Path(path)
    try:
        artifact = open_artifact(path)
    except ArtifactError as error:
        return str(error).splitlines()
    m = artifact.manifest
    problems = []
    for name, digest in m.source.files.items():
        if ".safetensors" not in name:
            problems += _file_problem(path / name, digest)
    if file_digest(_tensors_file(path)) != m.block_digests[contract.TENSORS_FILE]:
        problems.append(f"{_tensors_file(path)}: digest differs from the manifest's; corrupt")
    entries = open_checkpoint(path)
    for layer in m.layers:
        for expert in range(m.num_experts):
            problems += _block_problem(entries, layer, expert, m)
    return problems + _rest_problems(path, m)


def _block_problem(
    entries: dict[str, TensorEntry], layer: str, expert: int, m: Manifest
) -> list[str]:
    try:
        block = block_tensors(entries, layer, expert, m.block_tensors.get(layer, ()))
        found = block_digest(*(entry.read() for entry in block))
    except CheckpointError as error:
        return [str(error)]
    if found == m.block_digests[f"{layer}.{expert}"]:
        return []
    where = f"{block[0].file}: {layer}.{expert}"
    return [f"{where}: digest differs from the manifest's; corrupt or replaced"]


def write_prism_folder(
    directory: str | Path, manifest: Manifest, layers: Iterable[LayerTensors]
) -> None:
    """Write prism/prism.safetensors and prism/prism.json into `directory`.

    `layers` in the order of manifest.layers. The digests of prism.safetensors and of the
    checkpoint's tensors outside the experts are added to the manifest here. The caller makes the
    directory appear at its final name by one rename.
    """
    from dataclasses import replace

    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name, layer in zip(manifest.layers, layers, strict=True):
        for e in range(manifest.num_experts):
            prefix = f"{name}.{e}.gate_proj.slice_router"
            tensors[f"{prefix}.weight"] = layer.router_weight[e].float().contiguous().clone()
            tensors[f"{prefix}.bias"] = layer.router_bias[e].float().contiguous().clone()
        for part in ("means", "scalars", "usage"):
            tensors[f"{name}.{part}"] = getattr(layer, part).float().contiguous()
    file = _tensors_file(Path(directory))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save(tensors))  # NB: save_file makes it readable by its owner alone
    digests = manifest.block_digests | {
        contract.TENSORS_FILE: file_digest(file),
        contract.REST_DIGEST: _rest_digest(Path(directory), manifest),
    }
    text = replace(manifest, block_digests=digests).to_json()
    Manifest.from_json(text)  # what we write must be what we read
    _manifest_file(Path(directory)).write_text(text, encoding="utf-8")
