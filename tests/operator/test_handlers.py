"""Every change reaches the jobs that it matters to, and nothing else wakes anybody."""

from __future__ import annotations

import asyncio
from typing import Any

from finetune_api.progress import Result
from finetune_operator.errors import NotFound
from finetune_operator.handlers import Operator
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, FINETUNE_RUNTIME, POD, RAY_JOB, Key, Kind
from finetune_operator.metrics import Metrics
from finetune_operator.runtime.reflector import ListWatch, Page
from tests.factories import job_document, runtime_document
from tests.operator.runtime.virtual_time import run
from tests.operator.stage import NAMESPACE, Stage, Watched, now, play

KEY = Key(NAMESPACE, "example")


async def passes(stage: Stage) -> float:
    """How many passes there were so far, once everything has settled."""
    await asyncio.sleep(1)
    counted = [
        stage.metric("controller_runtime_reconcile_total", controller="finetunejob", result=result)
        for result in ("success", "requeue_after", "error")
    ]
    return sum(filter(None, counted))


def test_a_job_waits_for_its_runtime_and_starts_when_it_appears() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document({"runtimeRef": {"name": "pool"}}))
        await asyncio.sleep(600)
        condition = stage.condition("Valid")
        assert (condition["status"], condition["reason"]) == ("False", "RuntimeNotFound")
        assert "pool" in condition["message"]
        assert stage.names(RAY_JOB) == []
        await stage.submit(runtime_document())
        await asyncio.sleep(1)
        assert stage.names(RAY_JOB) == ["example-1"]
        assert stage.condition("Valid")["status"] == "True"

    play(scenario)


def test_a_changed_runtime_does_not_wake_jobs_that_have_theirs() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(runtime_document())
        await stage.submit(job_document({"runtimeRef": {"name": "pool"}}))
        before = await passes(stage)
        await stage.there.apply(FINETUNE_RUNTIME, runtime_document({"description": "larger now"}))
        assert await passes(stage) == before

    play(scenario)


def test_a_job_starts_as_soon_as_the_job_whose_model_it_needs_has_written_it() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document({"model.source": "job://first"}, name="second"))
        await stage.submit(job_document({"tuning": {"full": {}}}, name="first"))
        await asyncio.sleep(600)
        assert stage.names(RAY_JOB) == ["first-1"]
        assert stage.condition("Admitted", "second")["reason"] == "DependencyPending"
        await stage.kuberay("first-1", "Running", "RUNNING")
        await stage.report("first", 1, step=100, result=Result.SUCCEEDED)
        await stage.kuberay("first-1", "Complete", "SUCCEEDED")
        await asyncio.sleep(1)
        assert "second-1" in stage.names(RAY_JOB)

    play(scenario)


MERGED = {"spec": {"outputs": [{"to": "s3://models/first", "merge": True}]}}


def test_a_job_refused_for_what_another_one_lacks_is_looked_at_again_when_that_one_is_corrected() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document({"suspend": True}, name="first"))
        await stage.submit(job_document({"model.source": "job://first"}, name="second"))
        await asyncio.sleep(1)
        assert stage.condition("Valid", "second")["reason"] == "DependencyUnfit"
        assert "give first an output with merge: true" in stage.condition("Valid", "second")["message"]
        await stage.there.merge(FINETUNE_JOB, Key(NAMESPACE, "first"), MERGED)
        await asyncio.sleep(1)
        assert stage.condition("Valid", "second")["reason"] == "Accepted"
        assert stage.condition("Admitted", "second")["reason"] == "DependencyPending"

    play(scenario)


def test_what_another_job_trains_counts_and_not_what_was_edited_since_until_it_begins_anew() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document(name="first"))
        await stage.submit(job_document({"model.source": "job://first"}, name="second"))
        await asyncio.sleep(1)
        await stage.kuberay("first-1", "Running", "RUNNING")
        first = Key(NAMESPACE, "first")
        await stage.there.merge(FINETUNE_JOB, first, MERGED)
        await asyncio.sleep(60)
        assert "suspend that job and resume it" in stage.condition("Valid", "second")["message"]
        for suspend in (True, False):
            await stage.there.merge(FINETUNE_JOB, first, {"spec": {"suspend": suspend}})
            await asyncio.sleep(60)
        assert "first-2" in stage.names(RAY_JOB)
        assert stage.condition("Valid", "second")["reason"] == "Accepted"

    play(scenario)


def test_a_job_of_another_manager_is_left_alone() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document({"managedBy": "kueue.x-k8s.io/multikueue"}))
        await asyncio.sleep(600)
        assert stage.cluster.asked == []

    play(scenario)


