"""What a machine must have before a cluster with nodes can be started on it; everything that lacks is named at once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

__all__ = ["PACKAGES", "CannotRun", "check", "install_line", "missing_packages"]

PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ipset": "ipset",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "debootstrap": "debootstrap",
    "/usr/bin/python3.11": "python3.11",
}
"""Programs, and Debian's packages that bring them."""

_ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive"}


class CannotRun(Exception):
    """This machine cannot run a cluster; the message says why, and what to type."""


def check(install: bool, say: Callable[[str], None]) -> None:
    """Raises CannotRun when something lacks. With `install` packages are installed instead, and said so."""
    if os.geteuid() != 0:
        raise CannotRun("a cluster with nodes needs root: it makes network namespaces, mounts and control groups")
    missing = missing_packages()
    if missing and not install:
        raise CannotRun(f"programs are missing. Install them with\n\n  {install_line(missing)}\n\nor add --install")
    if missing:
        say(f"installing {', '.join(missing)}")
        _install(missing)
    filesystems = Path("/proc/filesystems").read_text(encoding="utf-8")
    if "overlay" not in filesystems:
        subprocess.run(["modprobe", "overlay"], check=False, capture_output=True)
        if "overlay" not in Path("/proc/filesystems").read_text(encoding="utf-8"):
            raise CannotRun("the kernel has no overlay file system, which containers are made of")


def missing_packages() -> list[str]:
    """Debian's packages whose programs are not here."""
    return sorted({package for program, package in PACKAGES.items() if not _is_there(program)})


def install_line(packages: list[str]) -> str:
    """What a person types to have them."""
    return f"apt-get update && apt-get install --no-install-recommends {' '.join(packages)}"


def _is_there(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def _install(packages: list[str]) -> None:
    for command in (
        ["apt-get", "update", "--quiet"],
        ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | _ENVIRONMENT)
        if done.returncode:
            raise CannotRun(f"{' '.join(command)} failed:\n{done.stderr.strip()[-1000:]}")
