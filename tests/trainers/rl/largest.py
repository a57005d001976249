"""How large the tensors are that a piece of code makes: for tests of what must never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Largest"]


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor of one type that any operation makes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0
        self._dtype = dtype

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.dtype == self._dtype]
        self.elements = max([self.elements, *made])
        return out
