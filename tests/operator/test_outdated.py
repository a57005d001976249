"""What a server kept of a status is compared with what was written."""

from __future__ import annotations

from finetune_operator.outdated import dropped_fields


def test_fields_that_were_not_kept_are_named_at_any_depth() -> None:
    sent = {"phase": "Running", "progress": {"step": 1, "worldSize": 2}, "attempts": [{"number": 1, "uid": "a"}]}
    kept = {"phase": "Running", "progress": {"step": 1}, "attempts": [{"number": 1}]}
    assert list(dropped_fields(sent, kept)) == ["status.progress.worldSize", "status.attempts[0].uid"]
    assert list(dropped_fields(sent, None)) == ["status.phase", "status.progress", "status.attempts"]


def test_what_the_server_adds_and_nulls_that_it_leaves_out_are_no_difference() -> None:
    sent = {"progress": {"step": 1, "epoch": None}, "conditions": []}
    assert list(dropped_fields(sent, {"progress": {"step": 1, "percent": 0.0}, "conditions": []})) == []
