"""Images of the node: giving it an archive, or only those blobs of a layout that it lacks.

A whole archive of a torch image takes 16 s to import; its last layer, the code, well under one. The
node's content store is addressed by digest, so an archive without the blobs that are there imports
to the same image.
"""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from node.settings import SOCKET
from node.shell import output, run

CTR = ("ctr", "--address", SOCKET, "--namespace", "k8s.io")
NAME = "io.containerd.image.name"


def load(archive: Path) -> None:
    """Gives the node a docker-archive or an OCI archive, or an image of an OCI layout.

    A layout is a folder; one image of it is FOLDER:NAME, NAME as in its index.
    Raises FileNotFoundError, LookupError (no such image in the layout), CalledProcessError.
    """
    folder, _, name = str(archive).partition(":")
    if name:
        load_layout(Path(folder), name)
    elif not archive.exists():
        raise FileNotFoundError(f"no archive {archive}")
    else:
        run(*CTR, "images", "import", archive, silent=True)


def load_layout(folder: Path, name: str) -> None:
    """Gives the node the image of this name, and of its blobs those that it lacks."""
    known = set(output(*CTR, "content", "ls", "--quiet").split())
    entry = _entry(folder, name)
    missing = [digest for digest in _blobs(folder, entry) if digest not in known]
    # The manifest always travels: importing it gives the image its name.
    missing.append(entry["digest"])
    entry["annotations"] = {**entry.get("annotations", {}), NAME: name}
    index = {"schemaVersion": 2, "manifests": [entry]}
    command = [str(word) for word in (*CTR, "images", "import", "-")]
    devnull = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=devnull) as importing:
        assert importing.stdin  # a pipe: the layers of torch are not written once more
        with importing.stdin, tarfile.open(fileobj=importing.stdin, mode="w|") as tar:
            _add(tar, "oci-layout", {"imageLayoutVersion": "1.0.0"})
            for digest in dict.fromkeys(missing):
                path = f"blobs/{digest.replace(':', '/')}"
                tar.add(folder / path, arcname=path)
            _add(tar, "index.json", index)
    if importing.returncode:
        raise subprocess.CalledProcessError(importing.returncode, command)


def _entry(folder: Path, name: str) -> dict[str, Any]:
    index = json.loads((folder / "index.json").read_text())
    entry: dict[str, Any]
    for entry in index["manifests"]:
        if entry.get("annotations", {}).get("org.opencontainers.image.ref.name") == name:
            return entry
    raise LookupError(f"no image {name} in the layout {folder}")


def _blobs(folder: Path, entry: dict[str, Any]) -> Iterator[str]:
    path = folder / "blobs" / entry["digest"].replace(":", "/")
    manifest = json.loads(path.read_text())
    yield manifest["config"]["digest"]
    for layer in manifest["layers"]:
        yield layer["digest"]


def _add(tar: tarfile.TarFile, path: str, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    info = tarfile.TarInfo(path)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
