"""How a document changes another: JSON merge patch, and server-side apply for one field manager. Pure.

Used by `local.cluster`. Nothing given is changed; what comes back shares what did not change.
"""

from __future__ import annotations

from typing import Any

__all__ = ["applied", "copied", "merged"]


def merged(target: Any, patch: Any) -> Any:
    """`target` after a JSON merge patch (RFC 7386): mappings are merged, null removes, all else takes the place."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def applied(live: Any, before: Any, wanted: Any) -> Any:
    """`live` after an apply of `wanted` by a manager whose last apply was `before`.

    What the manager asked for before and asks for no longer goes; what others wrote stays. Lists are taken as a whole:
    those that the API merges by key (containers, ports) would be merged there.
    """
    if not isinstance(wanted, dict) or not isinstance(live, dict):
        return wanted
    owned = before if isinstance(before, dict) else {}
    result = {name: value for name, value in live.items() if name not in owned or name in wanted}
    for name in (name for name in owned if name in live and name not in wanted):
        # Of a mapping only what this manager put into it goes.
        if isinstance(live[name], dict) and (left := applied(live[name], owned[name], {})):
            result[name] = left
    for name, value in wanted.items():
        result[name] = applied(live.get(name), owned.get(name), value)
    return result


def copied(value: Any) -> Any:
    """A deep copy of what JSON can hold; much faster than copy.deepcopy."""
    if isinstance(value, dict):
        return {name: copied(child) for name, child in value.items()}
    if isinstance(value, list):
        return [copied(child) for child in value]
    return value
