"""Build and load the C++ extension, kernels/cpu/*.cpp.

Images build it ahead with `python -m prism.kernels.build OUT.so`. Knows compilers and files,
nothing of what the kernels compute. Decision: the compiler is called directly instead of through
torch.utils.cpp_extension: no setuptools or ninja at run time, no Python headers, half the code,
and one library runs on every machine of its architecture, since instruction sets are chosen in it
at run time. The cache is keyed by torch version, sources, compiler and flags; processes that want
the same library wait for one of them to build it.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from prism import contract

_SOURCES = Path(__file__).parent / "cpu"
_TORCH = Path(torch.__file__).parent
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
_TIMEOUT_S = 600


class BuildError(RuntimeError):
    """The extension cannot be built or loaded here; the message says why."""


def build(out: Path, compiler: str) -> None:
    """Compile the extension to `out`, which appears complete or not at all."""
    includes = [f"-isystem{_TORCH / 'include'}"]
    includes.append(f"-isystem{_TORCH / 'include/torch/csrc/api/include'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build-") as scratch:
        sources = sorted(_SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [
                pool.submit(_run, compiler, *_FLAGS, *includes, "-c", str(source), "-o", str(obj))
                for source, obj in zip(sources, objects, strict=True)
            ]:
                done.result()
        library = Path(scratch) / "extension.so"
        link = ["-shared", "-fopenmp", f"-L{_TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run(compiler, *map(str, objects), *link, "-o", str(library))
        os.replace(library, out)


def _run(*command: str) -> None:
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        first = [line for line in lines if "error" in line][:5] or lines[-5:]
        raise BuildError(f"{command[0]} failed: " + "\n".join(first)) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error


def find_compiler(environ: Mapping[str, str]) -> str:
    """$CXX, c++, g++ or clang++, whichever is there first; BuildError when none is."""
    for name in (environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def _key(compiler: str) -> str:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=60, check=False
    ).stdout
    digest = hashlib.sha256("\0".join([version, platform.machine(), *_FLAGS]).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"torch-{torch.__version__}-{digest.hexdigest()[:16]}"


def cached_library(environ: Mapping[str, str]) -> Path:
    """The library in the cache folder, built now if it is not there; raises BuildError."""
    compiler = find_compiler(environ)
    root = Path(environ.get(contract.ENV_CACHE) or Path.home() / ".cache/prism")
    folder = root / "kernels" / _key(compiler)
    library = folder / "prism_cpu.so"
    if not library.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system should we be killed
                if not library.exists():
                    build(library, compiler)
        except OSError as error:
            raise BuildError(f"cannot write the kernel cache: {error}") from error
    return library


@cache
def load() -> str:
    """Load the extension into torch.ops.prism, once; gives the reason for where it came from.

    Raises BuildError when it cannot be built; OSError when the library that the environment names
    does not load: whoever names one wants that one, and no fallback.
    """
    named = os.environ.get(contract.ENV_CPU_EXTENSION)
    if named:
        torch.ops.load_library(named)  # type: ignore[no-untyped-call]
        return f"prebuilt {named}"
    library = cached_library(os.environ)
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise BuildError(f"{library}: {error}") from error
    return f"built for torch {torch.__version__}"


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m prism.kernels.build OUT.so", file=sys.stderr)
        return contract.ExitCode.USAGE
    try:
        build(Path(argv[0]), find_compiler(os.environ))
        torch.ops.load_library(argv[0])  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as error:
        print(f"prism.kernels.build: {error}", file=sys.stderr)
        return contract.ExitCode.FAILED
    print(f"{argv[0]}: loads; this machine would use {torch.ops.prism.isa_name()}")
    return contract.ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
