"""What a Dockerfile removes goes here too, in the same words; images themselves are made by the cluster lane."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.images import leave_out


def test_what_is_left_out_goes_as_a_shell_in_the_container_would_remove_it(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    for file in ("usr/share/doc/a/copyright", "var/log/apt/term.log", "var/log/dpkg.log", "usr/bin/tool"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    (root / "var/log/elsewhere").symlink_to(outside)
    leave_out(root, ["/usr/share/doc", "/var/log/*", "/not/there", "/nor/here/*"])
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == [
        *("usr", "usr/bin", "usr/bin/tool", "usr/share", "var", "var/log")
    ]
    assert outside.exists()
