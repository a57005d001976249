"""The training state inside an engine as checkpoints have it: by parameter name, flat, in fp32. The only module that
knows where torch and DeepSpeed keep it.

Every trainable parameter has up to three states: `param` (the fp32 master), `exp_avg` and `exp_avg_sq` (AdamW's
moments). A parameter that was never updated has no moments, and none are saved. What a rank holds depends on the
engine:

    torch, ZeRO 0     everything, the same on all ranks: each writes an even part of it
    ZeRO 1, 2         part of a flat group of parameters laid end to end
    ZeRO 3            an even slice of each parameter

Saving reads a rank's own memory and nothing else: no gather, no collective. Restoring ends with what DeepSpeed does
after a step, since the weights that it computes with are copies of the masters. Facts about DeepSpeed are those of
0.19.8; a layout that is not among those above is refused when training starts, and never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from finetune_trainers.checkpoint.manifest import Manifest, ParamGroup, SliceKey, TensorRecord
from finetune_trainers.checkpoint.reading import SliceReader
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.slices import Wanted, even_slice
from finetune_trainers.engine import Engine
from finetune_trainers.engine_torch import TorchEngine
from finetune_trainers.errors import UserError

__all__ = ["EngineState", "Loaded", "UnknownLayoutError"]

_PARAM = "param"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MODEL, _HELPER = "model", "critic"
_GROWTH = "_growth_tracker"
"""torch's count of steps since the scale changed."""
_COUNTS = ("cur_iter", "last_overflow_iter", "cur_hysteresis")
"""DeepSpeed's; stage 0 forgives nothing and has no hysteresis."""


class UnknownLayoutError(UserError):
    """The engine keeps its state in a way that checkpoints cannot read."""


@dataclass(frozen=True)
class _Held:
    """What this rank holds of one parameter: elements [start, end), possibly none."""

    name: str
    shape: tuple[int, ...]
    group: int
    start: int
    end: int
    master: Tensor
    """The tensor that the optimizer updates: the parameter's own, or one of many parameters laid end to end."""
    offset: int
    """In the master: of element `start`."""

    def view(self, tensor: Tensor, start: int, end: int) -> Tensor:
        """Elements [start, end) of the parameter in a tensor that is laid out as the master is."""
        return tensor.detach().view(-1).narrow(0, self.offset + start - self.start, end - start)


@dataclass(frozen=True)
class Loaded:
    """What was read of a checkpoint for this rank, verified, and not yet in the engine."""

    values: Mapping[tuple[str, str], Tensor]
    """By parameter and state: flat, fp32, on the CPU."""
    steps: Mapping[str, int]
    """By parameter: updates that AdamW has made."""


