"""What the commands for jobs elsewhere do. Each returns the exit code; what goes wrong is one sentence on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from finetune_api.job import Phase
from finetune_api.problems import InvalidManifest
from finetune_client.advice import advice_for, typed
from finetune_client.cli.exits import ABSENT, DENIED, INVALID, NOT_INSTALLED, OK, UNREACHABLE
from finetune_client.cli.jobs.page import page
from finetune_client.cli.jobs.tables import artifact_table, job_table
from finetune_client.client import Client, Description, Job
from finetune_client.documents import handed_over
from finetune_client.errors import ClientError, NoLog, NoSuchJob, NotAllowed, NotInstalled, Unreachable
from finetune_client.telling import summary, what_next
from finetune_client.views import JobView

__all__ = [
    "Where",
    "artifacts",
    "cancel",
    "code_of",
    "describe",
    "get",
    "list_jobs",
    "logs",
    "resume",
    "submit",
    "suspend",
    "watch",
]

_INTERRUPTED = 130
_CODES: Sequence[tuple[type[ClientError], int]] = (
    (Unreachable, UNREACHABLE),
    (NotAllowed, DENIED),
    (NotInstalled, NOT_INSTALLED),
    (NoSuchJob, ABSENT),
    (NoLog, ABSENT),
    (ClientError, 1),
)


@dataclass(frozen=True)
class Where:
    """Where the jobs are, as it was typed."""

    namespace: str | None
    context: str | None
    kubeconfig: Path | None
    ray: str | None
    local: bool

    def client(self) -> Client:
        """A client that speaks to that place."""
        return Client(
            namespace=self.namespace,
            context=self.context,
            kubeconfig=self.kubeconfig,
            ray=None if self._is_typed_over else self.ray,
            local=self.local,
        )

    @property
    def _is_typed_over(self) -> bool:
        """Whether another place was typed than the Ray cluster that the environment names."""
        other = self.local or self.context is not None or self.kubeconfig is not None
        return other and self.ray == os.environ.get("FINETUNE_RAY")

    @property
    def is_said(self) -> bool:
        """Whether a place was named at all."""
        return self != Where(None, None, None, None, False)

    @property
    def is_kubernetes(self) -> bool:
        """Whether that is a Kubernetes cluster, which has runtimes of its own."""
        return (self.ray is None or self._is_typed_over) and not self.local


def submit(where: Where, files: Sequence[Path], wait: bool, dry_run: bool, output: str) -> int:
    """Submit every job in the files."""

    def work(client: Client) -> int:
        handed = handed_over(files)
        jobs = client.submit_all(handed, dry_run=dry_run)
        for runtime in handed.runtimes if where.is_kubernetes else ():
            name = runtime.metadata.name
            _say(f"runtime {name} is the platform's and was left alone; kubectl apply -f FILE installs it")
        views = [job.submitted for job in jobs if job.submitted is not None]
        if output != "table":
            _print(_document(views, many=len(views) > 1), output)
        for view in views if output == "table" else ():
            _tell_of_submission(view, dry_run, wait)
        if not wait or dry_run:
            return OK
        codes = [_follow(job, "table", several=len(jobs) > 1, to_stderr=output != "table") for job in jobs]
        return next((code for code in codes if code != OK), OK)

    return _answered(where, work)


def get(where: Where, name: str | None, output: str) -> int:
    """Show one job, with what to do next; or all."""
    if name is None:
        return list_jobs(where, False, output)

    def work(client: Client) -> int:
        view = client.job(name).view()
        if output != "table":
            _print(view.document, output)
            return OK
        _lines(job_table([view], datetime.now(UTC)))
        if told := [*filter(None, (advice_for(view).why, what_next(view)))]:
            _lines(["", *told])
        return OK

    return _answered(where, work)


def list_jobs(where: Where, all_namespaces: bool, output: str) -> int:
    """Show all jobs."""

    def work(client: Client) -> int:
        views = client.list(all_namespaces=all_namespaces)
        if output != "table":
            _print(_document(views, many=True), output)
        elif views:
            _lines(job_table(views, datetime.now(UTC), with_namespace=all_namespaces))
        else:
            _say("No jobs here. finetune submit FILE starts one; -A looks in every namespace")
        return OK

    return _answered(where, work)


def watch(where: Where, name: str, output: str) -> int:
    """Follow a job to its end."""
    return _answered(where, lambda client: _follow(client.job(name), output))


def logs(where: Where, name: str, follow: bool, attempt: int | None, everyone: bool, as_json: bool) -> int:
    """Print a log."""

    def work(client: Client) -> int:
        job = client.job(name)
        if follow and attempt is None and _has_yet_to_write(view := job.view()):
            _say(f"Waiting for the log of job {name}, which is {summary(view)}")
        for line in job.logs(follow=follow, attempt=attempt, everyone=everyone):
            if as_json:
                told = _text({"source": line.source, "text": line.text}, "json", compact=True)
            else:
                told = f"{line.source}: {line.text}" if everyone else line.text
            print(told, flush=follow)
        return OK

    return _answered(where, work)


def suspend(where: Where, name: str, wait: bool, as_json: bool) -> int:
    """Suspend a job."""

    def work(client: Client) -> int:
        job = client.job(name)
        status = job.suspend()
        if wait:
            status = job.wait()
        done = "is suspended" if status.phase is Phase.SUSPENDED else "saves and stops"
        view = job.view()
        _say(f"job {name} {done}; {typed('resume', view)} lets it go on")
        _print_if(as_json, view)
        return OK

    return _answered(where, work)


def resume(where: Where, name: str, as_json: bool) -> int:
    """Let a job go on."""

    def work(client: Client) -> int:
        job = client.job(name)
        job.resume()
        view = job.view()
        _say(f"job {name} goes on; {typed('watch', view)} follows it")
        _print_if(as_json, view)
        return OK

    return _answered(where, work)


def cancel(where: Where, name: str, as_json: bool) -> int:
    """End and remove a job."""

    def work(client: Client) -> int:
        job = client.job(name)
        before = job.view() if as_json else None
        job.cancel()
        _say(f"job {name} was removed from {job.namespace}; its artifacts and checkpoints stay")
        if before is not None:
            _print(before.document, "json")
        return OK

    return _answered(where, work)


def artifacts(where: Where, name: str, output: str) -> int:
    """List what a job has written."""

    def work(client: Client) -> int:
        view = client.job(name).view()
        if output != "table":
            _print([artifact.to_document() for artifact in view.artifacts], output)
        elif view.artifacts:
            _lines(artifact_table(view.artifacts))
        else:
            _say(f"job {name} is {view.phase} and has written no model yet")
        return OK

    return _answered(where, work)


def describe(where: Where, name: str, as_json: bool) -> int:
    """Tell all of a job."""

    def work(client: Client) -> int:
        found = client.job(name).describe()
        if as_json:
            _print(_described(found), "json")
        else:
            _lines(page(found, datetime.now(UTC)))
        return OK

    return _answered(where, work)


def _answered(where: Where, work: Callable[[Client], int]) -> int:
    """Do it with a client; a mistake of the person's, or of the place, is a sentence and a code."""
    try:
        with where.client() as client, _closed_pipe_is_no_error():
            return work(client)
    except InvalidManifest as invalid:
        for problem in invalid.problems:
            _say(str(problem))
        count = len(invalid.problems)
        _say(f"{count} problem{'s' if count > 1 else ''} found; nothing was submitted")
        return INVALID
    except ClientError as error:
        _say(str(error))
        return code_of(error)
    except KeyboardInterrupt:
        return _INTERRUPTED


