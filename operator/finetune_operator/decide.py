"""What to do about a job: a pure function of the job, what was seen, the time, and the settings. Never raises.

Called by the reconcile pass, on a cluster and on a laptop alike. One pass goes through a job's life in order and leaves
early:

    gone, or another's          nothing
    finished                    retention: the time to live, clusters left behind
    its RayJobs                 an attempt is whatever has a RayJob: what the status lost is taken up again
    the attempt that goes on    how far it is; whether it ended, is late, hung, or used up the job's time
    the spec                    problems become condition Valid; an attempt that goes on is left alone
    suspended                   trainers that can are asked to save and to stop; then, or when their time is over, the
                                RayJob is deleted and the attempt ends as Suspended
    waiting to try again        until the back-off is over
    otherwise                   the next attempt: runtime, other jobs' artifacts, plan, objects (`launch`)

An attempt is written into the status by the pass that creates its RayJob, and its RayJob's uid by the first pass that
sees it. So a RayJob that is gone is told from one that was never seen, and a pass that is repeated does no more than
the first. An attempt that ends keeps its RayJob until the next one starts; none starts while another RayJob of the job
is active. What is written moves forward only: attempts are numbered upwards, counts grow, an ended job stays ended.
"""

from __future__ import annotations

import re
import traceback
from datetime import datetime
from functools import cached_property
from typing import Any

from finetune_api.failures import FailureClass
from finetune_api.job import Attempt, FineTuneJob
from finetune_api.spec import Action
from finetune_operator import checkpoints, endings, names
from finetune_operator.conditions import TRAINING_STAGES, Finding
from finetune_operator.decision import Create, Decision, Delete, Event, Merge
from finetune_operator.describe import Scene, describe, events, resized
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, RAY_JOB, Key
from finetune_operator.launch import Blocked, Launch, Prepared, expected_config_maps, judge_spec, prepare
from finetune_operator.observe import Document, Observed
from finetune_operator.obstacles import Obstacle, obstacles
from finetune_operator.outdated import status_kept
from finetune_operator.policies.classification import CANCELLED, SUCCEEDED, Ending, classify, evidence
from finetune_operator.policies.deadline import active_due, start_due, used_up
from finetune_operator.policies.hang import hang_due
from finetune_operator.policies.restart import halved
from finetune_operator.policies.retention import (
    cluster_kept_until,
    expires_at,
    superseded_plans,
    superseded_ray_jobs,
)
from finetune_operator.policies.suspend import Hold, can_save, hold_on, saves_until
from finetune_operator.settings import Settings
from finetune_operator.states import STOP_KEY, PodState, RayJobState, Report
from finetune_operator.status import Draft, clip, in_brief, job_progress
from finetune_operator.times import after, sane, written

__all__ = ["Create", "Decision", "Delete", "Event", "Merge", "decide"]

_ACCEPTED = "The job can be run as it is written."
_NAME_TAKEN_SECONDS = 60.0
_SOON_SECONDS = 5.0
"""For what a watch will tell anyway, should it be late."""
_OUTCOME_SECONDS = 15.0
_FAULT_SECONDS = 300.0
_ADDRESS = re.compile(r"0x[0-9a-f]+")
_CLOCKS_DIFFER_SECONDS = 300.0
"""The trainers' clocks may be behind by this much without their reports counting as older than their admission."""


def decide(job: Document, observed: Observed, now: datetime, settings: Settings) -> Decision:
    """All that follows from what was seen of `job` at `now`, which has a time zone. Never raises."""
    try:
        return _Pass(job, observed, now, settings).run()
    except Exception as error:
        # A fault of ours in one job's case must not stop the others, and must not be silent.
        return _fault(job, observed, now, error)


