"""One node of the cluster: its namespace, containerd, kubelet and kube-proxy; started, stopped, or lost at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.images import Images, copy_store, import_images
from tests.cluster.nodes import daemons, machine
from tests.cluster.nodes.configs import cni_config, containerd_config, kubelet_config, proxy_config
from tests.cluster.nodes.layout import Layout, Node

__all__ = ["lose_node", "start_node", "stop_node"]


def start_node(layout: Layout, node: Node, programs: Mapping[str, Path], images: Images) -> None:
    """Starts it with `images`; returns before it is ready. Its namespace must be there."""
    run = layout.run_of(node)
    if not daemons.running(layout, _name(node, "containerd")):
        _prepare(layout, node, images)
    containerd = ["containerd", "--config", run / "containerd.toml"]
    daemons.start(layout, _name(node, "containerd"), containerd, node)
    daemons.wait(layout, layout.socket_of(node).exists, "containerd to listen", _name(node, "containerd"))
    _refresh(layout, node, images)
    daemons.start(layout, _name(node, "kubelet"), _kubelet(layout, node, programs["kubelet"]), node)
    proxy = [programs["kube-proxy"], f"--config={run / 'kube-proxy.json'}"]
    daemons.start(layout, _name(node, "kube-proxy"), proxy, node)


def _prepare(layout: Layout, node: Node, images: Images) -> None:
    """Images and configuration of a node that is about to start. Files of one that runs stay as they are: kube-proxy
    ends when its own is written again."""
    run = layout.run_of(node)
    (run / "cni").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(layout.of(node), ignore_errors=True)
    layout.of(node).mkdir(parents=True)
    copy_store(images, layout.of(node) / "containerd")
    (run / "containerd.toml").write_text(containerd_config(layout, node), encoding="utf-8")
    (run / "cni" / "pods.conflist").write_text(cni_config(layout, node), encoding="utf-8")
    (run / "kubelet.json").write_text(json.dumps(kubelet_config(layout, node)), encoding="utf-8")
    (run / "kube-proxy.json").write_text(json.dumps(proxy_config(layout, node)), encoding="utf-8")
    machine.make_group(node)


def _refresh(layout: Layout, node: Node, images: Images) -> None:
    """Our code as it is now, for containers that start from now on."""
    imported = layout.run_of(node) / "imported"
    if not imported.exists() or imported.read_text(encoding="utf-8") != str(images.archive):
        import_images(images, layout.socket_of(node))
        imported.write_text(str(images.archive), encoding="utf-8")


def lose_node(layout: Layout, node: Node) -> None:
    """As if its power were cut: every process of it is gone at once, and nobody is told."""
    for name in ("kubelet", "containerd", "kube-proxy"):
        daemons.kill(layout, _name(node, name))
    daemons.kill_all(daemons.processes_naming(str(layout.socket_of(node))))
    machine.kill_group(node)
    machine.remove_namespace(node)


def stop_node(layout: Layout, node: Node) -> None:
    """Takes it away with all that it made; also what is left of a lost one, or of one half started."""
    lose_node(layout, node)
    machine.unmount_below(layout.run_of(node))
    machine.unmount_below(layout.of(node))
    machine.remove_group(node)
    shutil.rmtree(layout.run_of(node), ignore_errors=True)
    shutil.rmtree(layout.of(node), ignore_errors=True)
    for file in Path("/var/lib/cni/results").glob(f"finetune-{node.name}-*"):  # containerd's memory of pods' networks
        file.unlink()
    for link in Path("/var/log/containers").glob("*"):
        if link.is_symlink() and link.readlink().is_relative_to(layout.of(node)):
            link.unlink()


def _kubelet(layout: Layout, node: Node, program: Path) -> list[object]:
    return [
        program,
        f"--config={layout.run_of(node) / 'kubelet.json'}",
        f"--kubeconfig={layout.run / f'{node.name}.kubeconfig'}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        f"--root-dir={layout.of(node) / 'kubelet'}",
        f"--cert-dir={layout.run_of(node)}",
    ]


def _name(node: Node, program: str) -> str:
    return f"{node.name}-{program}"
