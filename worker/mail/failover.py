"""Several relays in order of preference; unhealthy ones are skipped and probed."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import re
import socket
import ssl
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
    SendAborted,
    SendCancelled,
    Smtputf8Unsupported,
    Step,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from worker.mail.channel import RelayChannel
    from worker.mail.message import Mail

# Seconds between two probes of an unhealthy relay, less some jitter: doubled after each failure.
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
# While no relay is healthy, the next probe of each starts within the sum of these, 5 s.
_LONGEST_PAUSE_WITHOUT_RELAY: Final = 4.0
_PROBER_INTERVAL: Final = 1.0
# Seconds. A relay that accepted no mail to another address for so long may be refusing every mailbox.
_ACCEPTED_LATELY: Final = 600.0

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
    SendAborted: "aborted",
    SendCancelled: "cancelled",
}
# No other relay is tried after these.
_FINAL: Final = (RecipientRejected, AcceptanceUnknown, SendAborted, SendCancelled)
# A relay that answers so is at work.
_ANSWERS: Final = (RecipientRejected, MessageRejected, Smtputf8Unsupported)
_CONNECTING: Final = frozenset({Step.CONNECT, Step.BANNER, Step.EHLO, Step.STARTTLS, Step.AUTH})

logger = logging.getLogger(__name__)


class RelayStatus(NamedTuple):
    relay: str  # its URL, masked
    sends: dict[str, int]  # by outcome, since the start
    connections: int
    unhealthy: bool


class Relay:
    """One channel, its health and its counters."""

    def __init__(self, channel: RelayChannel, clock: Callable[[], float]) -> None:
        self.channel: Final = channel
        self.name: Final = channel.url.masked()
        self.healthy = True
        self.sends = dict.fromkeys((_ACCEPTED, *_OUTCOMES.values()), 0)
        self._clock = clock
        self._pause = _FIRST_PAUSE
        self._jitter = 1.0
        self._probed_at = 0.0
        self._probing = False
        self.failed_at: Step | None = None  # what made it unhealthy
        # The last accepted mail, and the last one before it to another address: recipient in lower case, and time.
        self._last_accepted = self._accepted_before = ("", -math.inf)

    def admits_probe(self, longest_pause: float) -> bool:
        """Whether to probe this unhealthy relay now: one probe at a time. If so, the probe has begun."""
        pause = min(self._pause, longest_pause) * self._jitter
        if self._probing or self._clock() < self._probed_at + pause:
            return False
        self._probing = True
        self._probed_at = self._clock()
        return True

    def accepted_another_lately(self, recipient: str) -> bool:
        """Whether it is worth believing when it refuses this mailbox."""
        last = self._last_accepted
        _, accepted_at = self._accepted_before if last[0] == recipient.lower() else last
        return self._clock() - accepted_at <= _ACCEPTED_LATELY

    def sent(self, recipient: str, error: Exception | None, *, probe: bool) -> str:
        """Take the outcome of a send into account; the outcome in a word."""
        if error is None:
            folded = recipient.lower()
            if folded != self._last_accepted[0]:
                self._accepted_before = self._last_accepted
            self._last_accepted = folded, self._clock()
        outcome = _ACCEPTED if error is None else _OUTCOMES.get(type(error), _DEFERRED)
        self.sends[outcome] += 1
        if isinstance(error, RelayUnavailable):
            # The failures of sends that were under way when it became unhealthy say nothing new.
            if probe or self.healthy:
                self._failed(error)
        # Deferred without a reply: the relay was not asked.
        elif error is None or isinstance(error, _ANSWERS) or (isinstance(error, MessageDeferred) and error.code):
            self._answered()
        if probe:
            self._probing = False
        return outcome

    async def check(self) -> None:
        """Probe by a connection without a mail."""
        try:
            await self.channel.check()
        except RelayUnavailable as exc:
            self._failed(exc)
        except MailError as exc:
            if exc.code:
                self._answered()
        else:
            self._answered()
        finally:
            self._probing = False

    def _failed(self, error: RelayUnavailable) -> None:
        self.failed_at = error.step
        self._jitter = random.uniform(0.5, 1.0)  # so that many workers do not probe in step
        if not self.healthy:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            return
        self.healthy = False
        self._probed_at = self._clock()
        if error.login_refused:
            did = "refused the login" if error.step is Step.AUTH else "wants a login"
            logger.warning("the relay %s (%s): check VERIFY_RELAYS", did, error.code, extra={"relay": self.name})
        elif error.__cause__ is not None:
            why = _reason(error.__cause__, error.step)
            logger.warning("the relay cannot be reached (%s): check VERIFY_RELAYS", why, extra={"relay": self.name})
        else:
            why = error.reply or f"no usable reply at {error.step}"
            logger.warning("the relay is unhealthy: %s", why, extra={"relay": self.name})

    def _answered(self) -> None:
        if not self.healthy:
            logger.info("the relay is healthy again", extra={"relay": self.name})
        self.healthy = True
        self.failed_at = None
        self._pause = _FIRST_PAUSE


class Failover:
    """Sends each mail through the first relay that accepts it."""

    def __init__(
        self,
        channels: Sequence[RelayChannel],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`channels` in order of preference; `clock` and `sleep` in seconds."""
        self._relays = [Relay(channel, clock) for channel in channels]
        self._sleep = sleep
        self._prober: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> bool:
        return any(relay.healthy for relay in self._relays)

    @property
    def capacity(self) -> int:
        """How many mails can be on their way at once: the capacity of the relay in use.

        If none is healthy, that of the first: sends fail at once then, and hold no connection.
        """
        return next((relay for relay in self._relays if relay.healthy), self._relays[0]).channel.capacity

    def statuses(self) -> list[RelayStatus]:
        return [
            RelayStatus(relay.name, relay.sends, relay.channel.open_connections, not relay.healthy)
            for relay in self._relays
        ]

    def send(self, mail: Mail) -> None:
        """Send a mail; `mail.done` is called when a relay has accepted it, or none will.

        Its error is `RecipientRejected`, `AcceptanceUnknown`, `SendAborted` or `SendCancelled` as soon as one relay
        says so; `MessageDeferred` if any relay could not be asked or said 4yz; `MessageRejected` if all refused, some
        of them with 5yz; `Smtputf8Unsupported` if all lack it; `ValueError` for an envelope that cannot be sent.
        """
        mail.attempt_done = self._attempt_done
        mail.untried = iter(self._relays)
        mail.failures = ()
        self._try_next(mail)

    async def close(self) -> None:
        if self._prober is not None:
            self._prober.cancel()
            await asyncio.wait([self._prober])
        await asyncio.gather(*(relay.channel.close() for relay in self._relays))

    def _try_next(self, mail: Mail) -> None:
        for relay in mail.untried:
            if relay.healthy or relay.admits_probe(self._longest_pause()):
                mail.relay, mail.is_probe = relay, not relay.healthy
                if mail.observer is not None:
                    mail.observer.trying(relay.channel.url)
                try:
                    relay.channel.send(mail)
                except ValueError as exc:
                    mail.finish(exc)
                return
            mail.failures += (MessageDeferred(),)
        mail.done(_combined(mail.failures))

    def _attempt_done(self, mail: Mail, error: Exception | None) -> None:
        relay = mail.relay
        outcome = relay.sent(mail.envelope.recipient, error, probe=mail.is_probe)
        if mail.observer is not None:
            mail.observer.tried(outcome, error)
        if isinstance(error, RelayUnavailable) and not self.healthy and (self._prober is None or self._prober.done()):
            self._prober = asyncio.create_task(self._probe_until_healthy())
        if isinstance(error, MailError):
            error.relay = relay.name
            error.credible_refusal = error.mailbox_refused and relay.accepted_another_lately(mail.envelope.recipient)
            if not isinstance(error, _FINAL):
                mail.failures += (error,)
                self._try_next(mail)
                return
        mail.done(error)

    def _longest_pause(self) -> float:
        return _LONGEST_PAUSE if self.healthy else _LONGEST_PAUSE_WITHOUT_RELAY

    async def _probe_until_healthy(self) -> None:
        """Check the relays while none is healthy: mails may be rare, or their retries far ahead."""
        while not self.healthy:
            await self._sleep(_PROBER_INTERVAL)
            pause = self._longest_pause()
            # Of a failure after the connection, `check` would not show whether it is over.
            due = [relay for relay in self._relays if relay.failed_at in _CONNECTING and relay.admits_probe(pause)]
            await asyncio.gather(*(relay.check() for relay in due))