def code_of(error: ClientError) -> int:
    """The exit code that says what kind of error it is."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def _follow(job: Job, output: str, several: bool = False, to_stderr: bool = False) -> int:
    """Print what changes until nothing more will; the exit code that fits the end."""
    said = ""
    with closing(job.views()) as views:
        for view in views:
            if output != "table":
                print(_told(view, output), flush=True)
            elif (line := summary(view)) != said:
                said = line
                stamp = datetime.now(UTC).strftime("%H:%M:%S")
                who = f"{view.name}: " if several else ""
                print(f"{stamp} {who}{line}", flush=True, file=sys.stderr if to_stderr else sys.stdout)
            if view.is_settled:
                _tell_what_next(view)
                return view.exit_code
    raise AssertionError("a job's views end when it is settled")


def _has_yet_to_write(view: JobView) -> bool:
    """Whether the newest attempt may be long in coming: in a queue, say, or for want of machines."""
    has_ended = any(attempt.ended_at is not None for attempt in view.status.attempts[-1:])
    return not view.is_settled and not has_ended and view.phase is not Phase.RUNNING


def _told(view: JobView, output: str) -> str:
    """The status for programs that read one after the other: a line of JSON, or a YAML document."""
    status = view.status.to_document()
    return f"---\n{_text(status, output)}" if output == "yaml" else _text(status, "json", compact=True)


def _tell_of_submission(view: JobView, dry_run: bool, wait: bool) -> None:
    if dry_run:
        print(f"job {view.name} is valid for namespace {view.namespace}; nothing was submitted (dry run)")
        return
    print(f"job {view.name} submitted to namespace {view.namespace}")
    if not wait:
        print(f"Next: {typed('watch', view)}")


def _tell_what_next(view: JobView) -> None:
    if told := what_next(view):
        _say(told)


def _document(views: Sequence[JobView], many: bool) -> Mapping[str, Any]:
    """One object, or a list as kubectl prints it."""
    if not many:
        return views[0].document
    return {"apiVersion": "v1", "kind": "List", "items": [view.document for view in views]}


def _described(found: Description) -> Mapping[str, Any]:
    """The job, why it is where it is, what to do next, and its events."""
    events = [
        {"at": one.at.isoformat() if one.at else None, "type": one.kind, "reason": one.reason, "message": one.message}
        for one in found.events
    ]
    return {"job": found.view.document, "why": found.advice.why, "next": found.advice.next, "events": events}


def _print_if(as_json: bool, view: JobView) -> None:
    """The job as it now is, for programs."""
    if as_json:
        _print(view.document, "json")


def _print(document: Any, output: str) -> None:
    print(_text(document, output))


def _text(document: Any, output: str, compact: bool = False) -> str:
    if output == "yaml":
        return yaml.safe_dump(_plain(document), sort_keys=False, allow_unicode=True).rstrip()
    return json.dumps(document, indent=None if compact else 2, ensure_ascii=False)


def _plain(document: Any) -> Any:
    return json.loads(json.dumps(document))


def _lines(lines: Iterator[str] | Sequence[str]) -> None:
    for line in lines:
        print(line)


def _say(sentence: str) -> None:
    """To the person who typed; stdout is for the answer."""
    print(sentence, file=sys.stderr)


@contextmanager
def _closed_pipe_is_no_error() -> Iterator[None]:
    """`finetune logs ... | head` ends when head has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed once more at the very end
