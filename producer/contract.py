"""The wire contract: names, formats and error codes that callers in any language rely on. Standard library only.

The envelope is a Celery task message, protocol 2, in kombu's virtual-transport form
(https://docs.celeryq.dev/en/stable/internals/protocol.html); `message()` builds the smallest one that any Celery worker
accepts, so that a plain Redis client can do the same by hand.
"""

from __future__ import annotations

import functools
import json
import os
import re
from binascii import b2a_base64
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from json.encoder import encode_basestring_ascii
from typing import Any, Final

TASK = "verification.send_code"
DEFAULT_QUEUE = "verification"
DEAD_LETTERS = "verification.dead"  # a Redis list in the broker database
DEFAULT_PURPOSE = "default"
PURPOSE_PATTERN = re.compile(r"[a-z0-9_-]{1,32}")
REPLY_KEY_PREFIX = (
    "celery-task-meta-"  # Celery's own; both the key of a stored reply and the channel it is published on
)
LONGEST_ID = 255  # bytes of a request id in UTF-8; a message with a longer one becomes a dead letter
REPLY_TTL = 3600  # seconds a reply is kept, and a request id remembered


class ErrorCode(IntEnum):
    """What a reply says; a JSON number on the wire. GateServer owns 1001-1011, new codes of ours stay below 1000."""

    SUCCESS = 0
    REDIS_ERR = 1
    EXCEPTION = 2
    INVALID_ADDRESS = 3
    TOO_MANY_REQUESTS = 4
    MAIL_REJECTED = 5
    TIMEOUT = 6
    ERROR_JSON = 1001
    VARIFY_EXPIRED = 1003
    VARIFY_CODE_ERR = 1004

    @property
    def title(self) -> str:
        """The name that contract and documentation use: `RedisErr`, `Error_Json`."""
        if self is ErrorCode.ERROR_JSON:
            return "Error_Json"
        return "".join(word.capitalize() for word in self.name.split("_"))


_KNOWN: Final = {int(error): error for error in ErrorCode}
_parse: Final = json.JSONDecoder().decode  # json.loads also guesses an encoding, which costs half as much again


def _template(**headers: str) -> str:
    """An envelope as JSON, with %(name)s for each value that differs from message to message."""
    envelope = {
        "body": "%(body)s",
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": TASK,
            "id": "%(id)s",
            "root_id": "%(id)s",
            # Celery shows these instead of the arguments, in Flower, events and logs.
            "argsrepr": "()",
            "kwargsrepr": "{}",
            **headers,
        },
        "properties": {
            "correlation_id": "%(id)s",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "%(queue)s"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": "%(tag)s",
        },
    }
    return re.sub(r'"(%\(\w+\)s)"', r"\1", json.dumps(envelope))


# Filled in, an envelope is what json.dumps would make of the whole, for a third of the time.
_ENVELOPE: Final = _template()
_TIMED_ENVELOPE: Final = _template(enqueued_at="%(time)s")
_traced_envelope: Final = functools.cache(
    lambda *names: _template(enqueued_at="%(time)s", **{name: f"%({name})s" for name in names})
)
_BODY: Final = '[[], {%s}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request: the address as the caller gave it, and how it went."""

    email: Any
    error: ErrorCode


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The answer to one check: SUCCESS, VARIFY_EXPIRED, VARIFY_CODE_ERR or REDIS_ERR."""

    email: str
    error: ErrorCode


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """One request for a code. `email` stays as the caller gave it, byte for byte; the worker judges it."""

    email: Any
    purpose: Any = DEFAULT_PURPOSE
    locale: Any = None

    def message(
        self,
        request_id: str,
        *,
        queue: str = DEFAULT_QUEUE,
        enqueued_at: float | None = None,
        trace: Mapping[str, str] | None = None,
    ) -> bytes:
        """The envelope to LPUSH onto `queue`. `enqueued_at`: Unix seconds, from which the request's age counts.

        `trace`: W3C trace context, as headers; taken only with `enqueued_at`.
        """
        kwargs = f'"email": {_as_json(self.email)}'
        if self.purpose != DEFAULT_PURPOSE:
            kwargs += f', "purpose": {_as_json(self.purpose)}'
        if self.locale is not None:
            kwargs += f', "locale": {_as_json(self.locale)}'
        body = b2a_base64((_BODY % kwargs).encode(), newline=False).decode()
        envelope = _ENVELOPE if enqueued_at is None else _TIMED_ENVELOPE
        words = {
            "body": f'"{body}"',
            "id": _as_json(request_id),
            "queue": _as_json(queue),
            "tag": f'"{new_uuid()}"',
            "time": enqueued_at,
        }
        if trace and enqueued_at is not None:
            envelope = _traced_envelope(*trace)
            words |= {name: _as_json(value) for name, value in trace.items()}
        return (envelope % words).encode()


def code_key(email: str, purpose: str = DEFAULT_PURPOSE) -> str:
    """The Redis key of a code. GateServer reads `code_<email>`; other purposes have keys that it cannot build."""
    return f"code_{email}" if purpose == DEFAULT_PURPOSE else f"code:{purpose}:{email}"


def is_purpose(value: object) -> bool:
    """Whether `value` is a well-formed purpose."""
    return isinstance(value, str) and PURPOSE_PATTERN.fullmatch(value) is not None


def new_uuid() -> str:
    """A random UUID, version 4; `str(uuid.uuid4())` takes more than twice as long."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def reply_key(request_id: str) -> str:
    """Where the reply to a request is stored, and the channel on which it is published."""
    return REPLY_KEY_PREFIX + request_id


def read_reply(payload: str | bytes) -> Reply:
    """The reply in a stored or published result.

    Raises `ValueError` for what is no reply to `verification.send_code`.
    """
    meta = _parse(payload if isinstance(payload, str) else payload.decode())
    try:
        result = meta["result"]
        email, error = result["email"], result["error"]
    except (TypeError, KeyError, IndexError) as exc:
        raise ValueError("the stored result is no reply to a verification request") from exc
    if type(error) is not int:
        raise ValueError("the stored result's error is no number")
    return Reply(email, known_error(error))


def known_error(number: int) -> ErrorCode:
    """The error of this number; `EXCEPTION` for one that we do not know, as a newer worker may write it."""
    return _KNOWN.get(number, ErrorCode.EXCEPTION)


def _as_json(value: Any) -> str:
    return encode_basestring_ascii(value) if isinstance(value, str) else json.dumps(value)