def _reason(cause: BaseException, step: Step | None) -> str:
    """Why no connection was made, in plain words; with the step if the relay had been connected to."""
    connected = "" if step is Step.CONNECT else f" at {step}"
    match cause:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not valid: {cause.verify_message}"
        case ssl.SSLError():
            return f"TLS failed{connected or '; is it smtps:// on a plain port?'}"
        case TimeoutError():
            return f"timed out{connected}"
        case socket.gaierror() | UnicodeError():  # UnicodeError: IDNA cannot encode it
            return "host name not found"
        case ConnectionResetError():  # asyncio's own have no number
            return f"connection reset{connected}"
        case OSError():
            # For a host with several addresses, asyncio puts all errors into one text, without a number.
            found = re.search(r"\[Errno (\d+)\]", str(cause))
            number = int(found[1]) if found else cause.errno
            why = os.strerror(number).lower() if number else cause.strerror or type(cause).__name__
            return f"{why}{connected}"
    return type(cause).__name__


def _combined(failures: tuple[MailError, ...]) -> MailError:
    """What the failures of all relays mean for the mail: it is deferred unless every relay refused it for good."""
    for error in failures:
        if not isinstance(error, MessageRejected | Smtputf8Unsupported):
            combined = MessageDeferred(error.code, error.enhanced, error.step)
            combined.relay = error.relay
            return combined
    return next((error for error in failures if isinstance(error, MessageRejected)), failures[0])
