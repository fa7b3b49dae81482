"""What the built images really hold: read from their layers, by buildah in the tool's own store.

Skips where there is no buildah, no root, or nothing was built (`make images` builds all).
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack import engines
from hack.images import IMAGES
from hack.progress import locked

ROOT = Path(__file__).resolve().parents[2]
MARKER = "settings-of-the-building-host"
BASE, RESULT = "localhost/prism-test-base:1", "localhost/prism-test-operator:1"
# Stands for pip: proves that it saw the settings and the CA, and installs one file. It is in the
# base's layer, so it must not spell the marker itself.
FAKE_PIP = f"""
import os, sys
from pathlib import Path
if "install" in sys.argv:
    marker = {MARKER[::-1]!r}[::-1]
    assert marker in Path(os.environ["PIP_CONFIG_FILE"]).read_text()
    assert marker + "-ca" in Path("/run/secrets/ca").read_text()
    target = Path(sys.argv[sys.argv.index("--target") + 1])
    target.mkdir(parents=True)
    (target / "installed.py").write_text("")
"""


def output(*words: object) -> str:
    command = [str(word) for word in words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def engine() -> engines.Engine:
    if os.geteuid() or not all(map(shutil.which, ("buildah", "skopeo"))):
        pytest.skip("needs root, buildah and skopeo")
    return engines.Engine("buildah", "test")


def built(engine: engines.Engine, name: str) -> str:
    """The newest image of this name, as buildah lists them."""
    found = [i for i in engine.images() if i.startswith(f"localhost/prism-{name}:")]
    if not found:
        pytest.skip(f"no prism-{name} was built here: make images")
    return found[0]


@pytest.fixture
def operator_with_settings(engine: engines.Engine, tmp_path: Path) -> Iterator[str]:
    """operator/Dockerfile built from a base with a fake pip, with settings and a CA as secrets."""
    module = tmp_path / "pip/__main__.py"
    module.parent.mkdir()
    module.write_text(FAKE_PIP)
    secrets = {"pip": tmp_path / "pip.conf", "ca": tmp_path / "ca.crt"}
    secrets["pip"].write_text(f"[global]\nindex-url = https://{MARKER}/simple\n")
    secrets["ca"].write_text(f"{MARKER}-ca")
    with locked(engines.CACHE / "lock"):
        container = output(*engines.BUILDAH, "from", built(engine, "base"))
        try:
            target = "/usr/lib/python3/dist-packages/pip"
            output(*engines.BUILDAH, "copy", container, module.parent, target)
            output(*engines.BUILDAH, "commit", container, BASE)
        finally:
            output(*engines.BUILDAH, "rm", container)
        try:
            dockerfile = ROOT / "operator/Dockerfile"
            stages = IMAGES["operator"].stages()
            engine.build(dockerfile, ROOT, RESULT, {"BASE": BASE, **stages}, secrets)
            yield RESULT
        finally:
            engine.remove([i for i in (RESULT, BASE) if engine.has(i)])


def test_pip_settings_and_ca_of_the_host_stay_in_no_layer(
    engine: engines.Engine, operator_with_settings: str, tmp_path: Path
) -> None:
    engine.layout(operator_with_settings, tmp_path / "layout")
    blobs = [path.read_bytes() for path in (tmp_path / "layout/blobs/sha256").iterdir()]
    assert any(b"site-packages/installed.py" in blob for blob in blobs)  # the layer was looked at
    assert not any(MARKER.encode() in blob for blob in blobs)


def test_job_and_serving_share_the_layer_of_torch(engine: engines.Engine) -> None:
    form = "{{range .OCIv1.RootFS.DiffIDs}}{{.}} {{end}}"

    def layers(name: str) -> list[str]:
        words = (*engines.BUILDAH, "inspect", "--type", "image", "--format", form)
        return output(*words, built(engine, name)).split()

    packages = layers("packages")
    assert len(packages) == 2  # the base, and the packages
    serving, refactor = layers("serving"), layers("refactor")
    assert serving[:2] == refactor[:2] and serving[0] == packages[0]


@pytest.mark.parametrize("name", ["operator", "serving", "refactor", "example-model"])
def test_result_holds_no_build_tool(engine: engines.Engine, name: str) -> None:
    with locked(engines.CACHE / "lock"):
        container = output(*engines.BUILDAH, "from", built(engine, name))
        try:
            root = Path(output(*engines.BUILDAH, "mount", container))
            folders = [root / path for path in ("bin", "usr/bin", "usr/local/bin")]
            tools = ("gcc", "g++", "cc", "c++", "ld", "make", "ninja", "pip", "pip3", "git")
            assert not [f / tool for f in folders for tool in tools if (f / tool).exists()]
            assert not (root / "etc/apt/sources.list").exists()
        finally:
            output(*engines.BUILDAH, "rm", container)
