"""Submitting jobs and following them, from Python: one set of verbs, wherever the jobs run.

    from finetune_client import Client

    with Client() as client:                       # the cluster that kubectl would speak to
        job = client.submit("job.yaml")
        for status in job.watch():
            print(status.phase, status.progress)
        print(job.metrics())                       # a row of figures for each step, as pandas.DataFrame takes them
        print(job.model_folder())                  # what plain peft or transformers loads

`AsyncClient` is the same with `await`. A client may be thrown away at any time: jobs go on, and `client.job(NAME)`
takes one up again. Errors are those of `finetune_client.errors`, and InvalidManifest for a job that is not right.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from finetune_api.failures import Problem
from finetune_api.job import Status
from finetune_api.problems import InvalidManifest
from finetune_api.progress import Artifact
from finetune_client.advice import Advice, advice_for
from finetune_client.backends.protocol import Backend
from finetune_client.documents import Handed, Submission, check_namespace, checked, handed_over
from finetune_client.errors import Unreachable
from finetune_client.history import Moment, Row, history_of, moments
from finetune_client.models import model_folder
from finetune_client.portal import Portal
from finetune_client.views import JobEvent, JobView, LogChoice, LogLine
from finetune_operator.kinds import Key

__all__ = ["AsyncClient", "AsyncJob", "Client", "Description", "Job"]


@dataclass(frozen=True)
class Description:
    """All that is known of a job."""

    view: JobView
    advice: Advice
    events: Sequence[JobEvent]


class AsyncClient:
    """Speaks to one place that runs jobs. Use it as a context, or `close` it."""

    def __init__(
        self,
        *,
        namespace: str | None = None,
        context: str | None = None,
        kubeconfig: Path | None = None,
        ray: str | None = None,
        local: bool = False,
        workdir: str | None = None,
    ) -> None:
        """A Kubernetes cluster, by kubeconfig, context and namespace as kubectl has them; or a Ray cluster; or `local`.

        `ray` is a dashboard's address, http://HEAD:8265, or Ray Client's, ray://HEAD:10001; `local` is this machine,
        in the background. `workdir` is a folder there for the runs' files.
        """
        self._namespace, self._context, self._kubeconfig = namespace, context, kubeconfig
        self._ray, self._local, self._workdir = ray, local, workdir
        self._backend: Backend | None = None

    async def backend(self) -> Backend:
        """What the client speaks to. Raises Unreachable where nothing says where that is."""
        if self._backend is None:
            self._backend = await self._open()
        return self._backend

    async def _open(self) -> Backend:
        if self._ray is None and not self._local:
            return await self._in_kubernetes()
        if self._context is not None or self._kubeconfig is not None or (self._ray is not None and self._local):
            raise Unreachable("name one place for the job: a kubeconfig's cluster, a Ray cluster, or this machine")
        if self._ray is not None:
            return await self._on_ray(self._ray)
        from finetune_client.backends.drivers import DriversBackend
        from finetune_client.backends.local import LocalDrivers

        return DriversBackend(LocalDrivers(self._workdir), self._namespace, is_here=True)

    async def _in_kubernetes(self) -> Backend:
        from finetune_client.backends.kubernetes import KubernetesBackend

        return await KubernetesBackend.open(self._namespace, self._context, self._kubeconfig)

    async def _on_ray(self, address: str) -> Backend:
        if address.startswith("ray://") and urlsplit(address).hostname:
            return await self._by_ray_client(address)
        if not address.startswith(("http://", "https://")) or not urlsplit(address).hostname:
            message = "such as http://HEAD:8265 (its dashboard) or ray://HEAD:10001 (Ray Client)"
            raise Unreachable(f"{address} is not the address of a Ray cluster, {message}")
        from finetune_client.backends.ray_jobs import RayJobsBackend

        return RayJobsBackend(address, self._namespace, self._workdir)

    async def _by_ray_client(self, address: str) -> Backend:
        try:
            from finetune_client.backends.ray_client import RayClientDrivers
        except ModuleNotFoundError as error:
            message = f"{address} needs Ray on this machine too: pip install 'ray[client]', of the cluster's version; "
            raise Unreachable(message + "the dashboard's address, http://HEAD:8265, does without") from error
        from finetune_client.backends.drivers import DriversBackend

        return DriversBackend(await RayClientDrivers.open(address, self._workdir), self._namespace)

    async def submit(self, job: Submission, *, dry_run: bool = False) -> AsyncJob:
        """Hand over one job: a model, plain values, or a file that holds it. `dry_run` has it judged and no more.

        Raises InvalidManifest, whoever finds the fault.
        """
        handed = handed_over(job)
        if len(handed.jobs) != 1:
            names = ", ".join(one.metadata.name for one in handed.jobs)
            message = f"holds {len(handed.jobs)} jobs ({names}); hand them over with submit_all"
            raise InvalidManifest([Problem(file=str(job), message=message)])
        [one] = await self._submit(handed, dry_run)
        return one

    async def submit_all(self, files: Sequence[Path] | Handed, *, dry_run: bool = False) -> Sequence[AsyncJob]:
        """Hand over every job in these files or folders; nothing is, when anything is wrong with one."""
        return await self._submit(files if isinstance(files, Handed) else handed_over(files), dry_run)

    async def job(self, name: str, namespace: str | None = None) -> AsyncJob:
        """A job that was submitted before, by whomever. Nothing is asked yet. Raises NoSuchJob for what is no name."""
        backend = await self.backend()
        return AsyncJob(backend, checked(Key(namespace or backend.namespace, name)))

    async def list(self, *, all_namespaces: bool = False) -> Sequence[JobView]:
        """All jobs, by name."""
        backend = await self.backend()
        return await backend.list(None if all_namespaces else backend.namespace)

    async def close(self) -> None:
        """Let go of connections."""
        if self._backend is not None:
            backend, self._backend = self._backend, None
            await backend.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _submit(self, handed: Handed, dry_run: bool) -> Sequence[AsyncJob]:
        for one in handed.jobs:
            check_namespace(one, self._namespace)
        backend = await self.backend()
        for one in handed.jobs if len(handed.jobs) > 1 and not dry_run else ():
            await backend.submit(
                one, handed.runtimes, True
            )  # so that the last one's fault does not find others started
        views = [await backend.submit(one, handed.runtimes, dry_run) for one in handed.jobs]
        return [AsyncJob(backend, Key(view.namespace, view.name), view) for view in views]


class AsyncJob:
    """One submitted job."""

    def __init__(self, backend: Backend, key: Key, submitted: JobView | None = None) -> None:
        """Made by a client."""
        self._backend = backend
        self.key = key
        self.submitted = submitted
        """The job as it was accepted, when this handle comes from submitting it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} in {self.namespace}>"

    @property
    def name(self) -> str:
        """Its name."""
        return self.key.name

    @property
    def namespace(self) -> str:
        """Where it is."""
        return self.key.namespace

    async def view(self) -> JobView:
        """The job as it is now. Raises NoSuchJob."""
        return await self._backend.get(self.key)

    async def status(self) -> Status:
        """What has become of it."""
        return (await self.view()).status

    async def views(self) -> AsyncGenerator[JobView]:
        """The job as it is now and after every change, until it has succeeded or failed for good."""
        async with aclosing(self._backend.watch(self.key)) as seen:
            async for view in seen:
                yield view
                if view.is_over:
                    return

    async def watch(self) -> AsyncGenerator[Status]:
        """Its status now and after every change, until it has succeeded or failed for good."""
        async with aclosing(self.views()) as seen:
            async for view in seen:
                yield view.status

    async def wait(self) -> Status:
        """Its status once nothing more will come of it by itself: ended, suspended, or refused as it is written."""
        async with aclosing(self._backend.watch(self.key)) as seen:
            async for view in seen:
                if view.is_settled:
                    return view.status
        raise AssertionError("a watch ends with an error or with the one who watches")

    def logs(
        self, *, follow: bool = False, attempt: int | None = None, everyone: bool = False
    ) -> AsyncGenerator[LogLine]:
        """What rank 0 of the newest attempt wrote so far, and with `follow` what it will. Raises NoLog."""
        return self._backend.logs(self.key, LogChoice(attempt, everyone), follow)

    async def suspend(self) -> Status:
        """Have it save a checkpoint and give back its machines."""
        return (await self._backend.suspend(self.key, True)).status

    async def resume(self) -> Status:
        """Let it go on, from its newest checkpoint."""
        return (await self._backend.suspend(self.key, False)).status

    async def cancel(self) -> None:
        """End it and remove it; artifacts and checkpoints stay."""
        await self._backend.cancel(self.key)

    async def artifacts(self) -> list[Artifact]:
        """The trained models that it has written so far."""
        return (await self.view()).artifacts

    async def model_folder(self) -> Path:
        """The folder on this machine of the model that it has written. Raises NoModel, where there is none."""
        return model_folder(await self.view())

    async def metrics(self) -> list[Row]:
        """The figures of each step, from the logs of all attempts. Raises NoLog, where there is none any more.

        In Kubernetes logs go with the pods, soon after a job's end: there, `follow` it while it trains.
        """
        return await history_of(self._backend, self.key)

    def follow(self) -> AsyncGenerator[Moment]:
        """The job now and after every change with the figures of every step so far.

        It ends as `wait` does: when nothing more will come of the job by itself.
        """
        return moments(self._backend, self.key)

    async def describe(self) -> Description:
        """All that is known of it, and what to do next."""
        view = await self.view()
        return Description(view, advice_for(view), await self._backend.events(self.key))


