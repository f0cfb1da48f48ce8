"""The wire contract: names, message formats and error codes that callers in any language rely on.

A message is a Celery task message, protocol 2, in kombu's virtual-transport envelope
(https://docs.celeryq.dev/en/stable/internals/protocol.html). `VerifyRequest.message` builds the smallest envelope that
any Celery worker accepts; a plain Redis client can build the same. Standard library only.
"""

from __future__ import annotations

import functools
import json
import os
import re
from binascii import b2a_base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from json.encoder import encode_basestring_ascii
from typing import Any, Final, Self

TASK = "verification.send_code"
DEFAULT_QUEUE = "verification"
DEAD_LETTERS = "verification.dead"  # a Redis list in the broker database
DEFAULT_PURPOSE = "default"
PURPOSE_PATTERN = re.compile(r"[a-z0-9_-]{1,32}")
REPLY_KEY_PREFIX = "celery-task-meta-"  # Celery's; the key of a stored reply, and the channel it is published on
CLIENT_HEADER = "x-verify-client"  # carries the client: gRPC metadata, and an HTTP header for proxies to limit by
LONGEST_CLIENT = 64  # characters
LONGEST_LOCALE = 35  # characters, RFC 5646, 4.4.1; a longer one counts as not given
LONGEST_ID = 255  # bytes of a request id in UTF-8; a message with a longer one is dead-lettered
LARGEST_MESSAGE = 65_536  # bytes; a longer message is dead-lettered unread
REPLY_TTL = 3600  # seconds that a reply is kept and a request id is remembered


class ErrorCode(IntEnum):
    """What a reply says; a JSON number on the wire.

    Each row is everything the project knows of one code: its number, the name that documentation uses, what it means,
    what the caller should do, and whether it is a failure of the service rather than an answer. The command line,
    OpenAPI, traces, the demo page and the docs read it from here. GateServer owns 1001 to 1011; new codes of ours stay
    below 1000.
    """

    SUCCESS = (
        0,
        "Success",
        "A relay accepted the mail, now or within the cooldown; of a check: the code is right.",
        "Nothing; a right code is used up.",
        False,
    )
    REDIS_ERR = (
        1,
        "RedisErr",
        "Redis cannot be reached, or it refused the login or a command.",
        "Check that Redis is up and takes writes, and that VERIFY_REDIS_URL is right, then ask again.",
        True,
    )
    EXCEPTION = (
        2,
        "Exception",
        "An unforeseen error, a malformed purpose or client, or a message that is too long or kept killing its worker.",
        "Look for the request id in the worker's log.",
        True,
    )
    INVALID_ADDRESS = (
        3,
        "InvalidAddress",
        "The address is empty, not an email address, or one that no relay can take.",
        "Let the user correct the address.",
        False,
    )
    TOO_MANY_REQUESTS = (
        4,
        "TooManyRequests",
        "The address, the client or the whole service has used up its mails for now, or the queue is full.",
        "Wait and ask again. The limits: VERIFY_MAX_SENDS_PER_HOUR, …_PER_CLIENT, …_TOTAL, and VERIFY_MAX_QUEUE.",
        False,
    )
    MAIL_REJECTED = (
        5,
        "MailRejected",
        "The mailbox was refused for good, or every relay refused the mail.",
        "Let the user check the spelling; if the address is right, look in the worker's log.",
        False,
    )
    TIMEOUT = (
        6,
        "Timeout",
        "The outcome is unknown: no reply in time, no relay can be reached, or the request expired.",
        "Ask again; the mail may still arrive. If it stays so, check that a worker and a relay are up.",
        True,
    )
    ERROR_JSON = (
        1001,
        "Error_Json",
        "HTTP only: the body is not a JSON object, or a field is missing or malformed.",
        "Correct the request; `detail` names the field.",
        False,
    )
    VARIFY_EXPIRED = (
        1003,
        "VarifyExpired",
        "Check only: no live code. It expired, was used, or had too many wrong checks.",
        "Ask for a new code.",
        False,
    )
    VARIFY_CODE_ERR = (
        1004,
        "VarifyCodeErr",
        "Check only: the code is wrong.",
        "Let the user try again; too many wrong checks (VERIFY_MAX_ATTEMPTS) drop the code.",
        False,
    )

    title: str
    meaning: str
    advice: str
    failure: bool

    def __new__(cls, number: int, title: str = "", meaning: str = "", advice: str = "", failure: bool = False) -> Self:
        """One row. The defaults are for type checkers, which take `ErrorCode(6)` for a call of this."""
        code = int.__new__(cls, number)
        code._value_ = number
        code.title, code.meaning, code.advice, code.failure = title, meaning, advice, failure
        return code


_KNOWN: Final = {int(error): error for error in ErrorCode}
_parse: Final = json.JSONDecoder().decode  # json.loads also detects the encoding and takes half as long again
# A reply as our workers write it; parsing it as JSON takes three times as long.
_TEXT: Final = rb'"[ !#-\[\]-~]*"'
_USUAL_REPLY: Final = re.compile(
    rb'\{"status":"SUCCESS","result":\{"email":%b,"error":(0|[1-9][0-9]{0,3})\},"traceback":null,"children":\[\],'
    rb'"date_done":%b,"task_id":%b\}' % (_TEXT, _TEXT, _TEXT)
)

_VALUE: Final = "\0"  # stands in an envelope for what changes; no name of a queue or a header has it


