"""Settings come from flags, then the environment, then defaults; a mistake is named where it was made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune_operator.settings import InvalidSettings, Settings, read_settings

DEPLOYMENT = Path(__file__).resolve().parents[2] / "helm/finetune-operator/templates/deployment.yaml"


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default() -> None:
    assert read_settings([], {}).workers == 8
    assert read_settings([], {"FINETUNE_WORKERS": "3"}).workers == 3
    assert read_settings(["--workers", "5"], {"FINETUNE_WORKERS": "3"}).workers == 5


def test_an_empty_variable_counts_as_absent() -> None:
    assert read_settings([], {"FINETUNE_WORKERS": "", "FINETUNE_LEASE_NAME": ""}) == read_settings([], {})


def test_namespaces_are_a_list_with_commas() -> None:
    assert read_settings([], {"FINETUNE_WATCH_NAMESPACES": "team-a, team-b,team-a"}).watch_namespaces == (
        "team-a",
        "team-b",
    )
    assert read_settings([], {}).watch_namespaces == ()


def test_leader_election_is_turned_off_by_flag_or_variable() -> None:
    assert read_settings([], {}).leader_elect
    assert not read_settings([], {"FINETUNE_LEADER_ELECT": "false"}).leader_elect
    assert not read_settings(["--no-leader-election"], {"FINETUNE_LEADER_ELECT": "true"}).leader_elect


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"FINETUNE_WORKERS": "many"}, ["FINETUNE_WORKERS", "valid integer", "'many'"]),
        ({"FINETUNE_WORKERS": "0"}, ["FINETUNE_WORKERS", "greater than or equal to 1", "'0'"]),
        ({"FINETUNE_LOG_LEVEL": "loud"}, ["FINETUNE_LOG_LEVEL", "'debug', 'info', 'warning' or 'error'", "'loud'"]),
        ({"FINETUNE_LEADER_ELECT": "perhaps"}, ["FINETUNE_LEADER_ELECT", "boolean", "'perhaps'"]),
        ({"FINETUNE_WATCH_NAMESPACES": "a,B"}, ["FINETUNE_WATCH_NAMESPACES", "'B'", "team-a,team-b"]),
        ({"FINETUNE_RAY_VERSION": "latest"}, ["FINETUNE_RAY_VERSION", "'latest'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_that_cannot_be_is_named_with_its_variable(environment: dict[str, str], named: list[str]) -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_settings([], environment)
    assert [word for word in named if word not in str(caught.value)] == []


def test_all_mistakes_are_told_at_once_and_by_flag_where_a_flag_was_used() -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_settings(["--metrics-port", "70000"], {"FINETUNE_WORKERS": "many"})
    first, second = sorted(str(caught.value).splitlines())
    assert first.startswith("--metrics-port: ")
    assert second.startswith("FINETUNE_WORKERS: ")


def test_the_chart_sets_variables_that_exist() -> None:
    known = {f"FINETUNE_{name.upper()}" for name in Settings.model_fields}
    lines = [line.strip() for line in DEPLOYMENT.read_text(encoding="utf-8").splitlines()]
    named = {yaml.safe_load(line)[0]["name"] for line in lines if line.startswith("- name: FINETUNE_")}
    assert named
    assert named <= known


def test_help_explains_every_setting_with_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(["--help"], {})
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert [name for name in Settings.model_fields if f"FINETUNE_{name.upper()}" not in text] == []


def test_the_operator_ends_with_2_and_a_sentence_for_settings_that_cannot_be() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "finetune_operator", "--workers", "many"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("--workers: ")
    assert "Traceback" not in ran.stderr


def test_the_operator_ends_with_2_and_a_sentence_without_its_kubeconfig(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finetune_operator", "--kubeconfig", str(tmp_path / "absent")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "absent is not there" in ran.stderr
    assert "Traceback" not in ran.stderr
