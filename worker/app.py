"""The Celery app. `celery -A worker.app worker`"""

from __future__ import annotations

import logging
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