class EngineState:
    """Reads and writes the state of one rank's engine."""

    def __init__(self, engine: Engine, rank: int, world_size: int, helpers: Collection[str] = ()) -> None:
        """`helpers`: parameters that serve training alone, such as a critic's; they have a role of their own, so that
        an export leaves them out. Raises UnknownLayoutError."""
        self._engine: Any = engine  # what is used of it is beyond the protocol
        self._helpers = frozenset(helpers)
        self._rank, self._world_size = rank, world_size
        self._kind = _kind_of(self._engine, world_size)
        self._held = {held.name: held for held in _HOLDINGS[self._kind](self._engine, rank, world_size)}
        for held in self._held.values():
            if held.master.dtype != torch.float32 or not held.master.is_contiguous():
                raise UnknownLayoutError(
                    f"spec.checkpoint: the state of {held.name} is kept as {held.master.dtype} and not as fp32 in one"
                    " piece, which checkpoints cannot read; look at spec.deepspeed.config, or remove spec.checkpoint"
                )

    @property
    def zero_stage(self) -> int:
        return int(getattr(self._engine, "zero_stage", 0))

    def tensors(self) -> tuple[TensorRecord, ...]:
        """All trainable parameters, on every rank alike."""
        return tuple(
            TensorRecord(
                name=held.name,
                role=self._role(held.name),
                shape=held.shape,
                states=dict.fromkeys((_PARAM, *_MOMENTS) if self._step(held) else (_PARAM,), "F32"),
            )
            for held in self._held.values()
        )

    def groups(self) -> tuple[ParamGroup, ...]:
        """The optimizer's groups; `steps` are AdamW's own counts, one for each tensor."""
        return tuple(
            self._group(index, role, [name for name in group.names if self._role(name) == role])
            for index, group in enumerate(self._engine.groups)
            for role in sorted({self._role(name) for name in group.names})
        )

    def _role(self, name: str) -> str:
        return _HELPER if name in self._helpers else _MODEL

    def _group(self, index: int, role: str, names: Sequence[str]) -> ParamGroup:
        group, settings = self._engine.groups[index], self._engine.adamw.param_groups[index]
        options: dict[str, JsonValue] = {
            "weight_decay": group.weight_decay,
            "opens_at": group.opens_at,
            "betas": list(settings["betas"]),
            "eps": settings["eps"],
            "steps": [self._step(self._held[name]) for name in names],
        }
        decay = "decayed" if group.weight_decay else "plain"
        name = f"{index}-{decay}-from-{group.opens_at:g}"
        return ParamGroup(name=name, role=role, tensors=tuple(names), options=options)

    def _step(self, held: _Held) -> int:
        """Updates that the parameter has seen. DeepSpeed counts for closed groups too, which begin anew later."""
        state = self._engine.adamw.state.get(held.master)
        is_open = getattr(self._engine, "is_open", None)
        if not state or (is_open is not None and not is_open[held.group]):
            return 0
        return int(state["step"])

    def slices(self, tensors: Sequence[TensorRecord]) -> list[Slice]:
        """What this rank writes of `tensors`: parameters first, then one moment after the other."""
        return [
            Slice(index, state, start, end)
            for state in (_PARAM, *_MOMENTS)
            for index, tensor in enumerate(tensors)
            if state in tensor.states
            for start, end in [self._written(self._held[tensor.name])]
            if start < end
        ]

    def _written(self, held: _Held) -> tuple[int, int]:
        if self._kind in _REPLICATED:
            return even_slice(held.end, self._rank, self._world_size)
        return held.start, held.end

    def data(self, tensors: Sequence[TensorRecord]) -> Callable[[Slice], memoryview]:
        """The bytes of slices of `tensors`: on a CPU the engine's own memory, which must not change meanwhile."""

        def read(piece: Slice) -> memoryview:
            return _bytes_of(self._part(tensors, piece).cpu())

        return read

    def fill(self, tensors: Sequence[TensorRecord]) -> Callable[[Slice, memoryview], None]:
        """Copies slices of `tensors` to memory of the right size, from wherever the engine has them. May be called by
        several threads at once."""

        def copy(piece: Slice, target: memoryview) -> None:
            part = self._part(tensors, piece)
            if part.device.type == "cpu":  # numpy copies memory faster, and lets other threads do so meanwhile
                np.copyto(np.frombuffer(target, np.float32), part.numpy())
            else:
                torch.frombuffer(target, dtype=torch.float32).copy_(part)

        return copy

    def _part(self, tensors: Sequence[TensorRecord], piece: Slice) -> Tensor:
        held = self._held[tensors[piece.tensor].name]
        return held.view(self._tensor(held, piece.state), piece.start, piece.end)

    @property
    def num_bytes(self) -> int:
        """What this rank writes once every parameter has its moments."""
        written = (self._written(held) for held in self._held.values())
        return sum((end - start) * 4 * (1 + len(_MOMENTS)) for start, end in written)

    def _tensor(self, held: _Held, state: str) -> Tensor:
        tensor: Tensor = held.master if state == _PARAM else self._engine.adamw.state[held.master][state]
        return tensor

    def read(self, reader: SliceReader, manifest: Manifest) -> Loaded:
        """What this rank needs of a checkpoint of the same parameters, saved by however many ranks. Takes memory for
        it. Raises DamagedError."""
        values, targets = {}, {}
        for tensor in manifest.intent.tensors:
            held = self._held[tensor.name]
            for state in tensor.states:
                if held.start == held.end:
                    continue
                buffer = torch.empty(held.end - held.start, dtype=torch.float32)
                values[tensor.name, state] = buffer
                wanted = Wanted(SliceKey(tensor.role, tensor.name, state), held.start, held.end)
                targets[wanted] = _bytes_of(buffer)
        reader.read(targets)
        return Loaded(values, _steps_of(manifest))

    @torch.no_grad()
    def load(self, loaded: Loaded) -> None:
        """Put what was read into the engine. Collective under DeepSpeed."""
        counts: dict[Tensor, int] = {}
        for held in self._held.values():
            counts[held.master] = max(counts.get(held.master, 0), loaded.steps[held.name])
        for master, count in counts.items():
            self._load_count(master, count)
        for held in self._held.values():
            self._load_moments(held, loaded)
            if (held.name, _PARAM) in loaded.values:
                held.view(held.master, held.start, held.end).copy_(loaded.values[held.name, _PARAM])
        _PUBLISHERS[self._kind](self._engine)

    def _load_count(self, master: Tensor, count: int) -> None:
        states = self._engine.adamw.state
        if count and not states.get(master):
            states[master] = _fresh_state(master)
        if states.get(master):
            states[master]["step"].fill_(float(count))

    def _load_moments(self, held: _Held, loaded: Loaded) -> None:
        state = self._engine.adamw.state.get(held.master)
        for moment in _MOMENTS if state else ():
            part = held.view(state[moment], held.start, held.end)
            value = loaded.values.get((held.name, moment))
            part.zero_() if value is None else part.copy_(value)

    @property
    def loss_scale(self) -> float | None:
        """Of fp16; None in other precisions."""
        if isinstance(self._engine, TorchEngine):
            return float(self._engine.scaler.get_scale()) if self._engine.scaler.is_enabled() else None
        scaling = _scaling(self._engine)
        return None if scaling is None or not scaling.dynamic_loss_scale else float(scaling.cur_scale)

    @loss_scale.setter
    def loss_scale(self, scale: float | None) -> None:
        if scale is None or self.loss_scale is None:
            return
        if isinstance(self._engine, TorchEngine):
            self._engine.scaler.load_state_dict({**self._engine.scaler.state_dict(), "scale": scale})
        else:
            _scaling(self._engine).cur_scale = scale

    @property
    def loss_scale_counts(self) -> dict[str, int]:
        """What the next change of the scale depends on: steps, overflows, and those that are forgiven. By the engine's
        own names."""
        if self.loss_scale is None:
            return {}
        if isinstance(self._engine, TorchEngine):
            return {_GROWTH: int(self._engine.scaler.state_dict()[_GROWTH])}
        scaler = _counting(self._engine)
        return {name: int(getattr(scaler, name)) for name in _COUNTS if hasattr(scaler, name)}

    @loss_scale_counts.setter
    def loss_scale_counts(self, counts: Mapping[str, int]) -> None:
        """Those of another engine begin anew, and so do all of a checkpoint that has none."""
        known = {name: count for name, count in counts.items() if name in self.loss_scale_counts}
        if isinstance(self._engine, TorchEngine):
            self._engine.scaler.load_state_dict({**self._engine.scaler.state_dict(), **known})
        else:
            for name, count in known.items():
                setattr(_counting(self._engine), name, count)


