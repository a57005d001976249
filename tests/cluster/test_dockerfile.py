"""What is built without Docker follows from the Dockerfiles; what the builder would not understand is refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.cluster.dockerfile import read_dockerfile

ROOT = Path(__file__).resolve().parents[2]
OURS = [ROOT / "operator" / "Dockerfile", ROOT / "trainers" / "Dockerfile"]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.parent.name)
def test_ours_run_as_a_numbered_user_who_is_not_root(path: Path) -> None:
    read = read_dockerfile(path)
    uid, gid = map(int, read.user.split(":"))
    assert uid > 0
    assert gid > 0
    assert f":x:{uid}:{gid}:" in read.arguments["ACCOUNT"]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.parent.name)
def test_ours_carry_the_version_of_the_project(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    labels = read_dockerfile(path).labels
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.parent.name)
def test_ours_install_extras_that_exist(path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    words = read_dockerfile(path).words("EXTRAS")
    assert set(words[1::2]) <= set(extras)
    assert set(words[::2]) == {"--extra"}


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.parent.name)
def test_ours_have_no_compiler(path: Path) -> None:
    assert not {"g++", "gcc", "build-essential", "ninja-build"} & set(read_dockerfile(path).words("PACKAGES"))


def test_the_operators_leaves_the_official_client_to_those_who_have_a_kubeconfig() -> None:
    """It is four times as large as everything else that is installed there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert read_dockerfile(OURS[0]).words("EXTRAS") == ["--extra", "operator"]
    assert not [line for line in extras["operator"] if line.startswith("kubernetes")]
    assert [line for line in extras["client"] if line.startswith("kubernetes")]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.parent.name)
def test_ours_list_the_packages_of_every_environment_that_they_have(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    environments = set(re.findall(r"^COPY --from=\w+ (/opt/\w+) /opt/\w+$", text, re.MULTILINE))
    assert environments
    for one in environments:
        assert f"--output-file {one}/sbom.cdx.json {one}/bin/python" in text


def test_the_last_stage_alone_says_how_a_container_starts(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text(
        '# words\nARG A="one two"\nFROM debian AS first\nENV B=early\nUSER 1:1\nRUN make \\\n    all\n'
        'FROM debian\nENV C="late"\nUSER 2:2\nCMD ["sleep", "1"]\n'
    )
    read = read_dockerfile(file)
    assert read.words("A") == ["one", "two"]
    assert read.environment == {"C": "late"}
    assert (read.user, read.command) == ("2:2", ["sleep", "1"])


def test_an_instruction_that_the_builder_does_not_know_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text('FROM debian\nENTRYPOINT ["sh"]\n')
    with pytest.raises(ValueError, match="ENTRYPOINT"):
        read_dockerfile(tmp_path / "Dockerfile")
