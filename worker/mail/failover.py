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
    SendCancelled,
    SendWithheld,
    Smtputf8Unsupported,
)
from worker.mail.message import Mail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from worker.mail.pool import Relay

_FIRST_PAUSE: Final = 1.0  # seconds until a sick relay is probed; doubled with every failed probe
_LONGEST_PAUSE: Final = 60.0

_ACCEPTED: Final = "accepted"
_DEFERRED: Final = "deferred"
_OUTCOMES: Final[dict[type[Exception], str]] = {
    RecipientRejected: "recipient_rejected",
    MessageRejected: "message_rejected",
    MessageDeferred: _DEFERRED,
    RelayUnavailable: "unavailable",
    RelayBusy: "busy",
    AcceptanceUnknown: "unknown",
    Smtputf8Unsupported: "no_smtputf8",
    SendWithheld: "withheld",
    SendCancelled: "cancelled",
}
# What no other relay is asked about.
_FINAL: Final = (RecipientRejected, AcceptanceUnknown, SendWithheld, SendCancelled)

logger = logging.getLogger(__name__)


class RelayStatus(NamedTuple):
    """How it stands with one relay."""

    relay: str  # its URL, masked
    sends: dict[str, int]  # by outcome, since the start
    connections: int
    unhealthy: bool


class _Health:
    """Whether a relay is sick, and when to probe it again."""

    def __init__(self, relay: Relay, clock: Callable[[], float]) -> None:
        self.relay: Final = relay
        self.unhealthy = False
        self.sends = dict.fromkeys((_ACCEPTED, *_OUTCOMES.values()), 0)
        self._clock = clock
        self._pause = _FIRST_PAUSE
        self._probe_at = 0.0
        self._probing = False

    def admits(self) -> bool:
        """Whether a send may try this relay now. If it is sick that send is a probe, the only one at a time."""
        if not self.unhealthy:
            return True
        if self._probing or self._clock() < self._probe_at:
            return False
        self._probing = True
        return True

    def note(self, error: Exception | None, *, probe: bool) -> None:
        """A send has ended: what its outcome says of the relay."""
        if error is None:
            self.sends[_ACCEPTED] += 1
            self._well()
        else:
            self.sends[_outcome(error)] += 1
            if isinstance(error, RelayUnavailable):
                # Sends that were under way when it fell sick say nothing new.
                if probe or not self.unhealthy:
                    self._worse(error)
            # A relay that refuses is at work; one that was not asked (no code) may not be.
            elif isinstance(error, RecipientRejected | MessageRejected | Smtputf8Unsupported | SendWithheld) or (
                isinstance(error, MessageDeferred) and error.code
            ):
                self._well()
        if probe:
            self._probing = False
            self._rest()

    def _worse(self, exc: RelayUnavailable) -> None:
        if self.unhealthy:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            kind = type(exc.__cause__ or exc).__name__
            logger.warning("relay %s is sick: %s, code %s", self.relay.url.masked(), kind, exc.code)
        self.unhealthy = True
        self._rest()

    def _rest(self) -> None:
        # Jitter, so that many workers do not probe in step.
        self._probe_at = self._clock() + self._pause * random.uniform(0.5, 1.0)

    def _well(self) -> None:
        if self.unhealthy:
            logger.info("relay %s is well again", self.relay.url.masked())
        self.unhealthy = False
        self._pause = _FIRST_PAUSE


class _Send:
    """One mail on its way through the relays."""

    __slots__ = ("_mail", "_outcomes", "_probe", "_relay", "_relays")

    def __init__(self, mail: Mail, relays: Iterable[_Health]) -> None:
        self._mail = mail
        self._relays = iter(relays)
        self._outcomes: list[MailError] = []
        self._probe = False

    def go_on(self) -> None:
        """Ask the next relay."""
        for health in self._relays:
            if health.admits():
                self._relay, self._probe = health, health.unhealthy
                mail = self._mail
                if mail.tries is not None:
                    mail.tries.trying(health.relay.url)
                try:
                    health.relay.send(Mail(mail.envelope, mail.deadline, mail.before_data, self._ended))
                except ValueError as exc:
                    self._ended(exc)
                return
            self._outcomes.append(MessageDeferred())
        self._mail.done(_verdict(self._outcomes))

    def _ended(self, error: Exception | None) -> None:
        self._relay.note(error, probe=self._probe)
        if self._mail.tries is not None:
            self._mail.tries.tried(_ACCEPTED if error is None else _outcome(error), error)
        if isinstance(error, MailError) and not isinstance(error, _FINAL):
            self._outcomes.append(error)
            self.go_on()
        else:
            self._mail.done(error)


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
        return next((health for health in self._relays if not health.unhealthy), self._relays[0]).relay.capacity

    def statuses(self) -> list[RelayStatus]:
        """How it stands with each relay."""
        return [
            RelayStatus(health.relay.url.masked(), health.sends, health.relay.open_connections, health.unhealthy)
            for health in self._relays
        ]

    def send(self, mail: Mail) -> None:
        """Send a mail; `mail.done` is called when a relay has accepted it, or none will.

        Its error is `RecipientRejected`, `AcceptanceUnknown`, `SendWithheld` or `CalledOff` as soon as one relay says
        so; `MessageDeferred` if any relay could not be asked or said 4yz; `MessageRejected` if all refused, some of
        them with 5yz; `Smtputf8Unsupported` if all lack it; `ValueError` for an envelope that would break the dialogue.
        """
        _Send(mail, self._relays).go_on()

    async def close(self) -> None:
        """Close all relays."""
        await asyncio.gather(*(health.relay.close() for health in self._relays))


def _outcome(error: Exception) -> str:
    return _OUTCOMES.get(type(error), _DEFERRED)


def _verdict(outcomes: list[MailError]) -> MailError:
    """What the failures of all relays mean together; the kinder one counts."""
    for exc in outcomes:
        if not isinstance(exc, MessageRejected | Smtputf8Unsupported):
            return MessageDeferred(exc.code, exc.enhanced)
    return next((exc for exc in outcomes if isinstance(exc, MessageRejected)), outcomes[0])
