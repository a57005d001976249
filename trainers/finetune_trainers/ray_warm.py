"""Starts the processes of a Ray Train group ahead of time, on a Ray of our own. Used by `ray_workers`.

A worker spends ten seconds and more on imports. Ray can start idle processes and keep them for actors of the same
environment; they import what they will need (`warm_up`) while the launcher looks at the model and at the data. No
function of ours runs in them before the group is started. Ray has no public call for it, so this leans on internals of
the version that `ray_workers` says it was written for; where it fails, the processes start when they are needed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["SETTINGS", "WARM_UP", "controller_seat", "prestart_group", "warm_modules"]

WARM_UP = "FINETUNE_WARM_UP"
"""Names the modules to import, separated by commas. Read by `warm_up` in each process."""
SEAT = "FINETUNE_WARM_CONTROLLER"
"""Names a file: the first process without WARM_UP that removes it is the controller's, and imports Ray Train."""
SETTINGS = {
    "RAY_preload_python_modules": "finetune_trainers.warm_up",
    "RAY_prestart_worker_first_driver": "0",  # processes without our environment would not be used
    "RAY_num_workers_soft_limit": "1024",  # above it, idle processes end, warm or not
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's own default, said here so that all processes agree
}
"""Environment that Ray must be started in."""
_WARM_SECONDS = 3600
"""How long a warm process waits: the data of a large job takes its time."""


def warm_modules(deepspeed: bool, lora: bool) -> str:
    """What a worker will import."""
    modules = ["finetune_trainers.worker", "finetune_trainers.worker_process"]
    return ",".join(
        [*modules, *(["deepspeed"] if deepspeed else []), *(["finetune_trainers.lean_peft"] if lora else [])]
    )


def prestart_group(num_workers: int, own: Mapping[str, str]) -> None:
    """Let Ray start a process for the controller and `num_workers` more with `own` on top of the driver's environment.

    Ray gives an actor an idle process only when its environment is the same to the letter: that of the controller as
    Python writes it, those of its workers as Ray's core writes what it has merged.
    """
    from ray.runtime_env import RuntimeEnv
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    inherited = get_env_vars_to_propagate()
    _prestart(1, RuntimeEnv(env_vars=inherited).serialize())
    merged = {"env_vars": inherited | dict(own)}
    _prestart(num_workers, json.dumps(merged, sort_keys=True, separators=(",", ":")))


def controller_seat(folder: Path) -> dict[str, str]:
    """The environment variable that names the controller's seat, a file made in `folder`."""
    seat = folder / "controller-seat"
    seat.touch()
    return {SEAT: str(seat)}


def _prestart(num_processes: int, serialized_environment: str) -> None:
    """Ask this node's raylet for idle worker processes with a runtime environment."""
    import ray
    from ray._private.grpc_utils import init_grpc_channel

    common, calls, stubs, environments = (
        importlib.import_module(f"ray.core.generated.{name}")
        for name in ("common_pb2", "node_manager_pb2", "node_manager_pb2_grpc", "runtime_environment_pb2")
    )
    (node,) = ray.nodes()
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    environment = environments.RuntimeEnvInfo(serialized_runtime_env=serialized_environment)
    environment.runtime_env_config.setup_timeout_seconds = 600
    environment.runtime_env_config.eager_install = True
    request = calls.PrestartWorkersRequest(
        language=common.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=environment,
        keep_alive_duration_secs=_WARM_SECONDS,
        num_workers=num_processes,
    )
    stubs.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=30)
    channel.close()
