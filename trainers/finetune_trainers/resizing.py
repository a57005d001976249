"""Groups of fewer workers than all: how many of them there is room for, and when they should give way to more.

`ray_workers` asks before a group starts, and while one of fewer trains, whose rank 0 reads the answer (`context`) and
gives way when it has trained for a while and all of that is saved (`saving`).

Whether there is room is asked of Ray by a placement group like the one that workers get, taken back at once. Adding up
what nodes have would count one whose machine is gone until Ray has noticed, and what others use.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

__all__ = ["Growth", "Room", "RoomFor", "first_size", "room_in_ray", "tell_of_room"]

RoomFor = Callable[[int, float], bool]
"""Whether there is room for so many workers, or will be within so many seconds."""

_LOOK_SECONDS = 15.0
"""Between two looks for room."""
_ANSWER_SECONDS = 2.0
"""Ray answers within milliseconds; on a busy machine a little later."""
_STOP_SECONDS = 1.0
"""Between two looks for a request to stop, while room is waited for."""
_READ_SECONDS = 1.0
"""Between two looks for word of it."""
_NAMESPACE, _YES = "finetune", b"room"
_log = logging.getLogger(__name__)


def room_in_ray(
    resources: Mapping[str, float], num_processes: int, seconds: float, stops: Callable[[], bool] = lambda: False
) -> bool:
    """Whether the Ray that this process is connected to has room for processes that need `resources` each, or will
    have within so many seconds. `stops` is asked every second whether to give up."""
    from ray.util import placement_group, remove_placement_group

    places = placement_group([dict(resources)] * num_processes)
    try:
        deadline = time.monotonic() + seconds
        while not places.wait(max(0.0, min(_STOP_SECONDS, deadline - time.monotonic()))):
            if stops() or time.monotonic() >= deadline:
                return False
        return True
    finally:
        remove_placement_group(places)


def first_size(
    sizes: Sequence[int], wanted: int, patience: float, room_for: RoomFor, stops: Callable[[], bool] = lambda: False
) -> int | None:
    """With how many workers the next group starts: `wanted` if there is room for them within `patience` seconds, or
    else as many of `sizes`, the most first, as there is room for. Waits for the least of them as long as it takes, or
    until it `stops`: None."""
    if room_for(wanted, patience):
        return wanted
    while not stops():
        for size in sizes:
            if room_for(size, _ANSWER_SECONDS):
                return size
    return None


class Growth(threading.Thread):
    """While a group of `size` workers trains: keeps telling it, as long as the `with` block, whether there is room for
    a larger one of `sizes`. When it makes use of that is the group's own affair."""

    def __init__(
        self,
        sizes: Sequence[int],
        size: int,
        room_for: RoomFor,
        tell: Callable[[bool], None],
        seconds: float = _LOOK_SECONDS,
    ) -> None:
        """`tell` is given what has changed; `seconds` are between two looks."""
        super().__init__(name="growth", daemon=True)
        self._larger = [one for one in sizes if one > size]
        self._size, self._room_for, self._tell, self._seconds = size, room_for, tell, seconds
        self._over = threading.Event()
        self.wanted: int | None = None
        """For how many workers there was room when there last was for more."""

    def __enter__(self) -> Growth:
        if self._larger:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._larger:
            self.join()

    def run(self) -> None:
        told = False
        while not self._over.wait(self._seconds):
            try:
                fits = self._look()
                if self._over.is_set():
                    break  # it may not have looked to the end
                self.wanted = fits or self.wanted
                if told is not (there_is := fits is not None):
                    self._tell(there_is)
                    told = there_is
            except Exception as error:  # training does not depend on it
                _log.warning("whether there is room for more workers cannot be told: %s", error)

    def _look(self) -> int | None:
        """The largest size that there is room for; None for none, or when nobody wants to know it any more."""
        for size in self._larger:
            if self._over.is_set():
                break
            if self._room_for(size - self._size, _ANSWER_SECONDS):
                return size
        return None


def tell_of_room(group_id: str, there_is: bool) -> None:
    """Leave word for rank 0 of a group, whether a larger one could start."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(group_id, _YES if there_is else b"", namespace=_NAMESPACE)


class Room:
    """What the driver has told a group, as its rank 0 reads it: from Ray's own store, since a worker need not share a
    disk with the driver. It is looked for once a second, however fast the steps are."""

    def __init__(self, group_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._group_id, self._clock = group_id, clock
        self._there_is = False
        self._read_at = float("-inf")

    def there_is(self) -> bool:
        """Whether a larger group could start."""
        from ray.experimental.internal_kv import _internal_kv_get

        if self._clock() - self._read_at >= _READ_SECONDS:
            self._read_at = self._clock()
            with suppress(Exception):  # what ails Ray is told in other ways
                self._there_is = _internal_kv_get(self._group_id, namespace=_NAMESPACE) == _YES
        return self._there_is
