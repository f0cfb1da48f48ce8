"""Asks for a code from any Celery app, without this project's code: needs the package `celery[redis]`.

python ask_celery.py a@example.com
"""

from __future__ import annotations

import json
import os
import sys

from celery import Celery
from celery.exceptions import TimeoutError as NoReply
from kombu.exceptions import OperationalError

TIMEOUT = float(os.environ.get("VERIFY_REPLY_TIMEOUT", "5"))  # seconds
REDIS_URL = os.environ.get("VERIFY_REDIS_URL", "redis://127.0.0.1:6379")
app = Celery(broker=f"{REDIS_URL}/1", backend=f"{REDIS_URL}/2")
# Without these, Celery retries for 19 s when Redis is down, and waits forever for a Redis that does not answer.
app.conf.broker_transport_options = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
app.conf.redis_socket_timeout = app.conf.redis_socket_connect_timeout = TIMEOUT
app.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1, "interval_start": 0}}

if __name__ == "__main__":
    try:
        task = app.send_task(
            "verification.send_code",
            kwargs={"email": sys.argv[1]},
            queue="verification",
            retry=False,
            kwargsrepr="{}",  # keeps the address out of the message's headers
        )
        reply = task.get(timeout=TIMEOUT)
    except (NoReply, OperationalError, RuntimeError) as exc:  # RuntimeError: the result backend gave up
        sys.exit(f"no reply within {TIMEOUT:g} s: {type(exc).__name__}")
    print(json.dumps(reply))
    sys.exit(0 if reply["error"] == 0 else 1)
