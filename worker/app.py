"""The Celery app. `celery -A worker.app worker`"""

from __future__ import annotations

import logging
import sys
from typing import Any

from celery import Celery, signals

from producer import logs
from worker import (
    broker,
    control,  # noqa: F401 - puts our inspect commands in the place of Celery's
)
from worker.tasks import SendCode

broker.register()
app = Celery("verifyserver")
app.config_from_object("celeryconfig")
send_code = app.register_task(SendCode())


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _configure_logs(loglevel: int | str | None = None, **_: Any) -> None:
    logs.configure(loglevel or logging.INFO)


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _require_pool(instance: Any = None, **_: Any) -> None:
    # The service runs on one loop in the worker's own process; a forked or green pool has no part in it.
    if instance.pool_cls.__module__ not in {"celery.concurrency.thread", "celery.concurrency.solo"}:
        sys.stderr.write("--pool: the worker runs with threads only, which is the default; leave the option out\n")
        raise SystemExit(2)
