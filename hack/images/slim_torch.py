"""Makes the CUDA wheel of torch work in a CPU-only image, without NVIDIA's libraries (3 GB).

    python3 slim_torch.py SITE_PACKAGES        needs gcc, nm, readelf and strip

torch's own libraries stay, stripped. Each NVIDIA library that one of them is linked to becomes a
stub of the same soname, symbols and symbol versions, whose functions return 1: an error in all of
these interfaces. Only the CUDA runtime stays real, so that torch finds out by itself that there is
no device. All other files of NVIDIA's packages, and Triton, are removed. What is linked to what is
read from the files, so a new torch needs no new list.

SITE_PACKAGES is changed, by replacing files and never by writing into them: it may be made of hard
links. Standard library only; it runs in the image's own Python.
"""

import collections
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

REAL = re.compile(r"libcudart\.so")  # says "no device", as torch expects it to
NVIDIAS = re.compile(r"cu|nv|nccl")  # prefixes of NVIDIA's functions
UNUSED = (
    "triton",
    "cuda",
    "torch/include",
    "torch/share",
    "torch/test",
    "torch/bin/protoc*",
    "torch/lib/libtorch_cuda_linalg.so",  # loaded by its first CUDA user alone
)
STRIPPED = ("libtorch_cpu.so", "libtorch_python.so", "libtorch_cuda.so", "libc10.so")


def main(site: Path) -> None:
    for pattern in UNUSED:
        for path in site.glob(pattern):
            _remove(path)
    users = sorted({*site.glob("torch/lib/*.so*"), *site.glob("torch/_C*.so")})
    nvidias = {path.name: path for path in site.glob("nvidia/**/*.so*") if path.is_file()}
    linked = {name for user in users for name in _needed(user)} & set(nvidias)
    wanted = {name for user in users for name, _ in _symbols(user, "--undefined-only")}
    for name in sorted(linked):
        if not REAL.match(name):
            _replace_with_stub(nvidias[name], wanted)
    for path in sorted(site.glob("nvidia/**/*")):
        if not path.is_dir() and path.name not in linked:
            path.unlink()
    for path in sorted(site.glob("nvidia/**/*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for name in STRIPPED:
        _strip(site / "torch/lib" / name)
    print(f"torch without NVIDIA's libraries: {', '.join(sorted(linked))} are stubs or the runtime")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _needed(file: Path) -> set[str]:
    """The libraries that this one is linked to."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "--dynamic", file)))


def _symbols(file: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Name and version of the dynamic symbols that are defined, or undefined, in a library."""
    for line in _output("nm", "--dynamic", kind, file).splitlines():
        name, _, version = line.split()[-1].partition("@")
        yield name, version.lstrip("@")


def _replace_with_stub(file: Path, wanted: Iterable[str]) -> None:
    # Only NVIDIA's own names: some libraries also export operator new and the like. A symbol whose
    # name is its version is the version's own definition.
    wanted = set(wanted)
    exports = {
        name: version
        for name, version in _symbols(file, "--defined-only")
        if name in wanted and NVIDIAS.match(name) and name != version
    }
    versions = collections.defaultdict(list)
    for name, version in sorted(exports.items()):
        versions[version].append(name)
    versions.pop("", None)
    with tempfile.TemporaryDirectory() as folder:
        code, script, stub = (Path(folder, name) for name in ("stub.c", "stub.map", "stub.so"))
        code.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(exports)))
        blocks = (f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in versions.items())
        script.write_text("".join(blocks))
        options = [f"-Wl,--version-script={script}"] if versions else []
        soname = f"-Wl,-soname,{file.name}"
        # -fno-builtin, -w: a function of theirs may be named like one of C's.
        flags = ("-shared", "-fPIC", "-nostdlib", "-O1", "-fno-builtin", "-w", soname)
        _output("gcc", *flags, *options, "-o", stub, code)
        file.unlink()
        shutil.copyfile(stub, file)


def _strip(file: Path) -> None:
    new = file.with_suffix(".stripped")
    _output("strip", "--strip-unneeded", "-o", new, file)  # symbol tables: 180 MB in all
    new.replace(file)


def _output(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"slim_torch: {' '.join(map(str, command))[:200]}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "torch").is_dir():
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
