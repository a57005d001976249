"""What the cluster changes on the machine itself, and takes back: namespaces, control groups, mounts, settings.

Every function may be called again, also on what an earlier call left half done.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cluster.nodes.configs import BRIDGE
from tests.cluster.nodes.daemons import kill_all, processes_naming
from tests.cluster.nodes.layout import HOST_ADDRESS, NETWORK, NODES, Layout, Node

__all__ = [
    "keep_settings",
    "kill_group",
    "left_behind",
    "make_group",
    "make_namespace",
    "remove_group",
    "remove_namespace",
    "restore_settings",
    "unmount_below",
]

_SETTINGS = ("kernel/panic", "kernel/panic_on_oops", "vm/overcommit_memory", "vm/panic_on_oom")
"""The kubelet sets them, for the whole machine."""
_SYS = Path("/proc/sys")
_STRAYS = (
    "/var/lib/kubelet",
    "/var/lib/cni",
    "/var/log/containers",
    "/usr/libexec/kubernetes",
    "/run/containerd",
    "/run/xtables.lock",
)
"""What kubelet, containerd and iptables make wherever they are told to work."""
_GROUPS = Path("/sys/fs/cgroup")
_HOST_END = "finetune-0"
"""This machine's end of the cable to the first node's bridge."""
_CONTROLLERS = "+cpuset +cpu +memory +pids"


def keep_settings(layout: Layout) -> None:
    """Writes down what the machine was like, once: its settings, and which files were not there."""
    if not layout.settings.exists():
        settings = {name: (_SYS / name).read_text(encoding="ascii").strip() for name in _SETTINGS}
        absent = [path for path in _STRAYS if not Path(path).exists()]
        before = {"settings": settings, "absent": absent, "chains": sorted(_chains())}
        layout.settings.write_text(json.dumps(before), encoding="utf-8")


def restore_settings(layout: Layout) -> None:
    """Makes it so again."""
    before = _before(layout)
    for name in _changed(before):
        (_SYS / name).write_text(before["settings"][name], encoding="ascii")
    for path in map(Path, before["absent"]):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def left_behind(layout: Layout) -> list[str]:
    """What of a cluster is still on this machine, one line each: all that the functions here and `daemons` make, and
    what differs from before."""
    before = _before(layout)
    pids = {pid for folder in (layout.run, layout.pki) for pid in processes_naming(str(folder))}
    found = [f"process {pid}" for pid in sorted(pids | {pid for node in NODES for pid in _members(node)})]
    found += [f"mount {point}" for folder in (layout.run, layout.root) for point in _mounts_below(folder)]
    found += [f"network namespace {node.namespace}" for node in NODES if Path("/run/netns", node.namespace).exists()]
    found += [f"network link {_HOST_END}"] * Path("/sys/class/net", _HOST_END).exists()
    found += [f"control group {group}" for node in NODES for group in _groups(node) if group.exists()]
    found += [f"chain of iptables {chain}" for chain in sorted(_chains() - {*before["chains"]})]
    found += [f"setting {name}, which was {before['settings'][name]}" for name in _changed(before)]
    return found + [f"file {path}" for path in before["absent"] if Path(path).exists()]


def _before(layout: Layout) -> dict[str, Any]:
    """What `keep_settings` wrote down; where there is nothing, nothing is known to have changed."""
    kept = json.loads(layout.settings.read_text(encoding="utf-8")) if layout.settings.exists() else {}
    return {"settings": {}, "absent": [], "chains": []} | kept


def _changed(before: dict[str, Any]) -> list[str]:
    settings = before["settings"].items()
    return [name for name, value in settings if (_SYS / name).read_text(encoding="ascii").strip() != value]


def _chains() -> set[str]:
    """Those of this machine's own rules that Kubernetes and CNI make."""
    program = shutil.which("iptables-save", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    rules = subprocess.run([program], capture_output=True, text=True).stdout if program else ""
    return {line.split()[0][1:] for line in rules.splitlines() if line.startswith((":KUBE-", ":CNI-"))}


def make_namespace(node: Node, first: Node) -> None:
    """The node's network: a namespace with a bridge for its pods, tied to the first node's bridge.

    The first node's is tied to this machine instead, which so reaches nodes and pods; nothing is routed any further.
    """
    if not Path("/run/netns", node.namespace).exists():
        _ip("netns", "add", node.namespace)
        _ip("link", "set", "lo", "up", inside=node)
        _ip("link", "add", BRIDGE, "type", "bridge", inside=node)
        _ip("address", "add", f"{node.pods}.0.1/16", "dev", BRIDGE, inside=node)
        _ip("link", "set", BRIDGE, "up", inside=node)
        _set_inside(node, "net/ipv4/ip_forward", "1")
        # So that what one pod of a node sends another by a service's address comes back through the same rules.
        _set_inside(node, "net/bridge/bridge-nf-call-iptables", "1")
        if node == first:
            _tie_to_machine(node)
        else:
            _tie_to_first(node, first)


def _tie_to_machine(first: Node) -> None:
    _ip("link", "add", _HOST_END, "type", "veth", "peer", "name", "host", "netns", first.namespace)
    _ip("link", "set", "host", "master", BRIDGE, "up", inside=first)
    _ip("address", "add", f"{HOST_ADDRESS}/16", "dev", _HOST_END)
    _ip("link", "set", _HOST_END, "up")
    _ip("route", "add", NETWORK, "via", first.address)


def _tie_to_first(node: Node, first: Node) -> None:
    _ip(
        "link",
        "add",
        node.name,
        "netns",
        first.namespace,
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        node.namespace,
    )
    _ip("link", "set", node.name, "master", BRIDGE, "up", inside=first)
    _ip("address", "add", f"{node.address}/16", "dev", "eth0", inside=node)
    _ip("link", "set", "eth0", "up", inside=node)
    _ip("route", "add", "default", "via", first.address, inside=node)
    _ip("route", "replace", f"{node.pods}.0.0/16", "via", node.address, inside=first)


def remove_namespace(node: Node) -> None:
    """Takes its cables, bridge, routes and rules along."""
    if Path("/run/netns", node.namespace).exists():
        _ip("netns", "delete", node.namespace)


def make_group(node: Node) -> None:
    """The control group that the kubelet puts all its pods into."""
    for hierarchy in _hierarchies():
        group = hierarchy / node.cgroup.strip("/")
        group.mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):  # the first version's begins empty, and no process may enter it
            if (hierarchy / name).exists() and (group / name).exists():
                (group / name).write_text((hierarchy / name).read_text(encoding="ascii"), encoding="ascii")


