"""`python3 -m hack.images build [NAME...]`: hack/README.md. References go to stdout as JSON."""

import argparse
import json
import subprocess
import sys

from hack.engines import NoEngine
from hack.host import MissingPackages
from hack.images import IMAGES, build
from hack.progress import step


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hack.images", description="Build Prism's images.")
    parser.add_argument("command", choices=["build"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(IMAGES)}; all")
    parser.add_argument("--registry", default="localhost", help="prefix of the image names")
    parser.add_argument("--tag", help="default: a digest of each image's sources")
    parser.add_argument("--push", action="store_true", help="send them to the registry")
    parser.add_argument("--base", help="an image with Python 3.11+ and pip to build on")
    parser.add_argument("--torch-index", help="an index that has the torch to install")
    given = parser.parse_args(words)
    unknown = sorted(set(given.names) - set(IMAGES))
    if unknown:
        parser.error(f"no image {', '.join(unknown)}: choose from {', '.join(IMAGES)}")
    if given.push and given.registry == "localhost":
        parser.error("--push needs --registry")
    if given.tag == "latest":
        parser.error("--tag latest: a node would pull it again at every start; name a version")
    return given


def main() -> None:
    given = arguments()
    try:
        with step("images"):
            references = build(
                given.names,
                registry=given.registry,
                tag=given.tag,
                push=given.push,
                base=given.base,
                torch_index=given.torch_index,
            )
    except subprocess.CalledProcessError as error:
        sys.exit(f"hack.images: {' '.join(map(str, error.cmd))[:300]} failed")
    except (NoEngine, MissingPackages, ValueError, OSError) as error:
        sys.exit(f"hack.images: {error}")
    print(json.dumps(references, indent=2))


if __name__ == "__main__":
    main()
