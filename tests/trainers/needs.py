"""What some tests need of the machine, as marks."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

__all__ = ["NEEDS_BITSANDBYTES"]

NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
"""The extra `quantization`, which is in every environment of `make install`; not every platform has builds of it."""
