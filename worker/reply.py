"""Replies, as any Celery client reads them as its tasks' results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from producer.contract import REPLY_TTL, ErrorCode, reply_key
from producer.script import EACH, Command, Script
from worker.job import Job

_REPLY = Script(EACH, Path(__file__).parent / "lua" / "reply.lua")


def store_replies(answered: Iterable[tuple[Job, ErrorCode]]) -> Command:
    """Store and publish these replies. Answers, for each, 1 if it is the first one to its id, 0, or an error."""
    now = datetime.now(UTC).isoformat()
    pairs = [(reply_key(job.request_id), _payload(job, error, now)) for job, error in answered]
    return _REPLY([key for key, _ in pairs], [REPLY_TTL, *(payload for _, payload in pairs)])


def _payload(job: Job, error: ErrorCode, date_done: str) -> bytes:
    """A reply as Celery's Redis backend stores it."""
    meta: dict[str, Any] = {
        "status": "SUCCESS",
        "result": {"email": job.request.email, "error": int(error)},
        "traceback": None,
        "children": [],
        "date_done": date_done,
        "task_id": job.request_id,
    }
    try:
        return orjson.dumps(meta)
    except TypeError:
        # An "address" that only the standard library can write: a lone surrogate, an integer beyond 64 bits.
        return json.dumps(meta).encode()
