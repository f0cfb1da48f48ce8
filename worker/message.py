"""A task message, read: what it asks for, whether it needs Celery's own machinery, and how Celery gets it then."""

from __future__ import annotations

import binascii
import json
from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from producer.contract import DEFAULT_PURPOSE, TASK, VerifyRequest
from producer.logs import mask_email
from worker.job import Job
from worker.queue import Reserved

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
        body = _read_json(b64decode(text, validate=True))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise Unfit("the body is not JSON in base64") from None
    if not (isinstance(body, list) and len(body) == 3 and isinstance(body[0], list) and isinstance(body[1], dict)):
        raise Unfit("the body is not [args, kwargs, embed]")
    args, kwargs, embed = body
    given = {**dict(zip(("email", "purpose", "locale"), args, strict=False)), **kwargs}
    request = VerifyRequest(given.get("email"), given.get("purpose", DEFAULT_PURPOSE), given.get("locale"))
    if not (_is_shallow(request.email, DEEPEST) and _is_shallow(request.purpose, DEEPEST)):
        raise Unfit("an argument is nested too deeply")
    expires, eta = _timestamp(headers, "expires"), _timestamp(headers, "eta")
    job = Job(request_id, reserved.tag, request, _number(headers.get("enqueued_at")), expires)
    job.scheduled = eta is not None
    embed = _signatures(embed)
    return Parsed(job, eta is not None or bool(headers.get("group") or embed), envelope, eta, embed)


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
    if not isinstance(embed, dict):
        return {}
    found = {name: embed[name] for name in ("callbacks", "errbacks", "chain", "chord") if embed.get(name)}
    for name, value in found.items():
        each = [value] if name == "chord" else value
        if not isinstance(each, list) or not all(
            isinstance(one, dict) and isinstance(one.get("task"), str) for one in each
        ):
            raise Unfit(f"{name} in the body is no task signature")
    return found


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # Beyond this, a time in milliseconds is no exact number in Lua; no clock is that wrong.
        return float(min(max(value, 0), 10**11))
    return None


def _timestamp(headers: dict[str, Any], name: str) -> float | None:
    """Celery's `expires` or `eta`: ISO 8601, UTC if it names no zone."""
    value = headers.get(name)
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
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
