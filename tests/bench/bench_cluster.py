"""What the product adds on a real cluster, from installing it to going on after a loss.

    python -m tests.bench.bench_cluster [--runs 3]        as root; brings up the cluster of tests.cluster

install   helm install to the operator being available, with images present. Under 30 s.
start     kubectl apply of a FineTuneJob to its first optimizer step, beside the same RayJob applied by itself: KubeRay,
          pods, plan and trainers are the same. Less than 3 s more.
loss      a worker's pod is deleted: until the next step that had not been made before, beside the job's cold start. At
          most half of it.
submit    Client.submit of each kind, the opening of the client included. Under 2 s.

Steps are seen when they appear in the run's metrics on the claim, which this machine shares with the pods.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from finetune_client import Client
from tests.bench.common import busy, write_results
from tests.cluster.nodes.cluster import Cluster, down, up
from tests.cluster.nodes.daemons import running
from tests.cluster.nodes.kuberay import install_kuberay
from tests.cluster.nodes.layout import layout
from tests.cluster.processes import wait_until
from tests.cluster_e2e.workbench import Workbench, workbench_in
from tests.cluster_e2e.world import NAMESPACE, World, install, team_in, tiny_job
from tests.factories import job_document

GOALS = {"install": 30.0, "start over the bare RayJob": 3.0, "loss of a cold start": 0.5, "submit": 2.0}
EVERY, STEPS = 100, 6000
SPREAD = {"topology": {"mode": "spread", "key": "kubernetes.io/hostname"}}
TWO = {"cluster": {"workers": {"replicas": 2}}, "deepspeed": {"zeroStage": 2}, "scheduling": SPREAD}


def say(text: str) -> None:
    print(text, flush=True)


def step(team: World, run: str) -> int:
    """The highest of a run's steps, 0 while there is none."""
    return max(team.steps_made(run), default=0)


def until(holds: Callable[[], object], began: float) -> float:
    """Seconds since `began` when it holds; looked at a hundred times a second."""
    while not holds():
        if time.monotonic() - began > 600:
            sys.exit("it takes longer than ten minutes")
        time.sleep(0.01)
    return round(time.monotonic() - began, 2)


def apply_job(team: World, name: str, spec: dict[str, Any]) -> None:
    head = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob"}
    team.apply({**head, "metadata": {"name": name}, "spec": spec})


def measure_install(cluster: Cluster, num_runs: int, folder: Path) -> list[float]:
    seconds = []
    for _ in range(num_runs):
        found = cluster.helm.run("status", "finetune-operator", "--namespace", NAMESPACE)
        if found.returncode == 0:
            cluster.helm("uninstall", "finetune-operator", "--namespace", NAMESPACE, "--wait")
        began = time.monotonic()
        install(cluster, folder)
        seconds.append(round(time.monotonic() - began, 2))
        say(f"install {seconds[-1]} s")
    return seconds


def measure_start(team: World, number: int) -> tuple[float, float]:
    """-> ours, the bare RayJob: seconds to the first step, one after the other on the same machine."""
    ours, bare = f"start-{os.getpid()}-{number}", f"bare-{os.getpid()}-{number}"
    began = time.monotonic()
    apply_job(team, ours, {**tiny_job(team), **TWO})
    our_seconds = until(lambda: step(team, ours), began)
    documents = bare_documents(team, ours, bare)
    team.wait(ours, lambda: team.phase(ours) == "Succeeded", "it to end", seconds=600)
    wait_until(lambda: not team.pods(ours), "its pods to be gone")
    began = time.monotonic()
    team.apply(*documents)
    bare_seconds = until(lambda: step(team, bare), began)
    wait_until(lambda: ray_job_is_over(team, bare), "the bare one to end", seconds=600)
    team.kubectl("delete", "rayjob", bare, "--wait=true", "--timeout=100s")
    team.delete(ours)
    say(f"start: ours {our_seconds} s, the RayJob by itself {bare_seconds} s")
    return our_seconds, bare_seconds


def bare_documents(team: World, job: str, name: str) -> list[dict[str, Any]]:
    """The RayJob of a job's first attempt and its plan, under another name and with nobody to look after them."""
    ray_job = json.loads(team.kubectl("get", "rayjob", f"{job}-1", "--output=json"))
    plan = json.loads(team.kubectl("get", "configmap", f"{job}-1-plan", "--output=json"))
    renamed = json.loads(json.dumps(ray_job["spec"]).replace(f"/{job}/", f"/{name}/").replace(f"{job}-1", f"{name}-1"))
    for state in ("jobId", "rayClusterName", "suspend"):
        renamed.pop(state, None)
    for pod in (renamed["rayClusterSpec"]["headGroupSpec"], *renamed["rayClusterSpec"]["workerGroupSpecs"]):
        pod["template"]["metadata"]["labels"] = {"app": name}
        pod["template"]["spec"].pop("affinity", None)
        pod["template"]["spec"].pop("topologySpreadConstraints", None)
    data = json.loads(json.dumps(plan["data"]).replace(f"/{job}/", f"/{name}/"))
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-1-plan"}, "data": data},
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": renamed},
    ]


