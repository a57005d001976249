"""The parts of a cluster with nodes that can be told without one: addresses, configuration, certificates, processes."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from tests.cluster.images import SANDBOX, Images
from tests.cluster.nodes import cluster, daemons, machine, needs
from tests.cluster.nodes.certificates import new_authority
from tests.cluster.nodes.configs import cni_config, containerd_config, kubelet_config
from tests.cluster.nodes.layout import API_ADDRESS, DNS_ADDRESS, HOST_ADDRESS, NETWORK, NODES, SERVICES, Layout
from tests.cluster.processes import wait_until


@pytest.fixture
def place(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "root", tmp_path / "run")


def test_no_two_parts_of_the_cluster_share_an_address() -> None:
    pods = [ipaddress.IPv4Network(f"{node.pods}.0.0/16") for node in NODES]
    networks = [*pods, ipaddress.IPv4Network(SERVICES)]
    assert not any(one.overlaps(other) for one in networks for other in networks if one is not other)
    assert all(one.subnet_of(ipaddress.IPv4Network(NETWORK)) for one in networks)
    fixed = [HOST_ADDRESS, *(node.address for node in NODES)]
    assert len(set(fixed)) == len(fixed)
    assert {API_ADDRESS, DNS_ADDRESS} <= {
        str(host) for host in ipaddress.IPv4Network(f"{API_ADDRESS}/27", strict=False).hosts()
    }


def test_pods_get_no_address_that_a_node_or_this_machine_has(place: Layout) -> None:
    for node in NODES:
        ((addresses,),) = json.loads(cni_config(place, node))["plugins"][0]["ipam"]["ranges"]
        first, last = (ipaddress.IPv4Address(addresses[key]) for key in ("rangeStart", "rangeEnd"))
        taken = [HOST_ADDRESS, addresses["gateway"], *(one.address for one in NODES)]
        assert not any(first <= ipaddress.IPv4Address(address) <= last for address in taken)


def test_what_a_node_mounts_and_listens_on_lies_in_its_own_folders(place: Layout) -> None:
    first, second = (containerd_config(place, node) for node in NODES)
    assert str(place.run / "node-1") in first
    assert "node-2" not in first
    assert str(place.run / "node-2") in second
    assert f'sandbox_image = "{SANDBOX}"' in first
    assert {kubelet_config(place, node)["cgroupRoot"] for node in NODES} == {"/finetune-node-1", "/finetune-node-2"}


def test_a_certificate_names_its_user_its_groups_and_its_addresses(tmp_path: Path) -> None:
    new_authority(tmp_path).issue("node-1", "system:node:node-1", ["system:nodes"], ["node-1", "10.0.0.1"])
    issued = x509.load_pem_x509_certificate((tmp_path / "node-1.crt").read_bytes())
    assert issued.subject.rfc4514_string() == "CN=system:node:node-1,O=system:nodes"
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-1"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    issued.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes()))
    assert (tmp_path / "node-1.key").stat().st_mode & 0o077 == 0


def test_what_is_missing_is_named_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(needs, "PACKAGES", {"no-such-program": "its-package", "sh": "dash"})
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(needs.CannotRun, match="apt-get install --no-install-recommends its-package\n"):
        needs.check(install=False, say=print)


def test_without_root_the_reason_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(needs.CannotRun, match="needs root"):
        needs.check(install=True, say=print)


def test_a_process_number_that_was_given_away_is_nobody_of_ours(place: Layout) -> None:
    place.run.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        (place.run / "etcd.pid").write_text(f"{stranger.pid} 1")
        assert not daemons.running(place, "etcd")
        daemons.kill(place, "etcd")
        assert stranger.poll() is None
        stranger.kill()
    assert not (place.run / "etcd.pid").exists()


def test_what_a_cluster_left_behind_is_named_with_what_was_before(
    place: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "NODES", ())  # another run's may be here
    monkeypatch.setattr(machine, "_STRAYS", (str(tmp_path / "stray"), str(tmp_path)))
    monkeypatch.setattr(machine, "_SETTINGS", ("vm/panic_on_oom", "vm/overcommit_memory"))
    place.root.mkdir()
    machine.keep_settings(place)
    nothing = machine.left_behind(place)
    (tmp_path / "stray").mkdir()
    before = json.loads(place.settings.read_text())
    before["settings"]["vm/panic_on_oom"] = "7"
    place.settings.write_text(json.dumps(before))
    with subprocess.Popen([sys.executable, "-c", "input()", str(place.pki)], stdin=subprocess.PIPE) as ours:
        left = machine.left_behind(place)
        ours.kill()
    assert {*left} - {*nothing} == {
        f"process {ours.pid}",
        "setting vm/panic_on_oom, which was 7",
        f"file {tmp_path / 'stray'}",
    }


def test_a_process_is_found_by_the_socket_in_its_command_line(tmp_path: Path) -> None:
    mark = str(tmp_path / "containerd.sock")
    with subprocess.Popen([sys.executable, "-c", "input()", mark], stdin=subprocess.PIPE) as ours:
        wait_until(lambda: daemons.processes_naming(mark) == [ours.pid], "the process to be seen")
        daemons.kill_all([ours.pid])
        assert ours.wait(10) == -9


@pytest.mark.parametrize("was_up", [False, True], ids=["a new one", "one that was up"])
def test_only_a_cluster_that_was_begun_now_is_taken_down_when_it_cannot_come_up(
    place: Layout, monkeypatch: pytest.MonkeyPatch, was_up: bool
) -> None:
    calls: list[str] = []

    def fail(*node: object) -> None:
        calls.append("begin")
        raise OSError("no more namespaces")

    monkeypatch.setattr(needs, "check", lambda install, say: None)
    monkeypatch.setattr(cluster, "layout", lambda: place)
    monkeypatch.setattr(cluster, "program_path", lambda name, say: Path(name))
    monkeypatch.setattr(cluster, "ready_images", lambda say: Images(Path("store"), Path("archive")))
    monkeypatch.setattr(cluster, "down", lambda: calls.append("down"))
    monkeypatch.setattr(daemons, "running", lambda layout, name: was_up)
    monkeypatch.setattr(machine, "make_namespace", fail)
    if was_up:
        place.run.mkdir()
        (place.run / "identities").write_text("store")
    with pytest.raises(OSError, match="no more namespaces"):
        cluster.up(lambda text: None)
    assert calls == (["begin"] if was_up else ["down", "begin", "down"])
