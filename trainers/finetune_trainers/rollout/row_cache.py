"""Keys and values of a batch whose rows come and go while it is written. Called by `in_process`.

    B  rows      K  key/value heads      L  columns: tokens that the longest row has      C  channels of a head

Rows end together at the newest column, and begin where they begin. transformers' own cache copies everything for
each new token; this one has room for some more. It keeps whole rows also for layers that look back through a window,
whose masks leave out the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["PROMPT_TOKENS", "RowCache"]

PROMPT_TOKENS = 1 << 14
"""Tokens of prompts that enter in one forward pass, padding included: what its activations take stays small."""
ROOM = 64
"""Columns of room for tokens to come."""


class RowCache(Cache):
    """A cache for a forward pass of any causal model that has attention only."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    def keep(self, rows: Sequence[int], first: int) -> None:
        """Only `rows`, of which one may come more than once, in their order, and only columns from `first` on."""
        for layer in self._layers():
            for room in layer.rooms:
                chosen = torch.tensor(rows, device=room.used.device)
                room.put(room.used[:, :, first:].index_select(0, chosen))
            layer.show()

    def join(self, other: RowCache) -> None:
        """The rows of `other` after those that are here; the shorter ones of both get empty columns in front."""
        for layer, theirs in zip(self._layers(), other._layers(), strict=True):
            for room, their_room in zip(layer.rooms, theirs.rooms, strict=True):
                room.put(_below(room.used, their_room.used))
            layer.show()

    def _layers(self) -> list[_Layer]:
        layers = [layer for layer in self.layers if isinstance(layer, _Layer)]
        assert len(layers) == len(self.layers), "every layer was made here"
        return layers


def _below(ours: Tensor, theirs: Tensor) -> Tensor:
    """[B + B', K, max(L, L'), C]"""
    columns = max(ours.shape[2], theirs.shape[2])
    padded = [torch.nn.functional.pad(one, (0, 0, columns - one.shape[2], 0)) for one in (ours, theirs)]
    return torch.cat(padded)


class _Layer(DynamicLayer):
    """One layer's part; `keys` and `values` are views into buffers with room behind them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rooms = (_Room(), _Room())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Everything seen so far, the new columns [B, K, L, C] behind the others."""
        is_first = not self.is_initialized
        if is_first:
            self.lazy_initialization(key_states, value_states)
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            take = room.put if is_first else room.append
            take(states)
        return self.show()

    def show(self) -> tuple[Tensor, Tensor]:
        """What the buffers hold, where transformers looks for it."""
        keys, values = (room.used for room in self.rooms)
        self.keys, self.values = keys, values
        return keys, values


class _Room:
    """A buffer [B, K, L + room, C], of which L columns are in use."""

    def __init__(self) -> None:
        self._buffer = self.used = torch.empty(0)

    def put(self, states: Tensor) -> None:
        """`states` [B, K, L, C] and nothing else, in a new buffer."""
        rows, heads, columns, channels = states.shape
        self._buffer = states.new_empty((rows, heads, columns + ROOM, channels))
        self.used = self._buffer[:, :, :columns]
        self.used.copy_(states)

    def append(self, states: Tensor) -> None:
        """`states` behind what is here, which moves only when the room is used up."""
        before, after = self.used.shape[2], self.used.shape[2] + states.shape[2]
        if after > self._buffer.shape[2]:
            self.put(torch.cat([self.used, states], dim=2))
            return
        self._buffer[:, :, before:after] = states
        self.used = self._buffer[:, :, :after]
