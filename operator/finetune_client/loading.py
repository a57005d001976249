"""From files to plans: reads manifests, finds each job's runtime, plans, and gathers everything that is wrong.

Called by the CLI's commands; it prints nothing.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.manifests import LoadedJob, collect_manifests
from finetune_api.plan import RunPlan
from finetune_api.problems import InvalidManifest, shorten
from finetune_api.runtime import FineTuneRuntime
from finetune_api.uris import Scheme, parse_uri
from finetune_client.overrides import Override, apply_overrides
from finetune_operator.planning import plan_run
from finetune_operator.policies.dependencies import dependency_names, dependency_paths, misfits

__all__ = [
    "Loaded",
    "PlannedJob",
    "load",
    "load_all",
    "load_one",
    "misfits_among",
    "missing_data",
    "missing_jobs",
    "missing_models",
]


JobName = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True)
class PlannedJob:
    """A job that can be run, and how it will be."""

    file: str
    job: FineTuneJob
    plan: RunPlan
    runtime: FineTuneRuntime | None = None
    """The one that the job names."""


@dataclass
class Loaded:
    """All jobs of some files, and all that is wrong with them."""

    planned: list[PlannedJob] = field(default_factory=list)
    runtimes: Mapping[str, FineTuneRuntime] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def load(files: Sequence[Path], runtimes: Sequence[Path] = (), overrides: Sequence[Override] = ()) -> Loaded:
    """Read and plan every job in `files`. A job's runtime may stand in any of `files` and `runtimes`."""
    found = collect_manifests(*files, edit=lambda document: apply_overrides(document, overrides))
    others = collect_manifests(*runtimes) if runtimes else None
    known = (others.runtimes if others else {}) | found.runtimes
    loaded = Loaded(runtimes=known, problems=[*found.problems, *(others.problems if others else [])])
    for job in found.jobs:
        try:
            loaded.planned.append(_planned(job, known, complete=not loaded.problems))
        except InvalidManifest as invalid:
            loaded.problems += [problem.model_copy(update={"file": job.file}) for problem in invalid.problems]
    loaded.problems += misfits_among(loaded.planned)
    return loaded


def load_one(
    file: Path, name: str | None = None, runtimes: Sequence[Path] = (), overrides: Sequence[Override] = ()
) -> PlannedJob:
    """The only job in `file`, or the one called `name`. Raises InvalidManifest."""
    loaded = load([file], runtimes, overrides)
    if loaded.problems:
        raise InvalidManifest(loaded.problems)
    chosen = [planned for planned in loaded.planned if name in (None, planned.job.metadata.name)]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(planned.job.metadata.name for planned in loaded.planned)
    if not loaded.planned:
        message = "holds no FineTuneJob"
    elif name is None:
        message = f"holds {len(chosen)} jobs; choose one with --job: {names}; finetune run -f runs all of them"
    else:
        message = f"must hold one job called {name}; it holds {names}"
    raise InvalidManifest([Problem(file=str(file), message=message)])


def load_all(file: Path, runtimes: Sequence[Path] = (), overrides: Sequence[Override] = ()) -> list[PlannedJob]:
    """Every job in `file`, or in the files of that folder, in their order. Raises InvalidManifest."""
    loaded = load([file], runtimes, overrides)
    if not loaded.problems and not loaded.planned:
        loaded.problems.append(Problem(file=str(file), message="holds no FineTuneJob"))
    loaded.problems += _of_one_name(loaded.planned)
    if loaded.problems:
        raise InvalidManifest(loaded.problems)
    return loaded.planned


def _of_one_name(planned: Sequence[PlannedJob]) -> list[Problem]:
    """Jobs that would share the folder of their run."""
    first: dict[str, PlannedJob] = {}
    problems = []
    for one in planned:
        other = first.setdefault(one.plan.name, one)
        if other is not one:
            message = f"is the name of a job in {other.file}, too, and each run has a folder of its name; change one"
            problems.append(Problem(file=one.file, path="metadata.name", value=one.plan.name, message=message))
    return problems


def missing_jobs(planned: Sequence[PlannedJob]) -> list[Problem]:
    """Jobs that these wait for, by job://name, and will never be able to start from."""
    jobs = {(one.plan.namespace, one.plan.name): one for one in planned}
    needs = {name: dependency_names(one.job.to_document()) for name, one in jobs.items()}
    problems = []
    for here, one in jobs.items():
        for path, needed in dependency_paths(one.job.to_document()).items():
            message = _why_not(jobs, needs, here, (here[0], needed))
            if message is not None:
                value = json.dumps(f"job://{needed}")
                problems.append(Problem(file=one.file, path=path, value=value, message=message))
    return problems