class _Pass:
    """One pass over one job: what is found goes into the draft of the status, what is to be done into lists."""

    def __init__(self, job: Document, seen: Observed, now: datetime, settings: Settings) -> None:
        self.document = job
        self.seen = seen
        self.settings = settings
        self.now = sane(now)
        self.draft = Draft(seen.status, self.now, seen.job.generation)
        self.creates: list[Create] = []
        self.deletes: list[Delete] = []
        self.events: list[Event] = []
        self.merges: list[Merge] = []
        self.moments: list[datetime] = []
        self.hold = Hold.NONE
        self.failed_into_hold = False

    def run(self) -> Decision:
        if self.seen.job.deleting or not self.seen.job.is_ours or not self.seen.job.uid:
            return Decision()
        if self.draft.finished_at is not None:
            return self._retain(self.draft.finished_at)
        self._take_up_ray_jobs()
        self._follow_attempt()
        if self.draft.finished_at is None:
            self._go_on()
        self._describe()
        return self._decision()

    # -- the job has ended ---------------------------------------------------------------------------------------------

    def _retain(self, finished_at: datetime) -> Decision:
        expiry = expires_at(finished_at, self.seen.lifecycle)
        if expiry is not None and expiry <= self.now:
            return Decision(delete=(Delete(FINETUNE_JOB, self.seen.job.key, self.seen.job.uid),))
        self._keep_until(finished_at, expiry)
        if self.draft.last is not None:
            self._clear_away(self.draft.last.number)
        return self._decision()

    def _keep_until(self, finished_at: datetime, expiry: datetime | None) -> None:
        """Clusters that outlive the job are ended when their time is over."""
        active = self._active()
        until = cluster_kept_until(finished_at, self.draft.failure is not None, self.seen.lifecycle)
        if active and until <= self.now:
            self._end_ray_jobs(active)
        elif active:
            self.moments.append(until)
        if self.draft.failure is None and self.seen.lifecycle.keep_failed_cluster_seconds > 0:
            # KubeRay keeps the cluster of every RayJob that has ended for so long, of one that has succeeded too.
            self._end_ray_jobs([one for one in self.seen.ray_jobs.values() if one.finished])
        if expiry is not None:
            self.moments.append(expiry)

    # -- attempts and their RayJobs ------------------------------------------------------------------------------------

    def _take_up_ray_jobs(self) -> None:
        """Every RayJob of the job is an attempt, also one that the status does not know; only the last can be open."""
        newest = self.draft.last.number if self.draft.last is not None else 0
        for number, ray_job in self.seen.ray_jobs.items():
            if number > newest:
                self._give_up_open("A later attempt had begun.")
                created = sane(ray_job.created_at or self.draft.now)
                admitted = None if ray_job.suspended else created
                self.draft.add(Attempt(number=number, ray_job=ray_job.name, created_at=created, admitted_at=admitted))
                self.draft.next_attempt_at = None
        attempt = self.draft.open
        ray_job_of_attempt = self.seen.ray_jobs.get(attempt.number) if attempt is not None else None
        if attempt is not None and attempt.uid is None and ray_job_of_attempt is not None:
            self.draft.change_last(uid=ray_job_of_attempt.uid or None)

    def _give_up_open(self, why: str) -> None:
        if self.draft.open is not None:
            endings.close(self.draft, FailureClass.UNKNOWN.value, why)
            self.draft.change_last(action=Action.RETRY.value)

    def _ray_job(self) -> RayJobState | None:
        """Of the attempt that goes on. One of its name with another uid is not it."""
        attempt = self.draft.open
        found = self.seen.ray_jobs.get(attempt.number) if attempt is not None else None
        return found if attempt is not None and found is not None and attempt.uid in (None, found.uid) else None

    def _active(self, but: int | None = None) -> list[RayJobState]:
        """RayJobs that hold machines, or may yet."""
        return [one for number, one in self.seen.ray_jobs.items() if not one.finished and number != but]

    def _end_ray_jobs(self, ray_jobs: list[RayJobState]) -> None:
        for one in ray_jobs:
            if not one.deleting:
                self.deletes.append(self._deletion(one))

    def _deletion(self, ray_job: RayJobState) -> Delete:
        return Delete(RAY_JOB, Key(self.seen.job.namespace, ray_job.name), ray_job.uid or None)

    # -- the attempt that goes on --------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What the trainers of the newest attempt said last; nothing, when that was an earlier one's."""
        last = self.draft.last
        mine = last is not None and self.seen.report.attempt == last.number
        return self.seen.report if mine else Report()

    @property
    def pods(self) -> tuple[PodState, ...]:
        """Of the newest attempt."""
        last = self.draft.last
        return self.seen.pods.get(last.number, ()) if last is not None else ()

    def _obstacle(self) -> Obstacle | None:
        """What keeps the attempt that goes on from having its cluster. Looked at again when there may be something."""
        attempt, ray_job = self.draft.open, self._ray_job()
        if attempt is None or attempt.admitted_at is None or (ray_job is not None and ray_job.running):
            return None
        found = list(obstacles(None if self.seen.one_machine else ray_job, self.pods))
        self.moments += [one.since for one in found if one.since is not None and one.since > self.now]
        return next((one for one in found if one.since is None or one.since <= self.now), None)

    def _follow_attempt(self) -> None:
        attempt, ray_job = self.draft.open, self._ray_job()
        checkpoints.keep_newest(self.draft, self.report)
        if attempt is None:
            return
        self._show_progress()
        if ray_job is not None:
            self._admit(ray_job)
        admitted, progress = self.draft.attempts[-1].admitted_at, self.report.progress
        if admitted is not None and progress is not None and progress.updated_at >= admitted:
            # One from before would tell of another start, where a queue took the attempt back and let it go again.
            self.events += checkpoints.begin(self.draft, progress)
        known = self.draft.post_mortem
        ending = classify(ray_job, self.pods, self.report, attempt=attempt.number, seen=known)
        if ray_job is None and attempt.uid is not None and (ending is None or ending.outcome == CANCELLED):
            # Nobody stopped the run but by deleting it, be it ourselves in a pass whose status was refused.
            ending = _ended(FailureClass.UNKNOWN, f"RayJob {attempt.ray_job} was deleted while the attempt went on.")
        if (self.seen.job.suspend or self._was_asked_to_stop()) and (ending is None or ending.outcome != SUCCEEDED):
            return  # whatever else it came to, by then it had to end
        if ending is not None:
            if not self._outcome_is_awaited(ending, ray_job):
                self._end_attempt(ending, ray_job)
        elif ray_job is not None and not ray_job.deleting:
            self._note_evidence(attempt)
            self._watch_clocks(ray_job)

    def _show_progress(self) -> None:
        progress, outcome, shown = self.report.progress, self.report.outcome, self.draft.progress
        if progress is None and outcome is None:
            return
        if outcome is None and progress is not None and shown is not None and shown.updated_at == progress.updated_at:
            return  # each report has a time of its own
        now, before = job_progress(outcome, progress), shown.world_size if shown is not None else None
        if now is not None and now.world_size is None:
            now = now.model_copy(update={"world_size": before})  # between two groups of workers
        self.draft.progress = now
        if now is not None and self.draft.resolved is not None:
            self.events += resized(before, now.world_size, self.draft.resolved.world_size)

    def _outcome_is_awaited(self, ending: Ending, ray_job: RayJobState | None) -> bool:
        """The RayJob has succeeded, and what the trainers wrote last is still on its way to us."""
        if ending.outcome != SUCCEEDED or ending.reported or ray_job is None or ray_job.ended_at is None:
            return False
        until = after(ray_job.ended_at, _OUTCOME_SECONDS)
        if until > self.now:
            self.moments.append(until)
        return until > self.now

    def _admit(self, ray_job: RayJobState) -> None:
        """Follows the queue, if there is one, and the trainers' first step."""
        attempt = self.draft.attempts[-1]
        if ray_job.suspended:
            if attempt.admitted_at is not None:
                taken = (self.draft.now - attempt.admitted_at).total_seconds()
                self.draft.active_seconds += max(0, int(taken))
                self.draft.change_last(admitted_at=None, running_at=None, resumed_from_step=None)
                self.events.append(Event("Normal", "Evicted", f"The queue took attempt {attempt.number} back."))
            return
        if attempt.admitted_at is None:
            attempt = self.draft.change_last(admitted_at=self.draft.now)
        heartbeat, progress = self._heartbeat(), self.report.progress
        if attempt.running_at is None and heartbeat and progress and progress.stage in TRAINING_STAGES:
            begun = max(attempt.admitted_at or heartbeat, min(heartbeat, self.draft.now))
            self.draft.change_last(running_at=begun)

    def _heartbeat(self) -> datetime | None:
        """When the trainers last reported since the attempt was admitted."""
        admitted, progress = self.draft.attempts[-1].admitted_at, self.report.progress
        if admitted is None or progress is None:
            return None
        return progress.updated_at if after(progress.updated_at, _CLOCKS_DIFFER_SECONDS) > admitted else None

    def _note_evidence(self, attempt: Attempt) -> None:
        """What a failed pod tells is kept at once: it may be gone when the attempt ends."""
        known = self.draft.post_mortem
        if known is not None and known.attempt == attempt.number:
            return
        found = evidence(self.pods)
        if found is not None and found.failure_class is not None:
            self.draft.post_mortem = endings.post_mortem(attempt.number, found.failure_class, found)

    def _watch_clocks(self, ray_job: RayJobState) -> None:
        attempt, heartbeat, progress = self.draft.attempts[-1], self._heartbeat(), self.report.progress
        hindered = self._obstacle()
        due = [
            active_due(attempt, self.draft.active_seconds, self.seen.lifecycle),
            start_due(attempt, heartbeat is not None, self.seen.lifecycle, hindered.message if hindered else ""),
            hang_due(attempt, heartbeat, self.seen.policy, progress.doing if progress is not None else None),
        ]
        first = min((one for one in due if one is not None), key=lambda one: one.at, default=None)
        if first is None:
            return
        if first.at > self.now:
            self.moments.append(first.at)
            return
        self._end_attempt(_ended(first.failure_class, first.message), ray_job, out_of_time=True)

    def _end_attempt(self, ending: Ending, ray_job: RayJobState | None, *, out_of_time: bool = False) -> None:
        """`out_of_time`: the attempt itself has not noticed, so its RayJob is ended too."""
        draft, report = self.draft, self.report
        when = ray_job.ended_at if ray_job is not None and not out_of_time else None
        step = endings.last_step(report, ending.step)
        endings.close(draft, ending.outcome, ending.message, step, when and sane(when))
        if ending.outcome == SUCCEEDED:
            endings.succeed(draft, report.outcome)
        elif ending.failure_class is FailureClass.DEADLINE_EXCEEDED and out_of_time:
            endings.give_up(draft, ending)
            self.events.append(endings.told(draft, ending, None))
        else:
            verdict = endings.settle(draft, ending, self.seen.policy, saves=self._goes_on_from_checkpoints())
            self.failed_into_hold = verdict is not None and verdict.action is Action.SUSPEND
            self.events.append(endings.told(draft, ending, verdict))
        if out_of_time and ray_job is not None and not self._is_kept_to_look_at(ending):
            self._end_ray_jobs([ray_job])

    def _is_kept_to_look_at(self, ending: Ending) -> bool:
        """The last cluster of a job that hung may stay for a while; one whose time is up must not train on."""
        is_last = self.draft.finished_at is not None and ending.failure_class is not FailureClass.DEADLINE_EXCEEDED
        return is_last and self.seen.lifecycle.keep_failed_cluster_seconds > 0

    # -- what comes next -----------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        self.hold = hold_on(self.seen.job.suspend, self.draft.condition("Suspended"), self.failed_into_hold)
        job = self._judge()
        if self.hold is not Hold.NONE or self._was_asked_to_stop():
            self._suspend()
        if self.hold is not Hold.NONE or self._was_asked_to_stop():
            return
        if self.draft.open is not None:
            self._keep_whole()
        elif self.draft.next_attempt_at is not None and self.draft.next_attempt_at > self.now:
            self.moments.append(self.draft.next_attempt_at)
        elif job:
            self._start()

    def _judge(self) -> bool:
        """Whether the spec holds. One that was found valid is not looked at again until it changes."""
        before = self.draft.condition("Valid")
        if before and before.status == "True" and before.observed_generation == self.draft.generation:
            return True
        if isinstance(self.parsed, Finding):
            self.draft.find(self.parsed)
            return False
        self.draft.method, self.draft.tuning = self.parsed.spec.method.chosen, self.parsed.spec.tuning.chosen
        self.draft.find(Finding("Valid", "True", "Accepted", _ACCEPTED))
        return True

    def _was_asked_to_stop(self) -> bool:
        """The attempt that goes on was asked to, and so must end."""
        return self.draft.open is not None and self.draft.open.stop_asked_at is not None

    def _suspend(self) -> None:
        attempt = self.draft.open
        if attempt is not None and self._is_saving(attempt):
            return
        if attempt is not None:
            asked_in_vain = attempt.stop_asked_at is not None and self.report.outcome is None
            endings.suspend(self.draft, self.report, saved_in_time=not asked_in_vain)
        self.draft.next_attempt_at = None
        self._end_ray_jobs(self._active())

    def _is_saving(self, attempt: Attempt) -> bool:
        """The trainers were asked to save and to stop, or are now, and there is time left."""
        where = CONFIG_MAP, names.progress_config_map(self.seen.job.name)
        until = saves_until(attempt, self.draft.now, self.seen.lifecycle)
        can = self._saves() and can_save(attempt, self._ray_job(), self.report)
        if not can or until <= self.now or where not in self.seen.own:
            return False
        if attempt.stop_asked_at is None:
            self.draft.change_last(stop_asked_at=self.draft.now)
        if self.seen.report.stop_attempt != attempt.number:
            patch = {"data": {STOP_KEY: str(attempt.number)}}
            self.merges.append(Merge(CONFIG_MAP, Key(self.seen.job.namespace, where[1]), patch))
        self.moments.append(until)
        return True

    def _keep_whole(self) -> None:
        """The attempt goes on: what it needs and somebody deleted is made again, what is not its own is ended."""
        attempt = self.draft.attempts[-1]
        self._clear_away(attempt.number)
        runtime_hash = self.draft.resolved.runtime_hash if self.draft.resolved is not None else None
        wanted = [(CONFIG_MAP, name) for name in expected_config_maps(self.seen, attempt.number, runtime_hash)]
        never_made = attempt.uid is None and attempt.number not in self.seen.ray_jobs
        if not never_made and all(one in self.seen.own for one in wanted):
            return
        prepared = self._prepare(attempt.number, attempt.micro_batch_size)
        if isinstance(prepared, Prepared):
            self.creates += prepared.create
        elif never_made:
            self._end_attempt(_ended(FailureClass.UNKNOWN, f"It never started: {prepared.finding.message}"), None)

    def _start(self) -> None:
        """The next attempt, once nothing of an earlier one holds machines."""
        active = self._active()
        if active:
            self._end_ray_jobs(active)
            self.moments.append(after(self.now, _SOON_SECONDS))
            return
        overdue = used_up(self.draft.active_seconds, self.seen.lifecycle)
        if overdue is not None:
            endings.fail(self.draft, FailureClass.DEADLINE_EXCEEDED, "DeadlineExceeded", overdue)
            return
        last = self.draft.last
        number = last.number + 1 if last is not None else 1
        prepared = self._prepare(number, self._micro_batch_size())
        if isinstance(prepared, Blocked):
            self._wait(prepared)
        elif prepared.delete:
            self.deletes += prepared.delete
            self.moments.append(after(self.now, _SOON_SECONDS))
        else:
            self._launch(number, prepared)

    def _prepare(self, number: int, micro_batch_size: int | None) -> Prepared | Blocked:
        if isinstance(self.parsed, Finding):
            return Blocked(self.parsed)
        resolved = self.draft.resolved
        launch = Launch(number, micro_batch_size, resolved.runtime_hash if resolved is not None else None)
        return prepare(self.parsed, self.document, self.seen, launch, self.settings)

    def _wait(self, blocked: Blocked) -> None:
        if blocked.failed:
            endings.fail(self.draft, FailureClass.DEPENDENCY_FAILED, blocked.finding.reason, blocked.finding.message)
            return
        self.draft.find(blocked.finding)
        if blocked.finding.reason == "NameTaken":
            self.moments.append(after(self.now, _NAME_TAKEN_SECONDS))

    def _launch(self, number: int, prepared: Prepared) -> None:
        draft, asked = self.draft, self._micro_batch_size()
        self.creates += prepared.create
        self._clear_away(number)
        attempt = Attempt(
            number=number,
            ray_job=prepared.create[-1].document["metadata"]["name"],
            created_at=draft.now,
            admitted_at=None if prepared.queued else draft.now,
            micro_batch_size=prepared.resolved.micro_batch_size if asked is not None else None,
        )
        draft.add(attempt)
        draft.resolved, draft.next_attempt_at = prepared.resolved, None
        self.events.append(Event("Normal", "AttemptStarted", f"Attempt {number} starts as RayJob {attempt.ray_job}."))
        if prepared.warning is not None and number == 1:
            draft.find(Finding("Valid", "True", "Accepted", f"{_ACCEPTED} {prepared.warning}"))
            self.events.append(Event("Warning", "ModelWillBeLost", prepared.warning))
        self.moments.append(after(self.now, self.seen.lifecycle.start_deadline_seconds))

    def _clear_away(self, number: int) -> None:
        """What attempts before this one left. Looked for while it goes on too: a pass may break off in its middle."""
        known = {one.key for one in self.deletes}
        gone = [self._deletion(one) for one in superseded_ray_jobs(self.seen.ray_jobs, number)]
        for old in superseded_plans(self.seen.plans, number):
            name = self.seen.plans[old]["metadata"]["name"]
            uid = self.seen.own[CONFIG_MAP, name] or None
            gone.append(Delete(CONFIG_MAP, Key(self.seen.job.namespace, name), uid))
        self.deletes += [one for one in gone if one.key not in known]

    def _micro_batch_size(self) -> int | None:
        """What the next attempt trains with instead of the job's own; None for the job's own."""
        last, resolved = self.draft.last, self.draft.resolved
        if last is None or last.action != Action.RETRY_WITH_SMALLER_MICRO_BATCH or last.ended_at is None:
            return last.micro_batch_size if last is not None else None
        micro = last.micro_batch_size or (resolved.micro_batch_size if resolved is not None else None)
        return None if micro is None else halved(micro) or micro

    # -- what is said --------------------------------------------------------------------------------------------------

    def _describe(self) -> None:
        attempt = self.draft.open
        doomed = {one.key.name for one in self.deletes if one.kind == RAY_JOB}
        over = self._active(but=attempt.number if attempt is not None else None)
        progress = self.report.progress if attempt is not None and self._heartbeat() is not None else None
        describe(
            self.draft,
            Scene(
                hold=self.hold,
                ray_job=self._ray_job(),
                obstacle=self._obstacle(),
                progress=progress,
                leftovers=tuple(one.name for one in over if one.deleting or one.name in doomed),
                queue=self._queue(),
                wants_checkpoints=self._saves(),
                save_failure=progress.save_failure if progress is not None else None,
            ),
        )
        finished_at = self.draft.finished_at
        if finished_at is not None:
            self._keep_until(finished_at, expires_at(finished_at, self.seen.lifecycle))

    def _queue(self) -> str | None:
        scheduling = self.spec.get("scheduling")
        queue = scheduling.get("queue") if isinstance(scheduling, dict) else None
        return queue if isinstance(queue, str) else None

    def _decision(self) -> Decision:
        wait = min(((moment - self.now).total_seconds() for moment in self.moments), default=None)
        again = None if wait is None else max(wait, 0.01)
        unkept = self.seen.unkept
        if unkept or (unkept is not None and self.draft.condition("StatusKept") is not None):
            self.draft.find(status_kept(unkept))
        status = self.draft.to_status()
        document = status.to_document() if status is not None else None
        creates, deletes, merges = tuple(self.creates), tuple(self.deletes), tuple(self.merges)
        if document is None or document == self.document.get("status"):
            return Decision(creates, deletes, merge=merges, requeue_after=again)
        return Decision(creates, deletes, document, (*self.events, *events(self.draft)), merges, again)

    # -- the spec, as far as it is needed ------------------------------------------------------------------------------

    @cached_property
    def spec(self) -> dict[str, Any]:
        spec = self.document.get("spec")
        return spec if isinstance(spec, dict) else {}

    def _saves(self) -> bool:
        return isinstance(self.spec.get("checkpoint"), dict)

    def _goes_on_from_checkpoints(self) -> bool:
        return self._saves() and self.spec["checkpoint"].get("resume") != "never"

    @cached_property
    def parsed(self) -> FineTuneJob | Finding:
        """The whole job, or what is wrong with its spec. Reading it costs more than all the rest: last resort."""
        return judge_spec(self.document, self.seen.job)


