"""One request that a worker holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from producer import address
from producer.address import Address
from producer.contract import ErrorCode, VerifyRequest, is_client, is_purpose
from producer.errors import InvalidAddress
from producer.store.codes import Claim

if TYPE_CHECKING:
    from worker.tracing import Trace

NO_CLAIM = Claim("", "", "", "", "", "")  # until `validate`


@dataclass(slots=True)
class Job:
    """A reserved message, read. `enqueued_at` and `expires_at` are Unix seconds."""

    request_id: str
    tag: str  # of the reservation
    request: VerifyRequest
    enqueued_at: float | None
    expires_at: float | None
    through_celery: bool = False  # Celery stores the reply and acks the message
    claim: Claim = NO_CLAIM
    mailbox: Address | None = None  # set by `validate`, if the address is valid
    began: float = 0.0  # loop time, as `lease_until`
    lease_until: float = 0.0  # 0: no lease
    dead_lettered: bool = False
    trace: Trace | None = None  # None: this worker is not traced

    def validate(self) -> ErrorCode | None:
        """Set `claim` and `mailbox`; the error that is certain without asking the code store."""
        request = self.request
        error = None
        canonical = ""
        try:
            self.mailbox = address.parse(request.email)
            canonical = self.mailbox.canonical
        except InvalidAddress:
            error = ErrorCode.INVALID_ADDRESS
        client = request.client
        if not (is_purpose(request.purpose) and is_client(client)):
            error, client = ErrorCode.EXCEPTION, None
        self.claim = Claim.of(self.request_id, self.tag, request.email, request.purpose, canonical, client)
        return error


# Requests that this worker holds no longer, each with its answer; None: delayed, dead-lettered or put back.
Finished = list[tuple[Job, ErrorCode | None]]
