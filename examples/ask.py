"""Asks for a code over plain Redis, with nothing but the package `redis`: SUBSCRIBE, LPUSH, GET.

python ask.py a@example.com
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import uuid
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

TIMEOUT = float(os.environ.get("VERIFY_REPLY_TIMEOUT", "5"))  # seconds
REDIS_URL = os.environ.get("VERIFY_REDIS_URL", "redis://127.0.0.1:6379")


def ask(email: str) -> Any:
    """Return the reply, or None if there is none in time; the mail may still arrive."""
    deadline = time.monotonic() + TIMEOUT
    options: Any = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "retry": Retry(NoBackoff(), 0)}
    broker, results = (redis.Redis.from_url(REDIS_URL, db=db, **options) for db in (1, 2))
    request_id = str(uuid.uuid4())
    message = {
        "body": base64.b64encode(json.dumps([[], {"email": email}, {}]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "verification.send_code", "id": request_id},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "verification"},
        },
    }
    key = f"celery-task-meta-{request_id}"
    with broker, results, results.pubsub() as subscription:  # type: ignore[no-untyped-call]
        subscription.subscribe(key)
        subscription.get_message(timeout=TIMEOUT)  # the confirmation of SUBSCRIBE
        broker.lpush("verification", json.dumps(message))
        payload = results.get(key)
        while payload is None and (left := deadline - time.monotonic()) > 0:
            published = subscription.get_message(timeout=left)
            payload = published and published["data"]
    return payload and json.loads(payload)["result"]


if __name__ == "__main__":
    reply = ask(sys.argv[1])
    if reply is None:
        sys.exit(f"no reply within {TIMEOUT:g} s")
    print(json.dumps(reply))
    sys.exit(0 if reply["error"] == 0 else 1)
