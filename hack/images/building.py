"""Building the images with the engine that answers.

The Dockerfiles do all of it from a public base. Where buildah builds for this machine alone
(registry localhost, no base named), base, compiler and packages are made here first (`local_base`)
and handed to the same Dockerfiles as arguments: no registry is needed, and a change of code builds
the last small layers alone.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from hack import engines
from hack.images import local_base, pip_settings
from hack.images.closure import ROOT
from hack.images.definitions import IMAGES, Image, digest
from hack.images.site_packages import OPERATOR_EXTRAS, TORCH_EXTRAS
from hack.progress import locked, say, step

EXTRAS = {"torch": TORCH_EXTRAS, "operator": OPERATOR_EXTRAS}
PUBLIC_PROMETHEUS = "prom/prometheus:v3.5.0"


def build(
    names: Iterable[str] = (),
    *,
    registry: str = "localhost",
    tag: str | None = None,
    push: bool = False,
    base: str | None = None,
    torch_index: str | None = None,
    engine: engines.Engine | None = None,
) -> dict[str, str]:
    """Builds images; name -> reference. All of them without names.

    registry: prefix of the references. tag: a digest of the sources if None; with a digest an image
    that the engine holds is not built again. base: an image with Python and pip instead of the
    Dockerfiles' own. torch_index: an index beside
    pip's own that has the torch to install (default: $PRISM_TORCH_INDEX); CPU-only and CUDA images
    differ by it alone.
    Raises KeyError (unknown name), NoEngine, MissingPackages, CalledProcessError.
    """
    wanted = [IMAGES[name] for name in (names or IMAGES)]
    engine = engine or engines.choose()
    torch_index = torch_index or os.environ.get("PRISM_TORCH_INDEX") or None
    made_here = (engine.name, registry, base, torch_index) == ("buildah", "localhost", None, None)
    origin = "slim CPU images from a base made here" if made_here else "from the public base"
    say(f"images: {engine.name}, because {engine.reason}; {origin}")
    references = {}
    with locked(engines.CACHE / "lock"), pip_settings.of_this_machine() as secrets:
        for image in wanted:
            if image.name == "prometheus" and not made_here:
                references[image.name] = PUBLIC_PROMETHEUS
                continue
            arguments = _local(image) if made_here else _public(image, base, torch_index)
            context = local_base.prometheus() if image.name == "prometheus" else ROOT
            name = image.reference(registry, tag or digest(image, context, arguments))
            if tag or not engine.has(name):
                with step(f"build {name}"):
                    given: Mapping[str, Path] = {} if made_here else secrets
                    engine.build(ROOT / image.dockerfile, context, name, arguments, given)
            if push:
                with step(f"push {name}"):
                    engine.push(name)
            references[image.name] = name
    return references


def _public(image: Image, base: str | None, torch_index: str | None) -> dict[str, str]:
    arguments = image.stages()
    if base:
        arguments["BASE"] = base
    if torch_index and image.packages == "torch":
        arguments["TORCH_INDEX"] = torch_index
    return arguments


def _local(image: Image) -> dict[str, str]:
    arguments = {"BASE": local_base.base()}
    if image.packages:
        arguments["PACKAGES"] = local_base.packages(EXTRAS[image.packages])
    if image.compiles:
        arguments["BUILDER"] = local_base.builder()
    return arguments