def kill_group(node: Node) -> None:
    """SIGKILL to everything in the node's pods."""
    deadline = time.monotonic() + 20
    while (pids := set(_members(node))) and time.monotonic() < deadline:
        kill_all(pids)


def remove_group(node: Node) -> None:
    """The group, and those of its pods; they must be empty."""
    for group in _groups(node):
        if group.exists():
            below = sorted((path for path in group.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
            for path in [*below, group]:
                with contextlib.suppress(OSError):
                    path.rmdir()


def unmount_below(folder: Path) -> None:
    """Everything that is mounted there, the last one first."""
    for point in reversed(_mounts_below(folder)):
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)


def _mounts_below(folder: Path) -> list[str]:
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    points = [line.split()[1].encode().decode("unicode_escape") for line in mounts]
    return [point for point in points if Path(point).is_relative_to(folder)]


def _groups(node: Node) -> list[Path]:
    return [hierarchy / node.cgroup.strip("/") for hierarchy in _hierarchies()]


def _members(node: Node) -> Iterator[int]:
    for group in _groups(node):
        for file in group.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                yield from map(int, file.read_text(encoding="ascii").split())


def _hierarchies() -> list[Path]:
    """One folder for each controller, or, in the second version, one for all."""
    if (_GROUPS / "cgroup.controllers").exists():
        (_GROUPS / "cgroup.subtree_control").write_text(_CONTROLLERS, encoding="ascii")
        return [_GROUPS]
    return [path for path in _GROUPS.iterdir() if path.is_dir() and not path.is_symlink()]


def _set_inside(node: Node, name: str, value: str) -> None:
    """A setting of the node's namespace; one that this kernel has not is passed over."""
    script = f"test ! -e /proc/sys/{name} || echo {value} > /proc/sys/{name}"
    subprocess.run(["nsenter", f"--net=/run/netns/{node.namespace}", "sh", "-c", script], check=True)


def _ip(*arguments: str, inside: Node | None = None) -> None:
    entered = ["-netns", inside.namespace] if inside else []
    done = subprocess.run(["ip", *entered, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(done.args)}: {done.stderr.strip()}")
