"""What the client can decide about a request without Redis: its message, its id, and errors that are certain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from producer import address
from producer.contract import (
    LARGEST_MESSAGE,
    LONGEST_CLIENT,
    LONGEST_ID,
    LONGEST_STAMP,
    ErrorCode,
    VerifyRequest,
    is_client,
    is_purpose,
    known_locale,
)


class RequestObserver(Protocol):
    """Watches one request until it is on the queue. Called on the client's event loop; must not raise."""

    def on_publish(self, request_id: str) -> None:
        """The request is about to be pushed under this id."""

    def on_confirmed(self) -> None:
        """Redis has the request. Not called if the reply arrives first."""


def build_request(email: object, purpose: object, locale: object, client: object = None) -> VerifyRequest:
    """The request to send. A malformed locale is left out, and the worker then uses its own.

    Raises `ValueError` for a malformed client.
    """
    if not is_client(client):
        raise ValueError(f"client must be a string of at most {LONGEST_CLIENT} characters, or None")
    return VerifyRequest(email, purpose, known_locale(locale), client or None)


def certain_error(request: VerifyRequest) -> ErrorCode | None:
    """The error that any worker would answer, so that there is no need to ask one; None if it takes a worker."""
    if not is_purpose(request.purpose):
        return ErrorCode.EXCEPTION
    return None if address.is_address(request.email) else ErrorCode.INVALID_ADDRESS


def require_request_id(value: object) -> None:
    """Raises `ValueError` unless `value` can be a request id."""
    if not (isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= LONGEST_ID):
        raise ValueError(f"request_id must be a string of printable characters, 1 to {LONGEST_ID} bytes, or None")


def encode(request: VerifyRequest, request_id: str, queue: str, trace: Mapping[str, str] | None) -> bytes:
    """The message for `queue`, which gets its time when it is sent.

    Raises `TypeError` for values that JSON cannot hold, `ValueError` for an email that is too long to be an address, or
    for a message that is too long for any worker.
    """
    if isinstance(request.email, str) and len(request.email) > address.MAX_GIVEN:
        raise ValueError(f"an email has at most {address.MAX_GIVEN} characters, spaces included")
    if not (isinstance(request.email, str) and isinstance(request.purpose, str)):
        try:
            json.dumps([request.email, request.purpose], allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise TypeError("email and purpose must be JSON values; an email is a string") from None
    message = request.message(request_id, queue=queue, trace=trace)
    if (size := len(message) + LONGEST_STAMP) > LARGEST_MESSAGE:
        raise ValueError(f"the request makes a message of {size} bytes; {LARGEST_MESSAGE} are allowed")
    return message