@functools.lru_cache(maxsize=64)
def _envelope(queue: str, *headers: str) -> str:
    """The envelope as JSON, with a `%s` for each value that changes from message to message.

    They are, in this order and as JSON: the id twice, the values of `headers`, the body, the id, the delivery tag.
    """
    envelope = {
        "headers": {
            "lang": "py",
            "task": TASK,
            "id": _VALUE,
            "root_id": _VALUE,
            # Flower, events and logs show these in place of the arguments.
            "argsrepr": "()",
            "kwargsrepr": "{}",
            **dict.fromkeys(headers, _VALUE),
        },
        "body": _VALUE,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "properties": {
            "correlation_id": _VALUE,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": _VALUE,
        },
    }
    return json.dumps(envelope).replace("%", "%%").replace(json.dumps(_VALUE), "%s")


_BEGINNING: Final = b'{"headers": {'  # of every message; `stamp` adds to it
LONGEST_STAMP: Final = len('"enqueued_at": 9999999999.999999, ')  # what `stamp` adds at most
_BODY: Final = '[[], {%s}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one request: the address exactly as the caller gave it, and the error code."""

    email: Any
    error: ErrorCode


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check: SUCCESS, VARIFY_EXPIRED, VARIFY_CODE_ERR or REDIS_ERR."""

    email: str
    error: ErrorCode


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """One request for a code. `email` stays as the caller gave it, byte for byte; the worker validates it."""

    email: Any
    purpose: Any = DEFAULT_PURPOSE
    locale: Any = None
    client: Any = field(default=None, repr=False)  # the caller's opaque word for its end user

    def message(
        self,
        request_id: str,
        *,
        queue: str = DEFAULT_QUEUE,
        trace: Mapping[str, str] | None = None,
    ) -> bytes:
        """The envelope to LPUSH onto `queue`; `stamp` adds its time. `trace`: W3C trace context headers."""
        kwargs = f'"email": {_as_json(self.email)}'
        if self.purpose != DEFAULT_PURPOSE:
            kwargs += f', "purpose": {_as_json(self.purpose)}'
        if self.locale is not None:
            kwargs += f', "locale": {_as_json(self.locale)}'
        if self.client is not None:
            kwargs += f', "client": {_as_json(self.client)}'
        body = b2a_base64((_BODY % kwargs).encode(), newline=False).decode()
        quoted, traced = _as_json(request_id), trace or {}
        # Filling in a template gives the same bytes as json.dumps in a quarter of the time.
        envelope = _envelope(queue, *traced)
        values = (quoted, quoted, *map(_as_json, traced.values()), f'"{body}"', quoted, f'"{new_uuid()}"')
        return (envelope % values).encode()


def stamp(messages: Iterable[bytes], enqueued_at: float) -> list[bytes]:
    """What `VerifyRequest.message` made, with the time from which its age counts: Unix seconds by Redis' clock."""
    beginning = b'%b"enqueued_at": %.6f, ' % (_BEGINNING, enqueued_at)
    return [beginning + message[len(_BEGINNING) :] for message in messages]


def code_key(email: str, purpose: str = DEFAULT_PURPOSE) -> str:
    """The Redis key of a code. GateServer reads `code_<email>`; it cannot build the keys of other purposes."""
    return f"code_{email}" if purpose == DEFAULT_PURPOSE else f"code:{purpose}:{email}"


def is_purpose(value: object) -> bool:
    """Whether `value` is a well-formed purpose."""
    return isinstance(value, str) and (value == DEFAULT_PURPOSE or PURPOSE_PATTERN.fullmatch(value) is not None)


def is_client(value: object) -> bool:
    """Whether `value` is a well-formed client; None and '' stand for none."""
    return value is None or (isinstance(value, str) and len(value) <= LONGEST_CLIENT)


def known_locale(value: object) -> str | None:
    """`value` if it can be a locale; anything else counts as not given."""
    return value if isinstance(value, str) and 0 < len(value) <= LONGEST_LOCALE else None


# Asking the kernel once for many UUIDs: for each it takes as long as all the rest of making one.
_DRAWN: Final = 64
_random_digits: list[str] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random_digits.clear)


def new_uuid() -> str:
    """A random version 4 UUID; `str(uuid.uuid4())` takes four times as long."""
    try:
        digits = _random_digits.pop()
    except IndexError:
        drawn = os.urandom(16 * _DRAWN).hex()
        _random_digits.extend(drawn[at : at + 32] for at in range(32, len(drawn), 32))
        digits = drawn[:32]
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def reply_key(request_id: str) -> str:
    """The key under which a request's reply is stored, and the channel on which it is published."""
    return REPLY_KEY_PREFIX + request_id


def read_reply(payload: str | bytes) -> Reply:
    """Read the reply in a stored or published Celery result.

    Raises `ValueError` if it is not a reply to `verification.send_code`.
    """
    meta = _parse(payload if isinstance(payload, str) else payload.decode())
    try:
        result = meta["result"]
        email, error = result["email"], result["error"]
    except (TypeError, KeyError, IndexError) as exc:
        raise ValueError("the stored result is not a reply to a verification request") from exc
    if type(error) is not int:
        raise ValueError("the error in the stored result is not a number")
    return Reply(email, known_error(error))


def read_error(payload: bytes) -> ErrorCode:
    """The error of a reply, as `read_reply` reads it."""
    usual = _USUAL_REPLY.fullmatch(payload)
    return read_reply(payload).error if usual is None else known_error(int(usual[1]))


def known_error(number: int) -> ErrorCode:
    """The error with this number; `EXCEPTION` for an unknown one, which a newer worker may have written."""
    return _KNOWN.get(number, ErrorCode.EXCEPTION)


def _as_json(value: Any) -> str:
    return encode_basestring_ascii(value) if isinstance(value, str) else json.dumps(value)
