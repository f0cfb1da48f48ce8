"""What a careful team writes first: the same job as one Celery task, on stock Celery, for `bench.soak.compare`.

The settings are those that Celery's documentation and its issues recommend for Redis: late acks, a short visibility
timeout with the restore sweep that goes with it, timeouts on every socket, retries with a bounded backoff.
"""

from __future__ import annotations

import os
import secrets
import smtplib
from email.message import EmailMessage
from typing import Any

import redis
from celery import Celery

from producer.contract import REPLY_TTL, TASK, code_key
from producer.settings import load

SETTINGS = load()
SOCKETS = {
    "socket_timeout": 5,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 5,
    "retry_on_timeout": False,
}
RELAY_HOST, RELAY_PORT = os.environ["VERIFY_RELAYS"].removeprefix("smtp://").split(":")

app = Celery("stock", broker=SETTINGS.broker_url, backend=SETTINGS.results_url)
app.conf.update(
    task_default_queue=SETTINGS.queue,
    task_serializer="json",
    accept_content=["json"],
    result_expires=REPLY_TTL,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    visibility_timeout=SETTINGS.visibility_timeout,
    result_backend_transport_options={"visibility_timeout": SETTINGS.visibility_timeout},
    broker_transport_options={
        "visibility_timeout": SETTINGS.visibility_timeout,
        "unacked_restore_interval": 2,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 10,
        **SOCKETS,
    },
    redis_socket_timeout=5,
    redis_socket_connect_timeout=2,
    redis_socket_keepalive=True,
    redis_backend_health_check_interval=5,
)
codes = redis.Redis.from_url(SETTINGS.codes_url, socket_timeout=5, socket_connect_timeout=2)


@app.task(  # type: ignore[untyped-decorator]  # Celery ships no types
    name=TASK,
    autoretry_for=(smtplib.SMTPException, OSError, redis.RedisError),
    retry_backoff=True,
    retry_backoff_max=4,  # seconds: below the visibility timeout, or a waiting retry is redelivered
    retry_jitter=True,
    max_retries=8,
)
def send_code(email: str, **_: Any) -> dict[str, Any]:
    """Get or create the code, mail it, and reply."""
    fresh = "".join(secrets.choice("0123456789") for _ in range(6))
    live = codes.set(code_key(email), fresh, ex=SETTINGS.code_ttl, nx=True, get=True)
    code = live.decode() if isinstance(live, bytes) else fresh
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "no-reply@example.com", email, "Your code"
    mail.set_content(code)
    with smtplib.SMTP(RELAY_HOST, int(RELAY_PORT), timeout=10) as relay:
        relay.send_message(mail)
    return {"email": email, "error": 0}
