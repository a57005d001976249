"""How long to hold back: growing delays for what fails, and a bucket that bounds the rate over all.

Pure arithmetic; called by the reflector, the work queue and their tests.
"""

from __future__ import annotations

__all__ = ["TokenBucket", "exponential"]

_LARGEST_EXPONENT = 60  # beyond it a float would overflow, and every limit has long been reached


def exponential(failures: int, first: float, limit: float) -> float:
    """Seconds to wait after so many earlier failures: `first`, then doubled each time up to `limit`."""
    return min(limit, first * 2.0 ** min(failures, _LARGEST_EXPONENT))


class TokenBucket:
    """Lets `burst` through at once and `per_second` after that. Places are given in the order of asking."""

    def __init__(self, per_second: float, burst: int) -> None:
        """The bucket starts full."""
        self._per_second = per_second
        self._burst = burst
        self._tokens = float(burst)
        self._seen_at: float | None = None

    def reserve(self, now: float) -> float:
        """Takes a token, if need be one of the future; says in how many seconds it may be used."""
        passed = 0.0 if self._seen_at is None else now - self._seen_at
        self._tokens = min(self._burst, self._tokens + passed * self._per_second) - 1
        self._seen_at = now
        return max(0.0, -self._tokens / self._per_second)
