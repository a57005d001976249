"""Layers and images are what the image specification says: digests of contents, nothing of where they came from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.layers import Image, Layer, Start, compressed_size, write_archive, write_layer


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "tool").write_text("echo")
    (folder / "bin" / "tool").chmod(0o755)
    (folder / "bin" / "link").symlink_to("tool")
    (folder / "read.me").write_text("words")
    return folder


def members(file: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(file) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_a_layer_lies_below_its_prefix_and_belongs_to_root(tree: Path, tmp_path: Path) -> None:
    layer = write_layer(tmp_path / "layer.tar", {"opt/own": tree})
    found = members(tmp_path / "layer.tar")
    assert list(found) == ["opt", "opt/own", "opt/own/bin", "opt/own/bin/link", "opt/own/bin/tool", "opt/own/read.me"]
    assert {(member.uid, member.gid, member.uname) for member in found.values()} == {(0, 0, "")}
    assert found["opt/own/bin/tool"].mode == 0o755
    assert found["opt/own/bin/link"].linkname == "tool"
    content = (tmp_path / "layer.tar").read_bytes()
    assert layer == Layer(f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))


def test_the_same_contents_are_the_same_layer_whenever_they_were_written(tree: Path, tmp_path: Path) -> None:
    first = write_layer(tmp_path / "first.tar", {"": tree})
    os.utime(tree / "read.me", (1, 1))
    assert write_layer(tmp_path / "second.tar", {"": tree}) == first
    (tree / "read.me").write_text("other words")
    assert write_layer(tmp_path / "third.tar", {"": tree}) != first


def test_a_file_under_two_names_is_two_files(tree: Path, tmp_path: Path) -> None:
    os.link(tree / "read.me", tree / "again.me")
    write_layer(tmp_path / "layer.tar", {"": tree})
    with tarfile.open(tmp_path / "layer.tar") as tar:
        texts = [tar.extractfile(name).read() for name in ("again.me", "read.me")]  # type: ignore[union-attr]
    assert texts == [b"words", b"words"]


def test_an_archive_leads_from_the_name_to_every_blob(tree: Path, tmp_path: Path) -> None:
    layer = write_layer(tmp_path / "layer.tar", {"": tree})
    start = Start(["tool"], "7:7", {"A": "1"}, {"title": "mine"})
    out = io.BytesIO()
    write_archive(out, [Image("here/mine:1", [layer], start)], {layer.digest: tmp_path / "layer.tar"})
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]

    def blob(descriptor: dict[str, Any]) -> bytes:
        content = files[f"blobs/{descriptor['digest'].replace(':', '/')}"]
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == descriptor["digest"]
        assert len(content) == descriptor["size"]
        return content

    (named,) = json.loads(files["index.json"])["manifests"]
    assert named["annotations"] == {"io.containerd.image.name": "here/mine:1"}
    manifest = json.loads(blob(named))
    config = json.loads(blob(manifest["config"]))
    assert config["rootfs"]["diff_ids"] == [layer.digest]
    assert config["config"]["User"] == "7:7"
    assert config["config"]["Env"][1:] == ["A=1"]
    assert config["config"]["Env"][0].startswith("PATH=")
    assert [len(blob(one)) for one in manifest["layers"]] == [layer.size]


def test_an_images_size_is_that_of_its_layers_by_gzip_wherever_they_are(tmp_path: Path) -> None:
    layers, blobs = [], tmp_path / "blobs"
    (blobs / "sha256").mkdir(parents=True)
    for name in ("below", "above"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "words").write_text(f"{name} " * 100_000)
        layers.append(write_layer(tmp_path / f"{name}.tar", {"": tmp_path / name}))
    (blobs / layers[0].digest.replace(":", "/")).write_bytes((tmp_path / "below.tar").read_bytes())
    images = [Image("mine:1", layers), Image("other:1", layers[1:])]
    with (tmp_path / "images.tar").open("wb") as archive:
        write_archive(archive, images, {layers[1].digest: tmp_path / "above.tar"})
    zipped = [len(gzip.compress((tmp_path / f"{name}.tar").read_bytes())) for name in ("below", "above")]
    sizes = [compressed_size(tmp_path / "images.tar", name, blobs) for name in ("mine:1", "other:1")]
    assert sizes == pytest.approx([sum(zipped), zipped[1]], rel=0.1)
    assert sizes[0] < layers[0].size / 10


def test_a_layer_that_is_there_already_is_named_and_not_packed() -> None:
    out = io.BytesIO()
    write_archive(out, [Image("here/mine:1", [Layer("sha256:" + "0" * 64, 5)])], {})
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        assert len(tar.getnames()) == 4
