"""A foreign training state as a checkpoint of ours: one rank's, written and published as any other.

Its names must be those that the model's parameters have in training. What wraps them there (`model.`, `module.`) is
found out from the optimizer's names or from the base model, or said by the user. A training resumes from the import
when job, base, adapter, parameters and global batch are its own; the order of its data is then the job's. Called by
the readers of this package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from finetune_trainers.checkpoint.commit import begin, publish
from finetune_trainers.checkpoint.fence import Fence
from finetune_trainers.checkpoint.imports import ImportOptions
from finetune_trainers.checkpoint.manifest import BaseModelPin, Intent, Manifest, ParamGroup, TensorRecord, World
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.write import announce, write_rank
from finetune_trainers.errors import UserError

__all__ = ["Foreign", "demand_pickles_allowed", "store", "wrapper_of"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TENSORS_KEPT = 4
"""In memory: one for each file that is written at once."""


@dataclass(frozen=True)
class Foreign:
    """What was found in a foreign checkpoint."""

    step: int | None
    """Optimizer steps done."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters, by their names there."""
    steps: Mapping[str, int]
    """Updates that the optimizer has made, of those parameters that have moments."""
    read: Callable[[str, str], Tensor]
    """(name, `param` or a moment) -> the whole tensor, of any floating-point type."""


def demand_pickles_allowed(options: ImportOptions, what: str) -> None:
    """Raises UserError unless the user has said so."""
    if not options.allow_pickle:
        raise UserError(
            f"--allow-pickle: {what}, and a pickle can run any program when it is read; if you trust whoever wrote it,"
            " say so with --allow-pickle (it is then read by a reader that builds only the harmless classes on a list)"
        )


def wrapper_of(keys: Iterable[str], known: Iterable[str]) -> str:
    """What stands before `known` names in most of the keys; nothing when none of them is found."""
    known, keys = set(known), list(keys)
    ends = Counter(key[: len(key) - len(name)] for key in keys for name in _ends(key) if name in known)
    return max(ends, key=lambda wrapper: (ends[wrapper], -len(wrapper)), default="")


def _ends(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def store(foreign: Foreign, storage: Storage, options: ImportOptions, now: datetime) -> Manifest:
    """Write and publish it. Raises UserError when it is not a state of the base model."""
    names = _names(foreign, options)
    if not names:
        raise UserError("--from: the checkpoint holds no parameters")
    fence, _ = begin(storage, options.owner, now)
    intent = _intent(foreign, names, fence, options, now)
    announce(storage, intent)
    held = [
        Slice(index, state, 0, tensor.numel)
        for state in ("param", *_MOMENTS)
        for index, tensor in enumerate(intent.tensors)
        if state in tensor.states and tensor.numel
    ]
    write_rank(storage, intent, 0, held, _data(foreign, intent, names), _memory())
    return publish(storage, fence, intent.id)


def _names(foreign: Foreign, options: ImportOptions) -> dict[str, str]:
    """Our name -> theirs."""
    known = None if options.base is None else _parameters(options.base)
    wrapper = options.prefix or wrapper_of(foreign.shapes, known or ())
    names = {name.removeprefix(wrapper): name for name in foreign.shapes}
    if known is None:
        return names
    for name, theirs in names.items():
        shape = foreign.shapes[theirs]
        if name in known.one_name and shape != known[name]:
            raise UserError(f"--base: {theirs} has shape {shape}, and the base model has it as {known[name]}")
        if name not in known and ".lora_" not in name:
            raise UserError(
                f"--prefix: {theirs} is no parameter of the model in {options.base}; say with --prefix what stands"
                " before the parameters' own names, or name another --base"
            )
    return {name: theirs for name, theirs in names.items() if name in known.one_name or ".lora_" in name}


class _Known(dict[str, tuple[int, ...]]):
    """Shapes of a model's parameters by all of their names, and of its buffers, which are not trained."""

    one_name: frozenset[str] = frozenset()
    """The names that training uses: one for each parameter."""


def _parameters(base: Path) -> _Known:
    from transformers import AutoConfig

    from finetune_trainers.models import meta_model

    model = meta_model(AutoConfig.from_pretrained(base))
    known = _Known({name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})
    known |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    known.one_name = frozenset(name for name, _ in model.named_parameters())
    return known


def _intent(foreign: Foreign, names: Mapping[str, str], fence: Fence, options: ImportOptions, now: datetime) -> Intent:
    step = options.step if options.step is not None else foreign.step or 0
    counts = {name: foreign.steps.get(theirs, 0) for name, theirs in names.items()}
    return Intent(
        step=step,
        epoch=fence.epoch,
        token=fence.token,
        job=options.job,
        created=now,
        writer={"torch": version("torch"), "import": "foreign"},
        world=World(size=1),
        consumed_samples=step * options.global_batch,
        global_batch=options.global_batch,
        base_model=None if options.base is None else _pin(options.base),
        adapter=options.adapter,
        tensors=tuple(
            TensorRecord(
                name=name,
                shape=foreign.shapes[theirs],
                states=dict.fromkeys(("param", *_MOMENTS) if counts[name] else ("param",), "F32"),
            )
            for name, theirs in names.items()
        ),
        param_groups=tuple(_groups(foreign, names, counts, options)),
    )


def _pin(base: Path) -> BaseModelPin:
    from finetune_trainers.merge import base_weights

    return BaseModelPin(source=base.absolute().as_uri(), digest=base_weights(base).digest())


def _groups(
    foreign: Foreign, names: Mapping[str, str], counts: Mapping[str, int], options: ImportOptions
) -> Iterable[ParamGroup]:
    """As `optim` groups them: by whether they decay."""
    for title, decay, wide in (("decayed", options.weight_decay, True), ("plain", 0.0, False)):
        held = tuple(name for name, theirs in names.items() if (len(foreign.shapes[theirs]) >= 2) is wide)
        settings: dict[str, Any] = {"weight_decay": decay, "opens_at": 0.0, "betas": [0.9, 0.999], "eps": 1e-8}
        if held:
            yield ParamGroup(name=title, tensors=held, options={**settings, "steps": [counts[name] for name in held]})


def _data(foreign: Foreign, intent: Intent, names: Mapping[str, str]) -> Callable[[Slice], memoryview]:
    """Each tensor is read once, and kept while files hold parts of it."""
    lock = Lock()

    @lru_cache(_TENSORS_KEPT)
    def whole(tensor: int, state: str) -> Tensor:
        return foreign.read(names[intent.tensors[tensor].name], state).detach().reshape(-1).float()

    def data(piece: Slice) -> memoryview:
        with lock:
            values = whole(piece.tensor, piece.state)
        array: Any = values[piece.start : piece.end].contiguous().numpy()
        return memoryview(array).cast("B")

    return data


def _memory() -> dict[str, bytes]:
    """What a training's own checkpoint has beside its tensors: a loop that has seen nothing, a generator as it is."""
    from finetune_trainers.loop import LoopMemory

    return {
        "loop.json": LoopMemory().model_dump_json().encode(),
        "random.safetensors": save_tensors({"cpu": torch.get_rng_state()}),
    }
