"""Writes what follows from other files: `python -m helm.generator [--check] [--helm PROGRAM]`.

From the comments of values.yaml the chart's README and the schema of its values; from manifests/crd the templates of
the CRDs; and, when given a `helm` to render the chart with, manifests/base. Called by `make generate` and `verify`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from helm.generator.base import render_base
from helm.generator.crds import crd_template, spec_schema
from helm.generator.readme import render_readme
from helm.generator.schema import render_schema, values_schema
from helm.generator.values import ValuesError, read_values

__all__ = ["BASE", "CHART", "chart_files", "main"]

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
CHART = _ROOT / "helm" / "finetune-operator"
BASE = _ROOT / "manifests" / "base"
_CRDS = CHART / "templates" / "crds"


def chart_files() -> dict[Path, str]:
    """The generated files of the chart. Raises ValuesError when a value is not documented."""
    chart = yaml.safe_load(_read(CHART / "Chart.yaml"))
    sections = read_values(_read(CHART / "values.yaml"))
    subcharts = [dependency["name"] for dependency in chart["dependencies"]]
    crds = sorted((_ROOT / "manifests" / "crd").glob("*.finetune-operator.io.yaml"))
    (runtimes,) = (crd for crd in crds if crd.name.startswith("finetuneruntimes."))
    definitions = yaml.safe_load(_read(_HERE / "definitions.yaml")) | {"runtimeSpec": spec_schema(_read(runtimes))}
    schema = values_schema(sections, definitions, subcharts)
    return {
        CHART / "values.schema.json": render_schema(schema),
        CHART / "README.md": render_readme(_read(_HERE / "README.in.md"), sections, chart),
        **{_CRDS / crd.name: crd_template(_read(crd)) for crd in crds},
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with --check compare them; 1 when one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--helm", type=Path, help="the helm program; without it manifests/base is left as it is")
    options = parser.parse_args(arguments)
    try:
        files = chart_files()
    except ValuesError as error:
        print(f"{CHART / 'values.yaml'}:\n{error}", file=sys.stderr)
        return 1
    faults = _settle(files, {_CRDS}, options.check)
    if options.helm:
        # Helm reads what was just written.
        base = {BASE / name: text for name, text in render_base(options.helm, CHART).items()}
        faults += _settle(base, {BASE}, options.check)
    for fault in faults:
        print(f"{fault}; run `make generate`", file=sys.stderr)
    return int(bool(faults))


def _settle(files: dict[Path, str], folders: set[Path], check: bool) -> list[str]:
    """Writes the files, and removes others in folders that hold nothing else; or says what would change."""
    faults = []
    for file in (file for folder in folders if folder.exists() for file in folder.iterdir() if file not in files):
        if check:
            faults.append(f"{file}: nothing generates this file")
        else:
            file.unlink()
    for file, text in files.items():
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or _read(file) != text:
            faults.append(f"{file}: differs from what it is generated from")
    return faults


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
