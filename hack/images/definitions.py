"""The images: which there are, and what each is made of.

An image's default tag is a digest of its sources, its Dockerfile and its arguments: the same
sources have one name, and a change is seen by every object that names the image.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hack.images.closure import ROOT

IGNORED = ("__pycache__",)


@dataclass(frozen=True, slots=True)
class Image:
    """One image. `sources` are files and folders below `context` that its Dockerfile copies."""

    name: str
    dockerfile: str
    sources: tuple[str, ...]
    packages: Literal["torch", "operator"] | None = None
    compiles: bool = False

    def stages(self) -> dict[str, str]:
        """The stages of its own that stand for the arguments PACKAGES and BUILDER.

        NB: the Dockerfile has these defaults; buildah before 1.30 skips a stage that only a default
        names as unused, and then looks for it in a registry.
        """
        made = {"PACKAGES": "installed"} if self.packages else {}
        return {**made, "BUILDER": "compiler"} if self.compiles else made

    def reference(self, registry: str, tag: str) -> str:
        return f"{registry.rstrip('/')}/prism-{self.name}:{tag}"


CORE = ("core/prism", "cli/prism_cli", "hack/images/prism")
IMAGES: Mapping[str, Image] = {
    image.name: image
    for image in (
        Image(
            "operator",
            "operator/Dockerfile",
            ("core/prism/__init__.py", "core/prism/contract.py", "operator/prism_operator"),
            packages="operator",
        ),
        Image(
            "serving",
            "serving_image/Dockerfile",
            (*CORE, "serving_image/prism_serving"),
            packages="torch",
            compiles=True,
        ),
        Image(
            "refactor",
            "refactor_job/Dockerfile",
            (*CORE, "refactor_job/prism_refactor"),
            packages="torch",
            compiles=True,
        ),
        Image(
            "example-model",
            "hack/images/example-model.Dockerfile",
            ("hack/images/copy_model.py", "examples/tiny-moe"),
        ),
        Image("prometheus", "hack/images/prometheus.Dockerfile", ("prometheus",)),
    )
}


def digest(image: Image, context: Path, arguments: Mapping[str, str]) -> str:
    """Twelve hex digits that name what the image is made of. Raises FileNotFoundError."""
    total = hashlib.sha256(repr(sorted(arguments.items())).encode())
    files = [ROOT / image.dockerfile]
    if image.packages:
        files += [ROOT / "constraints.txt", ROOT / "pyproject.toml"]
    for source in image.sources:
        files += _files(context / source)
    for file in files:
        total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:12]


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    found = (path for path in source.rglob("*") if path.is_file() and path.suffix != ".so")
    return sorted(path for path in found if not set(path.parts) & set(IGNORED))
