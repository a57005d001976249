"""Keys and values of a batch whose rows come and go while it is written. Called by `in_process`.

    B  rows      K  key/value heads      L  columns: tokens that the longest row has      C  channels of a head

Rows end together at the newest column, and begin where they begin. transformers' own cache copies everything for
each new token; this one has room for some more. It keeps whole rows also for layers that look back through a window,
whose masks leave out the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["RowCache"]

ROOM = 64
"""Columns of room for tokens to come."""


class RowCache(Cache):
    """A cache for a forward pass of any causal model that has attention only."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)

    def keep(self, rows: Tensor, first: int) -> None:
        """Only `rows` (int64; one may come more than once), in their order, and only columns from `first` on."""
        for layer in self._layers():
            layer.keys = layer.key_room.put(layer.keys[:, :, first:].index_select(0, rows))
            layer.values = layer.value_room.put(layer.values[:, :, first:].index_select(0, rows))

    def join(self, other: RowCache) -> None:
        """The rows of `other` after those that are here; the shorter ones of both get empty columns in front."""
        for layer, theirs in zip(self._layers(), other._layers(), strict=True):
            layer.keys = layer.key_room.put(_below(layer.keys, theirs.keys))
            layer.values = layer.value_room.put(_below(layer.values, theirs.values))

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
        super().__init__()
        self.key_room, self.value_room = _Room(), _Room()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Everything seen so far, the new columns [B, K, L, C] behind the others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self.key_room.put(key_states), self.value_room.put(value_states)
        else:
            self.keys = self.key_room.append(self.keys, key_states)
            self.values = self.value_room.append(self.values, value_states)
        return self.keys, self.values


class _Room:
    """A buffer [B, K, L + room, C]."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def put(self, states: Tensor) -> Tensor:
        """`states` [B, K, L, C] in a new buffer."""
        rows, heads, columns, channels = states.shape
        self._buffer = states.new_empty((rows, heads, columns + ROOM, channels))
        held = self._buffer[:, :, :columns]
        held.copy_(states)
        return held

    def append(self, held: Tensor, states: Tensor) -> Tensor:
        """`states` behind what the buffer holds, moving that only when the room is used up."""
        before, after = held.shape[2], held.shape[2] + states.shape[2]
        if after > self._buffer.shape[2]:
            self.put(held)
            if after > self._buffer.shape[2]:
                return self.put(torch.cat([held, states], dim=2))
        self._buffer[:, :, before:after] = states
        return self._buffer[:, :, :after]
