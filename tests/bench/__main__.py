"""Runs the benchmarks, one process each: `python -m tests.bench [NAME...]`, NAME without its bench_."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHES = {
    ".".join((*file.relative_to(HERE).parts[:-1], file.stem.removeprefix("bench_"))): file
    for file in sorted(HERE.rglob("bench_*.py"))
}
"""By name: `packing`, or `checkpoints.save` where it is in a folder."""


def main() -> int:
    """0 when every benchmark ran and met its goal."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="What each measures: tests/bench/README.md")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(BENCHES)}; all when left out")
    names = parser.parse_args().names or list(BENCHES)
    if unknown := sorted(set(names) - BENCHES.keys()):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    missed = []
    for name in names:
        print(f"\n===== bench {name} =====", flush=True)
        module = ".".join(("tests.bench", *BENCHES[name].relative_to(HERE).with_suffix("").parts))
        if subprocess.run([sys.executable, "-m", module], check=False).returncode:
            missed.append(name)
    print(f"\n{len(names) - len(missed)} of {len(names)} benchmarks met their goal" + f"; not: {missed}" * bool(missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
