"""One request in a worker's hands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from producer.address import Address
from producer.contract import ErrorCode, VerifyRequest
from producer.store.codes import Claim

if TYPE_CHECKING:
    from worker.tracing import Trace

NOBODY = Claim("", "", "", "", "")  # until the service knows better


@dataclass(slots=True)
class Job:
    """One request in this worker's hands. `enqueued_at` and `expires_at` are Unix seconds."""

    request_id: str
    tag: str
    request: VerifyRequest
    enqueued_at: float | None
    expires_at: float | None
    through_celery: bool = False  # Celery stores the reply and acks the message
    claim: Claim = NOBODY
    mailbox: Address | None = None
    began: float = 0.0  # on the loop's clock, as `lease_until`
    lease_until: float = 0.0
    scheduled: bool = False  # it waits at Celery for its ETA
    dead_lettered: bool = False  # it left as a dead letter
    trace: Trace | None = None  # None: this worker is not traced


# Requests that are off this worker's hands, each with its answer; None: it was parked, buried or put back.
Finished = list[tuple[Job, ErrorCode | None]]
