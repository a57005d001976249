"""Parameters that ZeRO-3 keeps in parts, whole on every rank while tokens are drawn. Called by `in_process`, and by
`vllm_weights`.

A token is one forward pass, and ZeRO-3 would gather the whole model for each. Gathered once, every rank writes its
answers at its own pace. Facts about DeepSpeed are those of 0.19.8.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from finetune_trainers.context import WorkerContext

__all__ = ["fits_whole", "gathered", "inside", "is_split", "parameters_but"]

SHARE = 0.6
"""Of free memory that gathered parameters may take; keys and values need the rest."""
_CGROUP = Path("/sys/fs/cgroup")


def inside(module: nn.Module) -> nn.Module:
    """What DeepSpeed's engine has inside, which needs none of its bookkeeping to write; any other module itself."""
    if type(module).__module__.startswith("deepspeed."):
        inner: nn.Module = module.module  # type: ignore[assignment]  # nn.Module's attributes are Tensor | Module
        return inner
    return module


def is_split(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds the parameters in parts: it marks each with an id."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def parameters_but(module: nn.Module, without: Collection[str]) -> list[nn.Parameter]:
    """Parameters of `module` that belong to no part whose own name is in `without`."""
    return [one for name, one in module.named_parameters() if not set(without) & set(name.split("."))]


def fits_whole(parameters: Collection[nn.Parameter], context: WorkerContext) -> bool:
    """Whether every rank has the memory for `parameters` in their own types. Collective."""
    needed = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)
    fits = needed <= SHARE * _free_bytes(context)
    refusals = torch.tensor(float(not fits), device=context.device)
    return context.all_reduce_sum(refusals).item() == 0


def _free_bytes(context: WorkerContext) -> float:
    """Of this rank: its device's, or an even share of this machine's."""
    if context.device.type == "cuda":
        unused = torch.cuda.memory_reserved(context.device) - torch.cuda.memory_allocated(context.device)
        return torch.cuda.mem_get_info(context.device)[0] + unused
    return min(_of_machine(), _of_container()) / context.local_world_size


def _of_machine() -> float:
    """Bytes that the kernel could give to programs."""
    figures = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(figures["MemAvailable"].split()[0]) * 1024.0


def _of_container() -> float:
    """Bytes below the limit of this container (cgroup v2), what only caches files not counted; else infinite."""
    try:
        limit = int(_CGROUP.joinpath("memory.max").read_text())  # "max" is no number
        used = int(_CGROUP.joinpath("memory.current").read_text())
        stat = dict(line.split() for line in _CGROUP.joinpath("memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    return float(limit - used + int(stat["inactive_file"]))


@contextmanager
def gathered(module: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Inside, `parameters` are whole, and a forward pass of `module`, which uses no others, is no collective. Entering
    and leaving are."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(parameters)), _without_hooks(module):
        yield


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """DeepSpeed's hooks set aside, which gather and release around each layer, and put back where they were.

    DeepSpeed's own `unwrap_model_for_generation` makes new ones instead, and so forgets the order in which it
    fetches parameters, and leaves one that is a collective at each forward pass.
    """
    tables = [hooks for part in module.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks)]
    saved = [list(hooks.items()) for hooks in tables]
    for hooks, items in zip(tables, saved, strict=True):
        for key, hook in items:
            if str(getattr(hook, "__module__", "")).startswith("deepspeed."):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, items in zip(tables, saved, strict=True):
            hooks.clear()  # the order in which hooks run is theirs again
            hooks.update(items)
