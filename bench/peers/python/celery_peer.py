"""Stock Celery: a worker, or `celery_peer.py fill FIRST COUNT`, which puts tasks on its queue."""

from __future__ import annotations

import os
import sys
from typing import Any

from celery import Celery, signals
from peer import (  # type: ignore[import-not-found]  # found beside the program that is started
    PROCESSES,
    REDIS_URL,
    addresses,
    end_with_parent,
    mark_and_reply,
    send_code,
)

app = Celery("celery_peer", broker=f"{REDIS_URL}/1", backend=f"{REDIS_URL}/2")
app.conf.update(
    task_default_queue="verification",
    result_expires=3600,
    worker_prefetch_multiplier=64,
    worker_disable_rate_limits=True,
    broker_connection_retry_on_startup=True,
)


def send(self: Any, email: str) -> dict[str, Any]:
    """The job; Celery stores and publishes what it returns."""
    send_code(email, self.request.id)
    mark_and_reply(email, self.request.id, reply=False)
    return {"email": email, "error": 0}


task = app.task(bind=True, name="send")(send)


def announce(**_: object) -> None:
    """All processes are up."""
    os.write(1, b"ready\n")


def main(words: list[str]) -> None:
    """Work, or fill."""
    if words[:1] == ["fill"]:
        with app.producer_pool.acquire() as producer:
            for email in addresses(*map(int, words[1:])):
                task.apply_async((email,), producer=producer)
        return
    signals.worker_ready.connect(announce)
    signals.worker_process_init.connect(lambda **_: end_with_parent(), weak=False)
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR"]
    app.worker_main(["worker", "--pool", "prefork", "--concurrency", str(PROCESSES), *quiet])


if __name__ == "__main__":
    main(sys.argv[1:])
