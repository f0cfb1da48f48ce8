"""The Celery app. `celery -A worker.app worker`"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any

import click
from celery import Celery, signals

from producer import logs
from producer.tracing import setup as traces
from worker.bootstrap import SERVICE
from worker.celery_side import (
    control,  # noqa: F401 - puts our inspect commands in the place of Celery's
    transport,
)
from worker.celery_side.backend import ReplyBackend
from worker.celery_side.flower import Queues
from worker.tasks import SendCode

transport.register()
app = Celery("verifyserver")
app.config_from_object("celeryconfig")
send_code = app.register_task(SendCode())


EXIT_WITHIN = 14.0  # seconds; the contract says 15

logger = logging.getLogger(__name__)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _configure_logs(loglevel: int | str | None = None, **_: Any) -> None:
    logs.configure(loglevel or logging.INFO)


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _before_start(sender: str, options: dict[str, Any] | None = None, **_: Any) -> None:
    logs.allow_node_name(sender)
    # The service runs on one loop in the worker's own process; a forked or green pool has no part in it.
    pool = (options or {}).get("pool")
    if pool is not None and pool.__module__ not in {"celery.concurrency.thread", "celery.concurrency.solo"}:
        sys.stderr.write("--pool: the worker runs with threads only, which is the default; leave the option out\n")
        raise SystemExit(2)
    traces.set_up_or_exit(SERVICE)


@signals.import_modules.connect  # type: ignore[untyped-decorator]
def _before_flower(**_: Any) -> None:
    """Flower's process has no worker in it: what it logs, and the results that it shows, are masked from here."""
    context = click.get_current_context(silent=True)
    if context is not None and context.info_name == "flower":
        logs.configure(logging.getLogger().level)
        ReplyBackend.masks = True
        import flower.utils.broker  # noqa: PLC0415 - not where a worker runs

        flower.utils.broker.RedisSentinel = Queues  # the one place from which its pages take it


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _end_in_time(**_: Any) -> None:
    """With Redis frozen, each of Celery's farewells to it waits for its whole timeout, one after the other."""

    def end() -> None:
        logger.critical("the shutdown takes too long; what is in hand will be redelivered")
        os._exit(1)

    timer = threading.Timer(EXIT_WITHIN, end)
    timer.daemon = True
    timer.start()
