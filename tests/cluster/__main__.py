"""Brings a Kubernetes cluster with two real nodes up on this machine, and takes it down.

    python -m tests.cluster up [--install]      as root; `make cluster-up`. One that is up gets our code as it is now
    python -m tests.cluster down                leaves nothing behind but the logs; `make cluster-down`
    python -m tests.cluster images              makes the images alone

What is missing on the machine is named, with the line to type; --install, or CI=true, has apt-get install it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.cluster.build import BuildError
from tests.cluster.images import ready_images
from tests.cluster.nodes.cluster import down, up
from tests.cluster.nodes.daemons import DaemonFailed
from tests.cluster.nodes.needs import CannotRun


def main() -> int:
    """0 when it is done; otherwise the reason is on stderr."""
    parser = argparse.ArgumentParser(description="A Kubernetes cluster with two real nodes, on this machine.")
    parser.add_argument("verb", choices=["up", "down", "images"])
    parser.add_argument("--install", action="store_true", help="let apt-get install what is missing")
    options = parser.parse_args()
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    try:
        if options.verb == "down":
            down()
        elif options.verb == "images":
            print(ready_images(_say).archive)
        else:
            began = time.monotonic()
            cluster = up(_say, install=options.install or in_ci)
            seconds = time.monotonic() - began
            print(f"The cluster is up, in {seconds:.0f} s. To use it, and to install the operator on it:\n")
            print(f"  export KUBECONFIG={cluster.layout.kubeconfig} PATH={cluster.programs['kubectl'].parent}:$PATH")
            print("  kubectl get nodes\n\nTo take it down: make cluster-down")
    except (BuildError, CannotRun, DaemonFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