def _fresh_state(master: Tensor) -> dict[str, Tensor]:
    """What torch's fused AdamW makes at its first step."""
    moments = {moment: torch.zeros_like(master, requires_grad=False) for moment in _MOMENTS}
    return {"step": torch.zeros((), dtype=torch.float32, device=master.device), **moments}


def _steps_of(manifest: Manifest) -> dict[str, int]:
    steps: dict[str, int] = {}
    for group in manifest.intent.param_groups:
        steps |= dict(zip(group.tensors, cast("list[int]", group.options["steps"]), strict=True))
    return steps


def _scaling(engine: Any) -> Any:
    """Where DeepSpeed's wrapper keeps the loss scale; None where there is no wrapper."""
    zero = engine.ds.optimizer
    return getattr(zero, "loss_scale_config", zero if hasattr(zero, "loss_scaler") else None)


def _counting(engine: Any) -> Any:
    """Where DeepSpeed counts what changes the scale."""
    scaling = _scaling(engine)
    return getattr(scaling, "loss_scaler", scaling)


def _kind_of(engine: Any, world_size: int) -> str:
    """The name of a layout. DeepSpeed's is told by the class of the optimizer around AdamW, and by its switches."""
    if isinstance(engine, TorchEngine):
        return "torch"
    wrapper = getattr(getattr(engine, "ds", None), "optimizer", None)
    if wrapper is not None and wrapper is engine.adamw:
        return "plain"
    name = type(wrapper).__name__
    kind = _WRAPPERS.get(name)
    odd = [switch for switch in _UNREAD if getattr(wrapper, switch, False)]
    if any(count != world_size for count in getattr(wrapper, "sub_group_partition_counts", ())):
        odd.append("partitions over part of the workers")
    if getattr(wrapper, "offload_optimizer", False) and getattr(wrapper, "partial_offload", 1.0) != 1.0:
        odd.append("an offload ratio")
    if kind is None or odd:
        what = f"{name} with {' and '.join(odd)}" if odd else name
        raise UnknownLayoutError(
            f"spec.checkpoint: DeepSpeed keeps its state in {what}, which checkpoints cannot read;"
            " look at spec.deepspeed.config, or remove spec.checkpoint"
        )
    return kind


