"""The `ray` command with more patience: it gives a node half a minute to get up, and a loaded machine is slower."""

from __future__ import annotations

import time
from typing import Any

from ray._private import services
from ray.scripts.scripts import main

_SECONDS = 300.0
_get_node: Any = services.get_node


def _patiently(*arguments: Any, **named: Any) -> Any:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            return _get_node(*arguments, **named)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    services.get_node = _patiently
    main()