def _why_not(
    jobs: Mapping[JobName, PlannedJob],
    needs: Mapping[JobName, Sequence[str]],
    here: JobName,
    needed: JobName,
) -> str | None:
    """Why job `here` would wait for the model of job `needed` in vain."""
    if needed not in jobs:
        return (
            "is the artifact of a job that is not run here; put that job into the same file or folder and run all of "
            "them with -f, or name the artifact itself: file:///path/to/artifact"
        )
    if _leads_to(needs, needed, here):
        return "is the artifact of a job that waits for this one; one of them must start from a model"
    return None


def misfits_among(jobs: Sequence[LoadedJob | PlannedJob]) -> list[Problem]:
    """Jobs of these files whose models will not do where others of them name them."""
    documents = {(one.job.metadata.namespace, one.job.metadata.name): one.job.to_document() for one in jobs}
    problems = []
    for one in jobs:
        beside = {name: other for (space, name), other in documents.items() if space == one.job.metadata.namespace}
        found = misfits(one.job.to_document(), beside)
        problems += [problem.model_copy(update={"file": one.file}) for problem in found]
    return problems


def missing_data(plan: RunPlan) -> list[Problem]:
    """Data sources on this machine's disk that are not there. Seen at once, before anything heavy is started."""
    sources = [
        (f"spec.data.{part}[{index}].source", source.source)
        for part, listed in (("train", plan.data.train), ("eval", plan.data.eval))
        for index, source in enumerate(listed)
    ]
    return [_not_there(path, uri) for path, uri in sources if not _is_there(uri)]


def missing_models(plan: RunPlan) -> list[Problem]:
    """Models and tokenizers that should be on this machine's disk and are not."""
    sources = [("spec.model.source", plan.model.source), ("spec.model.tokenizer", plan.model.tokenizer)]
    if plan.method.distill is not None:
        field, teacher = "spec.method.distill.teacher", plan.method.distill.teacher
        sources += [(f"{field}.source", teacher.source), (f"{field}.tokenizer", teacher.tokenizer)]
    if plan.method.online is not None:
        field = f"spec.method.{plan.method.chosen}.rewards"
        rewards = enumerate(plan.method.online.rewards)
        sources += [(f"{field}[{at}].model.source", one.model.source) for at, one in rewards if one.model is not None]
    return [_not_there(path, uri) for path, uri in sources if uri is not None and not _is_there(uri)]


def _planned(loaded: LoadedJob, runtimes: Mapping[str, FineTuneRuntime], complete: bool) -> PlannedJob:
    reference = loaded.job.spec.runtime_ref
    if reference is None:
        return PlannedJob(loaded.file, loaded.job, plan_run(loaded.job))
    runtime = runtimes.get(reference.name)
    if runtime is None:
        raise InvalidManifest([_unknown_runtime(reference.name, runtimes, complete)])
    return PlannedJob(loaded.file, loaded.job, plan_run(loaded.job, runtime), runtime)


def _leads_to(needs: Mapping[tuple[str, str], Sequence[str]], start: tuple[str, str], target: tuple[str, str]) -> bool:
    """Whether `start` needs `target`, by whatever way."""
    seen: set[tuple[str, str]] = set()
    waiting = [start]
    while waiting:
        here = waiting.pop()
        if here == target:
            return True
        if here not in seen:
            seen.add(here)
            waiting += [(here[0], name) for name in needs.get(here, ())]
    return False


def _unknown_runtime(name: str, runtimes: Mapping[str, FineTuneRuntime], complete: bool) -> Problem:
    close = difflib.get_close_matches(name, runtimes, n=1)
    hints = [
        f"did you mean {close[0]}? " if close else "",
        f"known here: {', '.join(sorted(runtimes))}; " if runtimes else "",
        # With a broken file about, the runtime may well be in it.
        "" if complete else "mend the other files first, or ",
        "bring it with --runtime FILE",
    ]
    message = "is not the name of a FineTuneRuntime in these files; " + "".join(hints)
    return Problem(path="spec.runtimeRef.name", value=shorten(name), message=message)


def _is_there(uri: str) -> bool:
    parsed = parse_uri(uri)
    if parsed.scheme is not Scheme.FILE:
        return True  # what is elsewhere, preparation finds out
    path = Path(parsed.path)
    try:
        return path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except ValueError:  # not a glob at all
        return False


def _not_there(path: str, uri: str) -> Problem:
    return Problem(path=path, value=json.dumps(uri), message="matches no file on this machine; correct the path")
