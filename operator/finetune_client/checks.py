"""What can be found wrong with a job before it goes where its runtime comes along: planning it, here and now.

Used by the backends without a Kubernetes cluster. In one, runtimes are the cluster's, and so is the planning.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.problems import InvalidManifest
from finetune_api.runtime import FineTuneRuntime
from finetune_client.loading import missing_data, missing_models
from finetune_operator.planning import plan_run
from finetune_operator.policies.dependencies import dependency_names

__all__ = ["check_plan"]


def check_plan(job: FineTuneJob, runtimes: Sequence[FineTuneRuntime], is_here: bool) -> None:
    """Raises InvalidManifest for a job that could not be run, or that waits for something that is not there.

    `is_here`: it will be run on this machine, so files that it names must be there.
    """
    if names := dependency_names(job.to_document()):
        message = "is another job's artifact, and jobs here do not wait for each other; name the artifact itself"
        raise InvalidManifest([Problem(path="spec.model.source", value=f'"job://{names[0]}"', message=message)])
    reference = job.spec.runtime_ref
    known = {runtime.metadata.name: runtime for runtime in runtimes}
    if reference is not None and reference.name not in known:
        listed = ", ".join(sorted(known)) or "none"
        message = f"is not the name of a FineTuneRuntime in the files that were handed over; there are: {listed}"
        raise InvalidManifest([Problem(path="spec.runtimeRef.name", value=f'"{reference.name}"', message=message)])
    plan = plan_run(job, known[reference.name] if reference is not None else None)
    if is_here and (missing := [*missing_models(plan), *missing_data(plan)]):
        raise InvalidManifest(missing)
