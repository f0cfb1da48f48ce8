"""Task messages: what one asks for, why one cannot be executed, and the form in which Celery gets those it must run."""

from __future__ import annotations

import binascii
import json
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple, TypeGuard

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
    """Read a message: the envelope first, then the body. Raises `UnfitMessage`."""
    try:
        # Not by the standard library, whose lone surrogates no Lua script and no trace could handle.
        envelope = orjson.loads(reserved.message)
    except orjson.JSONDecodeError:
        raise UnfitMessage(DeadLetterCode.ENVELOPE, "not JSON") from None
    _check_envelope(envelope)
    return _parse(envelope, reserved.tag)


def read_job(message: bytes) -> Job:
    """What a message asks for, even if its envelope is not sound: a dead letter's address is shown, and erased.

    Raises `UnfitMessage` if it cannot be read.
    """
    try:
        envelope = _read_json(message)
        envelope["headers"]["id"].encode()
        return _parse(envelope, "").job
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UnfitMessage(DeadLetterCode.ENVELOPE, "the envelope is not that of a task message") from None


def _parse(envelope: dict[str, Any], tag: str) -> Parsed:
    headers = envelope["headers"]
    try:
        body = _read_json(binascii.a2b_base64(envelope["body"], strict_mode=True))
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
    job = Job(headers["id"], tag, request, _number(get("enqueued_at")), expires)
    embed = _signatures(embed)
    return Parsed(job, bool(embed or get("group")), envelope, eta, embed)


def _check_envelope(envelope: Any) -> None:
    """Raise `UnfitMessage` unless the envelope is that of a message of our task."""
    if not isinstance(envelope, dict):
        fault = "no headers" if isinstance(envelope, list) else "not a JSON object"
        raise UnfitMessage(DeadLetterCode.ENVELOPE, fault)
    if "cut" in envelope:
        _check_size(envelope)
    get = envelope.get
    fault = _fault_in_headers(get("headers"))
    if not fault:
        if get("content-type") != "application/json":
            fault = "content-type is not application/json"
        elif get("content-encoding") != "utf-8":
            fault = "content-encoding is not utf-8"
        else:
            fault = _fault_in_properties(get("properties"))
    if not fault and not _is_text(get("body")):
        fault = "no body"
    if fault:
        raise UnfitMessage(DeadLetterCode.ENVELOPE, fault)


def _fault_in_headers(headers: object) -> str:
    if not isinstance(headers, dict):
        return "no headers"
    task = headers.get("task")
    if not _is_text(task):
        return "no task in the headers"
    if task != TASK:
        raise UnfitMessage(DeadLetterCode.UNKNOWN_TASK, "unknown task")
    return "" if _is_id(headers.get("id")) else "no id in the headers"


def _fault_in_properties(properties: object) -> str:
    if not isinstance(properties, dict):
        return "no properties"
    if not _is_text(properties.get("delivery_tag")):
        return "no delivery_tag in the properties"
    if properties.get("body_encoding") != "base64":
        return "body_encoding is not base64"
    info = properties.get("delivery_info")
    if not isinstance(info, dict):
        return "no delivery_info in the properties"
    if not (isinstance(info.get("exchange"), str) and isinstance(info.get("routing_key"), str)):
        return "no exchange or routing_key in the delivery_info"
    return ""


def _check_size(envelope: dict[str, Any]) -> None:
    """Raise `TooLarge` for what `reserve.lua` left of a message, or for what a caller pushed in that form."""
    cut, headers = envelope.get("cut"), envelope.get("headers")
    if isinstance(cut, dict) and isinstance(size := cut.get("size"), int) and isinstance(cut.get("message"), str):
        request_id = headers.get("id") if isinstance(headers, dict) else None
        raise TooLarge(size, request_id if _is_id(request_id) else "")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_id(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value != "" and len(value.encode()) <= LONGEST_ID


def _read_json(text: bytes) -> Any:
    """Parse JSON. The standard library also reads what orjson refuses: lone surrogates, numbers beyond a double."""
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
