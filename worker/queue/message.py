"""Task messages: what one asks for, why one cannot be executed, and the form in which Celery gets those it must run."""

from __future__ import annotations

import binascii
import json
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

import orjson

from producer.contract import DEFAULT_PURPOSE, LARGEST_MESSAGE, LONGEST_ID, TASK, VerifyRequest, known_locale
from producer.masking import mask_email
from worker.job import Job

_ARGUMENTS = ("email", "purpose", "locale", "client")  # in the order of the task's parameters
_SIGNATURES = ("callbacks", "errbacks", "chain", "chord")
_LATEST = 1e11  # Unix seconds; later times in milliseconds are not exact in Lua, and no clock is that wrong
SUSPECT_DEATHS = 2  # a message that killed so many workers is tried alone
POISON_DEATHS = 4  # one that killed so many is not tried again; the text of POISON says so too
MAX_NESTING = 100  # levels of an email or purpose that is not a string: the reply echoes it, so it must be writable


class DeadLetterCode(StrEnum):
    """Why a message was dead-lettered: the letter's field `code`, and the label `reason` of the metric."""

    UNKNOWN_TASK = "unknown_task"
    ENVELOPE = "envelope"  # a field of the envelope is missing or malformed
    BODY = "body"  # the arguments or signatures in the body cannot be read
    TIME = "time"  # `expires` or `eta` is not a time
    ID_CONFLICT = "id_conflict"
    TOO_LARGE = "too_large"  # the message was not read, and the letter holds only its beginning
    POISON = "poison"
    CELERY_REJECTED = "celery_rejected"
    OTHER = "other"


class DeadLetterReason(NamedTuple):
    """A code for programs and a text for people. The text never quotes the message."""

    code: DeadLetterCode
    text: str


ID_CONFLICT = DeadLetterReason(DeadLetterCode.ID_CONFLICT, "the request id belongs to another address or purpose")
POISON = DeadLetterReason(DeadLetterCode.POISON, "it killed its worker four times")
CELERY_REJECTED = DeadLetterReason(DeadLetterCode.CELERY_REJECTED, "Celery rejected it")


class UnfitMessage(Exception):
    """The message cannot be executed."""

    def __init__(self, code: DeadLetterCode, text: str) -> None:
        super().__init__(text)
        self.reason = DeadLetterReason(code, text)


class TooLarge(UnfitMessage):
    """The message was not read: only its beginning is left, and the request id if it was found."""

    def __init__(self, size: int, request_id: str) -> None:
        """`size`: of the whole message, in bytes."""
        super().__init__(DeadLetterCode.TOO_LARGE, f"larger than {LARGEST_MESSAGE} bytes")
        self.size = size
        self.request_id = request_id  # '': not found


class Reserved(NamedTuple):
    """A message that this worker holds. Each reservation makes a new tag, so only its holder can settle it."""

    tag: str
    message: bytes


@dataclass(slots=True)
class Parsed:
    """A message that can be executed. `needs_celery`: it has a group, callbacks, a chain or a chord."""

    job: Job
    needs_celery: bool
    envelope: dict[str, Any]
    eta: float | None  # Unix seconds
    embed: dict[str, Any]  # the signatures that Celery runs after the task
    for_celery: dict[str, Any] | None = None  # the message that Celery gets, if it needs Celery


def unreadable_job(tag: str, request_id: str = "") -> Job:
    """Stands for a message that cannot be read, so that it can be dead-lettered, or answered if its id was found."""
    return Job(request_id, tag, VerifyRequest(None), None, None)