def _named(engine: Any) -> Iterator[tuple[int, int, str, Any]]:
    """(group, place in it, name, parameter), in the order of the groups."""
    for index, group in enumerate(engine.groups):
        for place, (name, param) in enumerate(zip(group.names, group.params, strict=True)):
            yield index, place, name, param


def _whole(engine: Any, rank: int, world_size: int) -> Iterator[_Held]:
    for index, _, name, param in _named(engine):
        yield _Held(name, tuple(param.shape), index, 0, param.numel(), param, 0)


def _unfused(engine: Any, rank: int, world_size: int) -> Iterator[_Held]:
    for index, place, name, param in _named(engine):
        master = engine.ds.optimizer.fp32_groups[index][place]
        yield _Held(name, tuple(param.shape), index, 0, param.numel(), master, 0)


def _flat_groups(engine: Any, rank: int, world_size: int) -> Iterator[_Held]:
    """DeepSpeed's own map of fragments is asked: it knows padding and alignment. Ranks that hold nothing have none."""
    for index, _, name, param in _named(engine):
        master = engine.ds.optimizer.single_partition_of_fp32_groups[index]
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is None:
            yield _Held(name, tuple(param.shape), index, 0, 0, master, 0)
            continue
        start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        yield _Held(name, tuple(param.shape), index, start, start + numel, master, mapping.hp_fragment_address.start)


def _partitioned(engine: Any, rank: int, world_size: int) -> Iterator[_Held]:
    """Each parameter's slice has its place in a flat partition; the last ranks' slices are padded."""
    zero, places = engine.ds.optimizer, {}
    for piece, params in enumerate(zero.fp16_groups):
        offset = 0
        for param in params:
            places[param.ds_id] = (zero.fp32_partitioned_groups_flat[piece], offset)
            offset += param.partition_numel()
    for index, _, name, param in _named(engine):
        master, offset = places[param.ds_id]
        start, end = even_slice(param.ds_numel, rank, world_size)
        yield _Held(name, tuple(param.ds_shape), index, start, end, master, offset)


def _nothing(engine: Any) -> None:
    """The masters are the weights."""


def _publish_unfused(engine: Any) -> None:
    for index, place, _, param in _named(engine):
        param.data.copy_(engine.ds.optimizer.fp32_groups[index][place].data)


def _publish_flat_groups(engine: Any) -> None:
    engine.ds.optimizer.update_lp_params()


def _publish_partitioned(engine: Any) -> None:
    zero = engine.ds.optimizer
    for piece in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(piece)
    if zero.persistent_parameters:  # small ones stay gathered: as they were before
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


_WRAPPERS = {
    "FP16_UnfusedOptimizer": "unfused",
    "DeepSpeedZeroOptimizer": "flat groups",
    "DeepSpeedZeroOptimizer_Stage3": "partitioned",
}
_UNREAD = ("round_robin_gradients", "swap_optimizer", "zenflow")
_REPLICATED = ("torch", "plain", "unfused")
_HOLDINGS: dict[str, Callable[[Any, int, int], Iterator[_Held]]] = {
    "torch": _whole,
    "plain": _whole,
    "unfused": _unfused,
    "flat groups": _flat_groups,
    "partitioned": _partitioned,
}
_PUBLISHERS: dict[str, Callable[[Any], None]] = {
    "torch": _nothing,
    "plain": _nothing,
    "unfused": _publish_unfused,
    "flat groups": _publish_flat_groups,
    "partitioned": _publish_partitioned,
}


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, as bytes; writing there writes the tensor."""
    array: Any = tensor.numpy()  # numpy does not say that its arrays are buffers
    return memoryview(array).cast("B")
