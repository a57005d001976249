"""The repository as a product: what is where, what is packed, who may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "finetune_api": ROOT / "operator",
    "finetune_operator": ROOT / "operator",
    "finetune_client": ROOT / "operator",
    "finetune_trainers": ROOT / "trainers",
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str) -> str:
    """What a fresh interpreter in the repository's root prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_standard_library_keeps_its_operator() -> None:
    printed = python(
        "import sys; sys.modules.pop('operator', None); import operator; print(operator.__file__, operator.add(2, 3))"
    )
    file, total = printed.rsplit(" ", 1)
    assert not Path(file).is_relative_to(ROOT)
    assert total == "5"


@pytest.mark.parametrize("folder", ["operator", "trainers", "tests", "tests/operator", "tests/trainers"])
def test_a_folder_that_holds_packages_or_tests_is_not_a_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_typed_and_imports_from_its_root(package: str) -> None:
    folder = PACKAGES[package] / package
    assert (folder / "py.typed").exists()
    assert python(f"import {package}; print({package}.__file__)") == str(folder / "__init__.py")


def test_the_contract_needs_only_pydantic_yaml_and_the_standard_library() -> None:
    imported = {
        name.partition(".")[0]
        for file in (ROOT / "operator/finetune_api").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in _imports(node)
    }
    others = imported - set(sys.stdlib_module_names) - {"finetune_api"}
    assert others <= {"pydantic", "pydantic_core", "yaml"}


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        return [node.module or ""]
    return []


@pytest.mark.parametrize("module", ["finetune_api.job", "finetune_operator.__main__", "finetune_client.cli"])
def test_what_stands_under_operator_loads_without_torch_ray_and_kubernetes(module: str) -> None:
    heavy = "{'torch', 'ray', 'transformers', 'deepspeed', 'kubernetes'}"
    assert python(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_the_wheel_holds_the_four_packages_and_no_folder_named_operator(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    version = PYPROJECT["project"]["version"]
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, f"finetune_operator-{version}.dist-info"}
    packed = {name for name in names if name.endswith((".py", "py.typed"))}
    sources = [file for package, root in PACKAGES.items() for file in (root / package).rglob("*")]
    assert packed == {
        str(file.relative_to(file.parents[len(file.relative_to(ROOT).parts) - 2]))
        for file in sources
        if file.suffix == ".py" or file.name == "py.typed"
    }


def test_packages_that_cannot_be_asked_for_their_needs_are_locked_at_the_version_written_down() -> None:
    """Another version would not match the entry in tool.uv.dependency-metadata: uv would then run its setup.py."""
    locked = {entry["name"]: entry["version"] for entry in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    stated = {entry["name"]: entry["version"] for entry in PYPROJECT["tool"]["uv"]["dependency-metadata"]}
    assert stated == {name: locked[name] for name in stated}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "tests/bench/README.md"])
def test_every_make_verb_on_a_page_exists(page: str) -> None:
    verbs = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=[` \n])", _code(page))) <= verbs


def _code(page: str) -> str:
    """The commands on a page: fenced blocks and inline code."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", (ROOT / page).read_text(), flags=re.DOTALL))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"])
def test_every_link_to_a_file_on_a_page_leads_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []
