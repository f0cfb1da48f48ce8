"""A task message, read: what it asks for, whether it needs Celery's own machinery, and how Celery gets it then."""

from __future__ import annotations

import binascii
import json
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from producer.contract import DEFAULT_PURPOSE, TASK, VerifyRequest
from producer.logs import mask_email
from worker.job import Job
from worker.queue.commands import Reserved

_ARGUMENTS = ("email", "purpose", "locale")  # in the task's order
_SIGNATURES = ("callbacks", "errbacks", "chain", "chord")
_LATEST = 1e11  # Unix seconds; beyond, a time in milliseconds is no exact number in Lua, and no clock is that wrong
DEEPEST = 100  # levels that an address or purpose which is no text may be nested: it is echoed, so it must be writable


class Unfit(Exception):
    """The message's body or one of its headers cannot be read."""


@dataclass(slots=True)
class Parsed:
    """A message, read."""

    job: Job
    needs_celery: bool
    envelope: dict[str, Any]
    eta: float | None  # Unix seconds
    embed: dict[str, Any]


def parse(reserved: Reserved) -> Parsed:
    """Read a message. The reserve script has looked at its envelope before it gets here; a dead letter may lack one.

    Raises `Unfit` with the reason; the reason never quotes the message.
    """
    try:
        envelope = _read_json(reserved.message)
        headers, text = envelope["headers"], envelope["body"]
        request_id = headers["id"]
        request_id.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Unfit("the envelope is not that of a task message") from None
    try:
        body = _read_json(binascii.a2b_base64(text, strict_mode=True))
    except (ValueError, TypeError, RecursionError):
        raise Unfit("the body is not JSON in base64") from None
    if not (isinstance(body, list) and len(body) == 3 and isinstance(body[0], list) and isinstance(body[1], dict)):
        raise Unfit("the body is not [args, kwargs, embed]")
    args, kwargs, embed = body
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs} if args else kwargs
    email, purpose = given.get("email"), given.get("purpose", DEFAULT_PURPOSE)
    for value in (email, purpose):
        if not isinstance(value, str) and not _is_shallow(value, DEEPEST):
            raise Unfit("an argument is nested too deeply")
    get = headers.get
    expires = None if get("expires") is None else _timestamp(headers, "expires")
    eta = None if get("eta") is None else _timestamp(headers, "eta")
    request = VerifyRequest(email, purpose, given.get("locale"))
    job = Job(request_id, reserved.tag, request, _number(get("enqueued_at")), expires)
    job.scheduled = eta is not None
    embed = _signatures(embed)
    return Parsed(job, job.scheduled or bool(embed or get("group")), envelope, eta, embed)


def _read_json(text: bytes) -> Any:
    """JSON; also what orjson refuses and the standard library reads: lone surrogates, integers beyond 64 bits."""
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
    """What Celery is to do after the task: callbacks, chain, chord. Empty if there is nothing."""
    if not isinstance(embed, dict) or not any(embed.values()):
        return {}
    found = {name: embed[name] for name in _SIGNATURES if embed.get(name)}
    for name, value in found.items():
        each = [value] if name == "chord" else value
        if not isinstance(each, list) or not all(
            isinstance(one, dict) and isinstance(one.get("task"), str) for one in each
        ):
            raise Unfit(f"{name} in the body is no task signature")
    return found


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= _LATEST else 0.0 if value < 0 else _LATEST


def _timestamp(headers: dict[str, Any], name: str) -> float:
    """Celery's `expires` or `eta`: ISO 8601, UTC if it names no zone."""
    try:
        moment = datetime.fromisoformat(headers[name])
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        datetime.fromtimestamp(seconds, UTC)  # there are moments that only another zone can say
    except (TypeError, ValueError, OverflowError):
        raise Unfit(f"{name} is not a time in ISO 8601") from None
    return seconds


def for_celery(parsed: Parsed) -> dict[str, Any]:
    """The message as Celery gets it: settled by our tag, its deadline ours to keep, without the arguments, which the
    task does not need, and without any header that could make Celery drop it."""
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
            "eta": None if parsed.eta is None else datetime.fromtimestamp(parsed.eta, UTC).isoformat(),
            "argsrepr": "()",
            "kwargsrepr": repr({"email": mask_email(job.request.email)}),
        },
        "properties": {
            "delivery_tag": job.tag,
            "body_encoding": "base64",
            "delivery_info": message["properties"]["delivery_info"],
        },
    }