def test_a_job_that_cannot_be_handled_does_not_keep_others_from_running() -> None:
    async def scenario(stage: Stage) -> None:
        broken: dict[str, Any] = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob"}
        specs: list[Any] = [None, [], "text", {}, {"model": 7}, {"runtimeRef": {"name": ["a"]}}]
        for number, spec in enumerate(specs):
            metadata = {"name": f"broken-{number}", "namespace": NAMESPACE}
            await stage.there.create(FINETUNE_JOB, {**broken, "metadata": metadata, "spec": spec})
        await stage.submit(job_document())
        await asyncio.sleep(10)
        assert stage.names(RAY_JOB) == ["example-1"]
        for number in range(6):
            assert stage.condition("Valid", f"broken-{number}")["status"] == "False"

    play(scenario)


def test_what_others_write_without_changing_what_is_read_wakes_nobody() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await asyncio.sleep(1)
        await stage.kuberay("example-1", "Initializing")
        before = await passes(stage)
        for seconds in range(10):
            await stage.kuberay("example-1", "Initializing", rayClusterName=f"cluster-{seconds}")
        await stage.there.create(CONFIG_MAP, {"metadata": {"name": "theirs", "namespace": NAMESPACE}})
        await stage.there.create(POD, {"metadata": {"name": "theirs", "namespace": NAMESPACE}, "spec": {}})
        assert await passes(stage) == before
        await stage.kuberay("example-1", "Running", "RUNNING")
        assert await passes(stage) > before

    play(scenario)


def test_only_the_chosen_namespaces_are_looked_after() -> None:
    async def scenario(stage: Stage) -> None:
        for namespace in ("team-a", "team-b", "team-c"):
            document = job_document()
            document["metadata"]["namespace"] = namespace
            await stage.submit(document)
        await asyncio.sleep(10)
        found = [one["metadata"]["namespace"] for one in stage.there.select(RAY_JOB)]
        assert found == ["team-a", "team-c"]

    play(scenario, watch_namespaces=("team-a", "team-c"))


class WithoutRay(Watched):
    """A cluster in which KubeRay is not installed, until it is."""

    installed = False

    def source(self, kind: Kind, namespace: str | None = None, label_selector: str | None = None) -> ListWatch:
        source = super().source(kind, namespace, label_selector)
        return _Absent(source, self) if kind == RAY_JOB else source


class _Absent:
    def __init__(self, inner: ListWatch, cluster: WithoutRay) -> None:
        self._inner = inner
        self._cluster = cluster

    async def list(self, limit: int, continue_token: str | None) -> Page:
        if not self._cluster.installed:
            raise NotFound(404, "NotFound", "404 page not found")
        return await self._inner.list(limit, continue_token)

    def watch(self, resource_version: str, timeout_seconds: float) -> Any:
        return self._inner.watch(resource_version, timeout_seconds)


def test_without_kuberay_jobs_say_so_and_start_soon_after_it_was_installed() -> None:
    async def main() -> None:
        stage = Stage()
        cluster = WithoutRay(stage.there)
        stage.cluster = cluster
        async with stage.operator() as operator:
            await stage.submit(job_document())
            await asyncio.sleep(600)
            assert operator.unready() is None
            condition = stage.condition("ClusterReady")
            assert (condition["status"], condition["reason"]) == ("False", "KubeRayMissing")
            assert "helm install kuberay-operator" in condition["message"]
            stage.cluster.asked.clear()
            await asyncio.sleep(600)
            assert stage.cluster.asked == []
            cluster.installed = True
            await asyncio.sleep(20)
            assert stage.names(RAY_JOB) == ["example-1"]
            assert stage.condition("ClusterReady")["reason"] != "KubeRayMissing"

    run(main())


def test_a_replica_that_does_not_lead_watches_and_works_on_nothing() -> None:
    async def main() -> None:
        stage = Stage()
        operator = Operator(stage.cluster, stage.settings, Metrics(), now)
        assert operator.unready() is not None
        watching = asyncio.create_task(operator.watch())
        await stage.submit(job_document())
        await asyncio.sleep(60)
        assert operator.unready() is None
        assert stage.cluster.asked == []
        working = asyncio.create_task(operator.work())
        await asyncio.sleep(1)
        assert stage.names(RAY_JOB) == ["example-1"]
        working.cancel()
        await asyncio.wait((working,))
        stage.cluster.asked.clear()
        await stage.submit(job_document(name="second"))
        await asyncio.sleep(60)
        assert stage.cluster.asked == []
        again = asyncio.create_task(operator.work())
        await asyncio.sleep(1)
        assert "second-1" in stage.names(RAY_JOB)
        for task in (watching, again):
            task.cancel()
        await asyncio.wait((watching, again))

    run(main())


def test_a_pass_that_does_not_end_is_reported_as_stuck() -> None:
    async def main() -> None:
        stage = Stage()
        async with stage.operator() as operator:
            assert operator.stuck() is None
            operator._begun[KEY] = 0.0
            await asyncio.sleep(400)
            assert "default/example" in (operator.stuck() or "")
            del operator._begun[KEY]

    run(main())
