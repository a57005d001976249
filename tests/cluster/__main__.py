"""Brings a Kubernetes cluster with two real nodes up on this machine, and takes it down.

    python -m tests.cluster up [--install]   as root; `make cluster-up`. One that is up gets our code as it is now.
                                             KubeRay is on it, and what is printed installs the operator
    python -m tests.cluster down             leaves nothing behind but the logs; `make cluster-down`
    python -m tests.cluster images           makes the images alone

What is missing on the machine is named, with the line to type; --install, or CI=true, has apt-get install it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.cluster.build import BuildError
from tests.cluster.first_steps import commands, write_first_job
from tests.cluster.images import ready_images
from tests.cluster.nodes.cluster import down, up
from tests.cluster.nodes.daemons import DaemonFailed
from tests.cluster.nodes.kuberay import install_kuberay
from tests.cluster.nodes.layout import layout
from tests.cluster.nodes.needs import CannotRun
from tests.cluster.tools import ToolFailed


def main() -> int:
    """0 when it is done; otherwise the reason is on stderr."""
    parser = argparse.ArgumentParser(description="A Kubernetes cluster with two real nodes, on this machine.")
    parser.add_argument("verb", choices=["up", "down", "images"])
    parser.add_argument("--install", action="store_true", help="let apt-get install what is missing")
    options = parser.parse_args()
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    try:
        if options.verb == "down":
            left = down()
            if left:
                print("This is left behind:", *left, sep="\n  ", file=sys.stderr)
                return 1
        elif options.verb == "images":
            print(ready_images(_say).archive)
        else:
            began = time.monotonic()
            cluster = up(_say, install=options.install or in_ci)
            install_kuberay(cluster, _say)
            write_first_job(cluster)
            seconds = time.monotonic() - began
            print(f"The cluster is up, with KubeRay, in {seconds:.0f} s. To install the operator and run a job:\n")
            print(f"{commands(cluster.layout, cluster.programs)}\n\nTo take it down: make cluster-down")
    except (BuildError, CannotRun, DaemonFailed, OSError, ToolFailed) as error:
        print(error, file=sys.stderr)
        if layout().settings.exists():
            print("\nThere is a cluster, or a part of one. To take it down: make cluster-down", file=sys.stderr)
        return 1
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
