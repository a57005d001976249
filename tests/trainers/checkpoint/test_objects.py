"""A bucket of a real S3 server: what goes wrong on the way to it, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.upkeep import Mandate, collected
from finetune_trainers.checkpoint.commit import begin
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.errors import StorageDeniedError, StorageError, StorageUnavailableError
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.storage.resilient import Patience
from tests.cluster.s3 import S3, s3_server
from tests.trainers.checkpoint.s3_faults import Fault, FaultyEndpoint, faulty_endpoint
from tests.trainers.checkpoint.saving import original, restored, save, start
from tests.trainers.checkpoint.synthetic import NOON

pytestmark = pytest.mark.control_plane

QUICK = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2},
}


def options(s3: S3, **changes: Any) -> dict[str, Any]:
    return {**s3.options(), "retry_config": QUICK, **changes}


@pytest.fixture(scope="module")
def endpoint(s3: S3) -> Iterator[FaultyEndpoint]:
    with faulty_endpoint(s3.endpoint) as found:
        yield found


@pytest.fixture
def faulty(s3: S3, endpoint: FaultyEndpoint) -> Storage:
    endpoint.forget()
    found = open_storage(f"s3://{s3.bucket()}/run", options=options(s3, endpoint=endpoint.url))
    endpoint.forget()
    return found


@pytest.mark.parametrize("fault", ["refuse", "reset", "lose"])
def test_a_fault_at_any_request_changes_nothing_but_the_time(
    faulty: Storage, s3: S3, endpoint: FaultyEndpoint, fault: Fault
) -> None:
    """Save and find, with one request at a time refused, cut off, or carried out without an answer."""
    fence = start(faulty)
    endpoint.forget()
    save(faulty, fence, 1)
    find_newest(faulty)
    total = len(endpoint.seen)
    for number in range(total):
        endpoint.forget()
        endpoint.choose = lambda count, what, at=number: fault if count == at else None  # type: ignore[misc]
        manifest = save(faulty, fence, number + 2)
        found = find_newest(faulty)
        assert found.manifest == manifest, endpoint.seen[number]
        assert found.rejected == ()
    assert total > 20


IMPATIENT = {"timeout": timedelta(milliseconds=300)}
"""Of requests: a run waits a minute for an answer."""


def patient_and_not(s3: S3, endpoint: FaultyEndpoint, patience: Patience | None = None) -> tuple[Storage, Storage]:
    """One place, by a client that waits for answers and by one that soon does not, and tries again by `patience`."""
    uri, usual = f"s3://{s3.bucket()}/run", options(s3, endpoint=endpoint.url)
    impatient = usual | {"client_options": IMPATIENT}
    return open_storage(uri, options=usual), open_storage(uri, options=impatient, patience=patience, exclusive=True)


def test_a_request_that_is_never_answered_is_given_up_and_sent_again(s3: S3, endpoint: FaultyEndpoint) -> None:
    endpoint.forget()
    patient, storage = patient_and_not(s3, endpoint)
    fence = start(patient)
    endpoint.forget()
    save(patient, fence, 1, world=1)  # none of these requests is sent twice because the machine is busy
    total = len(endpoint.seen)
    for number in range(total):
        endpoint.forget()
        endpoint.choose = lambda count, what, at=number: "freeze" if count == at else None  # type: ignore[misc]
        manifest = save(storage, fence, number + 2, world=1)
        assert len(endpoint.seen) > number, "it was met"
        endpoint.forget()
        assert find_newest(storage).manifest == manifest
    assert total > 5


def test_a_store_that_answers_nothing_any_more_is_said_to_be_away(s3: S3, endpoint: FaultyEndpoint) -> None:
    endpoint.forget()
    patient, storage = patient_and_not(s3, endpoint, Patience(num_tries=1))
    fence = start(patient)
    endpoint.choose = lambda number, what: "freeze"
    with pytest.raises(StorageUnavailableError):
        save(storage, fence, 1)
    endpoint.forget()
    begin(patient, "the next attempt", NOON)
    assert find_newest(patient).rejected == ()


def test_a_burst_of_503_is_waited_out(faulty: Storage, endpoint: FaultyEndpoint) -> None:
    endpoint.choose = lambda number, what: "refuse" if number % 3 else None
    manifest = save(faulty, start(faulty), 10)
    assert restored(faulty, manifest) == original(manifest.intent)


def test_a_store_without_conditional_writes_is_used_and_gc_tells_of_it(s3: S3, endpoint: FaultyEndpoint) -> None:
    endpoint.forget()
    endpoint.choose = lambda number, what: "unconditional"
    found = open_storage(f"s3://{s3.bucket()}/run", options=s3.options() | {"endpoint": endpoint.url})
    assert not found.exclusive
    assert sum(what.startswith("PUT") for what in endpoint.seen) == 3 + 1 + 3, "tried twice more, and without"
    fence = start(found)
    manifest = save(found, fence, 10)
    assert restored(found, manifest) == original(manifest.intent)
    told = collected(found, Retention(), Mandate("ann", NOON, dry_run=False, take_over=True))
    assert any("does not honour conditional writes" in note for note in told.notes)


def test_a_store_that_is_away_is_said_to_be_away(s3: S3) -> None:
    nobody = options(s3, endpoint="http://127.0.0.1:9")
    with pytest.raises(StorageUnavailableError):
        open_storage("s3://bucket/run", options=nobody)


def test_wrong_keys_and_missing_buckets_are_refused_by_name(s3: S3) -> None:
    with pytest.raises(StorageDeniedError):
        open_storage(f"s3://{s3.bucket()}/run", options=options(s3, secret_access_key="wrong"))
    with pytest.raises(StorageDeniedError, match="NoSuchBucket: The specified bucket does not exist"):
        open_storage("s3://no-such-bucket/run", options=options(s3))
    with pytest.raises(StorageDeniedError, match="NoSuchBucket"):
        find_newest(open_storage("s3://no-such-bucket/run", options=options(s3), exclusive=True))


def test_errors_carry_no_secrets(s3: S3) -> None:
    with pytest.raises(StorageError) as caught:
        open_storage(f"s3://{s3.bucket()}/run", options=options(s3, access_key_id="someone-else"))
    assert s3.secret_key not in str(caught.value)
    assert "Signature" not in str(caught.value)


def test_settings_of_the_environment_are_taken(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    storage = open_storage(f"s3://{s3.bucket()}/run")
    storage.create("x", b"1")
    assert storage.read("x") == b"1"


def test_prefixes_of_a_bucket_do_not_see_each_other(s3: S3) -> None:
    bucket = s3.bucket()
    first, second = (open_storage(f"s3://{bucket}/{run}", options=options(s3)) for run in ("a", "ab"))
    save(first, start(first), 10)
    assert list(second.list("")) == []
    assert find_newest(second).manifest is None


def test_bytes_that_changed_on_the_servers_disk_are_noticed(s3: S3) -> None:
    bucket = s3.bucket()
    storage = open_storage(f"s3://{bucket}/run", options=options(s3))
    fence = start(storage)
    older, newer = save(storage, fence, 10), save(storage, fence, 20)
    path = s3.folder / bucket / "run" / layout.shard(newer.id, 0)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(bytes(data))
    search = find_newest(storage, deep=True)
    assert search.manifest == older
    assert search.rejected[0].damages[0].file == layout.shard(newer.id, 0)


def test_a_server_that_is_killed_has_what_was_committed(versitygw: Path, tmp_path: Path) -> None:
    with s3_server(versitygw, tmp_path) as mortal:
        bucket = mortal.bucket()
        storage = open_storage(f"s3://{bucket}/run", options=options(mortal), patience=Patience(num_tries=1))
        manifest = save(storage, start(storage), 10)
        mortal.process.kill()
        with pytest.raises(StorageUnavailableError):
            find_newest(storage)
    assert (mortal.folder / bucket / "run" / layout.manifest(manifest.id)).exists()