def ray_job_is_over(team: World, name: str) -> bool:
    told = json.loads(team.kubectl("get", "rayjob", name, "--output=json")).get("status", {})
    return told.get("jobDeploymentStatus") in ("Complete", "Failed")


def measure_loss(team: World, number: int) -> tuple[float, float]:
    """-> seconds from nothing to the first step, and from the loss of a pod to the first step beyond all before it."""
    name = f"loss-{os.getpid()}-{number}"
    spec = copy.deepcopy({**tiny_job(team), **TWO, "checkpoint": {"everySteps": EVERY}})
    spec["training"]["maxSteps"] = STEPS
    began = time.monotonic()
    apply_job(team, name, spec)
    cold = until(lambda: step(team, name), began)
    team.wait(name, lambda: team.saved(name) >= 3 * EVERY, "checkpoints")
    pod = min(pod["metadata"]["name"] for pod in team.pods(name, "worker"))
    began, made = time.monotonic(), 0
    team.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
    while team.trainings(name) < 2:  # until the loss is noticed, steps go on
        made = step(team, name)
        time.sleep(0.05)
    lost = until(lambda: step(team, name) > made, began)
    team.delete(name)
    say(f"cold start {cold} s, after a loss {lost} s")
    return cold, lost


def measure_submit(team: World, bench: Workbench, num_runs: int) -> dict[str, list[float]]:
    os.environ |= {"RAY_AUTH_TOKEN": bench.token, "RAY_AUTH_MODE": "token"}
    kubeconfig = team.cluster.layout.kubeconfig
    with tempfile.TemporaryDirectory() as folder:
        backends: dict[str, dict[str, Any]] = {
            "Kubernetes": {"kubeconfig": kubeconfig, "namespace": team.namespace},
            "Ray's Jobs API": {"ray": f"http://{bench.address}:8265"},
            "Ray Client": {"ray": f"ray://{bench.address}:10001"},
            "this machine": {"local": True, "workdir": folder},
        }
        seconds: dict[str, list[float]] = {name: [] for name in backends}
        for number in range(num_runs):
            for name, where in backends.items():
                spec = {key: value for key, value in tiny_job(team).items() if key != "runtimeRef"}
                if name == "this machine":
                    spec["model"], spec["data"] = local_sources(team)
                document = job_document(name=f"submit-{number}") | {"spec": spec}
                began = time.monotonic()
                with Client(**where) as client:
                    handle = client.submit(document)
                    seconds[name].append(round(time.monotonic() - began, 2))
                    handle.cancel()
                say(f"submit by {name}: {seconds[name][-1]} s")
    return seconds


def local_sources(team: World) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = [{"source": f"file://{team.folder}/rows.jsonl"}]
    return {"source": f"file://{team.folder}/tiny"}, {"train": rows}


def columns(names: tuple[str, str], rows: list[tuple[float, float]]) -> dict[str, list[float]]:
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


@contextmanager
def cluster_here() -> Iterator[Cluster]:
    was_up = running(layout(), "kube-apiserver")
    try:
        one = up(say)
        install_kuberay(one, say)
        yield one
    finally:
        if not was_up:
            down()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    num_runs, load = parser.parse_args().runs, busy()
    with cluster_here() as cluster, tempfile.TemporaryDirectory() as folder:
        installed = measure_install(cluster, num_runs, Path(folder))
        team = team_in(cluster, "bench")
        start = columns(("ours", "bare"), [measure_start(team, number) for number in range(num_runs)])
        loss = columns(("cold start", "after a loss"), [measure_loss(team, number) for number in range(num_runs)])
        with workbench_in(team) as bench:
            submit = measure_submit(team, bench, num_runs)
    medians = {
        "install": statistics.median(installed),
        "start over the bare RayJob": round(statistics.median(start["ours"]) - statistics.median(start["bare"]), 2),
        "loss of a cold start": round(
            statistics.median(loss["after a loss"]) / statistics.median(loss["cold start"]), 3
        ),
        "submit": max(statistics.median(found) for found in submit.values()),
    }
    raw = {"install": installed, "start": start, "loss": loss, "submit": submit}
    write_results("cluster", {"goals": GOALS, "load_before": load, "seconds": raw, "median": medians})
    say(yaml.safe_dump({"median": medians, "goals": GOALS}, sort_keys=False))
    return int(any(medians[name] > goal for name, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
