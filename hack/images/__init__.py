"""The images of the product and of its demo: `python3 -m hack.images`, or `build` from Python."""

from hack.images.building import build
from hack.images.definitions import IMAGES

__all__ = ["IMAGES", "build"]
