"""What the kernel's control groups tell of processes that it has killed for want of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainers.kernel_kills import KernelKills, kernel_kills

MOUNTED = {
    "version 2, by its own name": ("0::/\n", "memory.events"),
    "version 2, below others": ("0::/user.slice/app.scope\n", "user.slice/app.scope/memory.events"),
    "version 2, in a container that sees its group alone": ("0::/kubepods/pod1/c1\n", "memory.events"),
    "version 1": ("7:memory:/jobs\n3:cpu,cpuacct:/jobs\n", "memory/jobs/memory.oom_control"),
    "version 1, in a container": ("7:memory:/kubepods/pod1/c1\n", "memory/memory.oom_control"),
}
SAID = {
    "memory.events": "low 0\nhigh 0\nmax 41\noom 3\noom_kill 2\noom_group_kill 0\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
}


@pytest.mark.parametrize("which", MOUNTED)
def test_kills_are_read_where_the_kernel_counts_them(which: str, tmp_path: Path) -> None:
    own, where = MOUNTED[which]
    counter = tmp_path / "groups" / where
    counter.parent.mkdir(parents=True)
    counter.write_text(SAID[counter.name])
    (tmp_path / "own").write_text(own)
    assert kernel_kills(tmp_path / "groups", tmp_path / "own") == 2


@pytest.mark.parametrize("said", ["oom_kill_disable 0\nunder_oom 0\n", "oom_kill many\n", "odd\n", ""])
def test_where_the_kernel_does_not_count_there_are_none(said: str, tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text(said)
    assert kernel_kills(tmp_path, tmp_path / "missing") == 0


def test_this_machine_can_be_asked() -> None:
    assert kernel_kills() >= 0


def test_a_kill_is_new_once_and_those_of_before_are_not() -> None:
    counts = {"a": 3, "b": 0}
    kills = KernelKills(lambda: counts, all_are_new=False)
    assert not kills.any_new()
    counts["b"] = 1
    assert kills.any_new()
    assert not kills.any_new()


def test_where_all_nodes_are_new_any_kill_is_and_so_is_one_on_a_node_that_has_come_since() -> None:
    counts = {"a": 0}
    kills = KernelKills(lambda: counts, all_are_new=True)
    assert not kills.any_new()
    counts |= {"b": 1}
    assert kills.any_new()


def test_a_ray_that_does_not_answer_has_killed_nobody() -> None:
    def fails() -> dict[str, int]:
        raise ConnectionError("gone")

    assert not KernelKills(fails, all_are_new=False).any_new()
