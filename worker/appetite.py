"""How many requests a worker takes on: what its relay connections can send at once, and enough that none waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from worker.queue import MOVES

AHEAD: Final = 0.03  # seconds of work, at most, that are held beyond what can be sent at once
SHARE: Final = 4  # of that, many places are filled at once: when one part in so many is free
_SHORTEST: Final = 0.1  # seconds between two ticks that count as such
_SMOOTH: Final = 8  # fetches over which their duration is averaged


class Appetite:
    """Told of each fetch and each mail; asked how many messages to reserve."""

    def __init__(self, at_once: Callable[[], int]) -> None:
        """`at_once` tells how many mails can be on the wire at the moment."""
        self._at_once = at_once
        self._sent = 0  # mails since the last tick
        self._rate = 0.0  # mails a second, smoothed
        self._ticked = 0.0  # loop time
        self._fetch = 0.0  # seconds from asking for messages until their sends begin, smoothed

    def sent(self) -> None:
        """A mail was accepted."""
        self._sent += 1

    def fetched(self, seconds: float) -> None:
        """So long after messages were asked for, their sends began."""
        self._fetch += (seconds - self._fetch) / _SMOOTH

    def tick(self, now: float) -> None:
        """Once a second, about; `now` is loop time."""
        self._rate += (self._sent / max(now - self._ticked, _SHORTEST) - self._rate) / 2
        self._sent, self._ticked = 0, now

    def wanted(self, held: int, *, settling: int) -> int:
        """How many messages to reserve now, with so many in hand, of which some have left their connections already.

        A connection that becomes free finds its next mail here if what is sent in the time of a fetch, twice for good
        measure, is held ahead. More would wait here, while another worker may have connections with nothing to send.
        """
        at_once = self._at_once()
        ahead = round(self._rate * min(2 * self._fetch, AHEAD))
        most = at_once + ahead
        unsent = max(held - settling, 0)
        # However slowly outcomes are settled, what is in hand is bounded.
        free = min(most - unsent, 2 * most - held)
        return 0 if unsent >= at_once and free * SHARE < ahead else max(min(free, MOVES), 0)
