"""What a person needs on a cluster that is up: values of the chart and a job, as files, and the commands that use
them.

Called by `python -m tests.cluster up`. The files lie beside the cluster's own and go with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.cluster.nodes.cluster import Cluster
from tests.cluster.nodes.layout import Layout
from tests.cluster_e2e.world import CHART, NAMESPACE, ROOT, VALUES, team_in, tiny_job

__all__ = ["commands", "job_file", "values_file", "write_first_job"]

_TEAM = "team-a"
_JOB = "first"


def write_first_job(cluster: Cluster) -> None:
    """The files that the commands name, and a namespace with a claim that holds a tiny model and rows for it."""
    spec = tiny_job(team_in(cluster, _TEAM))
    head = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob"}
    job = {**head, "metadata": {"name": _JOB, "namespace": _TEAM}, "spec": spec}
    job_file(cluster.layout).write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    values_file(cluster.layout).write_text(VALUES, encoding="utf-8")


def commands(layout: Layout, programs: Mapping[str, Path]) -> str:
    """What to type, from the folder of the repository: to reach the cluster, install the operator and run a job."""
    path = os.pathsep.join(str(programs[name].parent) for name in ("kubectl", "helm"))
    return f"""\
  export KUBECONFIG={layout.kubeconfig}
  export PATH={path}:$PATH

  helm upgrade --install finetune-operator {CHART.relative_to(ROOT)} --namespace {NAMESPACE} --create-namespace \\
    --values {values_file(layout)} --wait
  kubectl apply -f {job_file(layout)}
  kubectl --namespace {_TEAM} get finetunejob {_JOB} --watch"""


def job_file(layout: Layout) -> Path:
    """A job that fits these nodes."""
    return layout.root / "first-job.yaml"


def values_file(layout: Layout) -> Path:
    """Values of the chart, with a runtime that fits these nodes."""
    return layout.root / "values.yaml"