def _ended(failure: FailureClass, message: str) -> Ending:
    return Ending(failure.value, failure, message=message)


def _fault(job: Any, seen: Observed, now: datetime, error: Exception) -> Decision:
    """A fault of the operator, told on the job that shows it. Nothing else is touched."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    # An address in it would be another each time, and each time be written.
    what = _ADDRESS.sub("0x…", repr(error))
    message = clip(f"The operator failed on this job, which is a fault of its own: {what} ({where})", 1024)
    status = job.get("status") if isinstance(job, dict) else None
    status = dict(status) if isinstance(status, dict) else {}
    listed = status.get("conditions")
    others = [one for one in (listed if isinstance(listed, list) else []) if isinstance(one, dict)]
    before = next((one for one in others if one.get("type") == "Valid"), {})
    condition = {
        "type": "Valid",
        "status": "False",
        "reason": "InternalError",
        "message": message,
        "lastTransitionTime": written(sane(now)),
        "observedGeneration": seen.job.generation,
    }
    if before.get("status") == "False" and "lastTransitionTime" in before:
        condition["lastTransitionTime"] = before["lastTransitionTime"]
    if before == condition:
        return Decision(requeue_after=_FAULT_SECONDS)
    status |= {"reason": condition["reason"], "message": in_brief(message)}
    status["conditions"] = [condition, *(one for one in others if one.get("type") != "Valid")]
    return Decision(status=status, events=(Event("Warning", "InternalError", message),), requeue_after=_FAULT_SECONDS)
