"""Asks for a code from any Celery app, which needs none of this project's code: the package `celery[redis]`.

python ask_celery.py a@example.com
"""

from __future__ import annotations

import json
import os
import sys
from urllib.parse import quote

from celery import Celery
from celery.exceptions import TimeoutError as NoReply
from kombu.exceptions import OperationalError

TIMEOUT = 5.0  # seconds
HOST, PORT = os.environ.get("REDIS_HOST", "127.0.0.1"), os.environ.get("REDIS_PORT", "6379")
WHO = f":{quote(os.environ['REDIS_PASSWORD'], safe='')}@" if "REDIS_PASSWORD" in os.environ else ""
app = Celery(broker=f"redis://{WHO}{HOST}:{PORT}/1", backend=f"redis://{WHO}{HOST}:{PORT}/2")
# By itself Celery tries again for 19 s when Redis is not there, and waits without end for one that says nothing.
app.conf.broker_transport_options = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
app.conf.redis_socket_timeout = app.conf.redis_socket_connect_timeout = TIMEOUT
app.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1, "interval_start": 0}}

if __name__ == "__main__":
    try:
        asked = app.send_task(
            "verification.send_code",
            kwargs={"email": sys.argv[1]},
            queue="verification",
            retry=False,
            kwargsrepr="{}",  # else the address stands in the message's headers
        )
        reply = asked.get(timeout=TIMEOUT)
    except (NoReply, OperationalError, RuntimeError) as exc:  # RuntimeError: the result backend gave up
        sys.exit(f"no reply within {TIMEOUT:g} s: {type(exc).__name__}")
    print(json.dumps(reply))
    sys.exit(0 if reply["error"] == 0 else 1)
