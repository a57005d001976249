"""A small model in training, its checkpoint, and what is in it: for tests of exports and imports.

The optimizer is torch's own AdamW with two groups, so that other programs' engines can go on from the same state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune_trainers.checkpoint.commit import begin, publish
from finetune_trainers.checkpoint.manifest import Intent, Manifest, ParamGroup, SliceKey, TensorRecord, World
from finetune_trainers.checkpoint.reading import SliceReader
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.slices import Wanted, even_slice
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.write import announce, write_rank

__all__ = ["NOON", "RATE", "Training", "contents", "network"]

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
RATE = 1e-2
STATES = ("param", "exp_avg", "exp_avg_sq")


def network() -> nn.Module:
    """The same one in each call; odd sizes, so that no number of ranks divides them."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(13, 7), nn.LayerNorm(7), nn.Linear(7, 5, bias=False))


@dataclass
class Training:
    """A network and its optimizer."""

    decayed: bool = True
    """Whether there are two groups, one of them with weight decay."""
    network: nn.Module = field(default_factory=network)

    def __post_init__(self) -> None:
        self.named = dict(self.network.named_parameters())
        wide = [name for name, parameter in self.named.items() if parameter.dim() > 1]
        narrow = [name for name in self.named if name not in wide]
        self.groups = [(wide, 0.1), (narrow, 0.0)] if self.decayed else [(list(self.named), 0.0)]
        groups = [{"params": [self.named[n] for n in names], "weight_decay": decay} for names, decay in self.groups]
        self.adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
        self.inputs = torch.randn(8, 13, generator=torch.Generator().manual_seed(2))

    def loss(self, of: Any = None) -> Tensor:
        """Of the network, or of an engine around it."""
        outputs: Tensor = (of or self.network)(self.inputs)
        return outputs.square().mean()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.adamw.zero_grad()
            self.loss().backward()  # type: ignore[no-untyped-call]
            self.adamw.step()

    def state(self, name: str, state: str) -> Tensor:
        parameter = self.named[name]
        found: Tensor = parameter.detach() if state == "param" else self.adamw.state[parameter][state]
        return found

    def contents(self) -> dict[tuple[str, str], bytes]:
        return {(name, state): self.state(name, state).numpy().tobytes() for name in self.named for state in STATES}

    def save(self, folder: Path, step: int, world: int = 2, **changes: Any) -> tuple[Storage, Manifest]:
        """A checkpoint by so many ranks, each with an even slice of each tensor."""
        storage = PosixStorage(str(folder))
        fence, _ = begin(storage, "test", NOON)
        states = dict.fromkeys(STATES, "F32")
        intent = Intent(
            step=step,
            epoch=fence.epoch,
            token=fence.token,
            job="job",
            created=NOON,
            world=World(size=world, zero_stage=3),
            tensors=tuple(TensorRecord(name=n, shape=tuple(p.shape), states=states) for n, p in self.named.items()),
            param_groups=tuple(
                ParamGroup(
                    name=str(index),
                    tensors=tuple(names),
                    options={"weight_decay": decay, "betas": [0.9, 0.95], "eps": 1e-8, "steps": [step] * len(names)},
                )
                for index, (names, decay) in enumerate(self.groups)
            ),
            **changes,
        )
        announce(storage, intent)
        for rank in range(world):
            held = [
                Slice(index, state, *even_slice(tensor.numel, rank, world))
                for state in STATES
                for index, tensor in enumerate(intent.tensors)
            ]
            write_rank(storage, intent, rank, [one for one in held if one.start < one.end], self._data(intent), {})
        return storage, publish(storage, fence, intent.id)

    def _data(self, intent: Intent) -> Any:
        def data(piece: Slice) -> memoryview:
            whole = self.state(intent.tensors[piece.tensor].name, piece.state).reshape(-1)
            array: Any = whole[piece.start : piece.end].contiguous().numpy()
            return memoryview(array).cast("B")

        return data


def contents(storage: Storage, manifest: Manifest) -> dict[tuple[str, str], bytes]:
    """Every state of every tensor of a checkpoint."""
    found = {}
    for tensor in manifest.intent.tensors:
        for state in tensor.states:
            memory = np.zeros(tensor.numel * 4, np.uint8)
            SliceReader(storage, manifest).read(
                {Wanted(SliceKey("model", tensor.name, state), 0, tensor.numel): memory.data}
            )
            found[tensor.name, state] = memory.tobytes()
    return found
