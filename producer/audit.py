"""Audit events: signs of an attack, for the log and for Prometheus.

Each event is counted, and logged as a WARNING of `verifyserver.audit` whose text is the event's name. An attack must
not fill the disk, and one kind of event must not hide another: in each period, each kind gets a few lines and then one
that sums up the rest.
"""

from __future__ import annotations

import logging
from collections import Counter
from enum import StrEnum
from typing import Final

from producer.line_limit import LineLimit
from producer.masking import mask_email

logger = logging.getLogger("verifyserver.audit")

LINES: Final = 10  # of one event, in each period
PERIOD: Final = 10.0  # seconds


class AuditEvent(StrEnum):
    """The events, by their name in the log and in the label `event`."""

    CODE_BURNT = "code_burnt"  # a code was dropped after too many wrong checks
    BUCKET_EMPTY = "bucket_empty"  # a limit on mails was used up: of an address, of a client or of all
    WRONG_KEY = "wrong_key"  # a key was given, and it is not one of VERIFY_API_KEYS
    MAILBOX_SUPPRESSED = "mailbox_suppressed"  # a request for a mailbox that a relay lately refused for good
    MESSAGE_TOO_LARGE = "message_too_large"  # a message on the queue was dead-lettered for its size


class Audit:
    """Counts and logs the events of one process. Use it on the event loop."""

    def __init__(self) -> None:
        self.counts: dict[AuditEvent, int] = dict.fromkeys(AuditEvent, 0)
        self._limits = {event: LineLimit(LINES, PERIOD, _sum_up) for event in AuditEvent}

    def code_burnt(self, email: str) -> None:
        self._record(AuditEvent.CODE_BURNT, email=mask_email(email))

    def bucket_empty(self, bucket: str, email: str) -> None:
        """`bucket`: its name in `verify_worker_rate_limited_total`."""
        self._record(AuditEvent.BUCKET_EMPTY, bucket=bucket, email=mask_email(email))

    def wrong_key(self, protocol: str, peer: str | None) -> None:
        """`peer`: the other end's IP address; behind a proxy, the proxy's. The wrong key itself is not recorded."""
        self._record(AuditEvent.WRONG_KEY, protocol=protocol, peer=peer)

    def mailbox_suppressed(self, email: str) -> None:
        self._record(AuditEvent.MAILBOX_SUPPRESSED, email=mask_email(email))

    def message_too_large(self, size: int) -> None:
        """`size`: bytes."""
        self._record(AuditEvent.MESSAGE_TOO_LARGE, size=size)

    def flush(self) -> None:
        """Log the sums of what was left out so far."""
        for limit in self._limits.values():
            limit.flush()

    def _record(self, event: AuditEvent, **fields: object) -> None:
        self.counts[event] += 1
        if self._limits[event].admits(event):
            logger.warning(event.value, extra=fields)


def _sum_up(left_out: Counter[AuditEvent]) -> None:
    for event, count in left_out.items():
        logger.warning(event.value, extra={"more": count})
