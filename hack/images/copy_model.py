"""Copies a model directory: `python copy_model.py SOURCE TARGET`. Nothing to do when it is there.

Written to a sibling and renamed, so that a Job that is killed half-way leaves nothing that looks
whole. Standard library only; it runs in the example-model image.
"""

import filecmp
import os
import shutil
import sys
from pathlib import Path


def copied(source: Path, target: Path) -> bool:
    """Whether every file of the source is in the target with the same bytes."""
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    _, different, missing = filecmp.cmpfiles(source, target, names, shallow=False)
    return not different and not missing


def copy(source: Path, target: Path) -> None:
    """Puts the directory in place. Raises OSError; FileExistsError for another one's directory."""
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not a copy of {source}: choose another name")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, partial, copy_function=shutil.copyfile)
    os.replace(partial, target)


def main(words: list[str]) -> None:
    if len(words) != 2:
        sys.exit(__doc__)
    source, target = map(Path, words)
    if not source.is_dir():
        sys.exit(f"no directory {source}")
    if target.is_dir() and copied(source, target):
        print(f"{target} is there already")
        return
    try:
        copy(source, target)
    except OSError as error:
        sys.exit(f"cannot copy {source} to {target}: {error}")
    print(f"copied {source} to {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
