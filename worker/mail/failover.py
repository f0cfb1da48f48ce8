"""Several relays in order of preference, the sick ones skipped and probed now and then."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    MessageRejected,
    RecipientRejected,
    RelayBusy,
    RelayUnavailable,
    SendWithheld,
    Smtputf8Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from worker.mail.relay import Envelope, Relay

_FIRST_PAUSE: Final = 1.0  # seconds until a sick relay is probed; doubled with every failed probe
_LONGEST_PAUSE: Final = 60.0

_ACCEPTED: Final = "accepted"
_DEFERRED: Final = "deferred"
_CALLED_OFF: Final = "called_off"  # the request's deadline came, or the worker stops
_OUTCOMES: Final[dict[type[MailError], str]] = {
    RecipientRejected: "recipient_rejected",
    MessageRejected: "message_rejected",
    MessageDeferred: _DEFERRED,
    RelayUnavailable: "unavailable",
    RelayBusy: "busy",
    AcceptanceUnknown: "unknown",
    Smtputf8Unsupported: "no_smtputf8",
    SendWithheld: "withheld",
}

logger = logging.getLogger(__name__)


class Standing(NamedTuple):
    """How it stands with one relay."""

    relay: str  # its URL, masked
    sends: dict[str, int]  # by outcome, since the start
    connections: int
    sick: bool


class _Health:
    """Whether a relay is sick, and when to probe it again."""

    def __init__(self, relay: Relay, clock: Callable[[], float]) -> None:
        self.relay: Final = relay
        self.sick = False
        self.sends = dict.fromkeys((_ACCEPTED, *_OUTCOMES.values(), _CALLED_OFF), 0)
        self._clock = clock
        self._pause = _FIRST_PAUSE
        self._probe_at = 0.0
        self._probing = False

    def admits(self) -> bool:
        """Whether a send may try this relay now. If it is sick that send is a probe, the only one at a time."""
        if not self.sick:
            return True
        if self._probing or self._clock() < self._probe_at:
            return False
        self._probing = True
        return True

    async def send(self, envelope: Envelope, before_dot: Callable[[], bool]) -> None:
        """`Relay.send`, with a look at what its outcome says of the relay."""
        probe, outcome = self.sick, _CALLED_OFF
        try:
            await self.relay.send(envelope, before_dot)
        except MailError as exc:
            outcome = _OUTCOMES.get(type(exc), _DEFERRED)
            if isinstance(exc, RelayUnavailable):
                # Sends that were under way when it fell sick say nothing new.
                if probe or not self.sick:
                    self._worse(exc)
            # A relay that refuses is at work; one that was not asked (no code) may not be.
            elif not isinstance(exc, RelayBusy | AcceptanceUnknown) and (
                exc.code or not isinstance(exc, MessageDeferred)
            ):
                self._well()
            raise
        else:
            outcome = _ACCEPTED
            self._well()
        finally:
            self.sends[outcome] += 1
            if probe:
                self._probing = False
                self._rest()

    def _worse(self, exc: RelayUnavailable) -> None:
        if self.sick:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            kind = type(exc.__cause__ or exc).__name__
            logger.warning("relay %s is sick: %s, code %s", self.relay.url.masked(), kind, exc.code)
        self.sick = True
        self._rest()

    def _rest(self) -> None:
        # Jitter, so that many workers do not probe in step.
        self._probe_at = self._clock() + self._pause * random.uniform(0.5, 1.0)

    def _well(self) -> None:
        if self.sick:
            logger.info("relay %s is well again", self.relay.url.masked())
        self.sick = False
        self._pause = _FIRST_PAUSE


class Failover:
    """Sends through the first relay that will."""

    def __init__(self, relays: Sequence[Relay], *, clock: Callable[[], float] = time.monotonic) -> None:
        """`relays` in order of preference; `clock` in seconds."""
        self._relays = [_Health(relay, clock) for relay in relays]

    @property
    def capacity(self) -> int:
        """How many sends can be under way at once: those of the relay that is in use.

        If all are sick, those of the first: sends fail at once then, and none of them holds a connection.
        """
        return next((health for health in self._relays if not health.sick), self._relays[0]).relay.capacity

    def standings(self) -> list[Standing]:
        """How it stands with each relay."""
        return [
            Standing(health.relay.url.masked(), health.sends, health.relay.open_connections, health.sick)
            for health in self._relays
        ]

    async def send(self, envelope: Envelope, before_dot: Callable[[], bool]) -> None:
        """Return when a relay has accepted the mail; `before_dot` as in `Relay.send`.

        Raises `RecipientRejected`, `AcceptanceUnknown` and `SendWithheld` as soon as one relay says so;
        `MessageDeferred` if any relay could not be asked or said 4yz; `MessageRejected` if all refused, some of them
        with 5yz; `Smtputf8Unsupported` if all lack it.
        """
        outcomes: list[MailError] = []
        for health in self._relays:
            if not health.admits():
                outcomes.append(MessageDeferred())
                continue
            try:
                return await health.send(envelope, before_dot)
            except (MessageRejected, MessageDeferred, RelayBusy, RelayUnavailable, Smtputf8Unsupported) as exc:
                outcomes.append(exc)
        raise _verdict(outcomes)

    async def close(self) -> None:
        """Close all relays."""
        await asyncio.gather(*(health.relay.close() for health in self._relays))


def _verdict(outcomes: list[MailError]) -> MailError:
    """What the failures of all relays mean together; the kinder one counts."""
    for exc in outcomes:
        if not isinstance(exc, MessageRejected | Smtputf8Unsupported):
            return MessageDeferred(exc.code, exc.enhanced)
    return next((exc for exc in outcomes if isinstance(exc, MessageRejected)), outcomes[0])
