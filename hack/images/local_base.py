"""Base images made on this machine with debootstrap and buildah, where no registry is needed.

Three of them, each named by a digest of what makes it and made once: the base (Debian and its
Python), the builder (base + compiler + torch's headers) and the packages (base + the installed
packages, torch slimmed). Addresses of this machine stay out: the base has no list of sources.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hack import host
from hack.engines import BUILDAH, CACHE
from hack.images import site_packages
from hack.images.closure import ROOT, closure
from hack.progress import say, step

SUITE = "bookworm"
RECIPE = "2"  # raised when the steps below make something else from the same inputs
PACKAGES = ("python3", "python-is-python3", "libgomp1", "ca-certificates")
COMPILER = ("g++",)
SITE = "/opt/prism/site-packages"
HEADERS = ("/opt/torch-include", "/opt/torch-include/torch/csrc/api/include")
SOURCES = CACHE / "sources.list"  # debootstrap's own, for the builder
SLIM = ROOT / "hack/images/slim_torch.py"
TRIMMED = (
    "var/cache/apt/archives/*.deb",
    "var/cache/debconf/*-old",
    "var/lib/apt/lists/*",
    "var/log/*.log",
    "var/log/apt",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
)


def base() -> str:
    """Debian with Python, and nothing that builds. 80 s when it has to be made."""
    name = _name("base", SUITE, *PACKAGES, *TRIMMED)
    if not _exists(name):
        with step(f"debootstrap {SUITE}"), _container("scratch", name) as root:
            command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
            _quietly([*command, SUITE, str(root), *_host_mirror()], CACHE / "debootstrap.log")
            shutil.move(root / "etc/apt/sources.list", SOURCES)
            _trim(root)
    return name


def builder() -> str:
    """The base with a compiler and the headers of this torch: for building, never shipped."""
    parent = base()
    torch = closure(("serving",))["torch"]
    name = _name("builder", parent, *COMPILER, torch.version)
    if not _exists(name):
        with step("add a compiler to the base"), _container(parent, name) as root:
            shutil.copy(SOURCES, root / "etc/apt/sources.list")
            shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
            install = ("install", "-qy", "--no-install-recommends", *COMPILER)
            for words in (("update", "-q"), install):
                _quietly(["chroot", str(root), "apt-get", *words], CACHE / "compiler.log")
            _trim(root)
            # The slimmed packages have no headers; the compiler finds these by CPATH.
            headers = Path(str(torch.locate_file("torch/include")))
            shutil.copytree(headers, root / HEADERS[0].lstrip("/"))
        _configure(name, "--env", f"CPATH={':'.join(HEADERS)}")
    return name


def packages(extras: tuple[str, ...]) -> str:
    """The base with all that these extras need in /opt/prism/site-packages; torch slimmed."""
    versions = site_packages.versions(extras)
    parent = base()
    slim = any(version.startswith("torch==") for version in versions)
    recipe = SLIM.read_text() if slim else ""
    name = _name("packages", parent, *versions, recipe)
    if not _exists(name):
        builder()
        site = CACHE / f"site-{'-'.join(extras)}"
        site_packages.make(extras, site)
        if slim:  # before the bytecode: triton and the tests of torch go
            with step("slim torch"):
                _in_builder(site, "python3", "/slim_torch.py", SITE)
        with step("compile bytecode"):
            flags = ("-qq", "-j", "0", "--invalidation-mode", "unchecked-hash")
            # Some packages carry files of other Pythons (templates, tests): those do not compile.
            _in_builder(site, "sh", "-c", f"python3 -m compileall {' '.join(flags)} {SITE} || true")
        with step("commit the packages image"), _container(parent, name) as root:
            (root / SITE.lstrip("/")).parent.mkdir(parents=True)
            _run("cp", "--archive", site, root / SITE.lstrip("/"))
        shutil.rmtree(site)
    return name


def prometheus() -> Path:
    """A folder with Debian's prometheus program: the installed one, else that of the package."""
    folder = CACHE / "prometheus"
    if not (folder / "prometheus").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        installed = shutil.which("prometheus")
        if installed:
            shutil.copy(installed, folder / "prometheus")
        else:
            with step("download Debian's prometheus (it is not installed here)"):
                _download_package("prometheus", folder)
    return folder


def _download_package(package: str, folder: Path) -> None:
    unpacked = folder / "unpacked"
    for words in (["apt-get", "update", "-qq"], ["apt-get", "download", "-qq", package]):
        subprocess.run(words, check=True, cwd=folder, stdout=sys.stderr)
    archive = next(folder.glob(f"{package}_*.deb"))
    _run("dpkg-deb", "--extract", archive, unpacked)
    shutil.copy(unpacked / f"usr/bin/{package}", folder / package)
    shutil.rmtree(unpacked)
    archive.unlink()


def _name(kind: str, *recipe: str) -> str:
    digest = hashlib.sha256("\0".join((RECIPE, *recipe)).encode()).hexdigest()[:12]
    return f"localhost/prism-{kind}:{digest}"


def _host_mirror() -> list[str]:
    """Where the host's apt gets this suite from; nothing (debootstrap's own choice) elsewhere."""
    if not shutil.which("apt-get"):
        return []
    form = "$(CODENAME) $(COMPONENT) $(REPO_URI)"
    question = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    answer = subprocess.run(question, capture_output=True, text=True).stdout
    for line in answer.splitlines():
        codename, component, address = line.split(" ", 2)
        if (codename, component) == (SUITE, "main"):
            return [address.rstrip("/")]
    return []


def _exists(image: str) -> bool:
    question = [*BUILDAH, "inspect", "--type", "image", image]
    return subprocess.run(question, capture_output=True).returncode == 0


@contextmanager
def _container(parent: str, name: str) -> Iterator[Path]:
    """The root folder of a working container; committed as `name` unless the body fails."""
    host.require(host.IMAGE_TOOLS)
    CACHE.mkdir(parents=True, exist_ok=True)
    container = _output(*BUILDAH, "from", parent)
    try:
        yield Path(_output(*BUILDAH, "mount", container))
        _output(*BUILDAH, "umount", container)
        _output(*BUILDAH, "commit", "--quiet", container, name)
    finally:
        _output(*BUILDAH, "rm", container)


def _configure(name: str, *options: str) -> None:
    container = _output(*BUILDAH, "from", name)
    try:
        _output(*BUILDAH, "config", *options, container)
        _output(*BUILDAH, "commit", "--quiet", container, name)
    finally:
        _output(*BUILDAH, "rm", container)


def _in_builder(site: Path, *command: str) -> None:
    container = _output(*BUILDAH, "from", builder())
    volumes = ("--volume", f"{site}:{SITE}", "--volume", f"{SLIM}:/slim_torch.py:ro")
    try:
        _run(*BUILDAH, "run", "--isolation", "chroot", *volumes, container, "--", *command)
    finally:
        _output(*BUILDAH, "rm", container)


def _trim(root: Path) -> None:
    for pattern in TRIMMED:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _quietly(command: list[str], log: Path) -> None:
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        say("".join(log.read_text().splitlines(keepends=True)[-15:]))
        raise subprocess.CalledProcessError(done.returncode, command)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    subprocess.run(words, check=True, stdout=sys.stderr)
