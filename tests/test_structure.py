"""docs/structure.md is the map: it must name every module, and no module that is gone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "core/prism",
    "refactor_job/prism_refactor",
    "serving_image/prism_serving",
    "operator/prism_operator",
    "cli/prism_cli",
)


def _modules_on_disk() -> set[str]:
    return {
        f"{package}/{path.relative_to(ROOT / package)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.read_text().strip()
    }


def _modules_on_the_map() -> set[str]:
    package, found = "", set()
    for line in (ROOT / "docs/structure.md").read_text().splitlines():
        if heading := re.match(r"### (\S+):", line):
            package = heading[1]
        elif row := re.match(r"\| (\S+\.py) \|", line):
            found.add(f"{package}/{row[1]}")
    return found


def test_the_map_names_every_module_and_no_other() -> None:
    assert _modules_on_the_map() == _modules_on_disk()