def parse(reserved: Reserved) -> Parsed:
    """Read a message. `reserve.lua` has checked the envelope of one from the queue; a dead letter may have none.

    Raises `UnfitMessage`.
    """
    try:
        envelope = _read_json(reserved.message)
        if "cut" in envelope:
            raise _too_large(envelope)
        headers, text = envelope["headers"], envelope["body"]
        request_id = headers["id"]
        request_id.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UnfitMessage(DeadLetterCode.ENVELOPE, "the envelope is not that of a task message") from None
    try:
        body = _read_json(binascii.a2b_base64(text, strict_mode=True))
    except (ValueError, TypeError, RecursionError):
        raise UnfitMessage(DeadLetterCode.BODY, "the body is not JSON in base64") from None
    if not (isinstance(body, list) and len(body) == 3 and isinstance(body[0], list) and isinstance(body[1], dict)):
        raise UnfitMessage(DeadLetterCode.BODY, "the body is not [args, kwargs, embed]")
    args, kwargs, embed = body
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs} if args else kwargs
    email, purpose = given.get("email"), given.get("purpose", DEFAULT_PURPOSE)
    for value in (email, purpose):
        if not isinstance(value, str) and not _is_shallow(value, MAX_NESTING):
            raise UnfitMessage(DeadLetterCode.BODY, "an argument is nested too deeply")
    get = headers.get
    expires = None if get("expires") is None else _timestamp(headers, "expires")
    eta = None if get("eta") is None else _timestamp(headers, "eta")
    request = VerifyRequest(email, purpose, known_locale(given.get("locale")), given.get("client"))
    job = Job(request_id, reserved.tag, request, _number(get("enqueued_at")), expires)
    embed = _signatures(embed)
    return Parsed(job, bool(embed or get("group")), envelope, eta, embed)


def _too_large(envelope: dict[str, Any]) -> TooLarge:
    """Read what `reserve.lua` left of a message, or something that a caller pushed and that looks like it."""
    cut, headers = envelope["cut"], envelope.get("headers")
    if not (isinstance(cut["size"], int) and isinstance(cut["message"], str)):
        raise TypeError("not what is left of a message")
    request_id = headers.get("id") if isinstance(headers, dict) else None
    if not (isinstance(request_id, str) and len(request_id.encode()) <= LONGEST_ID):
        request_id = ""
    return TooLarge(cut["size"], request_id)


def _read_json(text: bytes) -> Any:
    """Parse JSON. The standard library also reads what orjson refuses: lone surrogates, integers beyond 64 bits."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text.decode(), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_shallow(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list) or (levels > 0 and all(_is_shallow(each, levels - 1) for each in value))


def _signatures(embed: object) -> dict[str, Any]:
    """The signatures in `embed` that Celery must run: callbacks, errbacks, chain, chord."""
    if not isinstance(embed, dict) or not any(embed.values()):
        return {}
    found = {name: embed[name] for name in _SIGNATURES if embed.get(name)}
    for name, value in found.items():
        each = [value] if name == "chord" else value
        if not isinstance(each, list) or not all(
            isinstance(one, dict) and isinstance(one.get("task"), str) for one in each
        ):
            raise UnfitMessage(DeadLetterCode.BODY, f"{name} in the body: not a task signature")
    return found


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= _LATEST else 0.0 if value < 0 else _LATEST


def _timestamp(headers: dict[str, Any], name: str) -> float:
    """The header `expires` or `eta` in Unix seconds: ISO 8601, UTC if it names no zone."""
    try:
        moment = datetime.fromisoformat(headers[name])
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        datetime.fromtimestamp(seconds, UTC)  # fails for a moment just before year 1 or after 9999 in UTC
    except (TypeError, ValueError, OverflowError):
        raise UnfitMessage(DeadLetterCode.TIME, f"{name} is not a time in ISO 8601") from None
    return seconds


def for_celery(parsed: Parsed) -> dict[str, Any]:
    """The message to deliver to Celery.

    Its delivery tag is our reservation's. It carries no arguments, as the task finds its job by the tag; no `eta`, as
    it is due; no `expires`, as the service keeps that deadline; and no other header that could make Celery drop it.
    """
    message, job = parsed.envelope, parsed.job
    headers = message["headers"]
    body = json.dumps([[], {}, parsed.embed]).encode()
    return {
        **{name: message[name] for name in ("content-type", "content-encoding")},
        "body": b64encode(body).decode(),
        "headers": {
            **{name: headers[name] for name in ("root_id", "parent_id", "group") if isinstance(headers.get(name), str)},
            **({"group_index": headers["group_index"]} if isinstance(headers.get("group_index"), int) else {}),
            "lang": "py",
            "task": TASK,
            "id": job.request_id,
            "eta": None,
            "argsrepr": "()",
            "kwargsrepr": repr({"email": mask_email(job.request.email)}),
        },
        "properties": {
            "delivery_tag": job.tag,
            "body_encoding": "base64",
            "delivery_info": message["properties"]["delivery_info"],
        },
    }
