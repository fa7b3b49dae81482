"""Names, tags, arguments and secrets of the images, and what the Dockerfiles promise."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hack import engines
from hack.images import IMAGES, building, closure, copy_model, definitions, pip_settings
from hack.images.__main__ import arguments

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = {image.name: ROOT / image.dockerfile for image in IMAGES.values()}
# Programs that build; none may be installed into the stage that ships.
BUILDERS = re.compile(r"\b(gcc|g\+\+|build-essential|make|cmake|ninja-build|git|pip install)\b")


def stages(dockerfile: str) -> list[list[str]]:
    """The instructions of each stage, comments left out and continued lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.M).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("FROM ")]
    return [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


@pytest.mark.parametrize("file", DOCKERFILES.values(), ids=list(DOCKERFILES))
def test_result_runs_as_a_numbered_user_without_build_tools(file: Path) -> None:
    result = stages(file.read_text())[-1]
    assert [line for line in result if line.startswith("USER ")] == ["USER 65532:65532"]
    assert not [line for line in result if BUILDERS.search(line)]
    assert not [line for line in result if line.startswith("ADD ")]


@pytest.mark.parametrize("file", DOCKERFILES.values(), ids=list(DOCKERFILES))
def test_base_is_an_argument_with_a_pinned_public_default(file: Path) -> None:
    default = re.search(r"^ARG BASE=(\S+)$", file.read_text(), re.M)
    assert default and re.fullmatch(r"[a-z/]+:[\w.-]+", default[1])
    assert not default[1].endswith(":latest")


def test_pip_runs_only_with_mounted_settings_and_leaves_no_cache() -> None:
    for file in DOCKERFILES.values():
        for line in (line for stage in stages(file.read_text()) for line in stage):
            if "pip install" in line:
                assert "--mount=type=secret,id=pip" in line and "--mount=type=secret,id=ca" in line
                assert "--no-cache-dir" in line and "PIP_CONFIG_FILE=/run/secrets/pip" in line
            assert not re.match(r"(ENV|ARG) PIP_", line)


def test_job_and_serving_share_the_stages_that_make_the_torch_layer() -> None:
    def shared(name: str) -> str:
        text = DOCKERFILES[name].read_text()
        begin = text.index("# ---- packages")
        return text[begin : text.index("# ---- end of what both")]

    assert shared("serving") == shared("refactor")


def test_every_source_that_names_an_image_is_there_and_copied() -> None:
    for image in IMAGES.values():
        copied = DOCKERFILES[image.name].read_text()
        for source in image.sources:
            assert source in copied
            assert image.name == "prometheus" or (ROOT / source).exists()


def test_constraints_pin_versions_and_name_no_index() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and not re.search(r"^-", text, re.M)
    pins = closure.constraints()
    assert {"torch", "transformers", "kopf", "fastapi"} <= set(pins)
    assert not [name for name in pins if closure.FOLLOWS_TORCH.match(name)]


def test_a_constraints_line_with_an_address_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("torch==2.15.0\n--index-url https://example.org/simple\n")
    with pytest.raises(ValueError, match=r"constraints.txt:2: expected NAME==VERSION"):
        closure.constraints(file)


def test_closure_follows_extras_and_leaves_the_project_out() -> None:
    operator = closure.closure(["operator"])
    assert {"kopf", "aiohttp", "multidict"} <= set(operator)
    assert not {"torch", "numpy", "moe-prism"} & set(operator)
    with pytest.raises(KeyError):
        closure.closure(["no-such-extra"])


def test_requirements_are_those_of_the_extras_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "requirements.py"
    script.write_text((ROOT / "hack/images/requirements.py").read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())

    def run(*extras: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), *extras]
        return subprocess.run(command, capture_output=True, text=True)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = set(project["optional-dependencies"]["operator"])
    assert set(run("operator").stdout.splitlines()) == wanted
    assert "nonsense" in run("nonsense").stderr and run("nonsense").returncode == 1
    assert run().returncode == 1