class Client:
    """`AsyncClient` for code that does not await: the same verbs, in the same order, with the same errors.

    It has a thread with an event loop of its own, so it works in notebooks too. For use by one thread at a time.
    """

    def __init__(
        self,
        *,
        namespace: str | None = None,
        context: str | None = None,
        kubeconfig: Path | None = None,
        ray: str | None = None,
        local: bool = False,
        workdir: str | None = None,
    ) -> None:
        """See AsyncClient."""
        self._async = AsyncClient(
            namespace=namespace, context=context, kubeconfig=kubeconfig, ray=ray, local=local, workdir=workdir
        )
        self._portal = Portal()

    def submit(self, job: Submission, *, dry_run: bool = False) -> Job:
        """Hand over one job: a model, plain values, or a file that holds it. Raises InvalidManifest."""
        return Job(self._portal, self._portal.call(self._async.submit(job, dry_run=dry_run)))

    def submit_all(self, files: Sequence[Path] | Handed, *, dry_run: bool = False) -> Sequence[Job]:
        """Hand over every job in these files or folders; nothing is, when anything is wrong with one."""
        return [Job(self._portal, one) for one in self._portal.call(self._async.submit_all(files, dry_run=dry_run))]

    def job(self, name: str, namespace: str | None = None) -> Job:
        """A job that was submitted before. Nothing is asked yet."""
        return Job(self._portal, self._portal.call(self._async.job(name, namespace)))

    def list(self, *, all_namespaces: bool = False) -> Sequence[JobView]:
        """All jobs, by name."""
        return self._portal.call(self._async.list(all_namespaces=all_namespaces))

    def close(self) -> None:
        """Let go of connections."""
        if not self._portal.is_closed:
            try:
                self._portal.call(self._async.close())
            finally:
                self._portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Job:
    """`AsyncJob` for code that does not await."""

    def __init__(self, portal: Portal, job: AsyncJob) -> None:
        """Made by a client."""
        self._portal = portal
        self._job = job
        self.key = job.key
        self.submitted = job.submitted
        """The job as it was accepted, when this handle comes from submitting it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} in {self.namespace}>"

    @property
    def name(self) -> str:
        """Its name."""
        return self.key.name

    @property
    def namespace(self) -> str:
        """Where it is."""
        return self.key.namespace

    def view(self) -> JobView:
        """The job as it is now. Raises NoSuchJob."""
        return self._portal.call(self._job.view())

    def status(self) -> Status:
        """What has become of it."""
        return self._portal.call(self._job.status())

    def views(self) -> Generator[JobView]:
        """The job as it is now and after every change, until it has succeeded or failed for good."""
        return self._portal.iterate(self._job.views())

    def watch(self) -> Generator[Status]:
        """Its status now and after every change, until it has succeeded or failed for good."""
        return self._portal.iterate(self._job.watch())

    def wait(self) -> Status:
        """Its status once nothing more will come of it by itself: ended, suspended, or refused as it is written."""
        return self._portal.call(self._job.wait())

    def logs(self, *, follow: bool = False, attempt: int | None = None, everyone: bool = False) -> Generator[LogLine]:
        """What rank 0 of the newest attempt wrote so far, and with `follow` what it will. Raises NoLog."""
        return self._portal.iterate(self._job.logs(follow=follow, attempt=attempt, everyone=everyone))

    def suspend(self) -> Status:
        """Have it save a checkpoint and give back its machines."""
        return self._portal.call(self._job.suspend())

    def resume(self) -> Status:
        """Let it go on, from its newest checkpoint."""
        return self._portal.call(self._job.resume())

    def cancel(self) -> None:
        """End it and remove it; artifacts and checkpoints stay."""
        self._portal.call(self._job.cancel())

    def artifacts(self) -> list[Artifact]:
        """The trained models that it has written so far."""
        return self._portal.call(self._job.artifacts())

    def model_folder(self) -> Path:
        """The folder on this machine of the model that it has written. Raises NoModel, where there is none."""
        return self._portal.call(self._job.model_folder())

    def metrics(self) -> list[Row]:
        """The figures of each step, from the logs of all attempts. Raises NoLog, where there is none any more.

        In Kubernetes logs go with the pods, soon after a job's end: there, `follow` it while it trains.
        """
        return self._portal.call(self._job.metrics())

    def follow(self) -> Generator[Moment]:
        """The job now and after every change with the figures of every step so far.

        It ends as `wait` does: when nothing more will come of the job by itself.
        """
        return self._portal.iterate(self._job.follow())

    def describe(self) -> Description:
        """All that is known of it, and what to do next."""
        return self._portal.call(self._job.describe())