def test_tag_is_a_digest_of_sources_dockerfile_and_arguments(tmp_path: Path) -> None:
    image = definitions.Image("x", "operator/Dockerfile", ("code",))
    code = tmp_path / "code"
    (code / "__pycache__").mkdir(parents=True)
    (code / "a.py").write_text("1")
    first = definitions.digest(image, tmp_path, {"BASE": "b"})
    (code / "__pycache__/a.pyc").write_text("bytecode")
    assert definitions.digest(image, tmp_path, {"BASE": "b"}) == first
    assert definitions.digest(image, tmp_path, {"BASE": "c"}) != first
    (code / "a.py").write_text("2")
    assert definitions.digest(image, tmp_path, {"BASE": "b"}) != first


def test_an_image_that_the_engine_holds_is_not_built_again(programs, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(engines, "CACHE", tmp_path)
    programs.add("docker", f'[ "$2" != inspect ] || [ -e {tmp_path}/built ]')
    engine = engines.Engine("docker", "test")

    def build() -> str:
        return building.build(["operator"], engine=engine, registry="r.example")["operator"]

    name = build()
    assert re.fullmatch(r"r\.example/prism-operator:[0-9a-f]{12}", name)
    assert len([call for call in programs.calls if call.startswith("docker build")]) == 1
    (tmp_path / "built").touch()
    assert build() == name
    assert len([call for call in programs.calls if call.startswith("docker build")]) == 1


def test_torch_index_base_and_push_reach_the_engine(programs, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(engines, "CACHE", tmp_path)
    programs.add("docker")
    made = building.build(
        ["serving", "prometheus"],
        registry="r.example",
        tag="1",
        push=True,
        base="python:3.13-slim",
        torch_index="https://torch.example/cpu",
        engine=engines.Engine("docker", "test"),
    )
    assert made == {
        "serving": "r.example/prism-serving:1",
        "prometheus": building.PUBLIC_PROMETHEUS,
    }
    built, pushed = (call for call in programs.calls if "inspect" not in call)
    assert "--build-arg BASE=python:3.13-slim" in built
    assert "--build-arg TORCH_INDEX=https://torch.example/cpu" in built
    assert pushed == "docker push r.example/prism-serving:1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "nothing"], "no image nothing"),
        (["build", "--push"], "--push needs --registry"),
        (["build", "--tag", "latest"], "name a version"),
        ([], "command"),
    ],
)
def test_wrong_arguments_are_refused_with_a_reason(words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        arguments(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_pip_settings_become_secrets_without_folders_of_this_machine(tmp_path: Path) -> None:
    listing = (
        "global.cert='/etc/ssl/own.crt'\nglobal.index-url='https://old.example/simple'\n"
        ":env:.index-url='https://user:word@own.example/simple'\n"
        ":env:.find-links='/opt/wheels'\n:env:.default-timeout='180'"
    )
    found = pip_settings.secrets(pip_settings.parse(listing), tmp_path)
    assert found["ca"] == Path("/etc/ssl/own.crt")
    assert found["pip"].read_text().splitlines() == [
        "[global]",
        "index-url = https://user:word@own.example/simple",
        "timeout = 180",
        "cert = /run/secrets/ca",
    ]
    assert found["pip"].stat().st_mode & 0o077 == 0
    assert pip_settings.secrets({}, tmp_path) == {}


def test_model_is_copied_once_and_a_half_copy_is_never_seen(tmp_path: Path, capsys) -> None:
    source, target = tmp_path / "source", tmp_path / "claim/models/tiny"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (target.parent / ".tiny.partial").mkdir(parents=True)  # a killed Job's
    copy_model.main([str(source), str(target)])
    assert (target / "config.json").read_text() == "{}"
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    copy_model.main([str(source), str(target)])
    assert "is there already" in capsys.readouterr().out


def test_another_models_directory_is_not_overwritten(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, text in ((source, "a"), (target, "b")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    with pytest.raises(SystemExit, match="is not a copy of"):
        copy_model.main([str(source), str(target)])
    assert (target / "config.json").read_text() == "b"
